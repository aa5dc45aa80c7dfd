"""Ledgers with the filter rdp: every plan and every step may be chosen after all before it, within the allowances."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgerkit import (
    HALF_DELTA,
    NEXT_OWNER,
    NEXT_WRITER,
    OWNER,
    WRITER,
    export_bytes,
    make_ledger,
    make_plan,
    rdp_ledger,
    reopen,
    snapshot_of,
)

import dpbudget
from dpbudget._renyi import PhaseCost, RenyiTerms
from dpbudget.errors import BudgetExceeded, InvalidParameter, Tampered
from dpbudget.filters import LedgerFilter, RDPFilter, Spent
from dpbudget.filters.ledger_renyi import PAD, certified_allowances, certified_costs, ideal_delta
from dpbudget.ledger.entries import Entry, build
from dpbudget.ledger.journal import replay
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.renyi import RenyiAccount, steps_that_fit, uses_of
from dpbudget.ledger.rules import admit
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, sign_envelope
from dpbudget.ledger.statement import plan_statement, statement_digest
from dpbudget.plan import Budget, Phase, Plan, rate_from_float

ORDER_TWO = RenyiTerms((2.0,), (1,), (1.0,))


# --- the account -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 10**6)), min_size=1, max_size=12),
    st.lists(st.floats(1e-18, 1e3), min_size=3, max_size=3),
)
def test_what_is_spent_is_rounded_up_once_a_phase_however_it_is_leased(
    leases: list[tuple[int, int]], costs: list[float]
) -> None:
    account = RenyiAccount.fresh(ORDER_TWO, 1e-6)
    for phase, steps in leases:
        account.charge("run", [(phase, steps, PhaseCost((costs[phase],), 1e-30, 1e-20))])
    exact = sum(
        math.ceil(Fraction(costs[phase]) * sum(steps for where, steps in leases if where == phase) * 2**100)
        for phase in {phase for phase, _ in leases}
    )
    assert account.spent == [exact]


def test_an_unknown_cost_closes_its_order_for_ever() -> None:
    account = RenyiAccount.fresh(RenyiTerms((2.0, 3.0), (1, 1), (1.0, 1.0)), 1e-6)
    account.charge("a", [(0, 1, PhaseCost((None, 0.5), 0.0, 0.0))])
    account.charge("b", [(0, 1, PhaseCost((0.0, 0.5), 0.0, 0.0))])
    assert account.spent[0] is None
    assert account.fits
    account.charge("b", [(0, 1, PhaseCost((0.0, 1e-30), 0.0, 0.0))])
    assert not account.fits


def test_one_order_with_room_is_enough_but_both_tails_must_hold() -> None:
    terms = RenyiTerms((2.0, 3.0), (1, 1), (1.0, -5.0))
    for cost, fits in (
        (PhaseCost((1.0, 9.0), 1e-8, 0.0099), True),
        (PhaseCost((1.1, 9.0), 0.0, 0.0), False),
        (PhaseCost((0.0, 0.0), 1.1e-8, 0.0), False),
        (PhaseCost((0.0, 0.0), 0.0, 0.0101), False),
    ):
        account = RenyiAccount.fresh(terms, 1.0000001e-6)
        account.charge("run", [(0, 1, cost)])
        assert account.fits is fits


def test_steps_cross_the_phases_of_a_plan() -> None:
    phases = tuple(Phase(rate_k=rate_from_float(0.01), noise_multiplier=s, steps=n) for s, n in ((1.0, 3), (2.0, 2)))
    plan = make_plan(phases=phases)
    costs = (PhaseCost((0.125,), 0.0, 0.0), PhaseCost((0.25,), 0.0, 0.0))
    assert [(phase, steps) for phase, steps, _ in uses_of(plan, costs, 1, 5)] == [(0, 2), (1, 2)]
    account = RenyiAccount.fresh(RenyiTerms((2.0,), (1,), (0.7,)), 1e-6)
    assert steps_that_fit(account, "run", plan, costs, 5) == 4  # 0.375 + 0.25


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_an_rdp_ledger_lives_and_reads_back(tmp_path: Path) -> None:
    ledger = rdp_ledger(tmp_path / "ledger")
    data = export_bytes(ledger)
    ledger.close()
    with Ledger.open(tmp_path / "ledger", trust=NEXT_OWNER.public) as again:
        assert export_bytes(again) == data
        state = again.state
    assert [run.charged for run in state.runs.values()] == [4, 2]
    assert state.account is not None
    # Four steps of 1/128 and two of 2/128; twice that at order 8.
    assert [units and Fraction(units, 2**100) for units in state.account.spent] == [Fraction(8, 128), Fraction(16, 128)]
    assert (state.epsilon, [grant.charged for grant in state.grants]) == (2.0, [0, 4, 6])
    assert state.portfolios == ()


def test_a_run_takes_what_has_room_and_ends_where_none_is_left() -> None:
    ledger = make_ledger(kind="rdp", budget=Budget(epsilon=0.0625, delta=1e-6))  # eight steps at order 2
    first, second = (ledger.sign_plan(make_plan(6), owner=OWNER) for _ in range(2))
    steps = [receipt.step for receipt in ledger.start(first, lease_steps=4)]
    run = ledger.start(second, lease_steps=6)
    taken = [run.next_receipt().step for _ in range(2)]
    with pytest.raises(BudgetExceeded, match="step 3 of 6: no Renyi order"):
        run.next_receipt()
    assert (steps, taken) == ([0, 1, 2, 3, 4, 5], [0, 1])
    assert ledger.state.runs[second].charged == 2
    ledger.change_budget(Budget(epsilon=0.09375, delta=1e-6), owner=OWNER)
    assert [receipt.step for receipt in run] == [2, 3, 4, 5]


def test_a_plan_that_does_not_fit_is_refused_with_the_steps_that_would() -> None:
    ledger = make_ledger(kind="rdp", budget=Budget(epsilon=0.0625, delta=1e-6))
    size = ledger.state.size
    with pytest.raises(BudgetExceeded, match="no Renyi order has room for the 9 steps") as caught:
        ledger.sign_plan(make_plan(9), owner=OWNER)
    assert "8 of its steps would fit" in caught.value.hint
    assert ledger.state.size == size
    with pytest.raises(BudgetExceeded) as caught:
        ledger.sign_plan(make_plan(1, epsilon=16.0), owner=OWNER)
    assert "not one of its steps fits" in caught.value.hint


def test_a_closed_or_crashed_lease_gives_nothing_back(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger", kind="rdp", budget=Budget(epsilon=0.0625, delta=1e-6))
    run_id = ledger.sign_plan(make_plan(8), owner=OWNER)
    run = ledger.start(run_id, lease_steps=5)
    run.next_receipt()
    run.close()
    ledger.close()
    with reopen(tmp_path / "ledger") as again:
        assert [receipt.step for receipt in again.start(run_id)] == [5, 6, 7]
        assert again.state.account is not None
        assert again.state.account.spent[0] == 8 * 2**100 // 128


def test_two_runs_that_race_share_what_is_left(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger", kind="rdp", budget=Budget(epsilon=0.0625, delta=1e-6))
    ids = [ledger.sign_plan(make_plan(8), owner=OWNER) for _ in range(2)]
    others = [reopen(tmp_path / "ledger") for _ in ids]
    runs = [other.start(run_id, lease_steps=1) for other, run_id in zip(others, ids, strict=True)]
    released = 0
    while runs:
        for run in list(runs):
            try:
                run.next_receipt()
                released += 1
            except BudgetExceeded:
                runs.remove(run)
    assert released == 8
    for other in (*others, ledger):
        other.close()


def test_a_budget_below_what_is_spent_is_refused() -> None:
    ledger = make_ledger(kind="rdp")
    with ledger.start(ledger.sign_plan(make_plan(4, epsilon=32.0), owner=OWNER)) as run:  # a quarter a step
        for _ in run:
            pass
    with pytest.raises(InvalidParameter, match="below what is spent at every Renyi order"):
        ledger.change_budget(Budget(epsilon=0.99, delta=1e-6), owner=OWNER)
    ledger.change_budget(Budget(epsilon=1.0, delta=1e-6), owner=OWNER)
    assert ledger.state.epsilon == 1.0


def tampered_cases() -> dict[str, tuple[dict[str, Any], str]]:
    common = {"run": "ab" * 16, "nonce": "01" * 32, "commitment": "02" * 32, "first": 0, "count": 1}
    return {
        "a claim": ({**common, "claim": 0.5}, "with a claim in an rdp ledger"),
        "beyond every order": ({**common, "count": 4, "claim": None}, "no Renyi order has room"),
    }


@pytest.mark.parametrize("name", tampered_cases())
def test_the_rules_refuse_what_the_writer_would_never_write(name: str) -> None:
    ledger = make_ledger(kind="rdp", budget=Budget(epsilon=0.0234375, delta=1e-6))  # three steps
    state = ledger.state
    plan, costs = make_plan(4), ledger._filter.renyi_costs(make_plan(4), ORDER_TWO)  # type: ignore[union-attr]
    payload = plan_statement(plan, ledger_id=ledger.id, run_id="ab" * 16, costs=costs)
    line = build(
        "plan",
        seq=state.size,
        prev=state.last,
        run="ab" * 16,
        statement=statement_digest(payload),
        portfolio=0,
    )
    state = admit(state, Entry(line, sign_envelope(payload, STATEMENT_TYPE, OWNER)))
    fields, problem = tampered_cases()[name]
    with pytest.raises(Tampered, match=problem):
        admit(state, Entry(build("lease", seq=state.size, prev=state.last, **fields)))
    fine = {**fields, "count": 3, "claim": None}
    assert admit(state, Entry(build("lease", seq=state.size, prev=state.last, **fine))).size == state.size + 1


def test_the_orders_stand_second_once_and_in_rdp_ledgers_alone() -> None:
    fields = {"orders": [2.0, 8.0], "shares": [1, 1], "allowances": [1.0, 1.0]}
    for state in (make_ledger().state, make_ledger(kind="rdp").state):
        line = build("renyi", seq=state.size, prev=state.last, **fields)
        with pytest.raises(Tampered, match="renyi stands second"):
            admit(state, Entry(line, sign_envelope(line, RECORD_TYPE, OWNER)))


def test_plan_and_portfolio_keep_to_the_filter_of_genesis() -> None:
    state = make_ledger(kind="rdp").state
    line = build("portfolio", seq=state.size, prev=state.last, index=1, delta=HALF_DELTA, epsilon=None)
    with pytest.raises(Tampered, match="portfolio in a ledger with another filter"):
        admit(state, Entry(line, sign_envelope(line, RECORD_TYPE, OWNER)))
    payload = plan_statement(make_plan(), ledger_id=state.genesis.ledger_id, run_id="ab" * 16)
    fields = {"run": "ab" * 16, "statement": statement_digest(payload), "portfolio": 0}
    line = build("plan", seq=state.size, prev=state.last, **fields)
    with pytest.raises(Tampered, match="statement of unknown type"):
        admit(state, Entry(line, sign_envelope(payload, STATEMENT_TYPE, OWNER)))


# --- with the true arithmetic ----------------------------------------------------------------------------------------


def true_plan(steps: int = 50, rate: float = 0.01, sigma: float = 1.0) -> Plan:
    return dpbudget.plan_for(
        noise_multiplier=sigma, dataset_size=10_000, sample_rate=rate, steps=steps, delta=1e-6, max_parameters=2**20
    )


@pytest.fixture(scope="module")
def orders() -> LedgerFilter:
    return LedgerFilter(orders=(4.0, 8.0, 16.0, 32.0))


def true_ledger(filter: LedgerFilter, epsilon: float, path: Path | None = None) -> Ledger:
    budget = Budget(epsilon=epsilon, delta=1e-6)
    return make_ledger(path, kind="rdp", filter=filter, budget=budget)


def test_the_ledger_stops_where_the_filter_does(orders: LedgerFilter) -> None:
    ledger = true_ledger(orders, 2.0)
    small, large = true_plan(40, 0.02, 1.2), true_plan(4000, 0.01, 0.9)
    with ledger.start(ledger.sign_plan(small, owner=OWNER)) as run:
        assert len(list(run)) == 40
    filter_ = RDPFilter(Budget(epsilon=2.0, delta=ideal_delta(1e-6)), orders=orders.orders)
    spent = filter_.admit(Spent(), small.charges)
    with pytest.raises(BudgetExceeded) as caught:
        ledger.sign_plan(large, owner=OWNER)
    assert "all of it fits with a noise multiplier of" in caught.value.hint
    fits = int(caught.value.hint.split("; ")[1].split()[0])
    last = filter_.admit(spent, [large.charges[0].__class__(large.charges[0].mechanism, fits)])
    assert last
    with pytest.raises(BudgetExceeded):
        filter_.admit(spent, [large.charges[0].__class__(large.charges[0].mechanism, fits + 1)])


def test_the_table_is_padded_just_enough_for_every_machine(orders: LedgerFilter) -> None:
    plan = true_plan()
    terms = orders.renyi_terms(Budget(epsilon=2.0, delta=1e-6))
    (stated,), (own,) = orders.renyi_costs(plan, terms), certified_costs(plan, terms.orders)
    for his, mine in zip(stated.costs, own.costs, strict=True):
        assert his is not None
        assert mine is not None
        assert mine * (1 + 0.9 * PAD) < his <= mine * (1 + 2 * PAD)
    most = certified_allowances(Budget(epsilon=2.0, delta=1e-6), terms.orders, terms.shares)
    for allowance, bound in zip(terms.allowances, most, strict=True):
        assert bound - 3 * PAD * max(1.0, abs(bound)) < allowance < bound


def test_an_rdp_ledger_is_verified_with_its_odometer(orders: LedgerFilter, tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with true_ledger(orders, 4.0, path) as ledger, ledger.start(ledger.sign_plan(true_plan(), owner=OWNER)) as run:
        for _ in run:
            pass
    report = dpbudget.verify(path, trust=OWNER.public)
    assert (report.ok, report.problems) == (True, ())
    assert (report.filter, report.delta, report.budget, report.steps) == ("rdp", 1e-6, (4.0, 1e-6), 50)
    assert report.epsilon is not None
    # The plan as a single composition is what nothing adaptive can beat; the odometer pays for being adaptive.
    assert report.epsilon.lower == pytest.approx(true_plan().claim.epsilon, rel=1e-3)
    assert true_plan().claim.epsilon < report.epsilon.upper < 4.0


def test_raises_after_spending_are_said_and_the_odometer_stands_for_itself(
    orders: LedgerFilter, tmp_path: Path
) -> None:
    path = tmp_path / "ledger"
    with true_ledger(orders, 4.0, path) as ledger:
        with ledger.start(ledger.sign_plan(true_plan(), owner=OWNER)) as run:
            run.next_receipt()
        ledger.change_budget(Budget(epsilon=8.0, delta=1e-6), owner=OWNER)
    report = dpbudget.verify(path, trust=OWNER.public)
    assert report.ok
    assert any("raised epsilon 4 to 8" in warning for warning in report.warnings)
    assert report.epsilon is not None
    assert report.epsilon.upper < 4.0


def forged(orders: LedgerFilter, change: str) -> bytes:
    """An rdp ledger whose owner signed a number that is no bound."""

    class Liar(LedgerFilter):
        def renyi_costs(self, plan: Plan, terms: RenyiTerms) -> tuple[PhaseCost, ...]:
            (cost,) = super().renyi_costs(plan, terms)
            low = tuple(one and one * (1 - 1e-6) for one in cost.costs)
            return (
                PhaseCost(
                    low if change == "costs" else cost.costs,
                    cost.tail * (0.5 if change == "tail" else 1.0),
                    cost.factor * (0.5 if change == "factor" else 1.0),
                ),
            )

        def renyi_terms(self, budget: Budget) -> RenyiTerms:
            terms = super().renyi_terms(budget)
            lift = 1e-6 if change == "allowances" else 0.0
            return RenyiTerms(terms.orders, terms.shares, tuple(bound + lift for bound in terms.allowances))

    ledger = true_ledger(Liar(orders=orders.orders), 2.0)
    with ledger.start(ledger.sign_plan(true_plan(), owner=OWNER)) as run:
        run.next_receipt()
    return export_bytes(ledger)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("costs", "below what is certified"),
        ("tail", "the tail of the noise costs more"),
        ("factor", "the tail of the noise costs more"),
        ("allowances", "its allowances are beyond epsilon 2"),
        ("none", None),
    ],
)
def test_numbers_that_are_no_bounds_are_found(
    orders: LedgerFilter, change: str, problem: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "export"
    path.write_bytes(forged(orders, change))
    report = dpbudget.verify(path, trust=OWNER.public)
    assert report.ok is (problem is None)
    assert problem is None or problem in report.problems[0]
    assert (report.epsilon is None) is (problem is not None)


def test_a_plan_with_an_unknown_cost_at_every_order_is_refused(orders: LedgerFilter) -> None:
    class Unknown(LedgerFilter):
        def renyi_costs(self, plan: Plan, terms: RenyiTerms) -> tuple[PhaseCost, ...]:
            return tuple(PhaseCost((None,) * len(terms.orders), 0.0, 0.0) for _ in plan.phases)

    with pytest.raises(BudgetExceeded, match="no Renyi order"):
        true_ledger(Unknown(orders=orders.orders), 2.0).sign_plan(true_plan(), owner=OWNER)


def test_a_writer_of_an_rdp_ledger_rotates_too() -> None:
    snapshot = snapshot_of(rdp_ledger())
    state, _ = replay(snapshot.entries, snapshot.note, OWNER.public)
    assert (state.writers[0], state.writer, state.owner) == (WRITER.public, NEXT_WRITER.public, NEXT_OWNER.public)
