"""Moments of one step against mpmath: values, relative accuracy, and error bounds that hold."""

from __future__ import annotations

import math
import random

import mpmath
import numpy as np
import pytest

from dpbudget.accountants import exact
from dpbudget.accountants._law import Law
from dpbudget.accountants._moment_bound import MomentBound, log_moment_bounds
from dpbudget.accountants._phases import Phase
from dpbudget.accountants._quadrature import choose_grid
from dpbudget.accountants._tilted_step import TiltedStep, _expm1_minus
from dpbudget.mechanisms import SubsampledGaussianPair

ORDERS = (1.001, 1.01, 1.1, 1.5, 2.0, 3.3, 8.0, 30.0, 200.0)


def wide_cases():
    rng = random.Random(20240607)
    cases = [(10 ** rng.uniform(-6, -0.005), 10 ** rng.uniform(-0.52, 1.7), order) for order in ORDERS * 3]
    cases += [(1e-6, 0.3, 200.0), (1e-6, 50.0, 1.001), (0.999, 0.3, 1.001), (0.5, 50.0, 200.0), (0.05, 0.4, 1.187)]
    return cases


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize(("rate", "sigma", "order"), wide_cases())
def test_log_moments_agree_with_mpmath_to_1e_12_and_within_their_bounds(rate, sigma, order, direction):
    true = exact.log_moment(rate, sigma, mpmath.mpf(order) - 1, direction, 45)
    low, high = log_moment_bounds(SubsampledGaussianPair(rate, sigma), order - 1, direction)
    # order - 1 is rounded here and exact there, which moves log A by up to order / (order - 1) roundoffs.
    slack = float(abs(true)) * 2.0**-52 * order / (order - 1) * 2
    assert low - slack <= true <= high + slack
    assert high - low <= 2e-12 * true + 2 * slack
    assert abs(0.5 * (low + high) - true) <= 1e-12 * true


@pytest.mark.parametrize("order", ORDERS)
def test_without_sampling_the_moment_is_the_gaussian_closed_form(order):
    low, high = log_moment_bounds(SubsampledGaussianPair(1.0, 1.7), order - 1, "remove")
    true = order * (order - 1) / (2 * 1.7**2)
    assert low <= true <= high
    assert high == pytest.approx(true, rel=1e-13)


