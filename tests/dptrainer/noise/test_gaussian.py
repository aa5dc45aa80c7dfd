"""The noise generator against the law it claims, and broken generators against the same tests."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special

from dpbudget._truncation import CAP
from dptrainer.noise import boxmuller, gaussian
from dptrainer.noise.chacha import keystream
from dptrainer.noise.gaussian import add_gaussian_, standard_gaussian

Floats = NDArray[np.float64]
Generator = Callable[[bytearray], Floats]
KEY = bytes(range(32))
# One threshold for every p-value below. Keys are fixed, so the outcome is the same in every run.
ALPHA = 1e-4


def shipped(words: bytearray) -> Floats:
    bench = boxmuller.Workbench(len(words) // 64)
    bench.words[:] = words
    return bench.box_muller(bench.blocks).copy()


def radius_of_24_bits(words: bytearray) -> Floats:
    """What a float32 generator does: the radius forgets all but the top 24 of its bits."""
    halves = np.frombuffer(words, dtype="<u4").reshape(-1, 16).copy()
    halves[:, 0:10:2] = 0
    halves[:, 1:10:2] &= 0xFFFFFF00
    return shipped(bytearray(halves.tobytes()))


def sigma_off_by_one_percent(words: bytearray) -> Floats:
    return 0.99 * shipped(words)


def nonce_used_again(words: bytearray) -> Floats:
    """The second half of the blocks are those of the first half."""
    half = len(words) // 128 * 64
    return shipped(words[:half] + words[:half])


def cosine_alone(words: bytearray) -> Floats:
    """Both values of a pair from the cosine: each is Gaussian, the pair is not."""
    return np.repeat(shipped(words)[::2], 2)


def p_normal(z: Floats) -> dict[str, float]:
    """p-values for N(0, 1): moments, chi-squared over 4096 equal bins, Kolmogorov and Smirnov, independence."""
    n = len(z)
    u = special.ndtr(z)
    counts = np.bincount(np.minimum((u * 4096).astype(np.int64), 4095), minlength=4096)
    chi = float(((counts - n / 4096) ** 2).sum() / (n / 4096))
    ordered = np.sort(u)
    grid = np.arange(n) / n
    distance = float(max((ordered - grid).max(), (grid + 1 / n - ordered).max()))
    pairs = z.reshape(-1, 2)
    normal = {
        "mean": float(z.sum()) / math.sqrt(n),
        "variance": float((z**2).sum() - n) / math.sqrt(2 * n),
        "within a pair": float((pairs[:, 0] * pairs[:, 1]).sum()) / math.sqrt(n / 2),
        "squares of a pair": float(((pairs[:, 0] ** 2 - 1) * (pairs[:, 1] ** 2 - 1)).sum()) / (2 * math.sqrt(n / 2)),
        "next pair": float((z[2:] * z[:-2]).sum()) / math.sqrt(n - 2),
        "halves": float((z[: n // 2] * z[n // 2 :]).sum()) / math.sqrt(n / 2),
    }
    found = {name: 2 * float(special.ndtr(-abs(value))) for name, value in normal.items()}
    found["chi-squared"] = float(special.chdtrc(4095, chi))
    found["kolmogorov"] = float(special.kolmogorov(math.sqrt(n) * distance))
    return found


def p_tail(generate: Generator, zero_bits: int, blocks: int = 20_000) -> float:
    """Radii given that their top ``zero_bits`` bits are 0: r^2 - 2 b ln 2 must be exponential with mean 2."""
    k = np.frombuffer(keystream(KEY, zero_bits, 0, blocks), dtype="<u8").reshape(-1, 8).copy()
    k[:, :5] >>= np.uint64(zero_bits)
    pairs = generate(bytearray(k.tobytes())).reshape(-1, 2)
    excess = (pairs**2).sum(1) / 2 - zero_bits * math.log(2)
    ordered = np.sort(-np.expm1(-np.maximum(excess, 0)))
    n = len(ordered)
    grid = np.arange(n) / n
    distance = float(max((ordered - grid).max(), (grid + 1 / n - ordered).max()))
    return float(special.kolmogorov(math.sqrt(n) * distance))


def p_counts(z: Floats) -> dict[str, float]:
    """p-values for the numbers of values beyond 1 to 4 standard deviations, either side."""
    found = {}
    for bound in range(1, 5):
        count, expected = int((np.abs(z) > bound).sum()), 2 * special.ndtr(-bound) * len(z)
        sides = special.pdtrc(count - 1, expected) if count else 1.0, special.pdtr(count, expected)
        found[f"beyond {bound}"] = min(1.0, 2 * float(min(sides)))
    return found


def suspicions(generate: Generator, count: int = 1_000_000) -> list[str]:
    values = generate(keystream(KEY, 0, 0, count // 10))
    wrong = [name for name, p in {**p_normal(values), **p_counts(values)}.items() if p < ALPHA]
    return wrong + [f"tail beyond 2^-{bits}" for bits in (8, 24, 40, 52) if p_tail(generate, bits) < ALPHA]


def test_a_million_values_pass_every_test_of_normality() -> None:
    assert suspicions(shipped) == []


@pytest.mark.parametrize(
    ("broken", "symptom"),
    [
        (radius_of_24_bits, "tail beyond 2^-24"),
        (sigma_off_by_one_percent, "variance"),
        (cosine_alone, "within a pair"),
        (nonce_used_again, "halves"),
    ],
)
def test_a_broken_generator_fails_them(broken: Generator, symptom: str) -> None:
    assert symptom in suspicions(broken)


def test_the_generator_of_torch_has_no_far_tail() -> None:
    # Why this package exists: 24 uniform bits end at 5.77 standard deviations, far inside the cap that plans charge.
    assert math.sqrt(2 * 24 * math.log(2)) < 5.77 < CAP
    k = bytearray(64)
    assert math.isclose(float(np.hypot(*shipped(k)[:2])), CAP, rel_tol=1e-15)


def words_for(k: int, a: int) -> bytearray:
    block = bytearray(64)
    for pair in range(5):
        block[8 * pair : 8 * pair + 8] = k.to_bytes(8, "little")
        block[40 + 4 * pair : 44 + 4 * pair] = a.to_bytes(4, "little")
    return block


EDGE_K = [0, 1, 2, 1000, 2**32 - 1, 2**32, 2**40 + 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**63 + 1]
EDGE_K += [2**64 - 2**44, 2**64 - 2**44 - 1, 2**64 - 2**43, 2**64 - 2**20, 2**64 - 3, 2**64 - 2, 2**64 - 1]


@pytest.mark.parametrize("k", EDGE_K)
@pytest.mark.parametrize("a", [0, 1, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 1, 123456789])
def test_single_pairs_agree_with_arbitrary_precision(k: int, a: int) -> None:
    with mpmath.workdps(60):
        radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(k + 1) / 2**64))
        angle = 2 * mpmath.pi * (a + mpmath.mpf(1) / 2) / 2**32
        expected = float(radius * mpmath.cos(angle)), float(radius * mpmath.sin(angle))
        size = float(radius)
    values = shipped(words_for(k, a))
    assert np.allclose(values.reshape(5, 2), expected, rtol=0, atol=size * 2.0**-48)
    assert (np.abs(values) <= CAP * (1 + 1e-15)).all()
    assert (size == 0) == (k == 2**64 - 1)


def test_angles_cover_the_circle_symmetrically() -> None:
    quarters = [np.sign(shipped(words_for(2**63, a))[:2]).tolist() for a in (0, 2**30, 2**31, 3 * 2**30)]
    assert quarters == [[1, 1], [-1, 1], [-1, -1], [1, -1]]
    ends = [shipped(words_for(2**63, a))[1] for a in (0, 2**32 - 1)]
    assert ends[0] == pytest.approx(-ends[1], rel=1e-6)
    assert ends[0] > 0  # no value is exactly zero but at radius 0


def reference_element(key: bytes, param: int, element: int) -> float:
    pair, part = divmod(element, 2)
    block, slot = divmod(pair, 5)
    words = keystream(key, param, block, 1)
    k = int.from_bytes(words[8 * slot : 8 * slot + 8], "little")
    a = int.from_bytes(words[40 + 4 * slot : 44 + 4 * slot], "little")
    angle = 2 * math.pi * (a + 0.5) / 2**32
    return math.sqrt(-2 * math.log((k + 1) / 2**64)) * (math.sin(angle) if part else math.cos(angle))


def test_every_element_stands_where_the_layout_says() -> None:
    values = standard_gaussian(KEY, 7, 53)
    expected = [reference_element(KEY, 7, e) for e in range(53)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 4_000, 50_000])
@pytest.mark.parametrize("offset", [0, 1, 5, 10, 40_959, 40_960, 40_961])
def test_a_shard_gets_the_values_of_the_whole(count: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "BLOCKS", 4096)  # tiles of 40,960 values
    monkeypatch.setattr(gaussian, "_IDLE", [])
    whole = standard_gaussian(KEY, 2, offset + count)
    assert torch.equal(standard_gaussian(KEY, 2, count, offset=offset), whole[offset:])


def test_an_offset_beyond_the_32_bit_counter_is_reached_directly() -> None:
    offset = 10 * 2**32 - 7
    values = standard_gaussian(KEY, 1, 20, offset=offset)
    expected = [reference_element(KEY, 1, offset + e) for e in range(20)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_noise_is_added_in_float64_and_rounded_once() -> None:
    start = torch.linspace(-3, 3, 30_001)
    noisy = start.clone()
    assert add_gaussian_(noisy, KEY, 0, 0.7) is noisy
    z = standard_gaussian(KEY, 0, 30_001)
    assert torch.equal(noisy, (start.double() + 0.7 * z).float())


@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 3, 7)])
def test_every_shape_gets_noise_in_row_order(shape: tuple[int, ...]) -> None:
    tensor = add_gaussian_(torch.zeros(shape, dtype=torch.float64), KEY, 0, 1.0)
    assert torch.equal(tensor.reshape(-1), standard_gaussian(KEY, 0, tensor.numel()))


def test_a_strided_tensor_gets_the_same_noise_in_place() -> None:
    base = torch.zeros(6, 8, dtype=torch.float64)
    view = base.t()[::2]
    add_gaussian_(view, KEY, 0, 1.0)
    assert torch.equal(view.reshape(-1), standard_gaussian(KEY, 0, view.numel()))
    assert int((base != 0).sum()) == view.numel()


def test_parameters_and_keys_get_independent_noise() -> None:
    first, second = standard_gaussian(KEY, 0, 100_000), standard_gaussian(KEY, 1, 100_000)
    other = standard_gaussian(os.urandom(32), 0, 100_000)
    for noise in (second, other):
        assert abs(float((first * noise).mean())) * math.sqrt(100_000) < 6


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.int64)])
def test_a_type_that_cannot_hold_the_noise_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        add_gaussian_(tensor, KEY, 0, 1.0)


@pytest.mark.parametrize("bad", [{"std": -1.0}, {"std": math.inf}, {"std": math.nan}, {"offset": -1}])
def test_a_scale_or_offset_out_of_range_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        add_gaussian_(torch.zeros(2), KEY, 0, **{"std": 1.0, **bad})


@pytest.mark.slow
def test_a_hundred_million_values_pass_down_to_the_tail() -> None:  # by the compiled path where there is one
    pieces, counts, worst = 100, np.zeros(7), 1.0
    for piece in range(pieces):
        z = standard_gaussian(KEY, 1000 + piece, 1_000_000).numpy()
        worst = min(worst, *p_normal(z).values())
        counts += [(np.abs(z) > bound).sum() for bound in range(7)]
    assert worst * pieces * 8 > 1e-3  # Bonferroni over all tests
    for bound in range(1, 7):
        expected = 2 * special.ndtr(-bound) * pieces * 1_000_000
        low = 1.0 if counts[bound] == 0 else special.pdtrc(counts[bound] - 1, expected)
        high = special.pdtr(counts[bound], expected)
        assert min(low, high) > 1e-6, f"{counts[bound]} values beyond {bound}, expected {expected:.1f}"
