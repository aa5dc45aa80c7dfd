"""The laws that stand in for a step: nowhere below its privacy profile, or nowhere above it."""

from __future__ import annotations

import itertools
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pld_pairs import FinitePair, LaplacePair, NormalPair, response, uses

from dpbudget.accountants import get_accountant
from dpbudget.accountants._pld_law import _hull, _scan, contract, spread
from dpbudget.accountants._pld_moment import lattice_log_moment
from dpbudget.accountants.exact import delta_one_step
from dpbudget.mechanisms import Adjacency

DIRECTIONS = ("remove", "add")


def profile(law, epsilon, digits=40):
    """The profile of a law's floats, exactly."""
    with mpmath.workdps(digits):
        y = mpmath.exp(mpmath.mpf(epsilon))
        terms = [
            mpmath.mpf(w) * (1 - y * mpmath.exp(-mpmath.mpf(t)))
            for t, w in zip(law.losses.tolist(), law.weights.tolist(), strict=True)
            if t > epsilon
        ]
        return mpmath.fsum(terms) + mpmath.mpf(law.infinite)


def normal_profile(pair, epsilon, direction):
    """The hockey stick of one sampled Gaussian step at any epsilon of either sign."""
    with mpmath.workdps(40):
        if epsilon >= 0.0:
            return delta_one_step(pair.rate, pair.sigma, epsilon, direction)
        other = "add" if direction == "remove" else "remove"
        return 1 - mpmath.exp(mpmath.mpf(epsilon)) * (1 - delta_one_step(pair.rate, pair.sigma, -epsilon, other))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rate", "sigma", "step"), [(0.02, 0.8, 2e-3), (1.0, 2.0, 1e-2), (0.3, 0.5, 0.05)])
def test_the_laws_enclose_the_profile_at_nodes_and_between_them(direction, rate, sigma, step):
    pair = NormalPair(rate, sigma)
    nodes = np.arange(-200, 301) * step
    upper, lower = spread(pair, direction, nodes), contract(pair, direction, nodes)
    for epsilon in (-150.3, -17.0, -3.4, -1.0, -0.5, 0.0, 0.02, 0.7, 1.0, 2.5, 40.0, 111.9):
        truth = normal_profile(pair, epsilon * step, direction)
        assert profile(lower, epsilon * step) <= truth <= profile(upper, epsilon * step)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_error_of_both_laws_is_of_second_order(direction):
    pair, errors = NormalPair(1.0, 1.0), {}
    for step in (0.02, 0.01):
        nodes = np.arange(-round(9 / step), round(9 / step) + 1) * step
        laws = spread(pair, direction, nodes), contract(pair, direction, nodes)
        points = [0.3 + step * k / 7.0 for k in range(14)]
        errors[step] = [sum(abs(float(profile(law, e) - normal_profile(pair, e, direction))) for e in points) / 14
                        for law in laws]  # fmt: skip
    for coarse, fine in zip(errors[0.02], errors[0.01], strict=True):
        assert 3.3 < coarse / fine < 4.7


@pytest.mark.parametrize("pair", [response(0.7), response(0.3, 0.01), LaplacePair(1.5), NormalPair(0.1, 1.0)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_total_mass_and_mean_ratio_are_kept_by_the_pessimistic_law(pair, direction):
    law = spread(pair, direction, np.arange(-4000, 8001) * 1e-3)
    assert float(law.weights.sum()) + law.infinite == pytest.approx(1.0, abs=1e-12)
    # E e^-L is the mass of S where F does not vanish; all of S lies within the window or below it.
    assert float(law.weights @ np.exp(-law.losses)) <= 1.0 + 1e-10


def test_an_infinite_loss_is_seen_by_both_laws():
    nodes = np.arange(-500, 501) * 1e-2
    assert spread(response(0.3, 0.01), "remove", nodes).infinite == pytest.approx(0.01, rel=1e-12)
    assert contract(response(0.3, 0.01), "remove", nodes).infinite == pytest.approx(0.01, rel=1e-12)
    assert contract(NormalPair(1.0, 1.0), "remove", nodes).infinite == 0.0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-1000, 1000), min_size=3, max_size=30), st.integers(0, 50))
