"""Lines of figures: what one pair says, by two independent ways."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpbudget.mechanisms import Adjacency
from dpbudget.report.figures import FALSE_POSITIVES, TABLED
from dpbudget.report.lines import PairCurve, epsilon_grid, kink, least_false_negatives, pair_line

EPSILONS, DELTAS = st.floats(1e-3, 20.0), st.floats(1e-9, 0.5)


@given(epsilon=EPSILONS, delta=DELTAS, at=st.floats(0.0, 20.0))
def test_the_profile_of_a_pair_is_the_supremum_over_its_trade_off(epsilon: float, delta: float, at: float) -> None:
    """delta(e) = sup over alpha of 1 - beta(alpha) - e^e alpha, and beta is piecewise linear with corners at 0 and the
    kink and where it reaches 0."""
    corners = [0.0, kink(epsilon, delta), 1.0 - delta]
    sup = max(1.0 - pair_line(alpha, epsilon, delta) - math.exp(at) * alpha for alpha in corners)
    found = PairCurve(epsilon, delta).delta(at).upper
    assert found >= sup - 1e-12
    assert found == pytest.approx(sup, abs=1e-9)


@given(epsilon=EPSILONS, delta=DELTAS, alpha=st.floats(0.0, 1.0))
def test_the_attack_on_a_pair_is_its_own_line(epsilon: float, delta: float, alpha: float) -> None:
    curve = PairCurve(epsilon, delta)
    (beta,) = curve.trade_off([alpha])
    assert beta.lower <= max(pair_line(alpha, epsilon, delta), 0.0)
    assert beta.lower == pytest.approx(min(pair_line(alpha, epsilon, delta), 1.0 - alpha), abs=1e-12)
    assert curve.tpr_at(alpha).upper == pytest.approx(1.0 - beta.lower, abs=1e-12)


def test_a_pair_says_nothing_below_its_delta() -> None:
    curve = PairCurve(2.0, 1e-5)
    assert curve.epsilon(1e-5).upper == 2.0
    assert curve.epsilon(1e-6).upper == math.inf
    assert curve.delta(700.0).upper == 1e-5
    assert PairCurve(1e6, 1e-5).delta(3.0).upper == 1.0


@given(epsilon=EPSILONS, delta=DELTAS)
def test_thresholds_find_no_better_attack_than_there_is(epsilon: float, delta: float) -> None:
    alphas = [0.001, 0.01, 0.3, 0.9]
    drawn = least_false_negatives(PairCurve(epsilon, delta), epsilon, alphas, 41)
    for alpha, low in zip(alphas, drawn, strict=True):
        assert low <= pair_line(alpha, epsilon, delta) + 1e-9


def test_a_grid_goes_from_zero_to_beyond_epsilon() -> None:
    grid = epsilon_grid(2.0, 41)
    assert (grid[0], grid[-1], len(grid)) == (0.0, 2.5, 41)


def test_what_a_table_shows_is_among_the_points_of_the_line() -> None:
    assert set(TABLED) <= set(FALSE_POSITIVES)
    assert list(FALSE_POSITIVES) == sorted(FALSE_POSITIVES)


def test_the_profile_of_a_plan_covers_the_tail_of_noise_where_a_record_is_replaced() -> None:
    from reportkit import plan_for

    from dpbudget._targets import curve_of

    plan = plan_for(epsilon=8.0, delta=1e-12, adjacency="replace-one", batch_size=2000, steps=2)
    assert plan.adjacency is Adjacency.REPLACE_ONE
    other = plan.replace(noise="exact")
    # Three times the additive part of add-remove, at twice the shift.
    from dpbudget._truncation import truncation_delta

    phase = plan.phases[0]
    tail = truncation_delta([(phase.rate, phase.noise_multiplier, 2)], plan.bounded_values, True)
    high, low = curve_of(plan).delta(30.0).upper, curve_of(other).delta(30.0).upper
    assert tail > 0.0
    assert high - low == pytest.approx(tail, rel=1e-6)
