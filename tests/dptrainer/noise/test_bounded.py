"""The bound of the error of rounded noise in floating point: its polynomials certified, the whole of it measured."""

from __future__ import annotations

import random
from fractions import Fraction
from math import factorial

import mpmath
import numpy as np
import pytest

from dptrainer.noise import bounded, ziv
from dptrainer.noise.bounded import LEAST, MAGIC, R_MAX, R_MIN, SLOPE
from dptrainer.noise.chacha import ROUNDED, keystream
from tests.dptrainer.noise import exact

KEY = bytes(range(32))
ULP = 2.0**-53  # u of docs/exact-sampler.md


def greatest(coefficients: list[Fraction], end: Fraction, cells: int = 128) -> Fraction:
    """A bound of |c_0 + c_1 w + ...| on [0, end]: in each cell |c(m + t)| <= sum of |c^(j)(m) / j!| h^j, |t| <= h."""
    worst, h = Fraction(0), end / (2 * cells)
    for cell in range(cells):
        shifted = list(coefficients)
        for start in range(len(shifted)):  # Taylor's coefficients at the cell's middle, by repeated division
            for j in range(len(shifted) - 2, start - 1, -1):
                shifted[j] += (2 * cell + 1) * h * shifted[j + 1]
        worst = max(worst, sum((abs(c) * h**j for j, c in enumerate(shifted)), Fraction(0)))
    return worst


def difference(polynomial: tuple[float, ...], series: list[Fraction], tail: Fraction, end: Fraction) -> Fraction:
    """A bound of |polynomial - function| on [0, end], the function being the series to within ``tail``."""
    padded = [Fraction(c) for c in polynomial] + [Fraction(0)] * (len(series) - len(polynomial))
    return greatest([p - c for p, c in zip(padded, series, strict=True)], end) + tail


def quarter_pi_power(n: int) -> Fraction:
    """(pi / 4)^n to 40 digits."""
    with mpmath.workdps(80):
        return Fraction(int(mpmath.floor((mpmath.pi / 4) ** n * 10**40)), 10**40)


def test_the_polynomial_of_the_sine_is_as_near_as_the_proof_says() -> None:
    series = [(-1) ** j * quarter_pi_power(2 * j + 1) / factorial(2 * j + 1) for j in range(16)]
    assert difference(bounded.SINE, series, Fraction(1, 10**35), Fraction(1)) < Fraction(0.3 * ULP)


def test_the_polynomial_of_the_cosine_is_as_near_as_the_proof_says() -> None:
    series = [(-1) ** j * quarter_pi_power(2 * j + 2) / factorial(2 * j + 2) for j in range(16)]
    assert difference(bounded.VERSINE, series, Fraction(1, 10**35), Fraction(1)) < Fraction(0.25 * ULP)


def test_the_polynomial_of_the_logarithm_is_as_near_as_the_proof_says() -> None:
    end, terms = Fraction(1, 9), 30
    series = [Fraction(4, 2 * j + 1) for j in range(terms)]
    tail = 4 * end**terms / (2 * terms + 1) / (1 - end)
    assert difference(bounded.ARTANH, series, tail, end) < 4 * Fraction(0.05 * ULP)  # relative: the function is >= 4
    with mpmath.workdps(40):
        assert abs(mpmath.mpf(bounded.MINUS_2_LN_2) / (-2 * mpmath.ln2) - 1) < 0.31 * ULP


def test_a_wrong_polynomial_has_no_certificate() -> None:
    series = [(-1) ** j * quarter_pi_power(2 * j + 1) / factorial(2 * j + 1) for j in range(16)]
    wrong = (bounded.SINE[0], bounded.SINE[1] * (1 + 1e-14), *bounded.SINE[2:])
    assert difference(wrong, series, Fraction(0), Fraction(1)) > Fraction(2 * ULP)


def random_words(blocks: int) -> np.ndarray:
    return np.frombuffer(keystream(KEY, 5, 0, blocks, layout=ROUNDED), dtype="<u8").reshape(-1, 8).copy()


def near(words: np.ndarray, centre: int, spread: int) -> np.ndarray:
    """The same angles with radii close to a centre."""
    words[:, :4] = np.uint64(centre) + (words[:, :4] >> np.uint64(64 - spread))
    return words


def at_octants(words: np.ndarray) -> np.ndarray:
    """The same radii with angles at every distance from the ends of octants."""
    place = np.arange(len(words), dtype=np.uint64)[:, None]
    words[:, 4:] = (words[:, 4:] >> place % np.uint64(61)) + (place % np.uint64(8) << np.uint64(61))
    words[:, 5::2] = ~words[:, 5::2]
    return words


