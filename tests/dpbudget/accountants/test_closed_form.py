"""Closed forms: integrals of the densities themselves, symmetry, and the far tails."""

from __future__ import annotations

import math

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpbudget.accountants._closed_form import gaussian_delta, one_step_delta
from dpbudget.accountants._phases import Phase
from dpbudget.mechanisms import SubsampledGaussianPair


def integral_of_the_hockey_stick(rate, sigma, epsilon, direction):
    """E[(1 - e^(epsilon - L))_+] by quadrature, without solving for where it becomes positive."""
    with mpmath.workdps(30):
        q, s, e = mpmath.mpf(rate), mpmath.mpf(sigma), mpmath.exp(epsilon)

        def excess(x):
            base = mpmath.npdf(x, 0, s)
            mixed = (1 - q) * base + q * mpmath.npdf(x, 1, s)
            first, second = (mixed, base) if direction == "remove" else (base, mixed)
            return max(first - e * second, 0)

        return mpmath.quad(excess, mpmath.linspace(-12 * s, 1 + 12 * s, 200), maxdegree=5)


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize(
    ("rate", "sigma", "epsilon"),
    [(0.01, 1.0, 0.005), (0.3, 0.8, 0.2), (0.9, 2.0, 1.0), (1.0, 1.0, 0.7), (0.5, 0.4, 0.65)],
)
def test_one_step_is_the_integral_of_the_hockey_stick(rate, sigma, epsilon, direction):
    low, high = one_step_delta(SubsampledGaussianPair(rate, sigma), epsilon, direction)
    true = float(integral_of_the_hockey_stick(rate, sigma, epsilon, direction))
    # The integrand has a kink, so the reference is good to 1e-5 only.
    assert 0.5 * (low + high) == pytest.approx(true, rel=1e-4, abs=1e-12)
    assert high - low <= 1e-15 * high + 1e-322


def test_adding_a_record_has_no_loss_beyond_minus_log_of_one_minus_the_rate():
    pair = SubsampledGaussianPair(0.1, 1.0)
    assert one_step_delta(pair, -math.log1p(-0.1) * 1.001, "add") == (0.0, 5e-324)
    assert one_step_delta(pair, -math.log1p(-0.1) * 0.98, "add")[0] > 0.0


def test_sampling_everyone_is_the_gaussian_mechanism_in_both_directions():
    pair = SubsampledGaussianPair(1.0, 1.4)
    expected = gaussian_delta([Phase(pair, 1)], 0.9)
    assert one_step_delta(pair, 0.9, "remove") == pytest.approx(expected, rel=1e-14)
    assert one_step_delta(pair, 0.9, "add") == pytest.approx(expected, rel=1e-14)


@given(st.floats(0.2, 200), st.integers(1, 10**6), st.floats(0, 50))
def test_the_gaussian_profile_has_the_value_of_balle_and_wang(sigma, count, epsilon):
    low, high = gaussian_delta([Phase(SubsampledGaussianPair(1.0, sigma), count)], epsilon)
    with mpmath.workdps(80):
        mu = mpmath.sqrt(count) / mpmath.mpf(sigma)
        true = mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)
        assert low <= true <= high


def test_the_gaussian_profile_reaches_delta_1e_300():
    low, high = gaussian_delta([Phase(SubsampledGaussianPair(1.0, 1.0), 1)], 37.5)
    assert 1e-310 < low <= high < 1e-295
    assert high <= low * (1 + 1e-14)


def test_gaussians_compose_by_their_squared_inverse_noise():
    two = [Phase(SubsampledGaussianPair(1.0, 3.0), 9), Phase(SubsampledGaussianPair(1.0, 4.0), 16)]
    one = [Phase(SubsampledGaussianPair(1.0, math.sqrt(0.5)), 1)]
    assert gaussian_delta(two, 1.0) == pytest.approx(gaussian_delta(one, 1.0), rel=1e-14)
