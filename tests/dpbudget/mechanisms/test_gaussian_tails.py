"""Tails of the Gaussian pairs against mpmath, from the centre to 1e-300."""

from __future__ import annotations

import math
from functools import cache

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tail_checks import check_enclosure, check_shape, normal_tail

from dpbudget.errors import InvalidParameter
from dpbudget.mechanisms import ReplaceOneGaussianPair, SubsampledGaussianPair

LOSSES = [-60.0, -5.0, -1.0, -0.3, -1e-3, -1e-9, 0.0, 1e-300, 1e-9, 1e-7, 1e-3, 0.3, 1.0, 5.0, 60.0, 300.0]
PAIRS = [(1.0, 1.0), (0.5, 2.0), (0.01, 0.7), (1e-7, 1.0), (1e-7, 200.0), (0.999, 0.2), (1e-3, 20.0), (2.0**-64, 0.5)]


def sampled_truth(rate, sigma):
    q, s = mpmath.mpf(rate), mpmath.mpf(sigma)

    def truth(t, direction):
        """From the point x at which the likelihood ratio is e^t; adding has its losses above t to the left of it."""
        sign = 1 if direction == "remove" else -1
        ratio = (mpmath.exp(sign * t) - 1 + q) / q
        if ratio <= 0:
            return (mpmath.mpf(1), mpmath.mpf(1)) if sign > 0 else (mpmath.mpf(0), mpmath.mpf(0))
        x = s**2 * mpmath.log(ratio) + mpmath.mpf(1) / 2
        p = (1 - q) * normal_tail(sign * x / s) + q * normal_tail(sign * (x - 1) / s)
        return (p, normal_tail(x / s)) if sign > 0 else (normal_tail(-x / s), p)

    return truth


def replaced_truth(rate, sigma):
    q, s = mpmath.mpf(rate), mpmath.mpf(sigma)

    def loss(x):
        near, far = mpmath.exp((2 * x - 1) / (2 * s * s)), mpmath.exp((-2 * x - 1) / (2 * s * s))
        return mpmath.log((1 - q + q * near) / (1 - q + q * far))

    @cache
    def inverse(t):
        # Bisection: the loss increases. At 0 it is flat like exp(-m^2 / 2), so that all digits are needed.
        low, high = -s * s * 100 - 1, s * s * 100 + 1
        assert loss(low) < t < loss(high)
        for _ in range(400):
            middle = (low + high) / 2
            low, high = (middle, high) if loss(middle) <= t else (low, middle)
        return low

    def truth(t, direction):
        low = inverse(t)
        tails = normal_tail(low / s), normal_tail((low - 1) / s), normal_tail((low + 1) / s)
        return (1 - q) * tails[0] + q * tails[1], (1 - q) * tails[0] + q * tails[2]

    return truth


@pytest.mark.parametrize(("rate", "sigma"), PAIRS)
def test_the_tails_of_the_sampled_pair_enclose_the_truth_tightly(rate, sigma):
    with mpmath.workdps(60):
        check_enclosure(SubsampledGaussianPair(rate, sigma), sampled_truth(rate, sigma), LOSSES)


@pytest.mark.parametrize(("rate", "sigma"), [(0.5, 2.0), (0.01, 0.7), (1e-7, 1.0), (0.2, 0.1)])
def test_the_tails_follow_the_loss_down_to_its_lower_edge(rate, sigma):
    edge = math.log1p(-rate)
    steps = [edge * (1 - 10.0**-k) for k in range(1, 15)]
    losses = sorted({*steps, math.nextafter(edge, 0), edge, math.nextafter(edge, -1)})
    with mpmath.workdps(60):
        truth, pair = sampled_truth(rate, sigma), SubsampledGaussianPair(rate, sigma)
        check_enclosure(pair, truth, losses, relative=1e-9)
        check_enclosure(pair, truth, sorted(-loss for loss in losses), relative=1e-9)
    beyond = pair.tails(np.array([-2 * edge]), "add")
    assert (beyond.first_upper[0], beyond.second_upper[0]) == (0.0, 5e-324)


