"""What a pair's digits say, by mpmath with hundreds of digits: the judge of rounded noise, independent of its code."""

from __future__ import annotations

from collections.abc import Callable

import mpmath

from dptrainer.noise.chacha import keystream

#: Further blocks of digits that the judge reads: 64 + 4 * 256 digits.
BLOCKS = 4


def value(k: int, a: int, further: Callable[[int], bytes], part: int, log2_width: int) -> int:
    """floor(s r cos(2 pi A) + 1/2), or the sine's, for the middle of the cell that 1088 digits leave.

    Raises:
        AssertionError: the value is so near a half-integer that even these digits may leave it open.
    """
    digits = 64 + 256 * BLOCKS
    for i in range(BLOCKS):
        block = further(i)
        k = k << 256 | int.from_bytes(block[:32], "little")
        a = a << 256 | int.from_bytes(block[32:], "little")
    with mpmath.workprec(digits + 200):
        radius = mpmath.sqrt(-2 * mpmath.log(mpmath.ldexp(2 * k + 1, -digits - 1)))
        angle = 2 * mpmath.pi * mpmath.ldexp(2 * a + 1, -digits - 1)
        exact = mpmath.ldexp(radius * (mpmath.sin(angle) if part else mpmath.cos(angle)), log2_width) + mpmath.mpf(0.5)
        assert abs(exact - mpmath.nint(exact)) > mpmath.ldexp(1, 80 - digits)
        return int(mpmath.floor(exact))


def words_at(key: bytes, stream: int, pair: int) -> tuple[int, int]:
    """The first words k and a of a pair (docs/adr/0003), read by their addresses alone."""
    block = keystream(key, stream, pair // 4, 1, layout=2)
    at = 8 * (pair % 4)
    return int.from_bytes(block[at : at + 8], "little"), int.from_bytes(block[32 + at : 40 + at], "little")


def element(key: bytes, stream: int, index: int, log2_width: int) -> int:
    """An element of a stream, from its words and the first of its further digits."""
    pair, part = divmod(index, 2)
    k, a = words_at(key, stream, pair)
    return value(k, a, lambda i: bytes(keystream(key, stream, 256 * pair + i, 1, layout=3)), part, log2_width)


def near_half(
    k: int, turns: mpmath.mpf, part: int, log2_width: int, agree: int, above: bool
) -> tuple[int, int, bytes, int]:
    """A pair whose value leaves a half-integer h + 1/2 so late that ``agree`` digits of its angle do not tell the side.

    U is k / 2^64 and its further digits are zeros; A begins as the angle near ``turns`` where the value is h + 1/2. The
    scaled radius must be above 1/2.

    Returns:
        k, a, all further blocks (each 64 bytes) in one, and the value.
    """
    digits = 64 + 256 * BLOCKS
    with mpmath.workprec(2 * digits):
        radius = mpmath.ldexp(mpmath.sqrt(-2 * mpmath.log(mpmath.ldexp(k, -64))), log2_width)
        function = mpmath.sin if part else mpmath.cos
        there = radius * function(2 * mpmath.pi * turns)
        half = mpmath.sign(there) * (max(0, mpmath.floor(abs(there) - 0.5)) + mpmath.mpf(0.5))
        angle = mpmath.asin(half / radius) if part else mpmath.acos(half / radius)  # in the first half turn or mirrored
        if part and 0.25 < turns < 0.75:
            angle = mpmath.pi - angle
        elif not part and turns > 0.5:
            angle = -angle
        slope = mpmath.cos(angle) if part else -mpmath.sin(angle)
        exact = int(mpmath.floor(mpmath.ldexp(angle / (2 * mpmath.pi) % 1, digits)))
        a = exact + (1 << (digits - agree)) * (1 if (slope > 0) == above else -1)
    rest = [a >> 256 * i & (1 << 256) - 1 for i in reversed(range(BLOCKS))]
    blocks = b"".join(bytes(32) + part_of.to_bytes(32, "little") for part_of in rest)
    return k, a >> 256 * BLOCKS, blocks, int(half - mpmath.mpf(0.5)) + above
