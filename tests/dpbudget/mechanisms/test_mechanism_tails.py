"""Tails of every other pair against sums and integrals in mpmath, at atoms and one float around them."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tail_checks import check_enclosure, check_shape

from dpbudget.mechanisms import (
    ApproximatePair,
    BoundedRangePair,
    DiscreteGaussianPair,
    DiscreteLaplacePair,
    FinitePair,
    LaplacePair,
    RandomisedResponsePair,
)


def around(*points):
    """Each point with the floats before and after it, and a few others."""
    near = [x for p in points for x in (math.nextafter(p, -math.inf), p, math.nextafter(p, math.inf))]
    return sorted({*near, -900.0, -1.0, -0.1, -1e-9, 0.0, 1e-9, 0.1, 1.0, 900.0})


def laplace_truth(scale):
    """Integrals of the two densities from the output at which the loss passes t."""
    b = mpmath.mpf(scale)

    def above(x, centre):
        y = (x - centre) / b
        return mpmath.exp(-y) / 2 if y >= 0 else 1 - mpmath.exp(y) / 2

    def truth(t, _):
        if t >= 1 / b:
            return mpmath.mpf(0), mpmath.mpf(0)
        if t < -1 / b:
            return mpmath.mpf(1), mpmath.mpf(1)
        x = (1 + t * b) / 2
        return above(x, 1), above(x, 0)

    return truth


def summed_truth(atoms):
    """Sums over (loss, P, Q), the losses of the exchanged pair being the negated ones."""

    def truth(t, direction):
        if direction == "remove":
            return mpmath.fsum(p for x, p, _ in atoms if x > t), mpmath.fsum(q for x, _, q in atoms if x > t)
        return mpmath.fsum(q for x, _, q in atoms if -x > t), mpmath.fsum(p for x, p, _ in atoms if -x > t)

    return truth


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.7, 0.01, 0.002, 1e4])
def test_laplace_tails_enclose_the_truth_and_are_strict_at_the_atoms(scale):
    with mpmath.workdps(60):
        check_enclosure(LaplacePair(scale), laplace_truth(scale), around(1 / scale, -1 / scale), relative=1e-12)


@pytest.mark.parametrize(("sigma", "shift"), [(1.0, 1), (0.3, 2), (5.5, 3), (0.05, 1), (2.0, 7)])
def test_discrete_gaussian_tails_are_lattice_sums(sigma, shift):
    with mpmath.workdps(60):
        s, reach = mpmath.mpf(sigma), int(40 * sigma) + 2 * shift + 4
        weights = {k: mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * s * s)) for k in range(-2 * reach, 2 * reach + 1)}
        total = mpmath.fsum(weights.values())
        atoms = [
            ((2 * k * shift - shift**2) / (2 * s * s), weights[k - shift] / total, weights[k] / total)
            for k in range(-reach, reach + shift + 1)
        ]
        exact_points = [float(x) for x, _, _ in atoms[:: max(1, len(atoms) // 24)]]
        check_enclosure(DiscreteGaussianPair(sigma, shift), summed_truth(atoms), around(*exact_points), floor=1e-295)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 1), (0.7, 3), (20.0, 5), (0.01, 2), (1e6, 4)])
def test_discrete_laplace_tails_are_lattice_sums(scale, shift):
    with mpmath.workdps(60):
        decay = mpmath.exp(-1 / mpmath.mpf(scale))
        atoms = []
        for k in range(shift + 1):
            left, right = k == 0, k == shift
            q = decay**k * (1 if not (left or right) else 0) * (1 - decay) / (1 + decay)
            q += (1 / (1 + decay) if left else 0) + (decay**shift / (1 + decay) if right else 0)
            p = decay ** (shift - k) * (1 if not (left or right) else 0) * (1 - decay) / (1 + decay)
            p += (decay**shift / (1 + decay) if left else 0) + (1 / (1 + decay) if right else 0)
            atoms.append(((2 * k - shift) / mpmath.mpf(scale), p, q))
        points = [float(x) for x, _, _ in atoms]
        check_enclosure(DiscreteLaplacePair(scale, shift), summed_truth(atoms), around(*points), relative=1e-12)


@pytest.mark.parametrize(("epsilon", "categories"), [(1.0, 2), (0.1, 3), (5.0, 1000), (300.0, 2)])
def test_randomised_response_has_three_atoms(epsilon, categories):
    with mpmath.workdps(200):
        e, k = mpmath.mpf(epsilon), categories
        low = 1 / (mpmath.exp(e) + k - 1)
        atoms = [
            (e, mpmath.exp(e) * low, low),
            (-e, low, mpmath.exp(e) * low),
            (mpmath.mpf(0), (k - 2) * low, (k - 2) * low),
        ]
        pair = RandomisedResponsePair(epsilon, categories)
        check_enclosure(pair, summed_truth(atoms), around(epsilon, -epsilon), relative=1e-14)
    assert pair.tails(np.array([epsilon]), "remove").first_upper[0] == 0.0


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-5), (0.0, 0.1), (3.0, 0.0), (0.5, 1.0), (50.0, 1e-200)])
def test_a_black_box_has_its_delta_at_infinity(epsilon, delta):
    with mpmath.workdps(60):
        e, d = mpmath.mpf(epsilon), mpmath.mpf(delta)
        small = (1 - d) / (1 + mpmath.exp(e))
        atoms = [(mpmath.inf, d, 0), (e, mpmath.exp(e) * small, small), (-e, small, mpmath.exp(e) * small)]
        pair = ApproximatePair(epsilon, delta)
        check_enclosure(pair, summed_truth([*atoms, (-mpmath.inf, 0, d)]), around(epsilon, -epsilon), relative=1e-14)
    at_epsilon = pair.tails(np.array([epsilon]), "add")
    assert at_epsilon.first_lower[0] <= delta <= at_epsilon.first_upper[0]
    assert at_epsilon.second_upper[0] == 0.0


@pytest.mark.parametrize("width", [1e-6, 0.3, 1.0, 8.0, 80.0])
def test_the_bounded_range_pair_is_the_envelope_of_two_point_pairs(width):
    """Its delta is the largest over t of the pairs with losses t and t - width, found on a grid of t."""
    pair = BoundedRangePair(width)
    losses = np.linspace(-0.99 * width, 0.99 * width, 9)
    for direction in ("remove", "add"):
        tails = pair.tails(losses, direction)
        for index, s in enumerate(losses):
            with mpmath.workdps(50):
                high = tails.first_upper[index] - mpmath.exp(mpmath.mpf(s)) * tails.second_lower[index]
                low = tails.first_lower[index] - mpmath.exp(mpmath.mpf(s)) * tails.second_upper[index]
                best = mpmath.mpf(0)
                for step in range(201):
                    t = mpmath.mpf(width) * step / 200
                    q = (1 - mpmath.exp(t - width)) / (mpmath.exp(t) - mpmath.exp(t - width))
                    p = mpmath.exp(t) * q
                    value = max(p - mpmath.exp(s) * q, 0) + max(1 - p - mpmath.exp(s) * (1 - q), 0)
                    best = max(best, value)
                assert best <= high
                assert best >= low * (1 - mpmath.mpf(10) ** -3) - mpmath.mpf(10) ** -9
    assert pair.tails(np.array([-width, width]), "add").first_lower.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("width", [0.3, 8.0])
def test_the_bounded_range_tails_are_the_slope_of_the_profile(width):
    with mpmath.workdps(60):
        w = mpmath.mpf(width)

        def profile(alpha):
            return (1 - mpmath.sqrt(alpha * mpmath.exp(-w))) ** 2 / (1 - mpmath.exp(-w))

        def truth(t, _):
            if t >= w or t < -w:
                return (mpmath.mpf(0),) * 2 if t >= w else (mpmath.mpf(1),) * 2
            second = -mpmath.diff(profile, mpmath.exp(t))
            return profile(mpmath.exp(t)) + mpmath.exp(t) * second, second

        check_enclosure(BoundedRangePair(width), truth, [-900.0, -0.2, -1e-9, 0.0, 0.1, 0.29, 900.0], relative=1e-12)


def test_a_finite_pair_counts_equal_infinite_and_impossible_losses():
    first, second = (0.5, 0.25, 0.125, 0.125, 0.0), (0.25, 0.5, 0.125, 0.0, 0.125)
    log2 = mpmath.log(2)
    atoms = [(log2, 0.5, 0.25), (-log2, 0.25, 0.5), (0, 0.125, 0.125), (mpmath.inf, 0.125, 0), (-mpmath.inf, 0, 0.125)]
    with mpmath.workdps(60):
        atoms = [
            (mpmath.log(mpmath.mpf(2)) * (1 if i == 0 else -1) if i < 2 else x, mpmath.mpf(p), mpmath.mpf(q))
            for i, (x, p, q) in enumerate(atoms)
        ]
        check_enclosure(
            FinitePair(first, second), summed_truth(atoms), around(math.log(2), -math.log(2)), relative=1e-14
        )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=6), st.floats(-3, 3))
def test_any_finite_pair_is_counted_exactly(weights, loss):
    first, second = [w[0] for w in weights], [w[1] for w in weights]
    if sum(first) == 0 or sum(second) == 0:
        first[0] = second[0] = 1
    with mpmath.workdps(60):
        p, q = [mpmath.mpf(x) / sum(first) for x in first], [mpmath.mpf(x) / sum(second) for x in second]
        atoms = [
            (mpmath.inf if b == 0 else -mpmath.inf if a == 0 else mpmath.log(a / b), a, b)
            for a, b in zip(p, q, strict=True)
            if a or b
        ]
        pair = FinitePair(tuple(map(float, first)), tuple(map(float, second)))
        check_enclosure(pair, summed_truth(atoms), sorted({loss, 0.0}), relative=1e-14)


@pytest.mark.parametrize(
    "pair",
    [LaplacePair(0.8), DiscreteGaussianPair(1.5, 1), DiscreteLaplacePair(2.0, 3), BoundedRangePair(2.0),
     RandomisedResponsePair(1.0, 3), ApproximatePair(1.0, 0.01), FinitePair((0.5, 0.5), (0.9, 0.1))],
)  # fmt: skip
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_delta_falls_and_is_convex_for_every_pair(pair, direction):
    losses = np.linspace(-3.0, 3.0, 121)
    check_shape(pair.tails(losses, direction), losses)
    everything = pair.tails(np.array([-1e4]), direction)
    assert everything.first_lower[0] >= 1 - 1e-15
