"""The Renyi accountant: published figures, the oracle, properties, extreme input."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from accounting_cases import WORKLOADS, sampled
from hypothesis import given, settings
from hypothesis import strategies as st

from dpbudget.accountants import exact, get_accountant
from dpbudget.mechanisms import Adjacency

RDP = get_accountant("rdp")

#: Best bound over real orders, and the order, found by a separate implementation.
BEST = {
    "W1": (2.59654, 8.122),
    "W2": (7.09844, 4.111),
    "W3": (7.88944, 4.499),
    "W4": (3.15281, 6.211),
    "W5": (5.28342, 8.471),
    "W6": (9.81956, 8.72),
    "W7": (8.84589, 4.149),
    "W8": (195.483, 1.187),
    "W9": (7.14375, 4.739),
    "W10": (6.62575, 4.206),
    "W11": (3808.92, 1.078),
    "W12": (2.22598, 10.17),
}


def curve(*steps):
    return RDP.curve([sampled(*step) for step in steps], Adjacency.ADD_REMOVE)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_the_bound_is_above_the_truth_and_the_best_of_all_real_orders(workload):
    answer = RDP.curve(workload.charges, Adjacency.ADD_REMOVE)
    epsilon, order = BEST[workload.name]
    bounds = answer.epsilon(workload.delta)
    assert bounds.lower == 0.0
    assert bounds.upper >= workload.epsilon
    assert bounds.upper == pytest.approx(epsilon, rel=3e-6)
    assert answer.best_order(workload.delta) == pytest.approx(order, rel=2e-3)


@pytest.mark.parametrize(("rate", "sigma", "count", "delta"), [(0.01, 1.0, 500, 1e-6), (0.2, 2.0, 40, 1e-9)])
def test_no_order_on_a_fine_grid_gives_a_smaller_bound(rate, sigma, count, delta):
    upper = curve((rate, sigma, count)).epsilon(delta).upper
    for tilt in np.geomspace(0.05, 60, 25):
        moment = max(exact.log_moment(rate, sigma, tilt, d, 20) for d in ("remove", "add"))
        with mpmath.workdps(25):
            a = mpmath.mpf(tilt)
            kappa = a * mpmath.log(a / (1 + a)) - mpmath.log1p(a)
            assert upper <= (count * moment + kappa - mpmath.log(delta)) / a * (1 + 1e-7)


@settings(max_examples=40, deadline=None)
@given(
    log_rate=st.floats(-7, 0),
    log_sigma=st.floats(-0.69, 2.3),
    log_count=st.floats(0, 9),
    log_delta=st.floats(-300, -2),
)
def test_any_valid_input_has_an_answer(log_rate, log_sigma, log_count, log_delta):
    bounds = curve((10**log_rate, 10**log_sigma, int(10**log_count))).epsilon(10**log_delta)
    assert 0.0 <= bounds.upper < math.inf
    assert bounds.kind == "certified"


@pytest.mark.parametrize(
    ("rate", "sigma", "count", "delta"),
    [
        (0.999, 0.2, 10**9, 1e-300),
        (1.0, 0.2, 10**9, 1e-300),
        (1e-7, 0.2, 1, 1e-300),
        (0.3, 1e-3, 3, 1e-5),
        (0.3, 1e6, 3, 0.5),
    ],
)
def test_the_corners_of_the_range_do_not_overflow(rate, sigma, count, delta):
    answer = curve((rate, sigma, count))
    assert math.isfinite(answer.epsilon(delta).upper)
    assert 0.0 < answer.delta(1.0).upper <= 1.0
    assert answer.best_order(delta) > 1.0


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-5, 0.9), st.floats(0.4, 20), st.integers(1, 10**5), st.floats(1e-12, 1e-3))
def test_more_steps_less_noise_or_less_delta_never_cost_less(rate, sigma, count, delta):
    base = curve((rate, sigma, count)).epsilon(delta).upper
    # The order search stops at a relative error of 1e-8.
    assert curve((rate, sigma, 2 * count)).epsilon(delta).upper >= base * (1 - 1e-7)
    assert curve((rate, sigma * 0.9, count)).epsilon(delta).upper >= base * (1 - 1e-7)
    assert curve((rate, sigma, count)).epsilon(delta / 2).upper >= base * (1 - 1e-7)


def test_delta_and_epsilon_are_inverse_to_each_other():
    answer = curve((0.01, 1.0, 1000))
    epsilon = answer.epsilon(1e-6).upper
    assert answer.delta(epsilon).upper == pytest.approx(1e-6, rel=1e-5)


def test_epsilon_is_zero_where_delta_alone_suffices():
    assert curve((1e-7, 200.0, 1)).epsilon(1e-2).upper == 0.0
