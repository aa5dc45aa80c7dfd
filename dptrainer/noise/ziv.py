"""One rounded Gaussian value in integers, with as many digits of its pair as it takes: right for certain, and slow.

A pair is two real numbers given by their binary digits: U in (0, 1) and A in [0, 1). The values are

    floor(s r cos(2 pi A) + 1/2)  and  floor(s r sin(2 pi A) + 1/2),    r = sqrt(-2 ln U),    s = 2^log2_width.

The first n digits say in which cell of width 2^-n U and A lie. Everything here is an interval [low, high] of integers
that count units of 2^-P, P = n + GUARD, and holds what it stands for over the whole cell. Where both ends of the last
one round to the same integer, that is the value; else n grows (Ziv 1991). docs/exact-sampler.md has the proofs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from dptrainer.noise.chacha import DIGITS, ROUNDED, keystream

#: Digits of U and of A in a word of a pair, and in each further block.
FIRST, FURTHER = 64, 256
#: Further blocks that a pair has addresses for: 65,536 digits. That these do not suffice has probability 2^-65000.
MOST = 256
GUARD = 32

Interval = tuple[int, int]


def settle(
    out: NDArray[np.int64], places: NDArray[np.int64], key: bytes, stream: int, offset: int, log2_width: int
) -> None:
    """Add element ``offset + place`` of the stream to ``out[place]``, modulo 2^64, for every one of the places.

    No place may stand there twice. What is in ``out`` meets one sum in machine words and has no influence on the time.
    """
    values = [element(key, stream, offset + place, log2_width) for place in places.tolist()]
    out[places] += np.array([value % (1 << 64) for value in values], dtype=np.uint64).view(np.int64)


def element(key: bytes, stream: int, index: int, log2_width: int) -> int:
    """Element ``index`` of the stream's rounded Gaussian values.

    Args:
        key: 32 secret bytes.
        stream: 0 <= stream < 2^32.
        index: 0 <= index < 2^57.
        log2_width: logarithm of the width s, at least 0.
    """
    pair, part = divmod(index, 2)
    block, slot = divmod(pair, 4)
    words = keystream(key, stream, block, 1, layout=ROUNDED)
    k, a = (int.from_bytes(words[at : at + 8], "little") for at in (8 * slot, 32 + 8 * slot))
    return decide(k, a, lambda i: bytes(keystream(key, stream, pair * MOST + i, 1, layout=DIGITS)), part, log2_width)


def decide(k: int, a: int, further: Callable[[int], bytes], part: int, log2_width: int) -> int:
    """The value of a pair whose first digits are the 64-bit words k and a: the cosine's for part 0, the sine's for 1.

    Args:
        k: first 64 binary digits of U.
        a: first 64 binary digits of A.
        further: i -> 64 bytes, the i-th 256 further digits of U and then those of A, each a little-endian integer.
        part: 0 or 1.
        log2_width: logarithm of the width s, at least 0.

    Raises:
        ArithmeticError: 65,600 digits leave it open, which no key is known to do.
    """
    for place_u, place_a, digits in _cells(k, a, further):
        if place_u:  # else the radius has no bound yet
            low, high = _value(place_u, place_a, digits, part, log2_width)
            if low == high:
                return low
    raise ArithmeticError("65,600 digits of a pair do not decide its value")


def _cells(k: int, a: int, further: Callable[[int], bytes]) -> Iterator[tuple[int, int, int]]:
    """Ever smaller cells: U in [k, k + 1] 2^-digits and A in [a, a + 1] 2^-digits."""
    yield k, a, FIRST
    for i in range(MOST):
        block = further(i)
        k = k << FURTHER | int.from_bytes(block[:32], "little")
        a = a << FURTHER | int.from_bytes(block[32:], "little")
        yield k, a, FIRST + FURTHER * (i + 1)


def _value(k: int, a: int, digits: int, part: int, log2_width: int) -> Interval:
    """The integers that the ends of the value's interval round to."""
    bits = digits + GUARD
    small, large = _radius(k, digits, bits)
    low, high, negative = _direction(a, digits, bits, part)
    low, high = low * (small if low > 0 else large), high * large  # high > 0; units of 2^(-2 bits)
    if negative:
        low, high = -high, -low
    shift = 2 * bits - log2_width
    half = 1 << (shift - 1)
    return (low + half) >> shift, (high + half) >> shift


def _radius(k: int, digits: int, bits: int) -> Interval:
    """sqrt(-2 ln U) for every U in [k, k + 1] 2^-digits, k >= 1."""
    e = k.bit_length()
    if 3 * k < 2 << e:
        e -= 1  # now k = m 2^e with 2/3 <= m < 4/3
    one = 1 << e
    low, high = _artanh(abs(one - k), one + k, bits)  # of (1 - m) / (1 + m), whose double is -ln m
    if k > one:
        low, high = -high, -low
    twos, twos_high = _ln_2(bits)
    low, high = 4 * low + 2 * (digits - e) * twos, 4 * high + 2 * (digits - e) * twos_high  # of -2 ln(k 2^-digits)
    low = max(0, low - (2 << bits) // k - 1)  # ln(k + 1) <= ln k + 1 / k
    return isqrt(low << bits), isqrt(high << bits) + 1


def _direction(a: int, digits: int, bits: int, part: int) -> tuple[int, int, bool]:
    """|cos| (part 0) or |sin| (part 1) of 2 pi A for every A in [a, a + 1] 2^-digits, and whether it is negative."""
    octant, place = a >> (digits - 3), a & ((1 << (digits - 3)) - 1)
    if octant & 1:  # measured from the octant's other end
        place = (1 << (digits - 3)) - 1 - place
    y = _quarter_pi(bits) * place >> (digits - 3)
    width = 1 << (bits - digits + 3)  # of the cell of y, as pi / 4 < 1
    if ((octant + 1 >> 1) ^ part) & 1:
        low, high = _taylor(y, y, 1, bits)
        high += width
    else:
        low, high = _taylor(1 << bits, y, 0, bits)
        low -= width
    return low, high, bool((octant >> 2 if part else octant + 2 >> 2) & 1)


def _artanh(numerator: int, denominator: int, bits: int) -> Interval:
    """artanh(numerator / denominator) for a ratio from 0 to 1/3: terms rounded down, each by less than 2."""
    power = (numerator << bits) // denominator
    square = power * power >> bits
    total, odd = power, 1
    while power:
        power = power * square >> bits
        odd += 2
        total += power // odd
    return total, total + odd + 4


def _taylor(term: int, y: int, n: int, bits: int) -> Interval:
    """Sin y (n = 1, term = y) or cos y (n = 0, term = 1) for 0 <= y < 0.8 that is known to 2 units below."""
    square = y * y >> bits
    total, sign, slack = term, -1, 4
    while term:
        n, slack = n + 2, slack + 2
        term = (term * square >> bits) // (n * (n - 1))
        total, sign = total + sign * term, -sign
    return total - slack, total + slack


@lru_cache(maxsize=8)
def _ln_2(bits: int) -> Interval:
    low, high = _artanh(1, 3, bits)
    return 2 * low, 2 * high


@lru_cache(maxsize=8)
def _quarter_pi(bits: int) -> int:
    """Pi / 4, rounded down, by Machin's 4 arctan(1/5) - arctan(1/239) with 32 guard bits."""
    bits += 32

    def arctan(inverse: int) -> int:
        power = total = (1 << bits) // inverse
        odd, sign = 1, -1
        while power:
            power //= inverse * inverse
            odd += 2
            total += sign * (power // odd)
            sign = -sign
        return total

    return 4 * arctan(5) - arctan(239) >> 32
