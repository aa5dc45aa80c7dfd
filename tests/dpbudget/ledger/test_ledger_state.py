"""Every rule of the ledger, each with one record that breaks it; and sequences of records against a small model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgerkit import BUDGET, HALF_DELTA, OWNER, STRANGER, WRITER, make_plan

from dpbudget._record import encode
from dpbudget.errors import Tampered
from dpbudget.ledger.entries import Entry, build
from dpbudget.ledger.journal import check_trust
from dpbudget.ledger.rules import admit
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, Ed25519Signer, sign_envelope
from dpbudget.ledger.state import LedgerState
from dpbudget.ledger.statement import plan_statement, read_statement, statement_digest
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import Plan

R1, R2, R3 = "11" * 16, "22" * 16, "33" * 16
NONCE, COMMITMENT, FRESH = "aa" * 32, "bb" * 32, "cc" * 16
GENESIS: dict[str, Any] = {
    "dataset": "dd" * 32,
    "adjacency": "add-remove",
    "unit": "example",
    "epsilon": BUDGET.epsilon,
    "delta": BUDGET.delta,
    "filter": "portfolio",
    "owner": OWNER.public.hex,
    "writer": WRITER.public.hex,
    "public_data": False,
}


def line_for(state: LedgerState, kind: str, **fields: Any) -> bytes:
    seq, prev = fields.pop("seq", state.size), fields.pop("prev", state.last)
    return build(kind, seq=seq, prev=prev, **fields)


def add(state: LedgerState, kind: str, *, signer: Ed25519Signer = OWNER, **fields: Any) -> LedgerState:
    line = line_for(state, kind, **fields)
    sealed = sign_envelope(line, RECORD_TYPE, signer) if kind in ("genesis", "portfolio") else None
    return admit(state, Entry(line, sealed))


def add_plan(
    state: LedgerState,
    run: str,
    plan: Plan | None = None,
    *,
    portfolio: int | None = None,
    owner: Ed25519Signer = OWNER,
    payload: bytes | None = None,
    digest: str | None = None,
) -> LedgerState:
    if payload is None:
        payload = plan_statement(plan or make_plan(), ledger_id=state.genesis.ledger_id, run_id=run)
    index = len(state.portfolios) if portfolio is None else portfolio
    line = line_for(state, "plan", run=run, statement=digest or statement_digest(payload), portfolio=index)
    return admit(state, Entry(line, sign_envelope(payload, STATEMENT_TYPE, owner)))


def lease(state: LedgerState, run: str, first: int, count: int, claim: float | None = None) -> LedgerState:
    return add(state, "lease", run=run, nonce=NONCE, commitment=COMMITMENT, first=first, count=count, claim=claim)


def born(**changes: Any) -> LedgerState:
    return add(LedgerState(), "genesis", **{**GENESIS, **changes})


def opened(epsilon: float | None = None, delta: float = HALF_DELTA) -> LedgerState:
    return add(born(), "portfolio", index=1, delta=delta, epsilon=epsilon)


def planned(steps: int = 4) -> LedgerState:
    return add_plan(opened(), R1, make_plan(steps))


def leased(steps: int = 4, count: int = 2) -> LedgerState:
    return lease(planned(steps), R1, 0, count, claim=1.0)


# --- chain -----------------------------------------------------------------------------------------------------------


def test_a_record_with_another_sequence_number_is_refused() -> None:
    state = leased()
    for seq in (0, state.size - 1, state.size + 1):
        with pytest.raises(Tampered, match="sequence number"):
            add(state, "reserve", run=R1, step=0, count=1, seq=seq)


def test_a_record_with_another_predecessor_is_refused() -> None:
    with pytest.raises(Tampered, match="does not continue the chain"):
        add(leased(), "reserve", run=R1, step=0, count=1, prev=bytes(32))


def test_a_second_genesis_is_refused() -> None:
    with pytest.raises(Tampered, match="comes first and once"):
        add(opened(), "genesis", **GENESIS)


@pytest.mark.parametrize("kind", ["portfolio", "reserve", "close"])
def test_nothing_but_genesis_comes_first(kind: str) -> None:
    fields: dict[str, Any] = {
        "portfolio": {"index": 1, "delta": HALF_DELTA, "epsilon": None},
        "reserve": {"run": R1, "step": 0, "count": 1},
        "close": {"run": R1, "first": 0, "unspent": 0},
    }[kind]
    with pytest.raises(Tampered, match="comes first and once"):
        add(LedgerState(), kind, **fields)


def test_a_refusal_names_the_record() -> None:
    with pytest.raises(Tampered, match=r"record 4: "):
        add(leased(), "reserve", run=R2, step=0, count=1)


def test_an_empty_ledger_has_no_facts() -> None:
    with pytest.raises(Tampered, match="no records"):
        LedgerState().genesis


# --- genesis ---------------------------------------------------------------------------------------------------------


def test_the_ledger_id_is_the_leaf_hash_of_genesis() -> None:
    state = born()
    assert state.genesis.ledger_id == state.last.hex()
    assert state.tree.root == state.last


def test_a_genesis_of_another_owner_than_the_trusted_one_is_refused() -> None:
    line = line_for(LedgerState(), "genesis", **GENESIS)
    state = admit(LedgerState(trust=STRANGER.public), Entry(line, sign_envelope(line, RECORD_TYPE, OWNER)))
    assert not state.trusted
    with pytest.raises(Tampered, match="the trusted key is") as caught:
        check_trust(state)
    assert caught.value.code == "DP072"


def test_a_genesis_that_its_owner_did_not_sign_is_refused() -> None:
    with pytest.raises(Tampered, match="not by the owner"):
        add(LedgerState(), "genesis", signer=STRANGER, **GENESIS)


def test_an_envelope_around_another_line_is_refused() -> None:
    line = line_for(LedgerState(), "genesis", **GENESIS)
    other = line_for(LedgerState(), "genesis", **{**GENESIS, "epsilon": 9.0})
    with pytest.raises(Tampered, match="signs another record"):
        admit(LedgerState(), Entry(line, sign_envelope(other, RECORD_TYPE, OWNER)))


def test_owner_and_writer_are_two_keys() -> None:
    with pytest.raises(Tampered, match="one key"):
        born(writer=OWNER.public.hex)


@pytest.mark.parametrize("name", ["owner", "writer"])
def test_a_small_order_key_in_genesis_is_refused(name: str) -> None:
    with pytest.raises(Tampered, match="small order"):
        born(**{name: "01" + "00" * 31})


def test_envelopes_stand_exactly_where_they_belong() -> None:
    state = leased()
    line = line_for(state, "reserve", run=R1, step=0, count=1)
    with pytest.raises(Tampered, match="superfluous envelope"):
        admit(state, Entry(line, sign_envelope(line, RECORD_TYPE, OWNER)))
    line = line_for(LedgerState(), "genesis", **GENESIS)
    with pytest.raises(Tampered, match="missing"):
        admit(LedgerState(), Entry(line))


# --- portfolio -------------------------------------------------------------------------------------------------------


def test_portfolios_are_numbered_from_one() -> None:
    with pytest.raises(Tampered, match="portfolio 2 after 0"):
        add(born(), "portfolio", index=2, delta=HALF_DELTA, epsilon=None)
    with pytest.raises(Tampered, match="portfolio 1 after 1"):
        add(leased(), "portfolio", index=1, delta=1e-9, epsilon=None)


def test_a_portfolio_opens_only_after_the_previous_one_froze() -> None:
    with pytest.raises(Tampered, match="before the previous one froze"):
        add(planned(), "portfolio", index=2, delta=1e-9, epsilon=None)
    assert len(add(leased(), "portfolio", index=2, delta=1e-9, epsilon=None).portfolios) == 2


def test_a_portfolio_that_the_owner_did_not_sign_is_refused() -> None:
    with pytest.raises(Tampered, match="not by the owner"):
        add(born(), "portfolio", index=1, delta=HALF_DELTA, epsilon=None, signer=WRITER)


def test_the_deltas_of_portfolios_sum_exactly_to_at_most_the_total() -> None:
    state = lease(add_plan(opened(delta=BUDGET.delta), R1, make_plan(delta=BUDGET.delta)), R1, 0, 1, claim=1.0)
    assert state.remaining_delta == 0
    with pytest.raises(Tampered, match="beyond the total"):
        # In floating point 1e-6 + 1e-30 == 1e-6; exact rationals see it.
        add(state, "portfolio", index=2, delta=1e-30, epsilon=None)


def test_a_portfolio_that_declares_more_epsilon_than_is_left_is_refused() -> None:
    with pytest.raises(Tampered, match="takes epsilon"):
        add(leased(), "portfolio", index=2, delta=1e-9, epsilon=2.0 + 1e-15 * 4)
    assert add(leased(), "portfolio", index=2, delta=1e-9, epsilon=2.0).remaining_epsilon == 0


# --- plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_before_the_first_portfolio_is_refused() -> None:
    with pytest.raises(Tampered, match="before the first portfolio"):
        add_plan(born(), R1, portfolio=1)


def test_a_plan_for_a_frozen_portfolio_is_refused() -> None:
    with pytest.raises(Tampered, match="frozen"):
        add_plan(leased(), R2)


def test_a_plan_for_another_portfolio_than_the_newest_is_refused() -> None:
    state = add(leased(), "portfolio", index=2, delta=HALF_DELTA, epsilon=None)
    with pytest.raises(Tampered, match="not for the newest"):
        add_plan(state, R2, portfolio=1)
    with pytest.raises(Tampered, match="not for the newest"):
        add_plan(state, R2, portfolio=3)


def test_a_run_has_one_plan() -> None:
    with pytest.raises(Tampered, match="has a plan already"):
        add_plan(planned(), R1)


def test_a_plan_signed_by_the_writer_is_refused() -> None:
    with pytest.raises(Tampered, match="not by the owner"):
        add_plan(opened(), R1, owner=WRITER)


def test_a_plan_whose_envelope_holds_another_statement_is_refused() -> None:
    with pytest.raises(Tampered, match="does not hold the statement"):
        add_plan(opened(), R1, digest="ee" * 32)


def test_a_plan_signed_for_another_ledger_is_refused() -> None:
    payload = plan_statement(make_plan(), ledger_id="ff" * 32, run_id=R1)
    with pytest.raises(Tampered, match="another ledger or run"):
        add_plan(opened(), R1, payload=payload)


def test_a_signed_plan_cannot_be_run_a_second_time() -> None:
    state = planned()
    payload = plan_statement(make_plan(), ledger_id=state.genesis.ledger_id, run_id=R1)
    with pytest.raises(Tampered, match="another ledger or run"):
        add_plan(state, R2, payload=payload)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (make_plan(adjacency=Adjacency.REPLACE_ONE), "neighbours"),
        (make_plan(adjacency=Adjacency.ZERO_OUT), "neighbours"),
        (make_plan(nominal_size=None), "nominal"),
        (make_plan(delta=1e-7), "portfolio at delta"),
        (make_plan(delta=6e-7), "portfolio at delta"),
    ],
)
def test_a_plan_that_does_not_belong_here_is_refused(plan: Plan, problem: str) -> None:
    with pytest.raises(Tampered, match=problem):
        add_plan(opened(), R1, plan)


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"predicateType": "urn:dpbudget:plan:v2"},
        {"subject": []},
        {"subject": None},
        {"predicate": None},
        {"predicate": {}},
        {"more": 1},
    ],
)
def test_a_statement_of_another_form_is_refused(change: dict[str, Any]) -> None:
    value = {
        "_type": "https://in-toto.io/Statement/v1",
        "predicateType": "urn:dpbudget:plan:v1",
        "predicate": make_plan().to_jsonable(),
        "subject": [{"name": f"dpbudget-run/{R1}", "digest": {"sha256": "ff" * 32}}],
    }
    assert read_statement(encode(value), ledger_id="ff" * 32, run_id=R1) == (make_plan(), None)
    with pytest.raises(Tampered):
        read_statement(encode({**value, **change}), ledger_id="ff" * 32, run_id=R1)


@pytest.mark.parametrize("name", ["unit", "noise", "model_digest", "max_parameters", "sampling"])
def test_a_statement_that_leaves_a_field_to_its_default_is_refused(name: str) -> None:
    predicate = make_plan().to_jsonable()
    del predicate[name]
    value = {
        "_type": "https://in-toto.io/Statement/v1",
        "predicateType": "urn:dpbudget:plan:v1",
        "predicate": predicate,
        "subject": [{"name": f"dpbudget-run/{R1}", "digest": {"sha256": "ff" * 32}}],
    }
    with pytest.raises(Tampered, match="canonical"):
        read_statement(encode(value), ledger_id="ff" * 32, run_id=R1)


# --- lease -----------------------------------------------------------------------------------------------------------


def test_a_lease_charges_its_steps_and_freezes_the_portfolio() -> None:
    state = leased(steps=4, count=2)
    assert state.runs[R1].charged == 2
    assert state.portfolios[0].claim == 1.0
    assert state.remaining_epsilon == 2


@pytest.mark.parametrize("first", [0, 1, 3])
def test_leases_are_contiguous(first: int) -> None:
    with pytest.raises(Tampered, match="lease from step"):
        lease(leased(), R1, first, 1)


def test_a_lease_beyond_the_plan_is_refused() -> None:
    with pytest.raises(Tampered, match="plan of 4"):
        lease(leased(), R1, 2, 3)
    full = lease(leased(), R1, 2, 2)
    with pytest.raises(Tampered, match="plan of 4"):
        lease(full, R1, 4, 1)


def test_only_the_first_lease_of_a_portfolio_carries_its_claim() -> None:
    with pytest.raises(Tampered, match="carries its claim"):
        lease(planned(), R1, 0, 1)
    with pytest.raises(Tampered, match="carries its claim"):
        lease(leased(), R1, 2, 1, claim=1.0)
    both = add_plan(planned(), R2)
    with pytest.raises(Tampered, match="carries its claim"):
        lease(lease(both, R1, 0, 1, claim=2.0), R2, 0, 1, claim=2.0)


def test_a_claim_beyond_the_budget_is_refused() -> None:
    with pytest.raises(Tampered, match="is left"):
        lease(planned(), R1, 0, 1, claim=3.0000000000000004)
    assert lease(planned(), R1, 0, 1, claim=3.0).remaining_epsilon == 0


def test_a_claim_beyond_what_its_portfolio_declares_is_refused() -> None:
    state = add_plan(opened(epsilon=1.5), R1)
    with pytest.raises(Tampered, match="is left for portfolio 1"):
        lease(state, R1, 0, 1, claim=1.6)
    assert lease(state, R1, 0, 1, claim=1.25).remaining_epsilon == 1.75  # the rest is free again


def test_claims_of_portfolios_add_up_exactly() -> None:
    state = lease(planned(), R1, 0, 1, claim=1e-20)
    state = add(state, "portfolio", index=2, delta=HALF_DELTA / 2, epsilon=None)
    state = add_plan(state, R2, make_plan(delta=HALF_DELTA / 2))
    with pytest.raises(Tampered, match="is left"):
        lease(state, R2, 0, 1, claim=3.0)  # 1e-20 + 3.0 == 3.0 in floating point, but not in rationals
    assert lease(state, R2, 0, 1, claim=2.9999999999999996).remaining_epsilon >= 0


def test_a_lease_of_an_unknown_run_is_refused() -> None:
    with pytest.raises(Tampered, match="unknown run"):
        lease(leased(), R3, 0, 1)


# --- reserve, settle, close ------------------------------------------------------------------------------------------


def reserve(state: LedgerState, step: int, count: int = 1) -> LedgerState:
    return add(state, "reserve", run=R1, step=step, count=count)


def settle(state: LedgerState, step: int) -> LedgerState:
    return add(state, "settle", run=R1, step=step, fresh=FRESH, output=None)


def close(state: LedgerState, first: int, unspent: int) -> LedgerState:
    return add(state, "close", run=R1, first=first, unspent=unspent)


def test_reserves_go_through_a_lease_in_order() -> None:
    state = leased(count=3)
    with pytest.raises(Tampered, match="not of the lease's next"):
        reserve(state, 1)
    state = reserve(state, 0, 2)
    with pytest.raises(Tampered, match="not of the lease's next"):
        reserve(state, 1)
    assert reserve(state, 2).runs[R1].reserved == 3


def test_a_reserve_outside_every_lease_is_refused() -> None:
    with pytest.raises(Tampered, match="no open lease"):
        reserve(leased(count=2), 2)
    with pytest.raises(Tampered, match="beyond the lease"):
        reserve(leased(count=2), 0, 3)


def test_a_reserve_for_a_whole_lease_of_another_process_is_possible() -> None:
    state = lease(leased(count=2), R1, 2, 2)  # two processes, one run
    state = reserve(state, 2, 2)
    assert reserve(state, 0, 2).runs[R1].reserved == 4


def test_a_settle_needs_its_reserve() -> None:
    with pytest.raises(Tampered, match="not reserved"):
        settle(leased(), 0)


def test_a_step_is_settled_once_and_in_order() -> None:
    state = settle(reserve(leased(count=3), 0, 3), 1)
    for step in (0, 1):
        with pytest.raises(Tampered, match="settled or passed over"):
            settle(state, step)


def test_a_lease_whose_last_step_is_settled_is_over() -> None:
    state = settle(reserve(leased(count=2), 0, 2), 1)
    assert state.runs[R1].leases == ()
    with pytest.raises(Tampered, match="no open lease"):
        settle(state, 0)
    with pytest.raises(Tampered, match="no open lease"):
        close(state, 0, 0)


@pytest.mark.parametrize("unspent", [0, 2, 3])
def test_a_close_states_exactly_what_was_never_reserved(unspent: int) -> None:
    with pytest.raises(Tampered, match="unspent"):
        close(reserve(leased(count=2), 0), 0, unspent)


def test_a_close_lowers_no_charge_and_ends_the_lease() -> None:
    state = close(reserve(leased(count=2), 0), 0, 1)
    assert state.runs[R1].charged == 2
    assert state.remaining_epsilon == 2
    with pytest.raises(Tampered, match="no open lease"):
        reserve(state, 1)
    with pytest.raises(Tampered, match="no open lease"):
        close(state, 0, 1)


def test_a_close_names_its_lease_by_the_first_step() -> None:
    with pytest.raises(Tampered, match="does not exist"):
        close(leased(count=2), 1, 2)


def test_admitting_changes_no_earlier_state() -> None:
    before = leased()
    after = reserve(before, 0)
    assert before.runs[R1].reserved == 0
    assert after.runs[R1].reserved == 1
    assert before.size == after.size - 1


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from(["lease", "reserve", "settle", "close"]), st.integers(0, 8), st.integers(0, 4)))
)
def test_whatever_is_admitted_the_charge_never_falls_and_never_passes_the_plan(
    moves: list[tuple[str, int, int]],
) -> None:
    state = leased(steps=8, count=2)
    released: set[int] = set()
    for kind, step, count in moves:
        before = state.runs[R1]
        try:
            if kind == "lease":
                state = lease(state, R1, step, count)
            elif kind == "reserve":
                state = reserve(state, step, count)
            elif kind == "settle":
                state = settle(state, step)
            else:
                state = close(state, step, count)
        except Tampered:
            continue
        if kind == "reserve":
            steps = set(range(step, step + count))
            assert not steps & released, "a step was released twice"
            released |= steps
        after = state.runs[R1]
        assert before.charged <= after.charged <= 8
        assert after.reserved == len(released) <= after.charged
        assert all(step < after.charged for step in released)
