"""Scalar numerics: log-space functions against mpmath, one-dimensional search."""

from __future__ import annotations

import math

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpbudget._numerics import (
    exp_or_inf,
    exp_up,
    log1p_exp,
    log_expm1,
    log_kappa,
    minimize_unimodal,
    truncate_mantissa,
)


@given(st.floats(-700, 700))
def test_log1p_exp_agrees_with_mpmath(x):
    with mpmath.workdps(400):
        assert log1p_exp(x) == pytest.approx(float(mpmath.log1p(mpmath.exp(x))), rel=1e-14)


@given(st.floats(1e-12, 1e5))
def test_log_expm1_agrees_with_mpmath(x):
    with mpmath.workdps(50):
        assert log_expm1(x) == pytest.approx(float(mpmath.log(mpmath.expm1(x))), rel=1e-13, abs=1e-15)


@given(st.floats(1e-9, 1e9))
def test_log_kappa_is_the_logarithm_of_its_closed_form(a):
    with mpmath.workdps(40):
        b = mpmath.mpf(a)
        assert log_kappa(a) == pytest.approx(float(b * mpmath.log(b / (1 + b)) - mpmath.log1p(b)), rel=1e-14)


@given(st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_kappa_turns_an_exponential_into_a_bound_of_the_hockey_stick(a, y):
    payoff = -math.expm1(-y) if y > 0 else 0.0
    assert payoff <= math.exp(min(log_kappa(a) + a * y, 700.0)) * (1 + 1e-12)


@pytest.mark.parametrize("a", [0.01, 0.5, 1.0, 7.0, 200.0])
def test_kappa_is_attained_so_no_smaller_constant_would_do(a):
    y = math.log1p(1.0 / a)  # where the ratio of both sides is largest
    assert -math.expm1(-y) == pytest.approx(math.exp(log_kappa(a) + a * y), rel=1e-12)


@given(st.floats(-760, 700))
def test_exp_up_is_above_exp_and_never_zero(x):
    with mpmath.workdps(30):
        assert mpmath.mpf(exp_up(x)) >= mpmath.exp(x)
    assert exp_up(x) > 0.0


def test_exp_or_inf_does_not_overflow():
    assert exp_or_inf(1e6) == math.inf
    assert exp_or_inf(1.0) == math.e


@given(st.floats(1e-250, 1e250), st.integers(1, 1 << 30))
def test_multiples_of_a_truncated_step_are_exact(x, k):
    step = truncate_mantissa(x)
    assert 0 < step <= x
    assert step > x * (1 - 2.0**-18)
    with mpmath.workdps(60):
        assert mpmath.mpf(step) * k == mpmath.mpf(step * k)


@given(st.floats(-8, 8), st.floats(-8, 8))
def test_the_minimum_of_a_quasi_convex_function_is_found(optimum, start):
    argument, value = minimize_unimodal(lambda x: math.log1p((x - optimum) ** 2), start, -20, 20, 1e-6)
    assert argument == pytest.approx(optimum, abs=1e-3)
    assert value < 1e-6


def test_a_search_that_starts_where_the_function_is_infinite_still_finds_the_minimum():
    argument, _ = minimize_unimodal(lambda x: math.inf if x > 2 else (x - 1) ** 2, 9.0, -20, 20, 1e-6)
    assert argument == pytest.approx(1.0, abs=1e-3)
