"""From a budget to a plan: smallest noise, most steps, epsilon and delta of a schedule, live table."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpbudget import _live
from dpbudget._calibrate import bounds_of, calibrate, delta_of, epsilon_of, max_steps, plan_for
from dpbudget._live import LiveMeter, build_meter
from dpbudget._schedule import default_delta, delta_warning, make_schedule
from dpbudget._search import most_steps, smallest_noise
from dpbudget.accountants import get_accountant
from dpbudget.curve import Bounds
from dpbudget.errors import BudgetExceeded, DPBudgetError, DPBudgetWarning, InvalidParameter, NotComputable
from dpbudget.mechanisms import Adjacency
from dpbudget.meter import Meter
from dpbudget.plan import MAX_STEPS, Phase, Plan, claimed_epsilon

MNIST: dict[str, Any] = {"dataset_size": 60000, "batch_size": 256, "epochs": 10}
#: rate, steps, delta, exact noise multiplier for epsilon 3 (computed by numerical inversion at 40 digits).
EXACT_FOR_THREE = {
    "mnist": (256 / 60000, 14062, 1e-5, 0.9684079236),
    "cifar": (4096 / 50000, 2500, 1e-5, 5.7673549916),
    "imagenet": (16384 / 1281167, 71000, 8e-7, 5.3627302873),
}


def noise_of(plan: Plan) -> float:
    return plan.phases[0].noise_multiplier


def recomputed_claim(plan: Plan) -> float:
    accountant = get_accountant(plan.claim.accountant)
    curve = accountant.curve(plan.charges, plan.adjacency)
    return claimed_epsilon(curve.epsilon(plan.ideal_delta(plan.claim.delta)).upper)


class TestSmallestNoise:
    @pytest.mark.parametrize(("rate", "steps", "delta", "exact"), EXACT_FOR_THREE.values(), ids=EXACT_FOR_THREE)
    def test_the_noise_for_epsilon_three_is_the_exact_one_from_above(
        self, rate: float, steps: int, delta: float, exact: float
    ) -> None:
        sigma = noise_of(calibrate(epsilon=3.0, delta=delta, sample_rate=rate, steps=steps))
        assert exact * (1 - 1e-10) <= sigma <= exact * (1 + 1e-6)

    @pytest.mark.parametrize(("rate", "steps", "delta", "exact"), EXACT_FOR_THREE.values(), ids=EXACT_FOR_THREE)
    def test_the_tail_of_a_small_model_costs_almost_nothing(
        self, rate: float, steps: int, delta: float, exact: float
    ) -> None:
        plan = calibrate(epsilon=3.0, delta=delta, sample_rate=rate, steps=steps, max_parameters=10**4)
        assert exact * (1 - 1e-10) <= noise_of(plan) <= exact * (1 + 1e-8)

    def test_the_claim_is_within_the_budget_and_less_noise_would_break_it(self) -> None:
        plan = calibrate(epsilon=3.0, **MNIST, accountant="rdp")
        assert plan.claim.epsilon <= 3.0
        less = noise_of(plan) * (1 - 1e-7)
        assert plan_for(noise_multiplier=less, **MNIST, accountant="rdp").claim.epsilon > 3.0

    def test_the_claim_is_what_its_accountant_says_after_the_tail_is_charged(self) -> None:
        plan = calibrate(epsilon=2.0, **MNIST, accountant="rdp")
        assert plan.claim.epsilon == recomputed_claim(plan)
        assert plan.claim.accountant == "rdp"
        assert plan.claim.accountant_version == get_accountant("rdp").version

    @settings(max_examples=20, deadline=None)
    @given(
        epsilon=st.floats(0.05, 20.0),
        rate=st.floats(1e-4, 1.0),
        steps=st.integers(1, 100_000),
        log_delta=st.floats(-9.0, -3.0),
    )
    def test_every_plan_keeps_its_budget(self, epsilon: float, rate: float, steps: int, log_delta: float) -> None:
        plan = calibrate(epsilon=epsilon, delta=10.0**log_delta, sample_rate=rate, steps=steps, accountant="rdp")
        assert plan.claim.epsilon == recomputed_claim(plan) <= epsilon

    @settings(max_examples=8, deadline=None)
    @given(low=st.floats(0.2, 8.0), factor=st.floats(1.05, 3.0))
    def test_a_smaller_budget_needs_at_least_as_much_noise(self, low: float, factor: float) -> None:
        strict, loose = (noise_of(calibrate(epsilon=e, **MNIST, accountant="rdp")) for e in (low, low * factor))
        assert strict >= loose

    def test_one_full_batch_step_is_the_analytic_gaussian(self) -> None:
        plan = calibrate(epsilon=1.0, delta=1e-5, sample_rate=1.0, steps=1, max_parameters=1)
        sigma = noise_of(plan)
        assert gaussian_delta(1.0, sigma) <= 1e-5
        assert gaussian_delta(1.0, sigma * (1 - 1e-7)) > 1e-5

    def test_an_unreachable_epsilon_names_the_smallest_reachable_one(self) -> None:
        with pytest.raises(
            NotComputable, match=r"epsilon 1e-09 is not reachable .* smallest reachable is 2e-9"
        ) as info:
            calibrate(epsilon=1e-9, delta=1e-5, sample_rate=0.01, steps=10, accountant="rdp")
        assert info.value.code == "DP004"

    def test_a_large_budget_still_leaves_noise_that_covers_its_own_tail(self) -> None:
        plan = calibrate(epsilon=1000.0, delta=1e-5, sample_rate=0.1, steps=10, accountant="rdp")
        assert plan.claim.epsilon <= 1000.0
        with pytest.raises(InvalidParameter) as info:
            plan_for(noise_multiplier=noise_of(plan) * 0.999, delta=1e-5, sample_rate=0.1, steps=10, accountant="rdp")
        assert info.value.code == "DP053"

    def test_a_delta_below_what_the_tail_costs_is_refused(self) -> None:
        with pytest.raises(InvalidParameter) as info:
            calibrate(epsilon=3.0, delta=1e-30, sample_rate=0.1, steps=1000, accountant="rdp")
        assert info.value.code == "DP053"

    def test_zero_out_has_the_pair_of_add_remove(self) -> None:
        one, other = (
            calibrate(epsilon=3.0, **MNIST, adjacency=a, accountant="rdp") for a in ("add-remove", "zero-out")
        )
        assert noise_of(one) == noise_of(other)
        assert other.adjacency is Adjacency.ZERO_OUT

    def test_replacing_a_record_needs_more_noise_than_removing_one(self) -> None:
        removed, replaced = (calibrate(epsilon=3.0, **MNIST, adjacency=a) for a in ("add-remove", "replace-one"))
        assert noise_of(removed) < noise_of(replaced) < 2.0 * noise_of(removed)
        assert replaced.claim.epsilon <= 3.0


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Balle and Wang (2018), Theorem 8, for sensitivity 1."""

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2.0))

    return cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * cdf(-0.5 / sigma - epsilon * sigma)


