"""The exact accountant: certified brackets contain the truth, are narrow, and always exist."""

from __future__ import annotations

import mpmath
import pytest
from accounting_cases import WORKLOADS, sampled
from hypothesis import given, settings
from hypothesis import strategies as st

from dpbudget.accountants import exact, get_accountant
from dpbudget.mechanisms import Adjacency

PRV, RDP = get_accountant("prv"), get_accountant("rdp")
DIRECTIONS = ("remove", "add")

#: Noise multipliers at which epsilon is 3, by a separate implementation.
SIGMA_AT_THREE = {"W1": 0.9684079236, "W2": 5.7673549916, "W3": 5.3627302873}
#: Widths relative to max(1, epsilon); twice to ten times what was measured.
WIDTH = {"W4": 1e-8, "W5": 1e-9, "W6": 1e-9}


def curve(*steps):
    return PRV.curve([sampled(*step) for step in steps], Adjacency.ADD_REMOVE)


def truth(steps, epsilon, digits=15):
    """(delta of "remove", delta of "add") by the mpmath contour."""
    return [exact.delta(steps, epsilon, direction, digits) for direction in DIRECTIONS]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_the_bracket_of_every_workload_contains_the_truth_and_is_narrow(workload):
    bounds = PRV.curve(workload.charges, Adjacency.ADD_REMOVE).epsilon(workload.delta)
    assert bounds.kind == "certified"
    assert bounds.lower <= workload.epsilon + workload.digits
    assert bounds.upper >= workload.epsilon - workload.digits
    assert bounds.width <= WIDTH.get(workload.name, 1e-10) * max(1.0, workload.epsilon)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_delta_at_the_true_epsilon_is_the_workloads_delta(workload):
    bounds = PRV.curve(workload.charges, Adjacency.ADD_REMOVE).delta(workload.epsilon)
    slack = 3e-8 if workload.name == "W11" else 3e-11 * max(1.0, workload.epsilon)
    assert bounds.lower <= workload.delta * (1 + slack)
    assert bounds.upper >= workload.delta * (1 - slack)
    assert bounds.width <= 1e-7 * workload.delta


@pytest.mark.parametrize("name", sorted(SIGMA_AT_THREE))
def test_epsilon_is_three_at_the_calibrated_noise(name):
    workload = next(w for w in WORKLOADS if w.name == name)
    ((rate, _, count),) = workload.steps
    sigma = SIGMA_AT_THREE[name]
    assert curve((rate, sigma * (1 + 1e-10), count)).epsilon(workload.delta).upper < 3.0
    assert curve((rate, sigma * (1 - 1e-10), count)).epsilon(workload.delta).lower > 3.0


#: Drawn at random (log-uniform); the oracle is quick on the first and takes up to 15 s on the others.
QUICK_CASES = [
    (0.733117653087338, 3.444268046493342, 557, 7.465962993272253e-08),
    (0.026308917005661, 4.580268293114536, 2173, 1.056284548678208e-08),
    (0.004266666666667, 1.1, 14062, 1e-5),
]
SLOW_CASES = [
    (0.208902924093938, 1.983848857249467, 133, 7.72118995640e-07),
    (0.086152771662475, 2.101915563072281, 208, 7.13792371774e-08),
    (0.018280733046038, 1.328199178314875, 2806, 3.90293875722e-11),
    (0.016607792052955, 1.536017117123692, 751, 4.55928233662e-11),
    (0.013579096114544, 1.345578647925293, 359, 6.12684055608e-08),
    (0.174841764600310, 0.777454143615913, 1415, 2.10279356532e-12),
]
ALL_CASES = QUICK_CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]


@pytest.mark.parametrize(("rate", "sigma", "count", "delta"), ALL_CASES)
def test_random_brackets_contain_the_mpmath_truth(rate, sigma, count, delta):
    bounds = curve((rate, sigma, count)).epsilon(delta)
    if bounds.lower > 0.0:
        assert max(truth([(rate, sigma, count)], bounds.lower)) >= delta * (1 - mpmath.mpf(10) ** -13)
    assert max(truth([(rate, sigma, count)], bounds.upper)) <= delta * (1 + mpmath.mpf(10) ** -13)


@pytest.mark.parametrize(("rate", "sigma", "count", "delta"), QUICK_CASES[:2])
def test_random_delta_brackets_contain_the_mpmath_truth(rate, sigma, count, delta):
    answer = curve((rate, sigma, count))
    epsilon = answer.epsilon(delta).upper * 0.8
    bounds = answer.delta(epsilon)
    true = max(truth([(rate, sigma, count)], epsilon))
    assert bounds.lower <= true * (1 + mpmath.mpf(10) ** -13)
    assert bounds.upper >= true * (1 - mpmath.mpf(10) ** -13)


def test_heterogeneous_phases_agree_with_the_mpmath_truth():
    steps = [(0.3, 1.5, 60), (0.1, 1.0, 50), (0.5, 4.0, 40)]
    bounds = curve(*steps).delta(6.0)
    true = max(truth(steps, 6.0))
    assert bounds.lower <= true <= bounds.upper
    assert bounds.width < 1e-8 * true


