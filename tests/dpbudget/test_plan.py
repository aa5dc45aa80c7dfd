"""Budget and plan: privacy facts stated once, in canonical form."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpbudget import errors
from dpbudget._truncation import CAP, truncation_delta, truncation_factor_log
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import Budget, Claim, Phase, Plan, claimed_epsilon, joint_ideal_delta, rate_from_float

CLAIM = Claim(epsilon=2.5, delta=1e-5, accountant="prv", accountant_version=1)


def make_plan(*phases: tuple[float, float, int], **changes) -> Plan:
    built = tuple(Phase(rate_k=rate_from_float(q), noise_multiplier=s, steps=t) for q, s, t in phases)
    return Plan(**{"phases": built, "clip_norm": 1.0, "nominal_size": 60000, "claim": CLAIM, **changes})


@given(st.floats(2.0**-64, 1.0))
def test_a_rate_is_one_float_for_planner_accountant_and_sampler(rate):
    k = rate_from_float(rate)
    assert Fraction(k / 2**64) == Fraction(k, 2**64)
    assert rate_from_float(k / 2**64) == k
    assert abs(k / 2**64 - rate) <= 2.0**-65


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, 256, math.nan, math.inf, "0.1", True, 2.0**-70])
def test_a_rate_that_is_no_probability_is_refused_with_the_way_out(rate):
    with pytest.raises(errors.InvalidParameter) as caught:
        rate_from_float(rate)
    assert caught.value.code == "DP008"
    assert repr(rate) in str(caught.value)
    assert caught.value.hint


def test_a_batch_size_given_as_a_rate_is_recognised():
    with pytest.raises(errors.InvalidParameter, match="did you mean a batch size of 256"):
        rate_from_float(256)


def test_a_plan_survives_its_canonical_bytes():
    plan = make_plan((256 / 60000, 1.1, 100), (0.5, 2.0, 7), adjacency=Adjacency.ZERO_OUT, model_digest="a" * 64)
    again = Plan.parse(plan.encode())
    assert again == plan
    assert again.digest() == plan.digest()
    assert again.steps == 107
    assert [again.phase_at(step).noise_multiplier for step in (0, 99, 100, 106)] == [1.1, 1.1, 2.0, 2.0]


@pytest.mark.parametrize("step", [-1, 107])
def test_a_step_outside_the_plan_has_no_phase(step):
    with pytest.raises(errors.InvalidParameter):
        make_plan((0.1, 1.0, 100), (0.5, 2.0, 7)).phase_at(step)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"clip_norm": math.nan},
        {"phases": ()},
        {"nominal_size": 0},
        {"nominal_size": True},
        {"max_parameters": 0},
        {"noise": "fast"},
        {"sampling": "shuffled"},
        {"unit": "token"},
        {"adjacency": "neighbourly"},
        {"model_digest": "A" * 64},
        {"surprise": 1},
    ],
)
def test_a_plan_outside_its_ranges_cannot_be_made(changes):
    with pytest.raises(ValueError):
        make_plan((0.1, 1.0, 100), **changes)


@pytest.mark.parametrize(
    "phase",
    [
        {"rate_k": 0, "noise_multiplier": 1.0, "steps": 1},
        {"rate_k": 2**64 + 1, "noise_multiplier": 1.0, "steps": 1},
        {"rate_k": 2**64 - 1, "noise_multiplier": 1.0, "steps": 1},  # rounds up to the whole dataset
        {"rate_k": 2**63 + 1, "noise_multiplier": 1.0, "steps": 1},  # rounds down: the accountant would under-count
        {"rate_k": 1, "noise_multiplier": 0.0, "steps": 1},
        {"rate_k": 1, "noise_multiplier": math.nan, "steps": 1},
        {"rate_k": 1, "noise_multiplier": -1.0, "steps": 1},
        {"rate_k": 1, "noise_multiplier": 1.0, "steps": 0},
        {"rate_k": 1, "noise_multiplier": 1.0, "steps": 1.0},
    ],
)
def test_a_phase_outside_its_ranges_cannot_be_made(phase):
    with pytest.raises(ValueError):
        Phase(**phase)


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (3.0, 0.0), (3.0, 1.0), (math.nan, 0.5), (math.inf, 0.5)]
)
def test_a_budget_outside_its_ranges_cannot_be_made(epsilon, delta):
    with pytest.raises(ValueError):
        Budget(epsilon=epsilon, delta=delta)


@given(st.floats(0, 1e5))
def test_a_claim_lies_above_its_bound_by_one_to_two_units(upper):
    unit = 1e-9 * max(1.0, upper)
    assert upper + 0.999 * unit <= claimed_epsilon(upper) <= upper + 2.001 * unit


@given(st.floats(0, 100), st.floats(-0.49, 0.49))
def test_a_drift_of_half_a_unit_never_breaks_a_claim(upper, drift):
    assert claimed_epsilon(upper) >= upper + drift * 1e-9 * max(1.0, upper)


class TestTheBoundedTailIsCharged:
    """The tail of the noise generator takes its share of delta."""

    @staticmethod
    def exact(q: float, sigma: float, steps: int, parameters: int) -> tuple[mpmath.mpf, mpmath.mpf]:
        with mpmath.workdps(40):
            cap, shift = mpmath.sqrt(128 * mpmath.log(2)), 1 / mpmath.mpf(sigma)
            pairs = (parameters + 1) // 2
            spread = cap * mpmath.exp(-cap * cap / 2) * mpmath.sqrt(pairs) * shift
            additive = steps * mpmath.mpf(q) * (spread + mpmath.exp(-((cap - shift) ** 2) / 2))
            return additive, -mpmath.log1p(-(mpmath.mpf(2) ** -64)) * pairs * steps

    @given(st.floats(1e-6, 1), st.floats(0.2, 100), st.integers(1, 10**8), st.integers(1, 1 << 40))
    def test_the_float_formulas_round_up(self, q, sigma, steps, parameters):
        additive, factor = self.exact(q, sigma, steps, parameters)
        assert additive <= truncation_delta([(q, sigma, steps)], parameters) <= additive * (1 + 1e-10)
        assert factor <= truncation_factor_log(steps, parameters) <= factor * (1 + 1e-10)

    @given(st.floats(1e-3, 1), st.floats(0.8, 10), st.integers(1, 10**5), st.floats(1e-6, 1e-3))
    def test_what_is_left_of_delta_is_rounded_down(self, q, sigma, steps, delta):
        plan = make_plan((q, sigma, steps))
        additive, factor = self.exact(plan.phases[0].rate, sigma, steps, plan.max_parameters)
        with mpmath.workdps(40):
            left = (delta - additive) * mpmath.exp(-factor)
            assert left * (1 - mpmath.mpf(10) ** -12) <= plan.ideal_delta(delta) <= left

    def test_a_delta_too_small_for_the_tail_is_refused_with_the_way_out(self):
        with pytest.raises(errors.InvalidParameter) as caught:
            make_plan((1.0, 1.0, 10**6)).ideal_delta(1e-12)
        assert caught.value.code == "DP053"
        assert "max_parameters" in caught.value.hint

    def test_a_noise_multiplier_without_a_proved_tail_is_refused(self):
        with pytest.raises(errors.InvalidParameter, match="inf"):
            make_plan((0.01, 0.1, 10)).ideal_delta(1e-5)

    def test_two_plans_together_cost_the_sum_of_their_tails(self):
        one, two = make_plan((0.5, 1.0, 1000)), make_plan((0.1, 0.9, 500))
        both = 1e-6 - joint_ideal_delta((one, two), 1e-6)
        assert both == pytest.approx((1e-6 - one.ideal_delta(1e-6)) + (1e-6 - two.ideal_delta(1e-6)), rel=1e-3)

    def test_the_cap_is_that_of_sixty_four_radius_bits(self):
        assert math.exp(-CAP * CAP / 2) == pytest.approx(2.0**-64, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ({"epsilon": 3.0}, "DP064", "needs delta"),
        ({"delta": 1e-5}, "DP064", "needs epsilon"),
        ({"epsilon": 0, "delta": 1e-5}, "DP001", "got 0"),
        ({"epsilon": math.nan, "delta": 1e-5}, "DP001", "got nan"),
        ({"epsilon": "3", "delta": 1e-5}, "DP001", "got '3'"),
        ({"epsilon": 3.0, "delta": 1}, "DP002", "got 1"),
    ],
)
def test_a_budget_that_is_none_is_refused_with_code_value_and_way_out(values, code, words):
    with pytest.raises(errors.InvalidParameter, match=words) as caught:
        Budget(**values)
    assert caught.value.code == code
    assert caught.value.hint


def test_a_budget_is_read_back_from_its_bytes_and_takes_integers():
    budget = Budget(epsilon=3, delta=1e-5)
    assert budget == Budget.parse(budget.encode()) == Budget(epsilon=3.0, delta=1e-5)


def test_the_first_steps_of_a_plan_are_its_phases_cut_short():
    whole = make_plan((0.1, 1.0, 3), (0.1, 2.0, 5), (0.2, 1.0, 2))
    for steps in range(1, whole.steps + 1):
        cut = whole.first(steps)
        assert cut.steps == steps
        assert [cut.phase_at(at).charge.mechanism for at in range(steps)] == [
            whole.phase_at(at).charge.mechanism for at in range(steps)
        ]
        assert cut.replace(phases=whole.phases) == whole
    for steps in (0, -1, whole.steps + 1):
        with pytest.raises(errors.InvalidParameter, match="of a plan of 10"):
            whole.first(steps)
