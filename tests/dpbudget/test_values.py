"""Small values: bounds, meter, mechanisms, errors."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpbudget import errors
from dpbudget.curve import Bounds, round_down, round_up, show_delta
from dpbudget.mechanisms import Adjacency, Gaussian, PoissonSampled, ReplaceOneGaussianPair, SubsampledGaussianPair
from dpbudget.meter import Meter


@pytest.mark.parametrize(("lower", "upper"), [(1.0, 0.5), (math.nan, 1.0), (0.0, math.nan)])
def test_crossed_or_unknown_bounds_cannot_be_made(lower, upper):
    with pytest.raises(ArithmeticError, match="not an interval"):
        Bounds(lower, upper)


def test_bounds_print_the_guarantee_first_and_both_ends_outward():
    assert str(Bounds(2.38159692, 2.38159693)) == "2.3816 (at least 2.38159)"
    assert f"{Bounds(0.0, math.inf)}" == "inf (at least 0)"


def test_bounds_may_be_open_above():
    assert Bounds(0.0, math.inf).width == math.inf


@given(value=st.floats(1e-300, 1e300), digits=st.integers(1, 17))
def test_printed_bounds_are_rounded_outward(value, digits):
    assert float(round_down(value, digits)) <= value <= float(round_up(value, digits))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3.1, "3.1"),
        (2.3815969214, "2.3816"),
        (0.1 + 0.2, "0.300001"),
        (0.0, "0"),
        (100000.0, "100000"),
        (1.5e-13, "1.5e-13"),
        (math.inf, "inf"),
    ],
)
def test_an_upper_bound_is_short_and_never_below(value, shown):
    assert round_up(value) == shown


METER = Meter((1, 5, 10), (Bounds(0.1, 0.2), Bounds(0.5, 0.6), Bounds(0.9, 1.0)), delta=1e-5, target=1.0)


@given(st.floats(min_value=1e-300, max_value=1.0))
def test_a_printed_delta_is_never_below_the_proved_one(delta):
    assert delta <= float(show_delta(delta)) <= delta * (1 + 1.1e-5)


def test_a_printed_delta_of_few_digits_stays_as_it_is():
    assert [show_delta(delta) for delta in (5e-07, 1e-5, 0.25)] == ["5e-07", "1e-05", "0.25"]


def test_a_meter_shows_nothing_spent_before_the_first_step():
    assert METER.epsilon(0) == Bounds(0.0, 0.0)


@given(st.integers(1, 10))
def test_a_meter_never_shows_less_than_the_next_tabled_point(steps):
    shown = METER.epsilon(steps)
    following = min(index for index, tabled in enumerate(METER.steps) if tabled >= steps)
    assert shown.upper == METER.bounds[following].upper
    assert shown.lower <= METER.bounds[following].lower
    assert METER.epsilon(max(1, steps - 1)).upper <= shown.upper


def test_a_meter_refuses_steps_beyond_the_plan():
    with pytest.raises(ValueError, match="beyond the plan"):
        METER.epsilon(11)


def test_the_dominating_pair_is_all_that_an_accountant_sees():
    gaussian = Gaussian(noise_multiplier=2.0)
    sampled = PoissonSampled(rate_k=1 << 63, inner=gaussian)
    for adjacency in (Adjacency.ADD_REMOVE, Adjacency.ZERO_OUT):
        assert gaussian.dominating_pair(adjacency) == SubsampledGaussianPair(1.0, 2.0)
        assert sampled.dominating_pair(adjacency) == SubsampledGaussianPair(0.5, 2.0)


def test_replacing_a_record_moves_a_sum_twice_as_far():
    gaussian = Gaussian(noise_multiplier=2.0)
    sampled = PoissonSampled(rate_k=1 << 63, inner=gaussian)
    assert gaussian.dominating_pair(Adjacency.REPLACE_ONE) == SubsampledGaussianPair(1.0, 1.0)
    assert sampled.dominating_pair(Adjacency.REPLACE_ONE) == ReplaceOneGaussianPair(0.5, 2.0)
    assert PoissonSampled(rate_k=1 << 64, inner=gaussian).dominating_pair(Adjacency.REPLACE_ONE).symmetric


def test_mechanisms_survive_their_canonical_bytes():
    sampled = PoissonSampled(rate_k=(1 << 64) - (1 << 11), inner=Gaussian(noise_multiplier=0.7))
    assert PoissonSampled.parse(sampled.encode()) == sampled


def test_an_error_says_code_message_and_way_out():
    error = errors.BudgetExceeded("plan needs epsilon 4, 3 is left", hint="plan fewer steps")
    assert str(error) == "DP052 plan needs epsilon 4, 3 is left Fix: plan fewer steps"
    assert (error.code, error.exit_code) == ("DP052", 3)
    assert isinstance(error, errors.DPBudgetError)
