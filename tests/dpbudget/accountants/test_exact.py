"""The oracles against each other: contour, nested integral, closed forms."""

from __future__ import annotations

import mpmath

from dpbudget.accountants import exact


def close(first, second, relative):
    with mpmath.workdps(60):
        return abs(first - second) <= relative * abs(second)


def test_the_contour_oracle_reproduces_the_gaussian_closed_form():
    value = exact.delta([(1.0, 20.0, 1000)], 8.3, "remove", 15)
    assert close(value, exact.delta_gaussian(1000**0.5 / 20, 8.3), 1e-13)


def test_the_contour_oracle_composes_different_gaussians():
    value = exact.delta([(1.0, 5.0, 20), (1.0, 10.0, 30)], 3.0, "add", 15)
    assert close(value, exact.delta_gaussian((20 / 25 + 30 / 100) ** 0.5, 3.0), 1e-13)


def test_the_one_step_oracle_is_the_gaussian_profile_at_rate_one():
    for direction in ("remove", "add"):
        assert close(exact.delta_one_step(1.0, 0.7, 2.0, direction), exact.delta_gaussian(1 / 0.7, 2.0), 1e-14)


def test_two_steps_without_sampling_are_one_gaussian():
    value = exact.delta_two_steps(1.0, 2.0, 0.5, "remove", 8)
    assert close(value, exact.delta_gaussian(2**0.5 / 2.0, 0.5), 1e-6)


def test_the_moment_at_tilt_one_is_the_chi_square_divergence():
    value = exact.log_moment(0.3, 0.8, 1.0, "remove", 40)
    with mpmath.workdps(40):
        chi = mpmath.mpf(0.3) ** 2 * mpmath.expm1(1 / mpmath.mpf(0.8) ** 2)
        assert close(value, mpmath.log1p(chi), 1e-35)