def test_a_phase_without_sampling_composes_with_sampled_ones():
    steps = [(0.2, 1.5, 50), (1.0, 8.0, 20)]
    bounds = curve(*steps).epsilon(1e-6)
    assert max(truth(steps, bounds.lower)) >= 1e-6 * (1 - 1e-12)
    assert max(truth(steps, bounds.upper)) <= 1e-6 * (1 + 1e-12)
    assert bounds.width < 1e-8


@pytest.mark.parametrize(
    ("rate", "sigma", "epsilon"), [pytest.param(0.3, 0.8, 0.7, marks=pytest.mark.slow), (0.6, 1.5, 0.4)]
)
def test_two_steps_contain_the_truth_of_a_method_without_any_contour(rate, sigma, epsilon):
    bounds = curve((rate, sigma, 2)).delta(epsilon)
    true = max(exact.delta_two_steps(rate, sigma, epsilon, direction, 10) for direction in DIRECTIONS)
    assert bounds.lower <= true * (1 + 1e-8)
    assert bounds.upper >= true * (1 - 1e-8)


@pytest.mark.parametrize("rate", [1e-7, 1e-3, 0.2, 0.95, 1.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-12, 1e-300])
def test_a_single_step_is_exact(rate, delta):
    rate = int(rate * 2**64) / 2**64
    bounds = curve((rate, 0.8, 1)).epsilon(delta)
    assert bounds.width <= 1e-11 * max(1.0, bounds.upper)
    worst = max(exact.delta_one_step(rate, 0.8, bounds.upper, direction) for direction in DIRECTIONS)
    assert worst <= delta
    if bounds.lower > 0.0:
        assert max(exact.delta_one_step(rate, 0.8, bounds.lower, d) for d in DIRECTIONS) >= delta


@settings(max_examples=25, deadline=None)
@given(
    log_rate=st.floats(-7, 0),
    log_sigma=st.floats(-0.69, 2.3),
    log_count=st.floats(0, 9),
    log_delta=st.floats(-300, -2),
)
def test_any_valid_input_has_a_certified_answer_not_above_the_renyi_bound(log_rate, log_sigma, log_count, log_delta):
    charges = [sampled(10**log_rate, 10**log_sigma, int(10**log_count))]
    bounds = PRV.curve(charges, Adjacency.ADD_REMOVE).epsilon(10**log_delta)
    renyi = RDP.curve(charges, Adjacency.ADD_REMOVE).epsilon(10**log_delta)
    assert bounds.kind == "certified"
    assert 0.0 <= bounds.lower <= bounds.upper <= renyi.upper * (1 + 1e-6)


@settings(max_examples=6, deadline=None)
@given(st.floats(1e-3, 0.5), st.floats(0.6, 8), st.integers(100, 10**5), st.floats(1e-10, 1e-4))
def test_more_steps_less_noise_or_less_delta_never_cost_less(rate, sigma, count, delta):
    base = curve((rate, sigma, count)).epsilon(delta)
    assert curve((rate, sigma, 2 * count)).epsilon(delta).upper >= base.lower
    assert curve((rate, sigma * 0.9, count)).epsilon(delta).upper >= base.lower
    assert curve((rate, sigma, count)).epsilon(delta / 2).upper >= base.lower
    assert curve((min(rate * 1.5, 1.0), sigma, count)).epsilon(delta).upper >= base.lower


@settings(max_examples=12, deadline=None)
@given(st.floats(1e-3, 0.5), st.floats(0.6, 8), st.integers(100, 10**5), st.floats(0.0, 20.0))
def test_delta_brackets_are_intervals_that_fall_with_epsilon(rate, sigma, count, epsilon):
    answer = curve((rate, sigma, count))
    first, second = answer.delta(epsilon), answer.delta(epsilon + 0.5)
    assert 0.0 <= first.lower <= first.upper <= 1.0
    assert second.lower <= first.upper


def test_without_a_useful_contour_the_answer_is_wide_but_certified():
    rate, sigma, delta = 1e-5, 0.9, 1e-9
    bounds = curve((rate, sigma, 3)).epsilon(delta)
    alone = curve((rate, sigma, 1)).epsilon(delta)
    renyi = RDP.curve([sampled(rate, sigma, 3)], Adjacency.ADD_REMOVE).epsilon(delta)
    assert alone.lower * (1 - 1e-12) <= bounds.lower <= bounds.upper <= renyi.upper
    assert bounds.kind == "certified"


def test_the_answer_does_not_depend_on_what_was_asked_before():
    fresh = curve((0.01, 1.0, 1000)).epsilon(1e-6)
    used = curve((0.01, 1.0, 1000))
    for delta in (1e-3, 1e-30, 1e-9):
        used.epsilon(delta)
    used.delta(0.5)
    assert used.epsilon(1e-6) == fresh
