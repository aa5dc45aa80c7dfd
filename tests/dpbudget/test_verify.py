"""Verification by a third party: what holds is confirmed, what does not is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

import dpbudget
from dpbudget import errors
from dpbudget._pause import interruptible
from dpbudget._recompute import OutOfTime, sum_up
from dpbudget.filters import PortfolioFilter
from dpbudget.ledger.journal import conclude
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.plan import Budget, Plan

DELTA = 1e-5


@pytest.fixture(scope="module")
def plan() -> Plan:
    # Full batches have a closed form, so the ledger is what these tests wait for.
    return dpbudget.calibrate(epsilon=3.0, delta=DELTA, dataset_size=1000, batch_size=1000, steps=20)


class Desk:
    """An owner, a writer and a ledger in a folder."""

    def __init__(self, folder: Path, **options) -> None:
        self.owner, self.writer = Ed25519Signer.generate(), Ed25519Signer.generate()
        self.path, self.export = folder / "a.ledger", folder / "a.jsonl"
        options = {"budget": Budget(epsilon=3.0, delta=DELTA), "whole_budget": True, **options}
        self.ledger = dpbudget.create_ledger(self.path, owner=self.owner, writer=self.writer, **options)

    def spend(self, plan: Plan, steps: int | None = None) -> str:
        run_id = self.ledger.sign_plan(plan, owner=self.owner)
        with dpbudget.start(self.ledger, run_id) as run:
            for _ in range(plan.steps if steps is None else steps):
                run.next_receipt()
        return run_id

    def verify(self, **options) -> dpbudget.Report:
        return dpbudget.verify(self.path, **{"trust": self.owner.public, **options})


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_an_honest_ledger_is_confirmed_with_both_ends_of_epsilon(desk, plan):
    desk.spend(plan)
    report = desk.verify()
    assert (report.ok, report.problems, report.exit_code) == (True, (), 0)
    assert 2.99 < report.epsilon.lower <= report.epsilon.upper <= 3.0
    assert (report.delta, report.steps, report.budget) == (DELTA, 20, (3.0, DELTA))
    assert set(report.checked_by) == {"prv", "rdp"}
    assert report.trusted
    assert not report.anchored


def test_a_sampled_plan_is_confirmed_by_both_accountants(desk):
    sampled = dpbudget.calibrate(epsilon=3.0, delta=DELTA, dataset_size=60000, batch_size=600, steps=1000)
    run_id = desk.ledger.sign_plan(sampled, owner=desk.owner)
    with desk.ledger.start(run_id) as run:
        run.next_receipt()
    report = desk.verify()
    assert report.ok
    assert 2.9999 < report.epsilon.lower <= report.epsilon.upper <= 3.0


def test_an_export_is_confirmed_like_the_ledger_itself(desk, plan):
    desk.spend(plan)
    desk.ledger.export(desk.export)
    report = dpbudget.verify(desk.export, trust=desk.owner.public)
    assert report == desk.verify()


def test_a_ledger_without_a_step_has_spent_nothing(desk, plan):
    assert desk.verify().epsilon == dpbudget.Bounds(0.0, 0.0)
    desk.ledger.sign_plan(plan, owner=desk.owner)
    report = desk.verify()
    assert report.ok
    assert report.epsilon.upper == 0.0
    assert report.runs[0].charged == 0


def test_the_whole_plan_is_claimed_though_the_run_stopped_early(desk, plan):
    desk.spend(plan, steps=3)
    report = desk.verify()
    assert report.epsilon.upper == pytest.approx(plan.claim.epsilon, abs=1e-8)
    assert report.runs[0].released == 3
    assert report.runs[0].charged >= 3


def test_the_key_in_the_file_proves_nothing_and_the_report_says_so(desk, plan):
    desk.spend(plan)
    report = desk.verify(trust=None)
    assert report.ok
    assert not report.trusted
    assert any("proves nothing" in warning for warning in report.warnings)


def test_a_self_consistent_ledger_of_another_owner_is_not_valid(desk, plan):
    desk.spend(plan)
    report = desk.verify(trust=Ed25519Signer.generate().public)
    assert report.exit_code == 1
    assert "DP072" in report.problems[0]


def test_the_head_that_was_seen_anchors_the_history(desk, plan):
    early = f"{desk.ledger.head.size}:{desk.ledger.head.root}"
    desk.spend(plan)
    late = f"{desk.ledger.head.size}:{desk.ledger.head.root}"
    for head in (early, late):
        report = desk.verify(expect_head=head)
        assert (report.ok, report.anchored) == (True, True)


def test_a_cut_tail_with_an_old_head_is_seen_with_an_anchor_alone(desk, plan, tmp_path):
    old = tmp_path / "old.ledger"
    old.write_bytes(desk.path.read_bytes())
    desk.spend(plan)
    head = f"{desk.ledger.head.size}:{desk.ledger.head.root}"
    unanchored = dpbudget.verify(old, trust=desk.owner.public)
    assert unanchored.ok
    assert any("unanchored" in warning for warning in unanchored.warnings)
    report = dpbudget.verify(old, trust=desk.owner.public, expect_head=head)
    assert (report.ok, report.exit_code) == (False, 5)
    assert "tail was cut" in report.problems[0]


def test_another_history_of_the_same_length_is_seen_with_an_anchor(desk, plan):
    desk.spend(plan)
    report = desk.verify(expect_head=f"{desk.ledger.head.size}:{'0' * 64}")
    assert report.exit_code == 5
    assert "another history" in report.problems[0]


@pytest.mark.parametrize("head", ["", "12", "0:" + "0" * 64, "12:xyz", "12:" + "0" * 63, "-1:" + "0" * 64])
def test_an_anchor_in_another_form_is_refused(desk, head):
    with pytest.raises(errors.InvalidParameter) as caught:
        desk.verify(expect_head=head)
    assert caught.value.code == "DP082"


class Understating:
    """A dishonest filter: it claims half of what is spent."""

    def joint_claim(self, plans, delta):
        return PortfolioFilter().joint_claim(plans, delta) / 2


def test_a_portfolio_that_claims_less_than_it_spends_is_not_valid(desk, plan):
    run_id = desk.ledger.sign_plan(plan, owner=desk.owner)
    desk.ledger.close()
    forged = dpbudget.Ledger.open(desk.path, writer=desk.writer, filter=Understating())
    with forged.start(run_id) as run:
        run.next_receipt()
    forged.close()
    report = desk.verify()
    assert report.exit_code == 1
    assert any("below the truth" in problem for problem in report.problems)
    # A refuted claim is nowhere shown as a bound.
    assert report.epsilon is None
    assert report.to_json()["epsilon"] is None
    assert "epsilon <=" not in report.summary()


def test_a_plan_that_claims_less_than_it_costs_is_not_valid(tmp_path, plan):
    desk = Desk(tmp_path)
    desk.ledger.close()
    forged = dpbudget.Ledger.open(desk.path, writer=desk.writer, filter=Understating())
    lying = plan.replace(claim=plan.claim.replace(epsilon=2.0))
    forged.sign_plan(lying, owner=desk.owner)
    forged.close()
    report = desk.verify()
    assert report.exit_code == 1
    assert "below the truth" in report.problems[0]


def test_a_claim_inside_the_bracket_cannot_be_confirmed(tmp_path):
    # The rdp accountant proves no lower end, so a claim below its upper end is unconfirmed rather than refuted by it.
    loose = dpbudget.calibrate(epsilon=3.0, delta=DELTA, dataset_size=1000, batch_size=1000, steps=20, accountant="rdp")
    desk = Desk(tmp_path)
    desk.ledger.close()
    forged = dpbudget.Ledger.open(desk.path, writer=desk.writer, filter=Understating())
    forged.sign_plan(loose.replace(claim=loose.claim.replace(epsilon=loose.claim.epsilon - 1e-6)), owner=desk.owner)
    forged.close()
    report = desk.verify()
    assert report.exit_code == 1
    assert "cannot be confirmed" in report.problems[0]


def test_two_plans_of_one_portfolio_are_claimed_jointly(tmp_path):
    desk = Desk(tmp_path, budget=Budget(epsilon=3.0, delta=DELTA))
    small = dpbudget.calibrate(epsilon=1.5, delta=DELTA, dataset_size=1000, batch_size=1000, steps=10)
    first = desk.ledger.sign_plan(small, owner=desk.owner)
    second = desk.ledger.sign_plan(small, owner=desk.owner)
    for run_id in (first, second):
        with dpbudget.start(desk.ledger, run_id) as run:
            assert len(list(run)) == 10
    report = desk.verify()
    assert report.ok
    assert 1.5 < report.epsilon.lower <= report.epsilon.upper < 3.0
    assert report.steps == 20


def test_verification_writes_nothing_and_needs_no_torch(desk, plan):
    desk.spend(plan)
    desk.ledger.close()
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in desk.path.parent.iterdir()}
    program = (
        "import json, sys, dpbudget; from dpbudget.ledger.signing import PublicKey;"
        f"r = dpbudget.verify({str(desk.path)!r}, trust=PublicKey.from_hex({desk.owner.public.hex!r}));"
        "print(json.dumps([r.ok, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, False]
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in desk.path.parent.iterdir()} == before


def test_a_file_that_is_no_ledger_is_unreadable(tmp_path):
    for content in (b"", b"hello", os.urandom(4096)):
        path = tmp_path / "x"
        path.write_bytes(content)
        with pytest.raises(errors.Unreadable):
            dpbudget.verify(path)
    with pytest.raises(errors.Unreadable):
        dpbudget.verify(tmp_path / "missing")


def test_the_report_is_plain_json_and_plain_words(desk, plan):
    desk.spend(plan)
    report = desk.verify()
    parsed = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {"ok", "epsilon", "delta", "steps", "head", "problems"} <= set(parsed)
    assert parsed["epsilon"]["upper"] == report.epsilon.upper
    assert report.summary().startswith("VALID: epsilon <= 2.999999")
    assert "lower bound" in report.summary()


def test_starting_a_ledger_without_steps_left_says_which_kind_of_nothing(desk, plan):
    with pytest.raises(errors.InvalidParameter) as nothing:
        dpbudget.start(desk.ledger)
    assert nothing.value.code == "DP081"
    desk.spend(plan)
    with pytest.raises(errors.PlanExhausted) as spent:
        dpbudget.start(desk.ledger)
    assert (spent.value.code, spent.value.exit_code) == ("DP050", 3)
    with pytest.raises(errors.InvalidParameter, match="no run 'abc'"):
        dpbudget.start(desk.ledger, "abc")


def test_a_single_unfinished_run_needs_no_name(desk, plan):
    run_id = desk.spend(plan, steps=3)
    with dpbudget.start(desk.ledger) as run:
        assert run.run_id == run_id
        assert run.meter.target == plan.claim.epsilon


def test_the_name_of_a_key_file_in_place_of_a_key_is_refused_with_the_way_out():
    with pytest.raises(errors.InvalidParameter, match=r"owner\.key\.pub") as caught:
        dpbudget.verify("any.ledger", trust="owner.key.pub")
    assert (caught.value.code, "load_public_key" in caught.value.hint) == ("DP072", True)


def test_sums_of_claims_and_deltas_are_rounded_up_and_printed_so(tmp_path):
    # 0.1 + 0.2 + ... of floats may end below the exact sum, and six digits of delta below the proved one.
    desk = Desk(tmp_path, budget=Budget(epsilon=50.0, delta=1e-3), whole_budget=False)
    deltas = []
    for _ in range(3):
        delta = desk.ledger.plan_delta / 3.0
        if not deltas:
            delta = desk.ledger.plan_delta  # the first portfolio is open with its own
        deltas.append(delta)
        desk.spend(dpbudget.plan_for(noise_multiplier=5.0, delta=delta, dataset_size=100, batch_size=100, steps=5), 1)
    report = desk.verify()
    assert report.ok
    assert Fraction(report.delta) >= sum(map(Fraction, deltas))
    claims = [Fraction(portfolio.claim) for portfolio in desk.ledger.state.portfolios]
    assert Fraction(report.epsilon.upper) >= sum(claims)
    shown = re.search(r"at delta (\S+)$", report.summary().splitlines()[0])
    assert float(shown[1]) >= report.delta


def test_float_sums_that_round_down_are_pushed_up():
    values = [1.0, 2.0**-53]
    assert sum(values) == 1.0
    assert Fraction(sum_up(values)) >= sum(map(Fraction, values))
    assert sum_up([0.5, 0.25]) == 0.75


def test_the_time_limit_is_lifted_for_every_owner_that_the_ledger_had_and_for_nobody_else(desk, plan, monkeypatch):
    now = [0.0]

    def late(machine, note):
        now[0] += 100.0  # all is read, and the time is over
        return conclude(machine, note)

    monkeypatch.setattr("dpbudget._recompute.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("dpbudget._verify.conclude", late)
    desk.spend(plan)
    next_owner = Ed25519Signer.generate()
    desk.ledger.rekey("owner", new=next_owner, by=desk.owner)
    for trust in (desk.owner.public, next_owner.public):
        assert dpbudget.verify(desk.path, trust=trust).ok
    for trust in (None, Ed25519Signer.generate().public):
        report = dpbudget.verify(desk.path, trust=trust)
        assert not report.ok
        assert "after 6 s" in report.problems[0] or "the trusted key is" in report.problems[0]
    assert not dpbudget.verify(desk.path, trust=next_owner.public, time_limit=0.0).ok


def test_work_that_is_interrupted_leaves_nothing_behind():
    plan = dpbudget.plan_for(noise_multiplier=1.0, delta=DELTA, dataset_size=1000, batch_size=10, steps=50)
    calls = 0

    def once() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OutOfTime

    whole = PortfolioFilter().joint_bounds((plan,), plan.claim.delta)
    other = plan.replace(phases=(plan.phases[0].replace(steps=plan.steps + 1),))
    with pytest.raises(OutOfTime), interruptible(once):
        PortfolioFilter().joint_bounds((other,), plan.claim.delta)
    with interruptible(lambda: None):
        assert PortfolioFilter().joint_bounds((plan,), plan.claim.delta) == whole
    assert calls == 3


def test_the_report_warns_of_a_delta_that_would_let_a_record_be_published(tmp_path):
    desk = Desk(tmp_path, budget=Budget(epsilon=3.0, delta=0.01))
    with pytest.warns(dpbudget.DPBudgetWarning, match="DP003"):
        plan = dpbudget.calibrate(epsilon=1.0, delta=0.01, dataset_size=1000, batch_size=1000, steps=2)
    desk.ledger.sign_plan(plan, owner=desk.owner)
    before = desk.verify()
    assert before.ok
    assert any("publishing 10 of 1000 records" in line for line in before.warnings), "before anything is spent"
    with dpbudget.start(desk.ledger) as run:
        run.next_receipt()
    after = desk.verify()
    assert after.ok, "a budget that protects nobody is the owner's to grant"
    assert "note: DP003 delta 0.01 allows publishing 10 of 1000 records" in after.summary()


def test_deltas_that_add_up_to_one_record_are_warned_of_though_each_is_small(tmp_path):
    desk = Desk(tmp_path, budget=Budget(epsilon=8.0, delta=1.5e-3), whole_budget=False)
    facts = {"epsilon": 1.0, "dataset_size": 1000, "batch_size": 1000, "steps": 2}
    for _ in range(2):  # each begins before the next is signed, so that it has a portfolio of its own
        assert not [line for line in desk.verify().warnings if line.startswith("DP003")]
        desk.spend(dpbudget.calibrate(delta=desk.ledger.plan_delta, **facts))
    assert [line for line in desk.verify().warnings if line.startswith("DP003")]


def test_the_report_says_whose_presence_is_protected(tmp_path, plan):
    desk = Desk(tmp_path, unit="user")
    with pytest.raises(errors.InvalidParameter, match="one example in a ledger for add-remove neighbours of one user"):
        desk.ledger.sign_plan(plan, owner=desk.owner)
    per_user = dpbudget.calibrate(epsilon=3.0, delta=DELTA, dataset_size=1000, batch_size=1000, steps=20, unit="user")
    assert per_user == plan.replace(unit="user")
    desk.spend(per_user)
    report = desk.verify()
    assert (report.ok, report.unit, report.adjacency) == (True, "user", "add-remove")
    assert (report.to_json()["unit"], "for one user of the dataset" in report.summary()) == ("user", True)


def test_an_unknown_unit_is_refused_with_the_known_ones():
    schedule = {"dataset_size": 1000, "batch_size": 10, "steps": 1, "delta": DELTA}
    for make in (dpbudget.plan_for, dpbudget.calibrate):
        target = {"noise_multiplier": 1.0} if make is dpbudget.plan_for else {"epsilon": 1.0}
        with pytest.raises(errors.InvalidParameter, match="unknown unit of privacy 'users'") as caught:
            make(**target, **schedule, unit="users")
        assert "user" in caught.value.hint


def test_a_name_or_a_number_in_place_of_a_key_or_a_plan_is_refused_with_the_line_to_write(desk, plan, tmp_path):
    budget = Budget(epsilon=3.0, delta=DELTA)
    with pytest.raises(errors.InvalidParameter, match=r"DP080 owner is a str.*dpbudget\.load_key"):
        dpbudget.create_ledger(tmp_path / "b.ledger", budget=budget, owner="PRIVATE", writer=desk.writer)
    with pytest.raises(errors.InvalidParameter, match="DP080 writer is a str") as caught:
        dpbudget.open_ledger(desk.path, writer="PRIVATE")
    assert "PRIVATE" not in str(caught.value)
    with pytest.raises(errors.InvalidParameter, match="DP080 owner is a str"):
        desk.ledger.sign_plan(plan, owner="owner.key")
    with pytest.raises(errors.InvalidParameter, match="DP060 plan is a int, not a Plan"):
        desk.ledger.sign_plan(3, owner=desk.owner)
    with pytest.raises(errors.InvalidParameter, match="DP060 a budget has epsilon and delta, and no 'delt'"):
        Budget(epsilon=3.0, delta=DELTA, delt=1)


def test_a_raise_of_epsilon_alone_is_told_without_the_delta(desk, plan):
    desk.spend(plan)
    desk.ledger.change_budget(Budget(epsilon=5.0, delta=DELTA), owner=desk.owner)
    (raised,) = [line for line in desk.verify().warnings if "raised" in line]
    assert "raised epsilon 3 to 5 at record" in raised


def test_a_thing_of_another_kind_is_refused_with_the_line_to_write(desk, plan):
    for use, hint in (
        (lambda: dpbudget.start("a.ledger"), "dpbudget.open_ledger"),
        (lambda: Desk(desk.path.parent / "other", budget=1.0), "dpbudget.Budget(epsilon="),
        (lambda: dpbudget.verify(desk.ledger), "pass the path"),
    ):
        with pytest.raises(errors.InvalidParameter) as caught:
            use()
        assert (caught.value.code, hint in caught.value.hint) == ("DP060", True)
