"""What the attacks share: keys, cheap plans with real claims, and ways to bend a ledger.

Plans take full batches, whose epsilon has a closed form, so that every attack meets the real accountants.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sqlite3
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import dpbudget
from dpbudget import Budget, Ledger, Plan, Report
from dpbudget._record import encode
from dpbudget.errors import DPBudgetError, Unreadable
from dpbudget.filters import LedgerFilter
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.head import sign_head
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, Ed25519Signer, sign_envelope
from dpbudget.ledger.store.base import Snapshot
from dpbudget.ledger.store.jsonl import read_export, write_export
from dpbudget.ledger.tree import Frontier, leaf_hash
from dpbudget_cli.main import app

OWNER = Ed25519Signer.from_seed(b"\x11" * 32)
WRITER = Ed25519Signer.from_seed(b"\x12" * 32)
STRANGER = Ed25519Signer.from_seed(b"\x13" * 32)
NEXT_OWNER, NEXT_WRITER = Ed25519Signer.from_seed(b"\x14" * 32), Ed25519Signer.from_seed(b"\x15" * 32)
BUDGET = Budget(epsilon=3.0, delta=1e-5)
THREAT_MODEL = Path(__file__).resolve().parents[2] / "docs" / "threat-model.md"

#: Changes a record in place and returns its envelope.
Edit = Callable[[dict[str, Any], bytes | None], bytes | None]


@cache
def plan(steps: int = 20, epsilon: float = 3.0, **changes: Any) -> Plan:
    """A plan of full batches for a claim of ``epsilon``."""
    facts: dict[str, Any] = {"dataset_size": 1000, "batch_size": 1000, "delta": BUDGET.delta, "steps": steps}
    return dpbudget.calibrate(epsilon=epsilon, **{**facts, **changes})


def make(path: Path, **options: Any) -> Ledger:
    """A new ledger whose first portfolio may take the whole budget."""
    facts: dict[str, Any] = {"budget": BUDGET, "owner": OWNER, "writer": WRITER, "whole_budget": True}
    return Ledger.create(path, filter=LedgerFilter(), **{**facts, **options})


def reopen(path: Path, **options: Any) -> Ledger:
    """The ledger for spending; ``high_water=False`` acts as another machine, which has seen nothing."""
    facts: dict[str, Any] = {"writer": WRITER, "filter": LedgerFilter(), "trust": OWNER.public}
    return Ledger.open(path, **{**facts, **options})


def spend(path: Path, run_id: str, steps: int, **options: Any) -> None:
    """Take receipts, settle every one, close."""
    with reopen(path, **options) as ledger, ledger.start(run_id, lease_steps=1) as run:
        for _ in range(steps):
            run.settle(run.next_receipt(), "ab" * 32)


def signed(path: Path, steps: int = 20, **facts: Any) -> str:
    """A new ledger with one signed plan, of which ``facts`` change something; its run id."""
    with make(path) as ledger:
        return ledger.sign_plan(plan(steps, **facts), owner=OWNER)


def spent(path: Path, steps: int = 3) -> str:
    """A new ledger with ``steps`` of a plan of 20 spent; the run id."""
    run_id = signed(path)
    spend(path, run_id, steps)
    return run_id


def export(path: Path) -> bytes:
    """The ledger as text."""
    file = io.BytesIO()
    with Ledger.open(path) as ledger:
        ledger.export(file)
    return file.getvalue()


def head_of(path: Path) -> str:
    with Ledger.open(path) as ledger:
        return str(ledger.head)


def charged(path: Path) -> int:
    """Steps that the ledger says are charged, of all runs."""
    with Ledger.open(path, trust=OWNER.public) as ledger:
        return sum(run.charged for run in ledger.state.runs.values())


def verify(path: Path, **options: Any) -> Report:
    return dpbudget.verify(path, **{"trust": OWNER.public, **options})


def problem(path: Path, **options: Any) -> str | None:
    """What verification says against a file; None where it has nothing to say."""
    try:
        report = verify(path, **options)
    except Unreadable as error:
        return str(error)
    return None if report.ok else report.problems[0]


def problem_of(data: bytes, folder: Path) -> str | None:
    """What verification says against the bytes of an export."""
    place = folder / "attacked.jsonl"
    place.write_bytes(data)
    return problem(place)


def call(*args: str | Path, code: int = 0) -> str:
    """The output of a command that ends with ``code``."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


# --- bending ---------------------------------------------------------------------------------------------------------


def rows(path: Path, *statements: str) -> list[Any]:
    """Run SQL on the file as whoever owns it can; the rows of the last statement."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        found = [connection.execute(statement).fetchall() for statement in statements]
    finally:
        connection.close()
    return found[-1]


def written(entries: Iterable[Entry], note: bytes) -> bytes:
    """An export of any entries under any head."""
    file = io.BytesIO()
    write_export(Snapshot(tuple(entries), note, (note,)).reading(), file)
    return file.getvalue()


def as_is(record: dict[str, Any], envelope: bytes | None) -> bytes | None:
    """The edit that changes nothing."""
    return envelope


def forged(data: bytes, edit: Edit = as_is, *more: dict[str, Any], writer: Ed25519Signer = WRITER) -> bytes:
    """What a writer who cheats can make: records edited and added, chain and tree right, the head signed again."""
    tree, prev, entries = Frontier(), bytes(32), list[Entry]()
    old = read_export(data).entries
    for record, sealed in [*((json.loads(entry.line), entry.envelope) for entry in old), *((m, None) for m in more)]:
        envelope = edit(record, sealed)
        # Not by our encoder, which makes only what is allowed.
        facts = {"v": 1, **record, "seq": len(entries), "prev": prev.hex()}
        line = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
        entries.append(Entry(line, envelope))
        prev = leaf_hash(line)
        tree = tree.append(prev)
    ledger_id = leaf_hash(entries[0].line).hex()
    return written(entries, sign_head(ledger_id, len(entries), tree.root, writer).note.encode())


def sealed(record: dict[str, Any], signer: Ed25519Signer) -> bytes:
    """An envelope around the line of a record."""
    return sign_envelope(encode(record), RECORD_TYPE, signer)


def swap_statement(
    record: dict[str, Any], envelope: bytes | None, signer: Ed25519Signer, change: Callable[[dict[str, Any]], None]
) -> bytes:
    """The envelope of a changed plan, whose digest the record now names."""
    payload = json.loads(base64.b64decode(json.loads(envelope or b"")["payload"]))
    change(payload["predicate"])
    swapped = sign_envelope(encode(payload), STATEMENT_TYPE, signer)
    record["statement"] = hashlib.sha256(encode(payload)).hexdigest()
    return swapped


# --- processes -------------------------------------------------------------------------------------------------------


def spawn(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child; its id. The child exits with 0, 10 + the exit code of our error, or 1."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except DPBudgetError as error:
            status = 10 + error.exit_code
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """How a child exited; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def release_into(path: Path, run_id: str, log: Path, most: int) -> None:
    """Take up to ``most`` receipts and log each, as a trainer would publish noisy gradients."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with reopen(path) as ledger, ledger.start(run_id, lease_steps=1) as run:
        for count, receipt in enumerate(run, 1):
            os.write(file, b"%d\n" % receipt.step)
            if count == most:
                break


def released(log: Path) -> list[int]:
    return [int(line) for line in log.read_bytes().split()] if log.exists() else []
