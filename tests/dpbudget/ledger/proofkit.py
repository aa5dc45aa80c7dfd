"""What the tests of proofs share: reading and joining them, and forgers who sign what no rule has seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ledgerkit import HALF_DELTA, OWNER, WRITER, make_ledger, make_plan, snapshot_in

from dpbudget._record import encode
from dpbudget.ledger.entries import Entry, build
from dpbudget.ledger.head import sign_head
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.proof_file import check_run_proof, make_run_proof
from dpbudget.ledger.run_proof import RunProof
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, Ed25519Signer, sign_envelope
from dpbudget.ledger.statement import plan_statement, statement_digest
from dpbudget.ledger.tree import Frontier, leaf_hash


def proof_of(ledger: Ledger, run_id: str, **options: Any) -> bytes:
    snapshot = snapshot_in(ledger)
    assert snapshot.note is not None
    return make_run_proof(snapshot.entries, snapshot.note, run_id, **options)


def lines_of(proof: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in proof.splitlines()]


def shown_in(proof: bytes) -> list[dict[str, Any]]:
    return [json.loads(line["line"]) for line in lines_of(proof)[1:]]


def join(*lines: dict[str, Any]) -> bytes:
    return b"".join(encode(line) + b"\n" for line in lines)


class Forger:
    """Adds records that no rule has seen, and signs the head over them."""

    def __init__(self) -> None:
        self.ledger = make_ledger()
        self.run = self.ledger.sign_plan(make_plan(4), owner=OWNER)
        self.entries = list(snapshot_in(self.ledger).entries)
        self.drawn = 0

    def add(self, kind: str, **fields: Any) -> Forger:
        line = build(kind, seq=len(self.entries), prev=leaf_hash(self.entries[-1].line), run=self.run, **fields)
        self.entries.append(Entry(line))
        return self

    def lease(self, first: int, count: int, claim: float | None = None, **fields: Any) -> Forger:
        self.drawn += 1
        fresh = {"nonce": f"{self.drawn:064x}", "commitment": f"{self.drawn + 1000:064x}"}
        return self.add("lease", first=first, count=count, claim=claim, **{**fresh, **fields})

    def proof(self) -> bytes:
        note = signed_note(self.ledger.id, self.entries)
        return make_run_proof(self.entries, note, self.run, with_settles=True)


def signed_note(ledger_id: str, entries: list[Entry]) -> bytes:
    tree = Frontier()
    for entry in entries:
        tree = tree.append(leaf_hash(entry.line))
    return sign_head(ledger_id, tree.size, tree.root, WRITER).note.encode()


class Scratch:
    """A ledger from its first byte, where owner and writer sign whatever they are given."""

    run = "ab" * 16

    def __init__(self, **genesis: Any) -> None:
        self.entries: list[Entry] = []
        facts = {"dataset": "11" * 32, "adjacency": "add-remove", "unit": "example", "epsilon": 3.0, "delta": 1e-6,
                 "filter": "portfolio", "owner": OWNER.public.hex, "writer": WRITER.public.hex,
                 "public_data": False}  # fmt: skip
        self.signed("genesis", **{**facts, **genesis})
        self.id = leaf_hash(self.entries[0].line).hex()

    def add(self, kind: str, seal: Callable[[bytes], bytes] | None = None, **fields: Any) -> Scratch:
        prev = leaf_hash(self.entries[-1].line) if self.entries else bytes(32)
        line = build(kind, seq=len(self.entries), prev=prev, **fields)
        self.entries.append(Entry(line, seal(line) if seal else None))
        return self

    def signed(self, kind: str, **fields: Any) -> Scratch:
        return self.add(kind, lambda line: sign_envelope(line, RECORD_TYPE, OWNER), **fields)

    def portfolio(self, epsilon: float | None = None) -> Scratch:
        return self.signed("portfolio", index=1, delta=HALF_DELTA, epsilon=epsilon)

    def renyi(self) -> Scratch:
        return self.signed("renyi", orders=("0x1.0000000000000p+1",), shares=(1,), allowances=("0x1.0000000000000p+1",))

    def rekey(
        self, old: str, key: Ed25519Signer, *by: Ed25519Signer, other: bool = False, role: str = "owner"
    ) -> Scratch:
        def seal(line: bytes) -> bytes:
            return sign_envelope(line + b" " * other, RECORD_TYPE, *by)

        return self.add("rekey", seal, role=role, old=old, key=key.public.hex)

    def plan(self, index: int = 1, *, says: str | None = None, costs: Any = None, **changes: Any) -> Scratch:
        statement = plan_statement(make_plan(**changes), ledger_id=self.id, run_id=self.run, costs=costs)
        digest = says or statement_digest(statement)
        seal = lambda _: sign_envelope(statement, STATEMENT_TYPE, OWNER)  # noqa: E731
        return self.add("plan", seal, run=self.run, statement=digest, portfolio=index)

    def lease(self, claim: float | None = None) -> Scratch:
        facts: dict[str, Any] = {"nonce": "11" * 32, "commitment": "22" * 32, "first": 0, "count": 1}
        return self.add("lease", run=self.run, claim=claim, **facts)

    def shown(self) -> RunProof:
        return check_run_proof(make_run_proof(self.entries, signed_note(self.id, self.entries), self.run), OWNER.public)
