"""Sampled mechanisms enumerated in exact rationals: no neighbours are farther apart than the pair says."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from tail_checks import check_enclosure

from dpbudget.mechanisms import (
    Adjacency,
    BlackBox,
    FinitePairOf,
    Gaussian,
    Laplace,
    LaplacePair,
    PoissonSampled,
    PoissonSampledPair,
    ShuffledEpoch,
    SubsampledGaussianPair,
    WithoutReplacement,
)

LOSSES = [-2.0, -0.7, -0.1, -1e-6, 0.0, 1e-6, 0.05, 0.2, 0.7, 1.5]


def bits(count: int) -> list[Fraction]:
    """A mechanism on a multiset of bits: the law of a noisy, coarse count, in exact fractions (positive everywhere)."""
    weights = [Fraction(1, 2 ** abs(k - min(count, 2))) for k in range(3)]
    return [w / sum(weights) for w in weights]


def hockey_stick(first, second, alpha: Fraction) -> Fraction:
    return sum((max(a - alpha * b, Fraction(0)) for a, b in zip(first, second, strict=True)), Fraction(0))


def mixture(parts):
    laws = list(parts)
    return [sum((w * law[k] for w, law in laws), Fraction(0)) for k in range(3)]


def poisson(data, rate: Fraction):
    return mixture(
        (math.prod((rate if s else 1 - rate) for s in chosen), bits(sum(itertools.compress(data, chosen))))
        for chosen in itertools.product((0, 1), repeat=len(data))
    )


def subsets(data, size: int):
    sets = list(itertools.combinations(data, size))
    return mixture((Fraction(1, len(sets)), bits(sum(chosen))) for chosen in sets)


def upper_delta(pair, loss: float, direction) -> float:
    tails = pair.tails(np.array([loss]), direction)
    return float(tails.first_upper[0] - math.exp(loss) * tails.second_lower[0]) + 1e-15


def test_poisson_sampling_never_exceeds_its_pair_on_any_neighbours():
    rate = Fraction(3, 8)
    # A data bit moves the law from count k to k + 1; the worst ratio of those laws is all that the pair knows.
    inner = BlackBox(epsilon=math.nextafter(max(worst_loss(1)), math.inf), delta=0.0)
    pair = PoissonSampled(rate_k=int(rate * 2**64), inner=inner).dominating_pair(Adjacency.ADD_REMOVE)
    assert isinstance(pair, PoissonSampledPair)
    for data in itertools.product((0, 1), repeat=3):
        with_record, without = poisson((*data, 1), rate), poisson(data, rate)
        for loss in LOSSES:
            alpha = Fraction(math.exp(loss))
            assert float(hockey_stick(with_record, without, alpha)) <= upper_delta(pair, loss, "remove")
            assert float(hockey_stick(without, with_record, alpha)) <= upper_delta(pair, loss, "add")


def worst_loss(change: int) -> list[float]:
    return [abs(math.log(a / b)) for k in range(4) for a, b in zip(bits(k), bits(k + change), strict=True)]


def test_sets_without_replacement_never_exceed_their_pair_on_any_neighbours():
    inner = BlackBox(epsilon=math.nextafter(max(worst_loss(1)), math.inf), delta=0.0, adjacency=Adjacency.REPLACE_ONE)
    pair = WithoutReplacement(size=2, population=5, inner=inner).dominating_pair(Adjacency.REPLACE_ONE)
    for data in itertools.product((0, 1), repeat=4):
        zero, one = subsets((*data, 0), 2), subsets((*data, 1), 2)
        for loss in LOSSES:
            alpha = Fraction(math.exp(loss))
            for direction in ("remove", "add"):
                assert float(hockey_stick(zero, one, alpha)) <= upper_delta(pair, loss, direction)
                assert float(hockey_stick(one, zero, alpha)) <= upper_delta(pair, loss, direction)


def test_the_sampled_pair_of_a_finite_pair_is_the_mixture_itself():
    first, second = (0.5, 0.25, 0.125, 0.125, 0.0), (0.25, 0.5, 0.125, 0.0, 0.125)
    inner = FinitePairOf(first=first, second=second, adjacencies=(Adjacency.ADD_REMOVE,))
    q = 0.25
    pair = PoissonSampled(rate_k=1 << 62, inner=inner).dominating_pair(Adjacency.ADD_REMOVE)
    with mpmath.workdps(60):
        mixed = [(1 - q) * b + q * a for a, b in zip(first, second, strict=True)]

        def truth(t, direction):
            laws = (mixed, second) if direction == "remove" else (second, mixed)
            kept = [
                (a, b) for a, b in zip(*laws, strict=True) if b == 0 or (a > 0 and mpmath.log(mpmath.mpf(a) / b) > t)
            ]
            return mpmath.fsum(a for a, _ in kept), mpmath.fsum(b for _, b in kept if b)

        check_enclosure(pair, truth, [-1.0, -0.29, -0.2, -0.1, 0.1, 0.2, 0.25, 0.287, 0.3, 1.0], relative=1e-13)


def test_sampling_the_gaussian_pair_by_the_general_rule_gives_the_gaussian_formula():
    losses = np.array([-3.0, -0.4, -0.1, 0.0, 0.05, 0.1, 0.3, 2.0])
    for rate in (0.3, 1e-6):
        general, direct = PoissonSampledPair(SubsampledGaussianPair(1.0, 0.9), rate), SubsampledGaussianPair(rate, 0.9)
        for direction in ("remove", "add"):
            one, two = general.tails(losses, direction), direct.tails(losses, direction)
            for name in ("first", "second"):
                lower = np.maximum(getattr(one, f"{name}_lower"), getattr(two, f"{name}_lower"))
                upper = np.minimum(getattr(one, f"{name}_upper"), getattr(two, f"{name}_upper"))
                assert np.all(lower <= upper)
                assert np.all(getattr(one, f"{name}_upper") - getattr(one, f"{name}_lower") <= 1e-11 * upper + 1e-300)


def test_the_subset_pair_is_symmetric_and_a_profile():
    pair = WithoutReplacement(size=1, population=10, inner=Laplace(noise_multiplier=1.0)).dominating_pair(
        Adjacency.REPLACE_ONE
    )
    losses = np.linspace(-1.0, 1.0, 41)
    tails = pair.tails(losses, "remove")
    delta = 0.5 * (tails.first_lower + tails.first_upper - np.exp(losses) * (tails.second_lower + tails.second_upper))
    mirrored = 1 - np.exp(losses) + np.exp(losses) * delta[::-1]
    assert delta == pytest.approx(mirrored, abs=1e-13)
    assert np.all(np.diff(np.diff(delta) / np.diff(np.exp(losses))) >= -1e-10)


def test_a_fixed_size_is_amplified_as_the_theorem_says():
    pair = WithoutReplacement(size=1, population=4, inner=Laplace(noise_multiplier=2.0)).dominating_pair(
        Adjacency.REPLACE_ONE
    )
    inner = LaplacePair(1.0).tails(np.array([0.5]), "remove")
    loss = math.log1p(0.25 * math.expm1(0.5))
    exact = 0.25 * float(inner.first_upper[0] - math.exp(0.5) * inner.second_upper[0])
    assert upper_delta(pair, loss, "remove") == pytest.approx(exact, rel=1e-11)


def test_a_shuffled_epoch_costs_one_use_without_sampling():
    inner = Gaussian(noise_multiplier=1.3)
    for adjacency in (Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE):
        assert ShuffledEpoch(inner=inner).dominating_pair(adjacency) == inner.dominating_pair(adjacency)