class TestMostSteps:
    def test_one_more_step_would_not_fit(self) -> None:
        question: dict[str, Any] = {"delta": 1e-5, "sample_rate": 0.01, "accountant": "rdp"}
        steps = max_steps(epsilon=2.0, noise_multiplier=1.0, **question)
        assert plan_for(noise_multiplier=1.0, steps=steps, **question).claim.epsilon <= 2.0
        assert plan_for(noise_multiplier=1.0, steps=steps + 1, **question).claim.epsilon > 2.0

    def test_it_inverts_the_smallest_noise(self) -> None:
        plan = calibrate(epsilon=3.0, **MNIST, accountant="rdp")
        again = max_steps(
            epsilon=3.0, noise_multiplier=noise_of(plan), dataset_size=60000, batch_size=256, accountant="rdp"
        )
        assert again == plan.steps == 2344

    def test_none_fits_a_budget_below_one_step(self) -> None:
        assert max_steps(epsilon=1e-3, delta=1e-7, sample_rate=0.5, noise_multiplier=1.0, accountant="rdp") == 0

    @given(limit=st.integers(0, MAX_STEPS), start=st.integers(1, MAX_STEPS))
    def test_the_search_finds_any_limit_from_any_start(self, limit: int, start: int) -> None:
        assert most_steps(lambda steps: steps <= limit, start) == limit

    @given(limit=st.floats(1e-3, 1e6), guess=st.floats(1e-3, 1e6))
    def test_the_noise_search_ends_above_any_limit_from_any_guess(self, limit: float, guess: float) -> None:
        def claim(sigma: float) -> float:
            return math.inf if sigma < limit else 1.0

        sigma = smallest_noise(claim, 2.0, guess)
        assert sigma is not None
        assert limit <= sigma <= limit * (1 + 2e-6)

    def test_the_noise_search_gives_up_where_no_noise_fits(self) -> None:
        assert smallest_noise(lambda sigma: 2.0, 1.0, 5.0) is None

    @given(power=st.floats(0.3, 3.0), target=st.floats(0.1, 10.0), guess=st.floats(0.01, 100.0))
    def test_the_noise_search_takes_few_questions_on_a_smooth_claim(
        self, power: float, target: float, guess: float
    ) -> None:
        asked = []

        def claim(sigma: float) -> float:
            asked.append(sigma)
            return 3.0 * sigma**-power

        sigma = smallest_noise(claim, target, guess)
        assert sigma is not None
        exact = min(max((3.0 / target) ** (1 / power), 1e-3), 1e6)
        assert exact * (1 - 1e-12) <= sigma <= exact * (1 + 1e-9 + 4e-9 * max(1.0, 1.0 / target) / power)
        assert len(asked) <= 20


