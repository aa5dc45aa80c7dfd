"""Changing totals, keys and notes: what the owner may do later, and what nobody may."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledgerkit import (
    BUDGET,
    NEXT_OWNER,
    NEXT_WRITER,
    OWNER,
    STRANGER,
    WRITER,
    SumFilter,
    export_bytes,
    make_ledger,
    make_plan,
    reopen,
    snapshot_of,
)

from dpbudget.errors import BudgetExceeded, InvalidParameter, Tampered
from dpbudget.ledger.admission import check_frozen
from dpbudget.ledger.entries import NOTES, Entry, build
from dpbudget.ledger.journal import check_kept_heads, replay
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.rules import Machine, admit
from dpbudget.ledger.signing import RECORD_TYPE, Ed25519Signer, sign_envelope
from dpbudget.ledger.state import LedgerState, SpendingFilter
from dpbudget.plan import Budget


def totals(epsilon: float, delta: float = 1e-6) -> Budget:
    return Budget(epsilon=epsilon, delta=delta)


def spent_ledger(path: Path | None = None) -> Ledger:
    """A ledger of epsilon 3 whose first portfolio froze at 2."""
    ledger = make_ledger(path)
    with ledger.start(ledger.sign_plan(make_plan(epsilon=2.0), owner=OWNER)) as run:
        run.next_receipt()
    return ledger


# --- totals ----------------------------------------------------------------------------------------------------------


def test_a_raise_makes_room_for_another_plan() -> None:
    ledger = spent_ledger()
    plan = make_plan(epsilon=2.0, delta=ledger.plan_delta)
    with pytest.raises(BudgetExceeded, match="left"):
        ledger.sign_plan(plan, owner=OWNER)
    ledger.change_budget(totals(4.0), owner=OWNER)
    assert ledger.sign_plan(plan, owner=OWNER) in ledger.state.runs


def test_a_lowered_total_refuses_what_fitted_before() -> None:
    ledger = spent_ledger()
    ledger.change_budget(totals(2.5), owner=OWNER)
    assert (ledger.state.epsilon, float(ledger.state.remaining_epsilon)) == (2.5, 0.5)
    with pytest.raises(BudgetExceeded):
        ledger.sign_plan(make_plan(epsilon=1.0, delta=ledger.plan_delta), owner=OWNER)


def test_a_total_can_be_lowered_to_exactly_what_is_spent_and_no_further() -> None:
    ledger = spent_ledger()
    with pytest.raises(InvalidParameter, match=r"below what the portfolios take: epsilon 2\b"):
        ledger.change_budget(totals(1.9999999), owner=OWNER)
    with pytest.raises(InvalidParameter, match="delta 5e-07"):
        ledger.change_budget(totals(2.0, 4e-7), owner=OWNER)
    ledger.change_budget(totals(2.0, 5e-7), owner=OWNER)
    assert ledger.state.remaining_epsilon == ledger.state.remaining_delta == 0


def test_a_lowered_total_stops_a_portfolio_that_was_not_frozen() -> None:
    ledger = make_ledger()
    run = ledger.start(ledger.sign_plan(make_plan(epsilon=2.0), owner=OWNER))
    ledger.change_budget(totals(1.5), owner=OWNER)
    with pytest.raises(BudgetExceeded, match=r"1\.5 is left"):
        run.next_receipt()
    assert run.charged == 0


@pytest.mark.parametrize("signer", [WRITER, STRANGER])
def test_nobody_but_the_owner_changes_the_totals(signer: Ed25519Signer) -> None:
    ledger = spent_ledger()
    with pytest.raises(InvalidParameter, match="not the owner's") as caught:
        ledger.change_budget(totals(9.0), owner=signer)
    assert caught.value.code == "DP080"
    state = ledger.state
    line = build("budget", seq=state.size, prev=state.last, epsilon=9.0, delta=1e-6, allowances=None)
    with pytest.raises(Tampered, match="not by the owner"):
        admit(state, Entry(line, sign_envelope(line, RECORD_TYPE, signer)))


def test_a_raise_that_was_signed_once_cannot_be_played_twice() -> None:
    ledger = spent_ledger()
    ledger.change_budget(totals(9.0), owner=OWNER)
    raised = snapshot_of(ledger).entries[-1]
    ledger.change_budget(totals(2.0), owner=OWNER)
    with pytest.raises(Tampered, match="sequence number"):
        admit(ledger.state, raised)


def test_every_grant_is_remembered_with_what_was_charged_before() -> None:
    ledger = spent_ledger()
    ledger.change_budget(totals(5.0), owner=OWNER)
    first, second = ledger.state.grants
    assert (first.seq, first.epsilon, first.delta, first.charged) == (0, BUDGET.epsilon, BUDGET.delta, 0)
    assert (second.seq, second.epsilon, second.charged) == (ledger.state.size - 1, 5.0, 1)


def test_allowances_stand_in_a_budget_of_an_rdp_ledger_alone() -> None:
    for kind, allowances in (("portfolio", [1.0, 1.0]), ("rdp", None), ("rdp", [1.0])):
        state = make_ledger(kind=kind).state
        line = build("budget", seq=state.size, prev=state.last, epsilon=3.0, delta=1e-6, allowances=allowances)
        with pytest.raises(Tampered, match="allowance"):
            admit(state, Entry(line, sign_envelope(line, RECORD_TYPE, OWNER)))


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_new_writer_goes_on_and_the_old_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = make_ledger(path)
    run_id = ledger.sign_plan(make_plan(), owner=OWNER)
    old = reopen(path)
    ledger.rekey("writer", new=NEXT_WRITER, by=WRITER)
    with ledger.start(run_id) as run:
        assert run.next_receipt().step == 0
    with pytest.raises(InvalidParameter, match="not the ledger's writer") as caught:
        old.start(run_id).next_receipt()
    assert caught.value.code == "DP080"
    with pytest.raises(InvalidParameter, match="not the ledger's writer"):
        reopen(path)
    old.close()
    ledger.close()
    with reopen(path, writer=NEXT_WRITER) as again:
        assert again.state.writer == NEXT_WRITER.public
        assert again.state.writers == (WRITER.public, NEXT_WRITER.public)


def test_the_owner_replaces_a_writer_whose_key_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with make_ledger(path) as ledger:
        run_id = ledger.sign_plan(make_plan(), owner=OWNER)
    with (
        Ledger.replace_writer(path, new=NEXT_WRITER, owner=OWNER, filter=SumFilter()) as ledger,
        ledger.start(run_id) as run,
    ):
        run.next_receipt()
    with Ledger.open(path, trust=OWNER.public) as ledger:
        assert ledger.state.writer == NEXT_WRITER.public


def test_a_stranger_replaces_nobody(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    make_ledger(path).close()
    with pytest.raises(Tampered, match="the trusted key is"):
        Ledger.replace_writer(path, new=NEXT_WRITER, owner=STRANGER)
    with reopen(path) as ledger:
        for role, by in (("writer", STRANGER), ("owner", STRANGER), ("owner", WRITER)):
            with pytest.raises(InvalidParameter, match="cannot hand over"):
                ledger.rekey(role, new=NEXT_WRITER, by=by)  # type: ignore[arg-type]
        assert ledger.state.size == 2


def forged_rekey(state: LedgerState, *signers: Ed25519Signer, role: str = "writer", **changes: str) -> Entry:
    old = state.writer if role == "writer" else state.owner
    fields = {"role": role, "old": old.hex, "key": NEXT_WRITER.public.hex, **changes}
    line = build("rekey", seq=state.size, prev=state.last, **fields)
    return Entry(line, sign_envelope(line, RECORD_TYPE, *signers))


def test_a_rekey_needs_the_signature_of_the_old_key_and_of_the_new_one() -> None:
    state = make_ledger().state
    assert admit(state, forged_rekey(state, WRITER, NEXT_WRITER)).writer == NEXT_WRITER.public
    for signers in ((WRITER,), (NEXT_WRITER,), (NEXT_WRITER, WRITER), (STRANGER, NEXT_WRITER), (WRITER, STRANGER)):
        with pytest.raises(Tampered):
            admit(state, forged_rekey(state, *signers))
    with pytest.raises(Tampered):
        admit(state, forged_rekey(state, WRITER, NEXT_WRITER, role="owner"))


def test_no_key_comes_back_and_none_holds_both_roles() -> None:
    ledger = make_ledger()
    ledger.rekey("writer", new=NEXT_WRITER, by=WRITER)
    ledger.rekey("owner", new=NEXT_OWNER, by=OWNER)
    for new in (WRITER, OWNER, NEXT_OWNER, NEXT_WRITER):
        with pytest.raises(InvalidParameter, match="used in this ledger before"):
            ledger.rekey("writer", new=new, by=NEXT_OWNER)
        state = ledger.state
        with pytest.raises(Tampered, match="used before"):
            admit(state, forged_rekey(state, NEXT_WRITER, new, key=new.public.hex))


def test_an_old_owner_grants_nothing_more_and_either_key_is_a_root_of_trust() -> None:
    ledger = spent_ledger()
    ledger.rekey("owner", new=NEXT_OWNER, by=OWNER)
    with pytest.raises(InvalidParameter, match="not the owner's"):
        ledger.change_budget(totals(9.0), owner=OWNER)
    ledger.change_budget(totals(5.0), owner=NEXT_OWNER)
    snapshot = snapshot_of(ledger)
    for trust in (OWNER.public, NEXT_OWNER.public):
        assert replay(snapshot.entries, snapshot.note, trust)[0].trusted
    with pytest.raises(Tampered, match="the trusted key is"):
        replay(snapshot.entries, snapshot.note, STRANGER.public)


def test_heads_before_a_rekey_are_the_old_writers_and_still_check(tmp_path: Path) -> None:
    ledger = spent_ledger(tmp_path / "ledger")
    ledger.rekey("writer", new=NEXT_WRITER, by=WRITER)
    ledger.note("checked")
    with ledger._journal.store.reading() as reading:
        machine = Machine(LedgerState(), watch=range(1, ledger.state.size + 1))
        machine.feed(reading.entries())
        heads = tuple(reading.heads())
    assert check_kept_heads(heads, machine.state(), machine.roots) == len(heads) > 4
    ledger.close()


@pytest.mark.parametrize("amount", [9.0, 2.5])
def test_totals_are_not_changed_on_what_was_known_before_another_process_understated_a_claim(
    tmp_path: Path, amount: float
) -> None:
    path = tmp_path / "ledger"
    with make_ledger(path) as ledger:
        run_id = ledger.sign_plan(make_plan(4), owner=OWNER)
    with reopen(path) as early:
        with reopen(path) as other:
            lease = {"first": 0, "count": 1, "nonce": "ab" * 32, "commitment": "cd" * 32, "claim": 1e-9}
            other._journal.transact(lambda draft: draft.add("lease", run=run_id, **lease))
        with pytest.raises(Tampered, match="frozen at a claim"):
            early.change_budget(totals(amount), owner=OWNER)
    with reopen(path, filter=None) as blind, pytest.raises(InvalidParameter, match="without a filter"):
        blind.change_budget(totals(amount), owner=OWNER)


def test_a_claim_that_is_frozen_while_totals_change_is_checked_before_they_are_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger"
    with make_ledger(path) as ledger:
        run_id = ledger.sign_plan(make_plan(4), owner=OWNER)
    checked: list[object] = []

    def check(state: LedgerState, spending: SpendingFilter) -> None:
        if not checked:  # another process begins the run between the check and the lock
            with reopen(path) as other, other.start(run_id) as run:
                run.next_receipt()
        checked.append(state.portfolios[0].claim)
        check_frozen(state, spending)

    monkeypatch.setattr("dpbudget.ledger.ledger.check_frozen", check)
    with reopen(path) as ledger:
        ledger.change_budget(totals(9.0), owner=OWNER)
        assert ledger.state.epsilon == 9.0
    assert checked[0] is None
    assert checked[1] is not None


# --- notes -----------------------------------------------------------------------------------------------------------


def test_a_note_is_a_word_of_a_list_and_changes_nothing() -> None:
    ledger = spent_ledger()
    before = ledger.state
    for event in NOTES:
        ledger.note(event)
    after = ledger.state
    assert after.size == before.size + len(NOTES)
    assert (after.runs, after.portfolios, after.grants) == (before.runs, before.portfolios, before.grants)
    with pytest.raises(InvalidParameter, match="is not one of"):
        ledger.note("accuracy 0.93")


def test_an_export_with_all_of_it_reads_back() -> None:
    ledger = spent_ledger()
    ledger.change_budget(totals(4.0), owner=OWNER)
    ledger.rekey("writer", new=NEXT_WRITER, by=OWNER)
    ledger.note("published")
    assert export_bytes(ledger) == export_bytes(ledger)
    snapshot = snapshot_of(ledger)
    state, head = replay(snapshot.entries, snapshot.note, OWNER.public)
    assert state == ledger.state or (state.size, state.grants) == (ledger.state.size, ledger.state.grants)
    assert head.size == state.size
