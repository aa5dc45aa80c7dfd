"""Run proofs whose hashes and signatures are all good, and whose records break a rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from ledgerkit import NEXT_OWNER, OWNER, STRANGER, WRITER, lived_in_ledger, make_ledger, make_plan, snapshot_in
from proofkit import Forger, Scratch, join, lines_of, proof_of, signed_note

from dpbudget._record import encode
from dpbudget._renyi import PhaseCost
from dpbudget.errors import Tampered
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.proof_file import check_run_proof, make_run_proof
from dpbudget.ledger.tree import leaf_hash
from dpbudget.mechanisms import Adjacency

# --- a writer who signs what the rules forbid -------------------------------------------------------------------------


def test_the_forger_can_write_what_the_rules_allow() -> None:
    forger = Forger().lease(0, 2, 1.0).add("reserve", step=0, count=2)
    forger.add("settle", step=1, fresh="aa" * 16, output=None).lease(2, 2)
    forger.add("reserve", step=2, count=1).add("close", first=2, unspent=1)
    shown = check_run_proof(forger.proof(), OWNER.public)
    assert (shown.charged, shown.reserved, shown.settled, shown.unspent) == (4, 3, 1, 1)
    assert shown.portfolio_claim == 1.0


@pytest.mark.parametrize(
    "forge",
    [
        lambda f: f.lease(1, 2, 1.0),
        lambda f: f.lease(0, 5, 1.0),
        lambda f: f.lease(0, 2, 1.0).lease(1, 2),
        lambda f: f.lease(0, 2, 1.0).lease(3, 1),
        lambda f: f.lease(0, 2, 1.0).lease(2, 1, 1.0),
        lambda f: f.lease(0, 2, 1.0).lease(2, 1, nonce=f"{1:064x}"),
        lambda f: f.lease(0, 2, 1.0).lease(2, 1, commitment=f"{1001:064x}"),
        lambda f: f.add("reserve", step=0, count=1),
        lambda f: f.lease(0, 2, 1.0).add("reserve", step=1, count=1),
        lambda f: f.lease(0, 2, 1.0).add("reserve", step=0, count=3),
        lambda f: f.lease(0, 2, 1.0).add("settle", step=0, fresh="aa" * 16, output=None),
        lambda f: two_settles(f, 0, 0, "bb" * 16),
        lambda f: two_settles(f, 1, 0, "bb" * 16),
        lambda f: two_settles(f, 0, 1, "aa" * 16),
        lambda f: f.lease(0, 2, 1.0).add("close", first=1, unspent=1),
        lambda f: f.lease(0, 2, 1.0).add("close", first=0, unspent=3),
        lambda f: f.lease(0, 2, 1.0).add("close", first=0, unspent=2).add("close", first=0, unspent=2),
        lambda f: f.lease(0, 2, 1.0).add("close", first=0, unspent=2).add("reserve", step=0, count=1),
        lambda f: f.lease(0, 2, 1.0).add("reserve", step=0, count=1).add("close", first=0, unspent=2),
        lambda f: two_settles(f, 0, 1, "bb" * 16).add("close", first=0, unspent=0),
    ],
)
def test_what_the_rules_of_a_run_forbid_is_refused_under_any_head(forge: Callable[[Forger], Forger]) -> None:
    forger = Forger()
    forge(forger)
    with pytest.raises(Tampered):
        forger.proof()


def two_settles(forger: Forger, one: int, two: int, fresh: str) -> Forger:
    forger.lease(0, 2, 1.0).add("reserve", step=0, count=2)
    return forger.add("settle", step=one, fresh="aa" * 16, output=None).add(
        "settle", step=two, fresh=fresh, output=None
    )


# --- an owner and a writer who sign together what the rules forbid ----------------------------------------------------


COSTS = (PhaseCost((0.5,), 0.0, 0.0),)


def test_what_the_rules_allow_can_be_written_from_scratch() -> None:
    declared = Scratch().portfolio(1.5).plan().lease(1.5).shown()
    assert (declared.portfolio_epsilon, declared.portfolio_claim, declared.charged) == (1.5, 1.5, 1)
    rdp = Scratch(filter="rdp").renyi().plan(0, costs=COSTS).lease().shown()
    assert (rdp.portfolio, rdp.portfolio_claim, rdp.charged) == (0, None, 1)


@pytest.mark.parametrize(
    ("forge", "problem"),
    [
        (lambda: Scratch().portfolio(1.5).plan().lease(1.6), "of a portfolio of epsilon"),
        (lambda: Scratch(writer=OWNER.public.hex).portfolio().plan(), "one key"),
        (lambda: Scratch().renyi().portfolio().plan(), "renyi stands second"),
        (lambda: Scratch(filter="rdp").add("note", event="checked").renyi().plan(0), "renyi stands second"),
        (lambda: Scratch(filter="rdp").plan(0), "before renyi"),
        (lambda: Scratch(filter="rdp").renyi().plan(1, costs=COSTS), "before renyi"),
        (lambda: Scratch(filter="rdp").renyi().portfolio().plan(1, costs=COSTS), "with rdp"),
        (lambda: Scratch(filter="rdp").renyi().plan(0, costs=COSTS).lease(1.0), "claim that the rules do not allow"),
        (lambda: Scratch().rekey(STRANGER.public.hex, NEXT_OWNER, OWNER, NEXT_OWNER).portfolio().plan(), "rekey of"),
        (lambda: Scratch().rekey(OWNER.public.hex, WRITER, OWNER, WRITER).portfolio().plan(), "was used before"),
        (lambda: Scratch().rekey(OWNER.public.hex, NEXT_OWNER, OWNER, NEXT_OWNER, other=True).portfolio().plan(),
         "another record"),
        (lambda: Scratch().rekey(OWNER.public.hex, NEXT_OWNER, STRANGER, NEXT_OWNER).plan(), "signed by key"),
        (lambda: Scratch().portfolio().plan().plan(steps=9), "a second plan"),
        (lambda: Scratch().plan(), "no portfolio of the plan"),
        (lambda: Scratch().portfolio().plan(2), "no portfolio of the plan"),
        (lambda: Scratch().portfolio().plan(says="00" * 32), "does not hold the statement"),
        (lambda: Scratch().portfolio().plan(adjacency=Adjacency.REPLACE_ONE), "other neighbours"),
        (lambda: Scratch().portfolio().plan(nominal_size=None), "nominal dataset size"),
        (lambda: Scratch().portfolio().plan(delta=1e-7), "another delta"),
        (lambda: Scratch().portfolio().lease().plan(), "lease from step 0"),
    ],
)  # fmt: skip
def test_what_the_rules_forbid_is_refused_though_all_signatures_are_good(
    forge: Callable[[], Scratch], problem: str
) -> None:
    with pytest.raises(Tampered, match=problem):
        forge().shown()


def test_a_record_that_does_not_continue_the_chain_is_refused() -> None:
    forger = Forger().lease(0, 1, 1.0)
    line = json.loads(forger.entries[-1].line)
    forger.entries[-1] = Entry(encode({**line, "prev": "00" * 32}))
    with pytest.raises(Tampered, match="does not continue the chain"):
        forger.proof()


def with_lines_of(proof: bytes, other: bytes, wanted: Callable[[dict[str, Any]], bool]) -> bytes:
    """``proof`` with some records of another proof of the same ledger, each with its good inclusion proof."""
    header, *records = lines_of(proof)
    records += [line for line in lines_of(other)[1:] if wanted(json.loads(line["line"]))]
    records.sort(key=lambda line: json.loads(line["line"])["seq"])
    return join({**header, "records": len(records)}, *records)


def test_records_of_another_run_or_portfolio_cannot_be_mixed_in() -> None:
    ledger = make_ledger()
    mine, other = (ledger.sign_plan(make_plan(), owner=OWNER) for _ in range(2))
    one, two = ledger.start(mine, lease_steps=1), ledger.start(other, lease_steps=1)
    one.next_receipt()
    two.next_receipt()
    two.next_receipt()
    first, second = proof_of(ledger, mine), proof_of(ledger, other)
    with pytest.raises(Tampered, match="lease of another run"):
        check_run_proof(with_lines_of(first, second, lambda record: record.get("first") == 1), OWNER.public)
    ledger = lived_in_ledger()
    old, new = (proof_of(ledger, run_id) for run_id in list(ledger.state.runs)[::2])
    with pytest.raises(Tampered, match="a second portfolio"):
        check_run_proof(with_lines_of(new, old, lambda record: record["type"] == "portfolio"), OWNER.public)
    with pytest.raises(Tampered, match="genesis of another ledger"):
        check_run_proof(new.replace(ledger.id.encode(), b"00" * 32, 1), OWNER.public)


def test_a_plan_cannot_be_carried_into_another_ledger() -> None:
    one, two = make_ledger(), make_ledger()
    run_id = one.sign_plan(make_plan(), owner=OWNER)
    two.sign_plan(make_plan(), owner=OWNER)
    moved = snapshot_in(one).entries[2]
    entries = [*snapshot_in(two).entries[:2]]
    prev = leaf_hash(entries[-1].line).hex()
    line = encode({**json.loads(moved.line), "prev": prev})
    entries.append(Entry(line, moved.envelope))
    with pytest.raises(Tampered, match="another ledger"):
        make_run_proof(entries, signed_note(two.id, entries), run_id)