class TestMechanismQuestions:
    def test_epsilon_and_delta_are_inverse(self) -> None:
        phases = [(0.01, 1.0, 1000), (0.02, 1.5, 500)]
        epsilon = epsilon_of(phases, delta=1e-5, accountant="rdp").upper
        assert delta_of(phases, epsilon=epsilon, accountant="rdp").upper == pytest.approx(1e-5, rel=1e-4)

    def test_two_halves_cost_what_the_whole_costs(self) -> None:
        whole = epsilon_of([(0.01, 1.0, 1000)], delta=1e-5, accountant="rdp")
        halves = epsilon_of([(0.01, 1.0, 400), (0.01, 1.0, 600)], delta=1e-5, accountant="rdp")
        assert halves.upper == pytest.approx(whole.upper, rel=1e-9)

    def test_a_mechanism_costs_less_than_the_plan_with_its_tail_and_rounding(self) -> None:
        plan = plan_for(noise_multiplier=1.1, **MNIST, accountant="rdp")
        pure = epsilon_of([(256 / 60000, 1.1, 2344)], delta=plan.claim.delta, accountant="rdp")
        assert pure.upper < plan.claim.epsilon < pure.upper * (1 + 1e-5)
        assert bounds_of(plan).upper == plan.claim.epsilon

    @pytest.mark.parametrize(
        ("phases", "code"),
        [
            ([], "DP009"),
            ([(0.0, 1.0, 1)], "DP008"),
            ([(1.5, 1.0, 1)], "DP008"),
            ([(math.nan, 1.0, 1)], "DP008"),
            ([(0.1, 0.0, 1)], "DP006"),
            ([(0.1, -1.0, 1)], "DP005"),
            ([(0.1, math.inf, 1)], "DP005"),
            ([(0.1, 1.0, 0)], "DP009"),
            ([(0.1, 1.0, 1.5)], "DP009"),
            ([(0.1, 1.0, 10**10)], "DP009"),
            ([(0.1, "1.0", 10)], "DP005"),
        ],
    )
    def test_a_bad_phase_is_refused_by_name(self, phases: Any, code: str) -> None:
        with pytest.raises(InvalidParameter) as info:
            epsilon_of(phases, delta=1e-5, accountant="rdp")
        assert info.value.code == code
        assert info.value.hint


