"""Proofs to hand on: what they show, what they say they cannot show, and every way in which one could be bent."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledgerkit import (
    NEXT_OWNER,
    NEXT_WRITER,
    OWNER,
    STRANGER,
    WRITER,
    committed_ledger,
    lived_in_ledger,
    make_ledger,
    make_plan,
    rdp_ledger,
    snapshot_in,
)
from proofkit import join, lines_of, proof_of, shown_in, signed_note

from dpbudget.errors import InvalidParameter, Tampered
from dpbudget.ledger.entries import Entry, read
from dpbudget.ledger.head import Head, read_head
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.proof_file import check_consistency_proof, check_run_proof, make_consistency_proof, make_run_proof
from dpbudget.ledger.store.base import Snapshot

# --- what a proof shows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_settles", [False, True])
@pytest.mark.parametrize("make", [lived_in_ledger, rdp_ledger, committed_ledger])
def test_a_run_proof_says_what_the_ledger_says_of_the_run(make: Callable[[], Ledger], with_settles: bool) -> None:
    ledger = make()
    state, entries = ledger.state, [read(entry.line) for entry in snapshot_in(ledger).entries]
    for run_id, run in state.runs.items():
        proof = check_run_proof(proof_of(ledger, run_id, with_settles=with_settles), OWNER.public)
        portfolio = state.portfolios[run.portfolio - 1] if run.portfolio else None
        own = [record for record in entries if record.get("run") == run_id]
        claims = [record["claim"] for record in own if record["type"] == "lease"]
        assert (proof.ledger_id, proof.run_id, proof.head) == (ledger.id, run_id, ledger.head)
        assert (proof.plan, proof.charged, proof.portfolio) == (run.plan, run.charged, run.portfolio)
        assert proof.portfolio_epsilon == (portfolio.epsilon if portfolio else None)
        assert proof.portfolio_claim == (portfolio.claim if portfolio and any(claims) else None)
        assert (proof.commitment, proof.entropy) == (run.commitment, run.entropy)
        assert proof.unspent == sum(record["unspent"] for record in own if record["type"] == "close")
        assert proof.reserved == (run.reserved if with_settles else 0)
        assert proof.settled == (sum(record["type"] == "settle" for record in own) if with_settles else 0)


def test_a_run_proof_shows_nothing_of_other_runs() -> None:
    ledger = lived_in_ledger()
    for run_id in ledger.state.runs:
        proof = proof_of(ledger, run_id, with_settles=True)
        assert {record.get("run", run_id) for record in shown_in(proof)} == {run_id}
        assert not [other for other in ledger.state.runs if other != run_id and other.encode() in proof]
        assert [record["type"] for record in shown_in(proof)].count("portfolio") == 1


def test_a_run_proof_says_where_the_noise_comes_from() -> None:
    ledger = committed_ledger()
    fresh, committed = (check_run_proof(proof_of(ledger, run_id), OWNER.public) for run_id in ledger.state.runs)
    assert not [said for said in fresh.proved if "noise" in said]
    assert f"the run committed to the noise key {committed.commitment} before its first step" in committed.proved
    assert [said for said in committed.proved if f"the entropy {'5e' * 32}" in said]


def test_a_run_proof_says_in_words_what_it_shows_and_what_not() -> None:
    ledger = lived_in_ledger()
    first, second, _ = ledger.state.runs
    shown = check_run_proof(proof_of(ledger, first), OWNER.public)
    assert f"at least 6 of its steps are charged in the history under the head {ledger.head}" in shown.proved
    assert "all plans of portfolio 1 together claim epsilon 2" in shown.proved
    assert any("a later lease of the run can be left out" in limit for limit in shown.not_proved)
    # The claim of the portfolio stands in the lease of the first run alone.
    other = check_run_proof(proof_of(ledger, second), OWNER.public)
    assert other.portfolio_claim is None
    assert len(other.proved) == len(shown.proved) - 1


def test_a_plan_that_was_never_begun_can_be_proved() -> None:
    ledger = make_ledger()
    run_id = ledger.sign_plan(make_plan(), owner=OWNER)
    assert check_run_proof(proof_of(ledger, run_id), OWNER.public).charged == 0


def test_a_run_of_hundreds_of_leases_is_proved() -> None:
    ledger = make_ledger()
    run = ledger.start(ledger.sign_plan(make_plan(600), owner=OWNER), lease_steps=1)
    for _ in range(600):
        run.next_receipt()
    run.close()
    shown = check_run_proof(proof_of(ledger, run.run_id, with_settles=True), OWNER.public)
    assert (shown.charged, shown.reserved, shown.settled) == (600, 600, 600)


def test_a_hidden_tail_of_leases_is_why_it_says_at_least() -> None:
    ledger = lived_in_ledger()
    run_id = next(iter(ledger.state.runs))
    header, *records = lines_of(proof_of(ledger, run_id))
    kept = [record for record in records if json.loads(record["line"])["type"] not in ("close",)][:-1]
    shown = check_run_proof(join({**header, "records": len(kept)}, *kept), OWNER.public)
    assert shown.charged == 3 < ledger.state.runs[run_id].charged


# --- whose proof it is ------------------------------------------------------------------------------------------------


def test_a_proof_of_another_owner_is_refused() -> None:
    ledger = lived_in_ledger()
    proof = proof_of(ledger, next(iter(ledger.state.runs)))
    for key in (STRANGER, WRITER, NEXT_OWNER):
        with pytest.raises(Tampered, match="trusted key") as caught:
            check_run_proof(proof, key.public)
        assert caught.value.code == "DP072"


def test_a_key_of_a_rekey_vouches_for_the_plans_that_it_signed() -> None:
    ledger = lived_in_ledger()
    before = next(reversed(ledger.state.runs))
    ledger.rekey("owner", new=NEXT_OWNER, by=OWNER)
    ledger.rekey("writer", new=NEXT_WRITER, by=WRITER)
    plan = make_plan(1, epsilon=0.25, delta=ledger.plan_delta)
    after = ledger.sign_plan(plan, owner=NEXT_OWNER)
    for run_id in (before, after):
        assert check_run_proof(proof_of(ledger, run_id), OWNER.public).plan == ledger.state.runs[run_id].plan
    assert check_run_proof(proof_of(ledger, after), NEXT_OWNER.public).plan == plan
    # A rekey record does not name its ledger, so that it could have been carried here from another one.
    with pytest.raises(Tampered, match="trusted key"):
        check_run_proof(proof_of(ledger, before), NEXT_OWNER.public)


def test_a_hidden_rekey_of_the_writer_leaves_a_head_that_nobody_signed() -> None:
    ledger = rdp_ledger()
    header, *records = lines_of(proof_of(ledger, next(iter(ledger.state.runs))))
    kept = [record for record in records if json.loads(record["line"])["type"] != "rekey"]
    assert len(kept) == len(records) - 2
    with pytest.raises(Tampered, match="writer"):
        check_run_proof(join({**header, "records": len(kept)}, *kept), OWNER.public)


# --- bytes ------------------------------------------------------------------------------------------------------------


def small_proof(**options: Any) -> bytes:
    ledger = make_ledger()
    with ledger.start(ledger.sign_plan(make_plan(3), owner=OWNER), lease_steps=2) as run:
        run.next_receipt()
    return proof_of(ledger, run.run_id, **options)


@pytest.mark.parametrize(("with_settles", "stride"), [(False, 1), (True, 5)])
def test_every_changed_byte_of_a_run_proof_is_refused(with_settles: bool, stride: int) -> None:
    proof = small_proof(with_settles=with_settles)
    assert check_run_proof(proof, OWNER.public).charged == 2
    for at in range(0, len(proof), stride):
        changed = bytearray(proof)
        changed[at] ^= (0x01, 0x20)[at % 2]  # another digit or letter, the other case
        with pytest.raises(Tampered):
            check_run_proof(bytes(changed), OWNER.public)


def test_a_cut_or_a_lost_byte_anywhere_in_a_run_proof_is_refused() -> None:
    proof = small_proof()
    for at in range(len(proof)):
        with pytest.raises(Tampered):
            check_run_proof(proof[:at] if at % 2 else proof[:at] + proof[at + 1 :], OWNER.public)


def test_records_cannot_be_dropped_repeated_or_swapped() -> None:
    proof = small_proof(with_settles=True)
    header, *records = lines_of(proof)
    count = len(records)
    bent = [join(header, *records[:at], *records[at + 1 :]) for at in range(count)]  # the header counts them
    bent += [join({**header, "records": count + 1}, *records[: at + 1], *records[at:]) for at in range(count)]
    for one in range(count):
        for two in range(one):
            swapped = list(records)
            swapped[one], swapped[two] = swapped[two], swapped[one]
            bent.append(join(header, *swapped))
    # Genesis, portfolio, plan, and what others lean on: the first lease, and the reserve before its settle and close.
    for at in range(count - 2):
        bent.append(join({**header, "records": count - 1}, *records[:at], *records[at + 1 :]))
    for data in bent:
        with pytest.raises(Tampered):
            check_run_proof(data, OWNER.public)


@pytest.mark.parametrize(
    "bend",
    [
        lambda header, records: header.update(v=2),
        lambda header, records: header.update(v=True),
        lambda header, records: header.update(type="dpbudget-consistency-proof"),
        lambda header, records: header.update(extra=1),
        lambda header, records: header.pop("run"),
        lambda header, records: header.update(run="00" * 16),
        lambda header, records: header.update(ledger="00" * 32),
        lambda header, records: header.update(records=0),
        lambda header, records: header.update(head=None),
        lambda header, records: header.update(head=base64.b64encode(b"x" * 200).decode()),
        lambda header, records: records[0].update(envelope=None),
        lambda header, records: records[0].update(envelope=records[1]["envelope"]),
        lambda header, records: records[3].update(envelope=records[2]["envelope"]),
        lambda header, records: records[2].update(line=records[3]["line"]),
        lambda header, records: records[2].update(path=records[3]["path"]),
        lambda header, records: records[2].update(path=[]),
        lambda header, records: records[2].update(path=records[2]["path"] * 40),
        lambda header, records: records[2].update(path=[1]),
        lambda header, records: records[2].update(path=["AAAA"]),
        lambda header, records: records[2].update(path="x"),
        lambda header, records: records[2].update(seq=2),
        lambda header, records: records[2].pop("line"),
        lambda header, records: records.clear(),
    ],
)
def test_a_bent_proof_is_refused(bend: Callable[[dict[str, Any], list[dict[str, Any]]], object]) -> None:
    header, *records = lines_of(small_proof())
    bend(header, records)
    if not records:
        header["records"] = 0
    with pytest.raises(Tampered):
        check_run_proof(join(header, *records), OWNER.public)


@given(st.binary(max_size=300) | st.lists(st.sampled_from(small_proof().splitlines()), max_size=8).map(b"\n".join))
def test_other_bytes_are_refused_with_the_one_error(data: bytes) -> None:
    for bent in (data, data + b"\n"):
        if bent != PROOF:
            with pytest.raises(Tampered):
                check_run_proof(bent, OWNER.public)


PROOF = small_proof()


@pytest.mark.parametrize(
    "bomb", [b"\n" * 2_000_000, b"[" * 3_000_000 + b"\n", b'{"a":"' + b"x" * 10_000_000 + b'"}\n', PROOF * 3]
)
def test_bombs_are_refused(bomb: bytes) -> None:
    with pytest.raises(Tampered):
        check_run_proof(bomb, OWNER.public)


# --- making -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_id", ["00" * 16, "", "x" * 500, "\u00e9", '"'])
def test_a_run_that_the_ledger_does_not_know_is_an_error(run_id: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        proof_of(lived_in_ledger(), run_id)
    assert caught.value.code == "DP081"


def test_no_proof_is_made_with_a_head_of_other_records() -> None:
    ledger = lived_in_ledger()
    run_id = next(iter(ledger.state.runs))
    older, snapshot = ledger.head, snapshot_in(ledger)
    ledger.note("checked")
    with pytest.raises(Tampered):
        make_run_proof(snapshot_in(ledger).entries, older.note.encode(), run_id)
    with pytest.raises(Tampered):
        make_run_proof(snapshot.entries, ledger.head.note.encode(), run_id)
    with pytest.raises(Tampered):
        make_run_proof(snapshot.entries[1:], older.note.encode(), run_id)
    with pytest.raises(InvalidParameter):
        make_run_proof((), older.note.encode(), run_id)


# --- consistency ------------------------------------------------------------------------------------------------------


def heads_of(snapshot: Snapshot, ledger_id: str) -> list[Head]:
    return [read_head(note, ledger_id, WRITER.public) for note in snapshot.heads]


def test_every_kept_head_is_shown_to_continue_the_one_before() -> None:
    ledger = lived_in_ledger()
    snapshot = snapshot_in(ledger)
    heads = heads_of(snapshot, ledger.id)
    assert len(heads) > 10
    for new in heads:
        for old in heads:
            if old.size <= new.size:
                check_consistency_proof(make_consistency_proof(snapshot.entries[: new.size], old.size), old, new)


def test_every_changed_byte_of_a_consistency_proof_is_refused() -> None:
    ledger = lived_in_ledger()
    snapshot = snapshot_in(ledger)
    heads = heads_of(snapshot, ledger.id)
    old, new = heads[3], heads[-1]
    proof = make_consistency_proof(snapshot.entries, old.size)
    check_consistency_proof(proof, old, new)
    for at in range(len(proof)):
        for bent in (proof[:at], proof[:at] + bytes([proof[at] ^ 1]) + proof[at + 1 :]):
            with pytest.raises(Tampered):
                check_consistency_proof(bent, old, new)
    for pair in ((new, old), (old, old), (heads[2], new), (old, heads[-2])):
        with pytest.raises(Tampered):
            check_consistency_proof(proof, *pair)


def test_two_histories_with_one_beginning_are_told_apart() -> None:
    ledger = make_ledger()
    common = ledger.head
    snapshot = snapshot_in(ledger)
    ledger.note("checked")
    entries = snapshot_in(ledger).entries
    fork = (*snapshot.entries, Entry(entries[-1].line.replace(b"checked", b"retired")))
    note = signed_note(ledger.id, list(fork))
    other = read_head(note, ledger.id, WRITER.public)
    for history, head in ((entries, ledger.head), (fork, other)):
        check_consistency_proof(make_consistency_proof(history, common.size), common, head)
    with pytest.raises(Tampered):
        check_consistency_proof(make_consistency_proof(entries, len(fork)), other, ledger.head)
    with pytest.raises(InvalidParameter):
        make_consistency_proof(entries, len(entries) + 1)