def test_an_integer_order_agrees_with_the_binomial_sum():
    rate, sigma, order = 0.03, 0.9, 7
    with mpmath.workdps(50):
        q, s = mpmath.mpf(rate), mpmath.mpf(sigma)
        terms = [
            mpmath.binomial(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp((k * k - k) / (2 * s * s))
            for k in range(order + 1)
        ]
        true = mpmath.log(mpmath.fsum(terms))
    low, high = log_moment_bounds(SubsampledGaussianPair(rate, sigma), order - 1.0, "remove")
    assert low <= true <= high
    assert high - low < 1e-12 * true


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize(
    ("rate", "sigma", "tilt", "u_max"),
    [
        (0.004, 1.1, 6.9, 25.0),
        (1e-3, 1.0, 3.6, 12.0),
        (0.05, 0.4, 0.18, 1.5),
        (0.3, 0.8, 0.7, 40.0),
        (1e-4, 0.6, 4.0, 90.0),
    ],
)
def test_complex_moments_lie_within_their_error_bounds(rate, sigma, tilt, u_max, direction):
    step = TiltedStep(Law(rate, 1.0 / sigma, direction), tilt, u_max, 45.0)
    u = np.linspace(0.0, u_max, 9)
    answer = step.moments(u)
    for at, value, error in zip(u, answer.log_moment, answer.error, strict=True):
        with mpmath.workdps(40):
            true = mpmath.exp(exact.log_moment(rate, sigma, mpmath.mpc(tilt, at), direction, 30))
            relative = abs(true / mpmath.exp(mpmath.mpc(complex(value))) - 1)
        assert relative <= error
        assert error < 1e-10


@pytest.mark.parametrize("direction", ["remove", "add"])
def test_the_scaled_path_and_the_centred_path_bound_the_same_moment(direction):
    pair = (0.02, 0.5)
    step = TiltedStep(Law(pair[0], 1.0 / pair[1], direction), 9.0, 0.0, 45.0)
    true = exact.log_moment(*pair, 9.0, direction, 30)
    value, error = step.log_moment()
    assert step.plain == (direction == "remove")
    assert abs(value - true) <= error


def test_a_grid_that_would_be_too_large_is_refused():
    assert choose_grid(Law(0.1, 1000.0, "remove"), 1e4, 0.0, 50.0) is None


def test_where_no_grid_exists_convexity_in_the_rate_still_bounds_the_moment():
    low, high = log_moment_bounds(SubsampledGaussianPair(0.25, 1e-3), 1e4, "remove")
    gaussian = 0.5 * 1e4 * (1e4 + 1) * 1e6
    assert low == 0.0
    # Padded by 1e-12 for rounding, never below the bound itself (1 - q + q e^g, whose logarithm exceeds g + log q).
    assert gaussian + math.log(0.25) <= high <= (gaussian + math.log(0.25)) * (1 + 2e-12)


@pytest.mark.parametrize("rate", [2.0**-60, 1e-12, 1e-6])
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_the_bound_by_convexity_is_rounded_up_at_tiny_rates(rate, direction):
    tilt, sigma = 900.0, 100.0
    _, high = log_moment_bounds(SubsampledGaussianPair(rate, sigma), tilt, direction)
    with mpmath.workdps(40):
        gaussian = mpmath.mpf(tilt) * (mpmath.mpf(tilt) + 1) / (2 * mpmath.mpf(sigma) ** 2)
        ceiling = mpmath.log1p(mpmath.mpf(rate) * mpmath.expm1(gaussian))
        assert exact.log_moment(rate, sigma, tilt, direction, 40) <= high <= ceiling * (1 + mpmath.mpf(10) ** -11)


@pytest.mark.parametrize("tilt", [1e-6, 0.3, 2.0, 40.0])
@pytest.mark.parametrize("rate", [1e-7, 0.01, 0.7])
def test_the_convexity_bound_is_above_the_true_moment(rate, tilt):
    true = exact.log_moment(rate, 1.3, tilt, "remove", 40)
    with mpmath.workdps(40):
        gaussian = mpmath.mpf(tilt) * (tilt + 1) / (2 * mpmath.mpf(1.3) ** 2)
        assert true <= mpmath.log1p(rate * mpmath.expm1(gaussian))


def test_moments_of_phases_add_up():
    first, second = (Phase(SubsampledGaussianPair(0.01, s), n) for s, n in ((1.0, 10), (2.0, 5)))
    together = MomentBound([first, second], "remove")(2.5)
    apart = MomentBound([first], "remove")(2.5) + MomentBound([second], "remove")(2.5)
    assert together == pytest.approx(apart, rel=1e-13)


def test_differences_that_cancel_are_computed_to_full_relative_accuracy():
    alpha = np.array([-700.0, -3.0, -0.5, -1e-3, -1e-9, 1e-12, 1e-5, 0.49, 0.51, 30.0])
    with mpmath.workdps(60):
        growth = [float(mpmath.expm1(a) - a) for a in map(mpmath.mpf, alpha)]
    np.testing.assert_allclose(_expm1_minus(alpha, np.expm1(alpha)), growth, rtol=2e-15)


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p", "sin", "cos"])
def test_numpy_functions_are_within_the_8_ulp_that_the_bounds_assume(name):
    rng = np.random.default_rng(7)
    x = np.concatenate([rng.uniform(-0.9, 5, 300), rng.uniform(-1e-3, 1e-3, 100), rng.uniform(10, 400, 200)])
    if name == "log":
        x = np.abs(x) + 1e-8
    values = getattr(np, name)(x)
    with mpmath.workdps(40):
        for at, value in zip(x, values, strict=True):
            true = getattr(mpmath, name)(mpmath.mpf(float(at)))
            assert abs(mpmath.mpf(float(value)) - true) <= 8 * math.ulp(float(true))
