"""What the owner may sign, and what fits: budgets, portfolios, claims and keys."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgerkit import (
    BUDGET,
    HALF_DELTA,
    OWNER,
    STRANGER,
    WRITER,
    SumFilter,
    WideFilter,
    make_ledger,
    make_plan,
    reopen,
    snapshot_of,
)

from dpbudget.errors import BudgetExceeded, DPBudgetError, InvalidParameter, Tampered
from dpbudget.ledger.claims import covers
from dpbudget.ledger.head import read_head
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.signing import STATEMENT_TYPE, open_envelope
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import Budget, Claim, Plan, claimed_epsilon


def spend_one(ledger: Ledger, run_id: str) -> None:
    with ledger.start(run_id) as run:
        run.next_receipt()


# --- create ----------------------------------------------------------------------------------------------------------


def test_a_new_ledger_states_the_owners_facts() -> None:
    ledger = make_ledger(adjacency=Adjacency.REPLACE_ONE, public_data=True, dataset="ab" * 32)
    genesis = ledger.state.genesis
    assert (genesis.epsilon, genesis.delta, genesis.adjacency) == (3.0, 1e-6, Adjacency.REPLACE_ONE)
    assert (genesis.owner, genesis.writer) == (OWNER.public, WRITER.public)
    assert genesis.public_data
    assert genesis.dataset == "ab" * 32
    assert ledger.id == genesis.ledger_id
    assert ledger.trusted
    assert read_head(ledger.head.note.encode(), ledger.id, WRITER.public) == ledger.head
    assert ledger.witness_key.startswith(f"dpbudget.ledger/{ledger.id[:16]}+")


def test_dataset_ids_are_random_unless_the_owner_issues_them() -> None:
    assert make_ledger().state.genesis.dataset != make_ledger().state.genesis.dataset
    for bad in ("", "health", "AB" * 32, "ab" * 31):
        with pytest.raises(InvalidParameter, match="dataset id"):
            make_ledger(dataset=bad)


def test_owner_and_writer_must_be_two_keys() -> None:
    with pytest.raises(InvalidParameter) as caught:
        make_ledger(writer=OWNER)
    assert caught.value.code == "DP080"


def test_the_first_portfolio_takes_half_of_delta_or_the_whole_budget() -> None:
    half, whole = make_ledger(), make_ledger(whole_budget=True)
    (first,), (all_of_it,) = half.state.portfolios, whole.state.portfolios
    assert (first.delta, first.epsilon) == (HALF_DELTA, None)
    assert (all_of_it.delta, all_of_it.epsilon) == (1e-6, 3.0)
    assert whole.state.remaining_delta == whole.state.remaining_epsilon == 0
    assert (half.plan_delta, whole.plan_delta) == (HALF_DELTA, 1e-6)


def test_a_plan_for_all_of_delta_in_a_ledger_that_keeps_half_is_told_of_whole_budget() -> None:
    for ledger, delta, told in ((make_ledger(), 1e-6, True), (make_ledger(), 1e-7, False)):
        with pytest.raises(InvalidParameter) as caught:
            ledger.sign_plan(make_plan(delta=delta), owner=OWNER)
        assert (caught.value.code, f"plan with delta {HALF_DELTA}" in caught.value.hint) == ("DP052", True)
        assert ("whole_budget=True" in caught.value.hint) is told
    with pytest.raises(InvalidParameter) as caught:
        make_ledger(whole_budget=True).sign_plan(make_plan(delta=HALF_DELTA), owner=OWNER)
    assert caught.value.hint == "plan with delta 1e-06"


def test_a_run_calibrated_to_the_whole_budget_fits_it_exactly() -> None:
    ledger = make_ledger(whole_budget=True)
    run_id = ledger.sign_plan(make_plan(2, epsilon=3.0, delta=1e-6), owner=OWNER)
    assert len(list(ledger.start(run_id))) == 2
    assert ledger.state.portfolios[0].claim == 3.0
    with pytest.raises(BudgetExceeded, match="frozen") as caught:
        ledger.sign_plan(make_plan(1, epsilon=1e-3, delta=1e-9), owner=OWNER)
    assert "used up" in caught.value.hint


# --- open ------------------------------------------------------------------------------------------------------------


def test_trust_is_the_owners_key_from_outside(tmp_path: Path) -> None:
    make_ledger(tmp_path / "ledger").close()
    for key in (OWNER.public, OWNER.public.raw):
        with Ledger.open(tmp_path / "ledger", trust=key) as ledger:
            assert ledger.trusted
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert not ledger.trusted
    for options in ({}, {"writer": WRITER}):
        with pytest.raises(Tampered) as caught:
            Ledger.open(tmp_path / "ledger", trust=STRANGER.public, **options)
        assert caught.value.code == "DP072"


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_signed_plan_is_an_in_toto_statement_for_one_run() -> None:
    ledger = make_ledger()
    plan = make_plan()
    run_id = ledger.sign_plan(plan, owner=OWNER)
    envelope = snapshot_of(ledger).entries[-1].envelope
    assert envelope is not None
    statement = json.loads(open_envelope(envelope, STATEMENT_TYPE, OWNER.public))
    assert statement == {
        "_type": "https://in-toto.io/Statement/v1",
        "predicateType": "urn:dpbudget:plan:v1",
        "predicate": plan.to_jsonable(),
        "subject": [{"name": f"dpbudget-run/{run_id}", "digest": {"sha256": ledger.id}}],
    }
    assert ledger.state.runs[run_id].plan == plan
    assert len(run_id) == 32


def test_two_plans_of_one_portfolio_are_claimed_together() -> None:
    ledger = make_ledger()
    ledger.sign_plan(make_plan(epsilon=1.5), owner=OWNER)
    with pytest.raises(BudgetExceeded, match=r"together with 1 signed before would claim epsilon 3\.1 .*; 3 of 3"):
        ledger.sign_plan(make_plan(epsilon=1.6), owner=OWNER)
    before = ledger.head
    ledger.sign_plan(make_plan(epsilon=1.5), owner=OWNER)
    assert ledger.head.size == before.size + 1


def test_a_refused_plan_writes_nothing() -> None:
    ledger = make_ledger()
    before = ledger.head
    for plan, owner, error in (
        (make_plan(epsilon=3.5), OWNER, BudgetExceeded),
        (make_plan(nominal_size=None), OWNER, InvalidParameter),
        (make_plan(delta=1e-7), OWNER, InvalidParameter),
        (make_plan(adjacency=Adjacency.ZERO_OUT), OWNER, InvalidParameter),
        (make_plan(), WRITER, InvalidParameter),
        (make_plan(), STRANGER, InvalidParameter),
    ):
        with pytest.raises(error):
            ledger.sign_plan(plan, owner=owner)
    assert ledger.refresh().size == before.size
    assert ledger.head == before


def test_a_plan_after_the_freeze_opens_the_next_portfolio_with_its_own_delta() -> None:
    ledger = make_ledger()
    spend_one(ledger, ledger.sign_plan(make_plan(epsilon=2.0), owner=OWNER))
    assert ledger.plan_delta == HALF_DELTA / 2
    with pytest.raises(BudgetExceeded, match="exceeds"):
        ledger.sign_plan(make_plan(epsilon=0.5, delta=5.1e-7), owner=OWNER)
    with pytest.raises(BudgetExceeded, match=r"claim epsilon 1\.5 .*; 1 of 3 is left"):
        ledger.sign_plan(make_plan(epsilon=1.5, delta=1e-7), owner=OWNER)
    assert len(ledger.state.portfolios) == 1
    run_id = ledger.sign_plan(make_plan(epsilon=1.0, delta=1e-7), owner=OWNER)
    assert ledger.state.portfolios[1].delta == 1e-7
    assert ledger.plan_delta == 1e-7
    spend_one(ledger, run_id)
    assert ledger.state.remaining_epsilon == 0
    assert ledger.state.remaining_delta == Fraction(1e-6) - Fraction(HALF_DELTA) - Fraction(1e-7)


def test_planned_but_unrun_plans_stay_charged() -> None:
    ledger = make_ledger()
    ledger.sign_plan(make_plan(epsilon=2.5), owner=OWNER)  # never run
    spend_one(ledger, ledger.sign_plan(make_plan(epsilon=0.5), owner=OWNER))
    assert ledger.state.portfolios[0].claim == 3.0


def test_many_portfolios_never_exceed_the_budget() -> None:
    ledger = make_ledger(budget=Budget(epsilon=1.0, delta=1e-6))
    for _ in range(12):
        plan = make_plan(epsilon=0.1, delta=ledger.plan_delta)
        try:
            spend_one(ledger, ledger.sign_plan(plan, owner=OWNER))
        except BudgetExceeded:
            break
    claims = [Fraction(portfolio.claim or 0) for portfolio in ledger.state.portfolios]
    assert len(claims) >= 9
    assert sum(claims) <= 1
    assert sum(Fraction(portfolio.delta) for portfolio in ledger.state.portfolios) <= Fraction(1e-6)


class Fixed:
    """A filter that certifies what it is told."""

    def __init__(self, claim: float) -> None:
        self.claim = claim

    def joint_claim(self, plans: Sequence[Plan], delta: float) -> float:
        return self.claim


@pytest.mark.parametrize(
    ("stated", "certified", "fits"),
    [
        (1.0, 1.0, True),
        (1.0, 0.5, True),  # another accountant of the plan may be looser
        (1.0, 1.0 + 0.9e-9, True),  # drift of elementary functions: at most one unit of the claim
        (1.0, 1.0 + 1.1e-9, False),
        (1.0, 1.1, False),
        (2.5, 2.5 + 2.4e-9, True),
        (2.5, 2.5 + 2.6e-9, False),
        (0.01, 0.01 + 0.9e-9, True),
        (0.01, 0.01 + 1.1e-9, False),
    ],
)
def test_a_plan_must_claim_what_the_filter_certifies_for_it(stated: float, certified: float, fits: bool) -> None:
    ledger = make_ledger(filter=Fixed(certified))
    if fits:
        assert ledger.sign_plan(make_plan(epsilon=stated), owner=OWNER)
    else:
        with pytest.raises(InvalidParameter, match="the ledger's filter certifies"):
            ledger.sign_plan(make_plan(epsilon=stated), owner=OWNER)


def test_a_plan_that_fills_the_budget_exactly_fits_it_on_every_machine(tmp_path: Path) -> None:
    """The claim of one plan is the owner's, though this machine would round it one unit higher."""
    ledger = make_ledger(tmp_path / "ledger", whole_budget=True, filter=Fixed(3.0))
    run_id = ledger.sign_plan(make_plan(epsilon=3.0, delta=1e-6), owner=OWNER)
    ledger.close()
    with reopen(tmp_path / "ledger", filter=Fixed(3.0 + 2.9e-9)) as elsewhere:
        spend_one(elsewhere, run_id)
        assert elsewhere.state.portfolios[0].claim == 3.0


