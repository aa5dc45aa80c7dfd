"""The bound for truncated noise, with a cap so small that it matters: by quadrature, and its parts by sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpbudget import _truncation
from dpbudget.accountants._closed_form import one_step_delta
from dpbudget.mechanisms import SubsampledGaussianPair


def truncated_delta(rate, shift, cap, epsilon, direction, nodes=1601):
    """Hockey-stick divergence of one step in one pair of coordinates, noise kept within the disc of radius ``cap``."""
    grid = np.linspace(-cap, cap + shift, nodes)
    x, y = np.meshgrid(grid, grid[np.abs(grid) <= cap], indexing="ij")
    inside = 1.0 - math.exp(-0.5 * cap * cap)
    absent = np.exp(-0.5 * (x * x + y * y)) * (x * x + y * y <= cap * cap) / inside
    moved = np.exp(-0.5 * ((x - shift) ** 2 + y * y)) * ((x - shift) ** 2 + y * y <= cap * cap) / inside
    present = (1.0 - rate) * absent + rate * moved
    first, second = (present, absent) if direction == "remove" else (absent, present)
    cell = (grid[1] - grid[0]) ** 2
    return float(np.maximum(first - math.exp(epsilon) * second, 0.0).sum() * cell / (2.0 * math.pi))


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize("rate", [0.2, 1.0])
@pytest.mark.parametrize(("shift", "cap", "epsilon"), [(0.5, 3.0, 0.1), (1.0, 3.5, 1.5), (1.2, 3.0, 3.0)])
def test_the_bound_holds_for_one_pair_by_quadrature(monkeypatch, rate, shift, cap, epsilon, direction):
    monkeypatch.setattr(_truncation, "CAP", cap)
    exact = truncated_delta(rate, shift, cap, epsilon, direction)
    ideal = one_step_delta(SubsampledGaussianPair(rate, 1.0 / shift), epsilon, direction)[1]
    factor = 1.0 / (1.0 - math.exp(-0.5 * cap * cap))
    extra = _truncation.truncation_delta([(rate, 1.0 / shift, 1)], 2)
    assert exact <= factor * ideal + extra + 1e-5
    # The cap is felt: outputs that are impossible under the neighbour cost delta at any epsilon.
    if direction == "remove" or rate == 1.0:
        assert exact > 0.2 * extra


@pytest.mark.parametrize("pairs", [1, 4, 25])
def test_the_unreachable_mass_of_many_pairs_is_below_its_bound(pairs):
    cap, shift, draws = 3.0, 0.8, 200_000
    rng = np.random.default_rng(3)
    each = shift / math.sqrt(pairs)
    count = 0
    for _ in range(draws * pairs // 500_000 + 1):
        size = min(draws, 500_000 // pairs)
        radius = np.sqrt(-2.0 * np.log1p(-rng.random((size, pairs)) * -math.expm1(-0.5 * cap * cap)))
        cosine = np.cos(2.0 * math.pi * rng.random((size, pairs)))
        moved = radius**2 - 2.0 * each * radius * cosine + each**2 > cap * cap
        count += int(moved.any(axis=1).sum())
    total = (draws * pairs // 500_000 + 1) * min(draws, 500_000 // pairs)
    spread = cap * math.exp(-0.5 * cap * cap) * math.sqrt(pairs) * shift
    lump = math.exp(-0.5 * (cap - shift) ** 2)
    assert count / total <= spread + lump


def test_the_mass_removed_when_adding_is_at_most_the_rate_times_the_bound_although_ratios_exceed_one():
    # With several pairs the ideal ratio may exceed 1 where the shifted noise cannot reach; the average cannot.
    cap, shift, pairs, rate, size = 2.5, 1.0, 4, 0.3, 400_000
    rng = np.random.default_rng(5)
    radius = np.sqrt(-2.0 * np.log1p(-rng.random((size, pairs)) * -math.expm1(-0.5 * cap * cap)))
    cosine = np.cos(2.0 * math.pi * rng.random((size, pairs)))
    each = shift / math.sqrt(pairs)
    unreachable = (radius**2 - 2.0 * each * radius * cosine + each**2 > cap * cap).any(axis=1)
    ratio = np.exp((each * radius * cosine).sum(axis=1) - 0.5 * shift**2)
    posterior = rate * ratio / (1.0 - rate + rate * ratio)
    assert ratio[unreachable].max() > 1.0
    removed = float((posterior * unreachable).mean())
    bound = cap * math.exp(-0.5 * cap * cap) * math.sqrt(pairs) * shift + math.exp(-0.5 * (cap - shift) ** 2)
    assert removed <= rate * bound


@pytest.mark.parametrize("fractions", [(1.0,), (0.6, 0.8), (0.1,) * 100, (0.9, *(0.1,) * 19)])
def test_the_sum_over_pairs_is_bounded_for_any_split_of_the_shift(fractions):
    cap, largest = 9.4, 5.0
    shifts = [largest * f for f in fractions]
    assert math.fsum(r * r for r in shifts) <= largest**2 * (1 + 1e-12)

    def annulus(r):
        return math.exp(-0.5 * (cap - r) ** 2) - math.exp(-0.5 * cap * cap)

    slope = cap * math.exp(-0.5 * cap * cap)
    bound = slope * math.sqrt(len(shifts)) * largest + math.exp(-0.5 * (cap - largest) ** 2)
    assert math.fsum(map(annulus, shifts)) <= bound


def test_a_shift_beyond_the_proof_is_refused():
    assert _truncation.truncation_delta([(0.1, 0.12, 1)], 10) == math.inf


def test_at_the_real_cap_the_cost_is_far_below_any_useful_delta():
    assert _truncation.truncation_delta([(0.01, 1.0, 10**6)], 10**9) < 2e-10
    assert _truncation.truncation_factor_log(10**6, 10**6) < 1e-7