@pytest.mark.parametrize(
    ("words", "share"),
    [
        (random_words(1000), 0.25),
        (at_octants(random_words(500)), 0.25),
        (near(random_words(500), 2**63 - 2**59, 60), 0.25),  # U about 1/2: where the two cases meet
        (near(random_words(500), 2**62, 40), 0.25),  # powers of two
        (near(random_words(500), 2**46, 46), 0.5),  # small U, whose cells are wide
        (near(random_words(500), 2**64 - 2**45, 44), 0.5),  # U about 1
    ],
)
def test_no_value_is_farther_from_the_law_than_the_bound(words: np.ndarray, share: float) -> None:
    bench = bounded.Workbench(len(words))
    bench.words[:] = words.tobytes()
    radii, values = bench.pairs(bench.blocks)
    pairs = values.reshape(-1, 2)
    seen = 0
    with mpmath.workprec(200):
        for i, (r, k, a) in enumerate(
            zip(radii.T.reshape(-1), words[:, :4].reshape(-1), words[:, 4:].reshape(-1), strict=True)
        ):
            if R_MIN <= r <= R_MAX:
                seen += 1
                for up in (0, 1):  # both ends of the cell that the words leave
                    radius = mpmath.sqrt(-2 * mpmath.log(mpmath.ldexp(int(k) + up, -64)))
                    angle = mpmath.ldexp(2 * mpmath.pi * (int(a) + up), -64)
                    bound = share * float(radius * 2**-49 + 2**-53)
                    assert abs(radius * mpmath.cos(angle) - pairs[i, 0]) < bound
                    assert abs(radius * mpmath.sin(angle) - pairs[i, 1]) < bound
    assert seen > 0.7 * len(pairs)


def words_of(k: int, a: int) -> bytes:
    """A block of four times the same pair."""
    return k.to_bytes(8, "little") * 4 + a.to_bytes(8, "little") * 4


def rounded(words: bytes, log2_width: int) -> tuple[list[int], list[int]]:
    bench = bounded.Workbench(len(words) // 64)
    bench.words[:] = words
    doubtful, integers = bench.round(bench.blocks, 2.0**log2_width)
    return doubtful.tolist(), integers.tolist()


@pytest.mark.parametrize("log2_width", [0, 17, 30, 40])
@pytest.mark.parametrize("above", [False, True])
def test_what_is_within_the_bound_of_a_half_integer_is_doubtful(log2_width: int, above: bool) -> None:
    draw = random.Random(5)
    for case in range(40):
        part, turns = case % 2, mpmath.mpf(draw.random())
        # The first digit of the angle that tells: from inside the margin to where the words do not reach it.
        agree = draw.randint(53, 80)
        k, a, _, expected = exact.near_half(2**63 - draw.getrandbits(62), turns, part, log2_width, agree, above)
        doubtful, integers = rounded(words_of(k, a), log2_width)
        if agree > 56:
            assert part in doubtful
        assert part in doubtful or integers[part] == expected


@pytest.mark.parametrize("k", [0, 1, 2**40, 2**46 - 2**40, 2**64 - 2**42, 2**64 - 2, 2**64 - 1])
def test_pairs_beyond_the_radii_of_the_bound_are_doubtful(k: int) -> None:
    for a in (0, 2**61, 2**62 + 1, 123456789):
        assert rounded(words_of(k, a), 3)[0] == list(range(8))


@pytest.mark.parametrize("k", [2**46 + 2**40, 2**50, 2**63 - 1, 2**63, 2**64 - 2**44])
def test_pairs_within_them_are_not(k: int) -> None:
    assert rounded(words_of(k, 2**60 + 12345), 3)[0] == []


def test_the_rate_of_doubt_is_that_of_the_proof() -> None:
    blocks = 40_000
    bench = bounded.Workbench(blocks)
    bench.words[:] = keystream(KEY, 6, 0, blocks, layout=ROUNDED)
    for log2_width in (35, 40):
        expected = 8 * blocks * 2 * 2.0**log2_width * (SLOPE * np.sqrt(np.pi / 2) + LEAST)
        assert abs(len(bench.round(blocks, 2.0**log2_width)[0]) - expected) < 6 * np.sqrt(expected) + 5


def test_sure_integers_are_those_of_integer_arithmetic() -> None:
    words = at_octants(random_words(300)).tobytes()
    flat = np.frombuffer(words, dtype="<u8").reshape(-1, 8)
    for log2_width in (0, 20, 40):
        doubtful, integers = rounded(words, log2_width)
        for position in set(range(len(integers))) - set(doubtful):
            block, pair = divmod(position // 2, 4)
            k, a = int(flat[block, pair]), int(flat[block, 4 + pair])
            expected = ziv.decide(k, a, lambda i: bytes(64), position % 2, log2_width)
            assert integers[position] == expected


def test_a_wrong_polynomial_without_a_margin_gives_wrong_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the margin is for: the same comparison as above fails if either is missing.
    words = random_words(300).tobytes()
    right = rounded(words, 40)[1]
    monkeypatch.setattr(bounded, "SINE", (*bounded.SINE[:3], bounded.SINE[3] * (1 + 1e-9), *bounded.SINE[4:]))
    monkeypatch.setattr(bounded, "SLOPE", 0.0)
    doubtful, wrong = rounded(words, 40)
    assert set(np.flatnonzero(np.array(right) != np.array(wrong)).tolist()) - set(doubtful)


def test_adding_the_magic_number_leaves_the_nearest_integer() -> None:
    x = np.array([0.0, 0.49, -0.49, 0.51, -0.51, 1e12 + 0.25, -1e12 - 0.75, 2.0**50 + 0.5])
    bits = (x + MAGIC).view(np.int64) - bounded._MAGIC_BITS
    assert bits.tolist() == np.rint(x).astype(np.int64).tolist()


def test_nothing_of_the_noise_is_left_after_erasing() -> None:
    bench = bounded.Workbench(64)
    bench.room(50)[:] = keystream(KEY, 0, 0, 50, layout=ROUNDED)
    bench.add(np.zeros(400, dtype=np.int64), 0, 2.0**20)
    bench.erase()
    assert not any(bench.words)
    assert not bench._floats[:, :, :50].any()  # the rest was never written
    assert not bench._results[:, :50].any()
