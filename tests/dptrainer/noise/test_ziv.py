"""One rounded value in integers: against mpmath on random and extreme digits, and where digits do not suffice."""

from __future__ import annotations

import random
from collections.abc import Callable

import mpmath
import numpy as np
import pytest

from dptrainer.noise import ziv
from tests.dptrainer.noise import exact

KEY = bytes(range(32))
EDGE_K = [0, 1, 2, 1000, 2**30, 2**46 - 1, 2**46, 2**62, 2**63 - 1, 2**63, 2**63 + 1]
EDGE_K += [2**64 - 2**43, 2**64 - 2**20, 2**64 - 2, 2**64 - 1]
EDGE_A = [(edge + step) % 2**64 for edge in range(0, 2**64, 2**61) for step in (-1, 0, 1)]


def further(seed: int) -> Callable[[int], bytes]:
    return lambda i: random.Random(1000 * seed + i).randbytes(64)


@pytest.mark.parametrize("k", EDGE_K)
@pytest.mark.parametrize("log2_width", [0, 20, 40])
def test_extreme_pairs_agree_with_arbitrary_precision(k: int, log2_width: int) -> None:
    for seed, a in enumerate(EDGE_A):
        for part in (0, 1):
            expected = exact.value(k, a, further(seed), part, log2_width)
            assert ziv.decide(k, a, further(seed), part, log2_width) == expected


def test_random_pairs_agree_with_arbitrary_precision() -> None:
    draw = random.Random(7)
    for seed in range(1500):
        k, a, part, log2_width = draw.getrandbits(draw.randint(1, 64)), draw.getrandbits(64), seed & 1, seed % 41
        expected = exact.value(k, a, further(seed), part, log2_width)
        assert ziv.decide(k, a, further(seed), part, log2_width) == expected


@pytest.mark.parametrize("agree", [60, 70, 100, 300, 330, 600, 900])
@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("turns", [0.06, 0.19, 0.31, 0.44, 0.56, 0.69, 0.81, 0.94])  # one in every octant
def test_as_many_digits_are_read_as_it_takes(agree: int, above: bool, turns: float) -> None:
    for part, log2_width in ((0, 0), (1, 0), (0, 17), (1, 40)):
        read: list[int] = []
        k, a, blocks, expected = exact.near_half(2**62 + 12345, mpmath.mpf(turns), part, log2_width, agree, above)

        def reading(i: int, blocks: bytes = blocks, read: list[int] = read) -> bytes:
            read.append(i)
            return blocks[64 * i : 64 * i + 64]

        assert ziv.decide(k, a, reading, part, log2_width) == expected
        assert read == list(range(len(read)))
        least = -(-(agree - 64 - 3) // 256)  # the digit in which A differs must have been read, or one just before
        assert least <= len(read) <= -(-(agree + log2_width - 50) // 256)


def test_an_interval_holds_the_value_for_the_whole_cell() -> None:
    draw = random.Random(3)
    with mpmath.workprec(300):
        for _ in range(300):
            k, a = draw.getrandbits(draw.randint(1, 64)) | 1, draw.getrandbits(64)
            low, high = ziv._radius(k, 64, 96)
            cosine = [ziv._direction(a, 64, 96, part) for part in (0, 1)]
            for up in (0, 1):
                radius = mpmath.sqrt(-2 * mpmath.log(mpmath.ldexp(k + up, -64)))
                assert low <= mpmath.ldexp(radius, 96) <= high
                angle = 2 * mpmath.pi * mpmath.ldexp(a + up, -64)
                for (least, most, negative), size in zip(cosine, (mpmath.cos(angle), mpmath.sin(angle)), strict=True):
                    assert least <= mpmath.ldexp(-size if negative else size, 96) <= most
            assert (high - low) * k < 2**99  # and is not much wider than that
            assert all(most - least < 2**36 for least, most, _ in cosine)


def test_constants_are_those_of_mathematics() -> None:
    for bits in (96, 352, 4192):
        with mpmath.workprec(bits + 64):
            assert 0 <= mpmath.ldexp(mpmath.pi / 4, bits) - ziv._quarter_pi(bits) < 1.01
            low, high = ziv._ln_2(bits)
            assert low <= mpmath.ldexp(mpmath.ln2, bits) <= high
            assert high - low < 2 * bits


def test_every_element_stands_where_the_layout_says() -> None:
    for index in (0, 1, 2, 7, 8, 9, 1001, 2**33 + 5, 2**57 - 1):
        for log2_width in (3, 40):
            assert ziv.element(KEY, 9, index, log2_width) == exact.element(KEY, 9, index, log2_width)


# Among the first 2^22 elements of stream 0 of this key, those that 64 digits leave open at width 2^40.
@pytest.mark.parametrize("index", [890167, 1448047, 1780680, 2907548, 3409931])
def test_further_digits_come_from_addresses_of_their_own(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    plain = ziv.keystream

    def watched(key: bytes, stream: int, block: int, blocks: int, *, layout: int) -> bytearray:
        asked.append((stream, block, layout))
        return plain(key, stream, block, blocks, layout=layout)

    monkeypatch.setattr(ziv, "keystream", watched)
    assert ziv.element(KEY, 0, index, 40) == exact.element(KEY, 0, index, 40)
    assert asked == [(0, index // 8, 2), (0, 256 * (index // 2), 3)]


def test_digits_that_never_decide_are_an_error_and_not_a_guess() -> None:
    with pytest.raises(ArithmeticError, match="65,600 digits"):
        ziv.decide(0, 2**60, lambda i: bytes(64), 0, 0)


def test_sums_are_taken_modulo_2_to_the_64() -> None:
    top, values = (1 << 63) - 1, [exact.element(KEY, 0, 5 + i, 40) for i in range(3)]
    out = np.array([top, 7, -top - 1])
    ziv.settle(out, np.array([0, 2]), KEY, 0, 5, 40)
    assert [int(x) % (1 << 64) for x in out] == [(top + values[0]) % (1 << 64), 7, (-top - 1 + values[2]) % (1 << 64)]