class TestSchedules:
    def test_rate_and_steps_come_from_sizes_exactly(self) -> None:
        schedule = make_schedule(**MNIST)
        assert schedule.rate == 256 / 60000
        assert schedule.steps == 2344  # ceil(10 * 60000 / 256)
        assert schedule.nominal_size == 60000

    @given(size=st.integers(1, 10**9), share=st.floats(0, 1), tenths=st.integers(1, 1000))
    def test_steps_are_the_exact_ceiling(self, size: int, share: float, tenths: int) -> None:
        batch = max(1, int(size * share))
        exact = -(-tenths * size // (10 * batch))
        if exact <= MAX_STEPS:
            assert make_schedule(dataset_size=size, batch_size=batch, epochs=tenths / 10).steps == exact
            assert make_schedule(dataset_size=size, batch_size=batch, epochs=Fraction(tenths, 10)).steps == exact

    def test_a_tenth_of_an_epoch_is_a_tenth(self) -> None:
        assert make_schedule(dataset_size=60000, batch_size=100, epochs=0.1).steps == 60

    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            ({"dataset_size": 256, "batch_size": 60000, "epochs": 1}, "DP008", "did you mean dataset size 60000"),
            ({"sample_rate": 256.0, "steps": 1}, "DP008", "did you mean a batch size of 256"),
            ({"sample_rate": 0.1}, "DP064", "either steps or epochs"),
            ({"steps": 10}, "DP064", "either sample_rate"),
            ({"sample_rate": 0.1, "steps": 1, "epochs": 1}, "DP064", "either steps or epochs"),
            ({"batch_size": 10, "steps": 1}, "DP064", "needs dataset_size"),
            ({"dataset_size": 0, "batch_size": 1, "steps": 1}, "DP009", "dataset size"),
            ({"dataset_size": 10, "batch_size": True, "steps": 1}, "DP009", "batch size"),
            ({"sample_rate": 0.1, "epochs": 0}, "DP009", "epochs"),
            ({"sample_rate": 0.1, "epochs": -3}, "DP009", "epochs"),
            ({"sample_rate": 0.1, "epochs": math.nan}, "DP009", "epochs"),
            ({"sample_rate": 0.1, "epochs": math.inf}, "DP009", "epochs"),
            ({"sample_rate": 1e-6, "epochs": 10**4}, "DP009", "at most"),
        ],
    )
    def test_a_bad_schedule_is_refused_with_the_way_out(self, arguments: dict[str, Any], code: str, words: str) -> None:
        with pytest.raises(InvalidParameter) as info:
            make_schedule(**arguments)
        assert info.value.code == code
        assert words in str(info.value)

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ({"epsilon": 0}, "DP001"),
            ({"epsilon": -1.0}, "DP001"),
            ({"epsilon": math.nan}, "DP001"),
            ({"epsilon": math.inf}, "DP001"),
            ({"epsilon": "3"}, "DP001"),
            ({"epsilon": True}, "DP001"),
            ({"delta": 0.0}, "DP002"),
            ({"delta": 1.0}, "DP002"),
            ({"delta": -1.0}, "DP002"),
            ({"delta": math.nan}, "DP002"),
            ({"clip_norm": 0.0}, "DP007"),
            ({"clip_norm": math.inf}, "DP007"),
            ({"clip_norm": None}, "DP007"),
            ({"adjacency": "add_remove"}, "DP062"),
            ({"accountant": "rpd"}, "DP061"),
            ({"accountant": None}, "DP061"),
            ({"max_parameters": 0}, "DP009"),
        ],
    )
    def test_every_parameter_is_checked_with_its_own_code(self, change: dict[str, Any], code: str) -> None:
        with pytest.raises(DPBudgetError) as info:
            calibrate(**{"epsilon": 3.0, **MNIST, "accountant": "rdp", **change})
        assert info.value.code == code
        assert info.value.hint

    def test_without_a_size_delta_must_be_given(self) -> None:
        with pytest.raises(InvalidParameter, match="delta is not given"):
            calibrate(epsilon=3.0, sample_rate=0.01, steps=10, accountant="rdp")

    @given(size=st.integers(2, 10**12))
    def test_the_default_delta_is_below_one_over_n(self, size: int) -> None:
        assert 0.0 < default_delta(size) < 1.0 / size
        assert delta_warning(default_delta(size), size) is None

    def test_a_delta_that_publishes_whole_records_is_warned_of(self) -> None:
        warning = delta_warning(0.1, 60000)
        assert warning is not None
        assert warning.startswith("DP003")
        assert "publishing 6000 of 60000 records" in warning
        assert warning.endswith("well below 1.6e-05"), "1 / 60000, rounded down"

    def test_the_warning_begins_at_one_over_n_and_says_no_less_than_one_record(self) -> None:
        assert delta_warning(1.0 / 64 - 1e-9, 64) is None
        assert "publishing 1 of 64 records" in str(delta_warning(1.0 / 64, 64))

    @pytest.mark.parametrize(
        "ask",
        [
            lambda facts: calibrate(epsilon=3.0, **facts),
            lambda facts: calibrate(advantage=0.3, **facts),
            lambda facts: plan_for(noise_multiplier=2.0, **facts),
            lambda facts: max_steps(epsilon=3.0, noise_multiplier=2.0, **{k: facts[k] for k in facts if k != "epochs"}),
        ],
    )
    def test_python_warns_the_line_that_asked(self, ask: Any) -> None:
        facts = {"dataset_size": 400, "batch_size": 100, "epochs": 2, "delta": 0.01}
        with pytest.warns(DPBudgetWarning, match=r"^DP003 delta 0\.01 allows publishing 4 of 400 ") as caught:
            ask(facts)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        ask({**facts, "delta": 1e-5})  # a warning would be an error here
        ask({**facts, "delta": None})