def test_a_claim_a_whole_unit_below_is_not_taken_over(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger", filter=Fixed(1.0))
    run_id = ledger.sign_plan(make_plan(epsilon=1.0), owner=OWNER)
    ledger.close()
    with reopen(tmp_path / "ledger", filter=Fixed(1.1)) as elsewhere:
        spend_one(elsewhere, run_id)
        assert elsewhere.state.portfolios[0].claim == 1.1


@settings(deadline=None)
@given(st.floats(1e-6, 1e6), st.floats(-1, 1))
def test_whatever_covers_exceeds_the_bound_of_this_machine(upper: float, drift: float) -> None:
    unit = 1e-9 * max(1.0, upper)
    stated, certified = claimed_epsilon(upper + 0.9 * drift * unit), claimed_epsilon(upper)
    if covers(stated, certified):
        assert stated > upper
    if covers(certified - 2 * unit, certified):
        raise AssertionError("two units below must not cover")


def test_a_claim_that_the_filter_cannot_make_is_passed_on() -> None:
    class Unable:
        def joint_claim(self, plans: Sequence[Plan], delta: float) -> float:
            raise InvalidParameter("delta is too small", code="DP053")

    ledger = make_ledger(filter=Unable())
    with pytest.raises(InvalidParameter) as caught:
        ledger.sign_plan(make_plan(), owner=OWNER)
    assert caught.value.code == "DP053"


def test_without_a_filter_nothing_is_signed_and_no_portfolio_begins(tmp_path: Path) -> None:
    with make_ledger(tmp_path / "ledger") as ledger:
        run_id = ledger.sign_plan(make_plan(), owner=OWNER)
    with reopen(tmp_path / "ledger", filter=None) as ledger:
        for act in (lambda: ledger.sign_plan(make_plan(), owner=OWNER), ledger.start(run_id).next_receipt):
            with pytest.raises(InvalidParameter, match="without a filter"):
                act()
    with reopen(tmp_path / "ledger") as ledger:
        spend_one(ledger, run_id)
    with reopen(tmp_path / "ledger", filter=None) as ledger:  # the claim stands in the ledger now
        assert ledger.start(run_id).next_receipt().step == 1


def test_plans_signed_at_once_by_two_processes_are_both_in_the_claim(tmp_path: Path) -> None:
    make_ledger(tmp_path / "ledger").close()
    gate = threading.Barrier(2)

    class Meeting(SumFilter):
        met = False

        def joint_claim(self, plans: Sequence[Plan], delta: float) -> float:
            if not self.met:
                self.met = True
                gate.wait(20)  # both have looked before either has written
            return super().joint_claim(plans, delta)

    results: list[Any] = []

    def sign() -> None:
        with reopen(tmp_path / "ledger", filter=Meeting()) as ledger:
            try:
                results.append(ledger.sign_plan(make_plan(epsilon=2.0), owner=OWNER))
            except DPBudgetError as error:
                results.append(error)

    threads = [threading.Thread(target=sign) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [result for result in results if isinstance(result, BudgetExceeded)]
    assert len(results) == 2
    assert len(refused) == 1  # 2 + 2 > 3: the second to write saw the first
    with Ledger.open(tmp_path / "ledger", trust=OWNER.public) as ledger:
        assert len(ledger.state.runs) == 1


def test_a_plan_of_another_accountant_keeps_its_name() -> None:
    ledger = make_ledger()
    plan = make_plan(claim=Claim(epsilon=1.0, delta=HALF_DELTA, accountant="rdp", accountant_version=1))
    run_id = ledger.sign_plan(plan, owner=OWNER)
    assert ledger.state.runs[run_id].plan.claim.accountant == "rdp"
    assert BUDGET.epsilon == 3.0


def test_an_owner_grants_nothing_on_top_of_an_understated_claim() -> None:
    # The writer alone states the claim of a portfolio: one of 0 would leave the whole budget to be granted again.
    ledger = make_ledger()
    run_id = ledger.sign_plan(make_plan(4, epsilon=2.0), owner=OWNER)
    lease = {"nonce": "ab" * 32, "commitment": "cd" * 32, "first": 0, "count": 4, "claim": 0.0}
    ledger._journal.transact(lambda draft: draft.add("lease", run=run_id, **lease))
    assert ledger.state.remaining_epsilon == 3
    before = ledger.head
    with pytest.raises(Tampered, match=r"frozen at a claim of epsilon 0\.0; .* certifies 2\.0") as caught:
        ledger.sign_plan(make_plan(4, epsilon=2.0, delta=ledger.plan_delta), owner=OWNER)
    assert caught.value.code == "DP071"
    assert ledger.head == before


@pytest.mark.parametrize(("name", "what"), [("MAX_RUNS", "2 runs"), ("MAX_ALL_PHASES", "2 phases")])
def test_a_plan_beyond_what_a_ledger_holds_is_refused_with_the_way_out(
    name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"dpbudget.ledger.admission.{name}", 1)
    ledger = make_ledger()
    ledger.sign_plan(make_plan(), owner=OWNER)
    with pytest.raises(InvalidParameter, match=f"would hold {what}; 1 is the most") as caught:
        ledger.sign_plan(make_plan(), owner=OWNER)
    assert "begin another" in caught.value.hint


def test_a_plan_whose_costs_fill_more_than_a_statement_is_refused_with_the_way_out() -> None:
    ledger = make_ledger(kind="rdp", filter=WideFilter())
    phases = tuple(make_plan(1).phases[0].replace(steps=1 + number) for number in range(1000))
    with pytest.raises(InvalidParameter, match=r"1000 phases would have [0-9]+ bytes") as caught:
        ledger.sign_plan(make_plan(phases=phases), owner=OWNER)
    assert "as several runs" in caught.value.hint
    ledger.sign_plan(make_plan(phases=phases[:600]), owner=OWNER)