@pytest.mark.parametrize(("rate", "sigma"), [(0.5, 2.0), (0.01, 0.7), (1e-7, 1.0), (0.9, 0.05), (0.3, 50.0)])
def test_the_tails_of_the_replaced_pair_enclose_the_truth_tightly(rate, sigma):
    with mpmath.workdps(150):
        check_enclosure(
            ReplaceOneGaussianPair(rate, sigma), replaced_truth(rate, sigma), [-60.0, -1e-3, 0.0, 1e-9, 0.3, 5.0, 60.0]
        )


def test_the_first_law_is_a_density_integral():
    """Independent of every inversion: integrate the density over the outputs whose loss is above the threshold."""
    q, s, t = mpmath.mpf(0.3), mpmath.mpf(0.8), mpmath.mpf(0.4)

    def kept(x):
        p = (1 - q) * mpmath.npdf(x, 0, s) + q * mpmath.npdf(x, 1, s)
        return p if mpmath.log(p / mpmath.npdf(x, 0, s)) > t else mpmath.mpf(0)

    edge = mpmath.findroot(lambda x: mpmath.log(1 - q + q * mpmath.exp((2 * x - 1) / (2 * s * s))) - t, 1)
    exact = mpmath.quad(kept, [edge, edge + 1, edge + 3, edge + 12])
    tails = SubsampledGaussianPair(0.3, 0.8).tails(np.array([0.4]), "remove")
    assert tails.first_lower[0] == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("pair", [SubsampledGaussianPair(0.2, 0.8), ReplaceOneGaussianPair(0.2, 0.8)])
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_delta_from_the_tails_falls_and_is_convex(pair, direction):
    losses = np.linspace(-4.0, 4.0, 401)
    check_shape(pair.tails(losses, direction), losses)


def test_everything_is_above_a_very_low_threshold():
    for pair in (SubsampledGaussianPair(0.2, 0.8), ReplaceOneGaussianPair(0.2, 0.8)):
        for direction in ("remove", "add"):
            tails = pair.tails(np.array([-1e6]), direction)
            assert tails.first_lower[0] >= 1 - 1e-14
            assert tails.second_upper[0] == 1.0


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-12, 1.0), st.floats(0.05, 200.0), st.floats(-40.0, 40.0))
def test_the_sampled_tails_enclose_the_truth_anywhere(rate, sigma, loss):
    with mpmath.workdps(60):
        check_enclosure(SubsampledGaussianPair(rate, sigma), sampled_truth(rate, sigma), [loss], relative=None)


@settings(max_examples=12, deadline=None)
@given(st.floats(1e-12, 0.999), st.floats(0.05, 50.0), st.floats(-40.0, 40.0))
def test_the_replaced_tails_enclose_the_truth_anywhere(rate, sigma, loss):
    with mpmath.workdps(150):
        check_enclosure(ReplaceOneGaussianPair(rate, sigma), replaced_truth(rate, sigma), [loss], relative=None)


def test_the_assumed_error_of_the_normal_tail_holds():
    from scipy.special import ndtr

    with mpmath.workdps(60):
        for z in np.concatenate([np.linspace(-8, 37.5, 300), np.linspace(-1, 1, 60)]):
            wrong = abs(mpmath.mpf(float(ndtr(-z))) / normal_tail(mpmath.mpf(float(z))) - 1)
            assert wrong <= (32 + 4 * max(z, 0) ** 2) * 2.0**-53


@pytest.mark.parametrize("function", ["exp", "expm1", "log", "log1p", "arcsinh"])
def test_elementary_functions_are_within_eight_ulp(function):
    exact = {"arcsinh": mpmath.asinh}.get(function) or getattr(mpmath, function)
    points = np.concatenate([np.logspace(-18, 2, 120), -np.logspace(-18, -0.4, 60)])
    points = points[points > 0] if function == "log" else points
    with mpmath.workdps(40):
        for x, y in zip(points, getattr(np, function)(points), strict=True):
            assert abs(mpmath.mpf(float(y)) - exact(mpmath.mpf(float(x)))) <= 8 * math.ulp(abs(float(y)))


@pytest.mark.parametrize("losses", [[math.nan], [math.inf], [[0.0]]])
def test_thresholds_that_are_no_finite_row_are_refused(losses):
    with pytest.raises(InvalidParameter, match="losses"):
        SubsampledGaussianPair(0.5, 1.0).tails(np.array(losses), "remove")