class TestTargets:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({}, "no target is given"),
            ({"epsilon": 3.0, "advantage": 0.1}, "epsilon and advantage are more than one target"),
            ({"advantage": 0.1, "beside": True}, "plans beside it have no joint advantage"),
        ],
    )
    def test_what_was_given_is_named(self, given: dict[str, Any], said: str) -> None:
        facts = {"delta": 1e-5, "dataset_size": 400, "batch_size": 400, "epochs": 2}
        if "beside" in given:
            given = {**given, "beside": [calibrate(epsilon=1.0, **facts)]}
        with pytest.raises(InvalidParameter, match=f"DP064 {said}"):
            calibrate(**given, **facts)

    def test_beside_plans_that_claim_all_of_it_no_plan_of_noise_alone_is_made(self) -> None:
        facts = {"delta": 1e-5, "dataset_size": 400, "batch_size": 400, "epochs": 2}
        with pytest.raises(BudgetExceeded, match=r"the plan beside it claims epsilon .* of 1 already"):
            calibrate(epsilon=1.0, beside=[calibrate(epsilon=1.0, **facts)], **facts)


class TestMeter:
    @pytest.fixture(scope="class")
    @staticmethod
    def plan() -> Plan:
        return calibrate(epsilon=3.0, **MNIST, accountant="rdp")

    def test_it_rises_from_zero_to_the_bound_behind_the_claim(self, plan: Plan) -> None:
        meter = build_meter(plan)
        assert meter.epsilon(0).upper == 0.0
        last = meter.epsilon(plan.steps).upper
        assert claimed_epsilon(last) == plan.claim.epsilon == meter.target
        uppers = [meter.epsilon(step).upper for step in range(plan.steps + 1)]
        assert uppers == sorted(uppers)

    def test_it_never_shows_less_than_the_accountant_says(self, plan: Plan) -> None:
        meter = build_meter(plan, points=8)
        phase = plan.phases[0]
        for steps in (1, 2, 50, 700, 2000, 2343):
            exact = epsilon_of([(phase.rate, phase.noise_multiplier, steps)], delta=plan.claim.delta, accountant="rdp")
            assert meter.epsilon(steps).upper >= exact.lower
            assert meter.epsilon(steps).lower <= exact.upper

    @pytest.mark.parametrize("points", [1, 2, 7, 64, 5000])
    def test_it_always_has_the_first_and_the_last_step(self, plan: Plan, points: int) -> None:
        meter = build_meter(plan.replace(phases=(plan.phases[0].replace(steps=40),)), points=points)
        assert meter.steps[0] == 1
        assert meter.steps[-1] == 40
        assert list(meter.steps) == sorted(set(meter.steps))

    def test_it_follows_the_phases_in_order(self, plan: Plan) -> None:
        quiet = Phase(rate_k=plan.phases[0].rate_k, noise_multiplier=4.0, steps=plan.steps)
        mixed = plan.replace(phases=(quiet, plan.phases[0]))
        meter = build_meter(mixed)
        alone = epsilon_of([(quiet.rate, 4.0, quiet.steps)], delta=plan.claim.delta, accountant="rdp").upper
        assert meter.epsilon(quiet.steps).upper == pytest.approx(alone, rel=1e-4)
        assert meter.epsilon(quiet.steps).upper < meter.epsilon(mixed.steps).upper / 2

    @pytest.fixture(scope="class")
    @staticmethod
    def sampled() -> Plan:
        return calibrate(epsilon=3.0, delta=1e-5, dataset_size=1437, batch_size=64, epochs=20)

    def test_where_it_is_read_it_is_tight(self, sampled: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_live, "_AT_ONCE", 1e9)  # however slow this machine is today
        meter, phase = build_meter(sampled), sampled.phases[0]
        for steps in range(18, 451, 9):  # the ends of leases
            exact = epsilon_of([(phase.rate, phase.noise_multiplier, steps)], delta=sampled.claim.delta)
            assert exact.lower <= meter.epsilon(steps).upper < 1.02 * exact.upper
            assert meter.epsilon(steps).lower <= exact.upper
        assert meter.epsilon(450).upper == Meter.epsilon(meter, 450).upper, "the end is the claim's own bound"

    def test_epsilon_never_falls_while_steps_are_added_though_the_time_runs_out(
        self, sampled: Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_live, "_A_STEP", 0.0)
        meter = build_meter(sampled)
        assert isinstance(meter, LiveMeter)
        shown = []
        for steps in range(1, sampled.steps + 1):
            if steps % 100 == 50:  # time for a few entries more
                meter.finer.seconds -= 5.0 * max(meter.finer.costs.values())
            shown.append(meter.epsilon(steps).upper)
        assert shown == sorted(shown)
        assert all(mine <= Meter.epsilon(meter, steps).upper for steps, mine in enumerate(shown, 1))

    def test_without_time_it_asks_nothing_and_with_it_once_for_a_percent(
        self, sampled: Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []
        meter = build_meter(sampled)
        assert isinstance(meter, LiveMeter)
        answer = meter.answer
        meter = replace(meter, answer=lambda steps: (asked.append(steps), answer(steps))[1])
        monkeypatch.setattr(_live, "_AT_ONCE", -1e9)
        plain = [meter.epsilon(steps) for steps in range(1, 451)]
        assert asked == []
        assert plain == [Meter.epsilon(meter, steps) for steps in range(1, 451)]
        monkeypatch.setattr(_live, "_AT_ONCE", 1e9)
        meter.finer.reached = 0
        for _ in range(2):
            for steps in range(1, 451):
                meter.epsilon(steps)
        assert asked == sorted(set(asked))
        assert 50 < len(asked) < math.log(3.0 / 0.5) / math.log(1.01)
        with pytest.raises(ValueError, match="beyond the plan"):
            meter.epsilon(451)

    def test_threads_refine_one_at_a_time_and_none_sees_epsilon_fall(
        self, sampled: Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_live, "_AT_ONCE", 1e9)
        meter = build_meter(sampled)
        assert isinstance(meter, LiveMeter)
        answer, inside, most = meter.answer, [], []

        def slow(steps: int) -> Bounds:
            inside.append(steps)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(steps)
            return answer(steps)

        shared = replace(meter, answer=slow)
        told: list[list[float]] = [[], [], []]

        def read(number: int) -> None:
            told[number] += [shared.epsilon(steps).upper for steps in range(40 + number, 450, 30)]

        threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most
        assert max(most) == 1
        assert all(len(mine) > 10 and mine == sorted(mine) for mine in told)
        assert list(shared.finer.table.steps) == sorted(set(shared.finer.table.steps))

    def test_a_certified_meter_brackets_every_tabled_step(self) -> None:
        plan = calibrate(epsilon=3.0, delta=1e-5, sample_rate=0.2, steps=80)
        meter = build_meter(plan)
        assert len(meter.steps) > 10
        for bounds in meter.bounds:
            assert 0.0 < bounds.lower <= bounds.upper <= plan.claim.epsilon


def test_where_epsilon_asks_for_less_noise_than_the_tail_the_tail_decides() -> None:
    plan = calibrate(epsilon=1000.0, dataset_size=60000, batch_size=20000, epochs=10)
    sigma = plan.phases[0].noise_multiplier
    assert plan.claim.epsilon <= 1000.0
    with pytest.raises(DPBudgetError, match="DP053"):
        plan_for(noise_multiplier=0.999 * sigma, dataset_size=60000, batch_size=20000, epochs=10)