def test_the_hull_lies_below_all_points_and_touches_its_own(heights, extra):
    values = np.sort(np.array(heights, dtype=float))[::-1] / 1000.0 + 1.0
    start = float(values[0]) + extra / 10.0
    nodes = np.arange(len(values)) * 0.125 - 1.0
    kept, weights = _hull(nodes, values, start)
    assert (weights >= 0.0).all()
    for node, value in zip(nodes, values, strict=True):
        gaps = np.maximum(-np.expm1(node - nodes[kept]), 0.0)
        assert float(weights @ gaps) + values[-1] <= value + 1e-12
    for k in kept:
        gaps = np.maximum(-np.expm1(nodes[k] - nodes[kept]), 0.0)
        assert float(weights @ gaps) + values[-1] == pytest.approx(values[k], abs=1e-12)
    scanned = _scan(np.arange(len(values)), nodes, values, start)
    slopes = np.diff(values[scanned]) / np.diff(np.exp(nodes[scanned]))
    assert (np.diff(slopes) >= -1e-9).all()


def brute_delta(first, second, count, ratio):
    """The hockey stick of ``count`` uses over all sequences of outputs, in rationals."""
    total = Fraction(0)
    for sequence in itertools.product(range(len(first)), repeat=count):
        p = q = Fraction(1)
        for output in sequence:
            p, q = p * first[output], q * second[output]
        total += max(p - ratio * q, Fraction(0))
    return total


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any),
    st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any),
    st.integers(2, 4),
    st.sampled_from([1.0, 1.25, 2.0, 9.0]),
)
def test_random_finite_pairs_agree_with_brute_force_in_rationals(first, second, count, ratio):
    p = [Fraction(x, sum(first)) for x in first]
    q = [Fraction(x, sum(second)) for x in second]
    pair = FinitePair(tuple(map(float, p)), tuple(map(float, q)))
    truth = max(brute_delta(p, q, count, Fraction(ratio)), brute_delta(q, p, count, Fraction(ratio)))
    # The pair's floats and the logarithm of the ratio are rounded, so the truth is known to a few units only.
    bounds = get_accountant("pld").curve([uses(pair, count)], Adjacency.ADD_REMOVE).delta(float(np.log(ratio)))
    assert bounds.lower <= float(truth) * (1.0 + 1e-14) + 1e-15
    assert float(truth) <= bounds.upper * (1.0 + 1e-14) + 1e-15


@pytest.mark.parametrize("tilt", [0.3, 2.0, 12.0, 300.0])
def test_the_lattice_moment_is_a_close_upper_bound(tilt):
    for single in (0.01, 0.3, 4.0):
        bound = lattice_log_moment(response(single), "remove")(tilt)
        truth = mpmath.log(
            (mpmath.exp((tilt + 1) * mpmath.mpf(single)) + mpmath.exp(-tilt * mpmath.mpf(single)))
            / (1 + mpmath.exp(mpmath.mpf(single)))
        )
        assert truth * (1 - mpmath.mpf(10) ** -12) <= bound <= truth * (1.0 + 0.016)


@pytest.mark.parametrize("tilt", [0.5, 3.0])
def test_the_lattice_moment_of_laplace_matches_its_closed_form(tilt):
    # Mironov 2017, Proposition 6, at order tilt + 1.
    b, a = mpmath.mpf(1.5), tilt + 1
    truth = mpmath.log(a * mpmath.exp((a - 1) / b) / (2 * a - 1) + (a - 1) * mpmath.exp(-a / b) / (2 * a - 1))
    bound = lattice_log_moment(LaplacePair(1.5), "remove")(tilt)
    assert truth <= bound <= truth * (1.0 + 0.016)


def test_no_moment_is_claimed_where_tails_never_vanish():
    assert lattice_log_moment(response(0.3, 0.01), "remove")(1.0) == np.inf
    assert lattice_log_moment(NormalPair(0.05, 1.2), "remove")(1.0) == np.inf
