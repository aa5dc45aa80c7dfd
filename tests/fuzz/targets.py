"""What is fuzzed: every reader of bytes that somebody else may have made, with an oracle for each.

A target takes bytes. It must return, or raise an error of ``dpbudget.errors``; any other exception is a finding. What
it accepts must be what was there: a target checks that the accepted value spells the same bytes again.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from dpbudget._attest import attest, read_attestation
from dpbudget._record import decode, encode
from dpbudget._verdict import Report
from dpbudget.curve import Bounds
from dpbudget.errors import DPBudgetError
from dpbudget.ledger.auditor import AuditorKey, load_auditor_key, load_auditor_public_key
from dpbudget.ledger.entries import Entry, read
from dpbudget.ledger.head import VerifierKey, check_cosignature, parse_verifier_key, read_checkpoint, read_head
from dpbudget.ledger.journal import replay
from dpbudget.ledger.keys import load_key, load_public_key
from dpbudget.ledger.plan_key import load_plan_key
from dpbudget.ledger.proof_file import check_run_proof, make_run_proof
from dpbudget.ledger.replay import StepKey
from dpbudget.ledger.requests import read_request, sign_request
from dpbudget.ledger.scan import scan
from dpbudget.ledger.sealed import open_sealed, seal_line
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, Ed25519Signer, open_envelope
from dpbudget.ledger.statement import plan_statement, read_statement
from dpbudget.ledger.store.base import Snapshot
from dpbudget.ledger.store.jsonl import read_export, write_export
from dpbudget.ledger.store.reader import read_ledger
from dpbudget.ledger.tree import leaf_hash
from dpbudget.plan import Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "dpbudget" / "ledger"))
from ledgerkit import (
    NEXT_OWNER,
    NEXT_WRITER,
    OWNER,
    STRANGER,
    WRITER,
    committed_ledger,
    export_bytes,
    lived_in_ledger,
    make_ledger,
    make_plan,
    rdp_ledger,
    snapshot_of,
)

_RUN = "ab" * 16
_LEDGERS = [snapshot_of(lived_in_ledger()), snapshot_of(rdp_ledger()), snapshot_of(committed_ledger())]
_ENTRIES = [entry for snapshot in _LEDGERS for entry in snapshot.entries]


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        run: takes bytes; raises anything but an error of the package for a finding.
        seeds: valid inputs.
    """

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def _export(data: bytes) -> None:
    snapshot = read_export(data)
    state, head = replay(snapshot.entries, snapshot.note, OWNER.public)
    file = io.BytesIO()
    write_export(snapshot.reading(), file)
    assert file.getvalue() == data, "an export was accepted in another spelling"
    assert head.size == state.size == len(snapshot.entries)


def _record(data: bytes) -> None:
    fast = scan(data)
    if fast is not None and not any(set(fast[name]) - set("0123456789abcdef") for name in ("prev", "run")):
        assert fast == read(data), "the fast reader disagrees with the slow one"
    assert encode(read(data)) == data


def _json(data: bytes) -> None:
    assert encode(decode(data, max_bytes=1 << 16)) == data


def _envelope(data: bytes) -> None:
    kind = RECORD_TYPE if RECORD_TYPE.encode() in data else STATEMENT_TYPE
    keys = [signer.public for signer in (OWNER, WRITER, NEXT_OWNER, NEXT_WRITER)]
    open_envelope(data, kind, *[keys] * max(1, data.count(b'"keyid"')))


def _head(data: bytes) -> None:
    ledger_id = leaf_hash(_LEDGERS[0].entries[0].line).hex()
    head = read_checkpoint(data, ledger_id, WRITER.public)
    assert read_head(head.note.encode(), ledger_id, WRITER.public) == head
    assert data.startswith(head.note.split("—")[0].encode())


def _cosignature(data: bytes) -> None:
    key, _, note = data.partition(b"\n")
    witness = str(parse_verifier_key(key.decode("latin-1")))
    assert witness.encode("latin-1") == key
    check_cosignature(note, witness)


def _statement(data: bytes) -> None:
    plan, costs = read_statement(data, ledger_id="cd" * 32, run_id=_RUN)
    assert plan_statement(plan, ledger_id="cd" * 32, run_id=_RUN, costs=costs) == data


def _cosigned() -> bytes:
    """A witness's key, and a checkpoint that it cosigned at second 7."""
    note = (_LEDGERS[0].note or b"").decode()
    key = VerifierKey("witness.example", STRANGER.public, cosigner=True)
    signature = STRANGER.sign(f"cosignature/v1\ntime 7\n{note[: note.index(chr(10) * 2) + 1]}".encode())
    blob = base64.b64encode(key.hash + (7).to_bytes(8, "big") + signature).decode()
    return f"{key}\n{note}— {key.name} {blob}\n".encode()


def _attested() -> bytes:
    facts = {"delta": 1e-6, "budget": (3.0, 1e-6), "filter": "portfolio", "steps": 7, "head": f"3:{'ab' * 32}"}
    report = Report(ok=True, problems=(), epsilon=Bounds(0.5, 1.0), ledger_id="cd" * 32, trusted=True, **facts)
    return attest(report, OWNER)


def _plan(data: bytes) -> None:
    plan = Plan.parse(data)
    assert Plan.parse(plan.encode()) == plan


def _request(data: bytes) -> None:
    read_request(data)
    assert read_request(sign_request(data, OWNER)) == read_request(data)


def _attestation(data: bytes) -> None:
    read_attestation(data, OWNER.public)


def _run_proof(data: bytes) -> None:
    proof = check_run_proof(data, OWNER.public)
    assert proof.charged <= proof.plan.steps


def _key_file(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "key"
        place.touch(0o600)
        place.write_bytes(data)
        for load in (load_key, load_public_key):
            try:
                load(place)
            except DPBudgetError:
                continue


_AUDITOR = AuditorKey(X25519PrivateKey.from_private_bytes(b"\x06" * 32))
_SEALED = {"commitment": "ab" * 32, "ledger": "cd" * 32, "run": _RUN, "type": "lease-key", "v": 1}


def _noise_key_file(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "key"
        place.touch(0o600)
        place.write_bytes(data)
        for load in (load_auditor_key, load_auditor_public_key, partial(load_plan_key, passphrase=b"x"), StepKey.load):
            try:
                load(place)
            except DPBudgetError:
                continue
        assert open_sealed(place, _AUDITOR, _SEALED) == b"\x07" * 32, "a seal opened to what nobody sealed"


def _noise_keys() -> tuple[bytes, ...]:
    """A sealed key, between others and torn lines; the other files are refused as sealed ones."""
    line, other = (seal_line(_AUDITOR.public, {**_SEALED, "run": run}, b"\x07" * 32) for run in (_RUN, "00" * 16))
    return line + b"\n", other + b"\n" + line[:80] + b"\n" + line + b"\n"


def _database(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "ledger"
        place.write_bytes(data)
        try:
            snapshot = read_ledger(place)
        finally:
            assert place.read_bytes() == data, "a reader wrote"
            assert [path.name for path in Path(folder).iterdir()] == ["ledger"]
        state, _ = replay(snapshot.entries, snapshot.note, OWNER.public)
        assert state.tree.root in {replay(s.entries, s.note, OWNER.public)[0].tree.root for s in _DATABASES}


def _seed_database(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "ledger"
        with make_ledger(place, kind=kind) as ledger, ledger.start(ledger.sign_plan(make_plan(), owner=OWNER)) as run:
            run.next_receipt()
        _DATABASES.append(read_ledger(place))
        return place.read_bytes()


_DATABASES: list[Snapshot] = []


def _seed_key() -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _requests() -> tuple[bytes, ...]:
    ledger = make_ledger()
    _, asked = ledger.request_plan(make_plan())
    return asked, sign_request(asked, OWNER)


def _proofs() -> tuple[bytes, ...]:
    found = []
    for snapshot in _LEDGERS:
        plan = next(read(entry.line) for entry in snapshot.entries if read(entry.line)["type"] == "plan")
        found.append(make_run_proof(snapshot.entries, snapshot.note or b"", plan["run"]))
    return tuple(found)


def _envelopes() -> tuple[bytes, ...]:
    return tuple(entry.envelope for entry in _ENTRIES if entry.envelope is not None)


TARGETS: Mapping[str, Target] = {
    "export": Target(_export, tuple(export_bytes(make()) for make in (lived_in_ledger, rdp_ledger, committed_ledger))),
    "record": Target(_record, tuple(entry.line for entry in _ENTRIES)),
    "json": Target(_json, (b'{"a":1,"b":[null,true,{"c":"x"}]}', b"{}")),
    "envelope": Target(_envelope, _envelopes()),
    "head": Target(_head, (_LEDGERS[0].note or b"",)),
    "cosignature": Target(_cosignature, (_cosigned(),)),
    "statement": Target(_statement, (plan_statement(make_plan(), ledger_id="cd" * 32, run_id=_RUN),)),
    "plan": Target(_plan, (make_plan().encode(),)),
    "request": Target(_request, _requests()),
    "attestation": Target(_attestation, (_attested(),)),
    "run-proof": Target(_run_proof, _proofs()),
    "key": Target(
        _key_file, (_seed_key(), b"dpbudget-ed25519 " + Ed25519Signer.generate().public.hex.encode() + b"\n")
    ),
    "noise-key": Target(_noise_key_file, _noise_keys()),
    "database": Target(_database, (_seed_database("portfolio"), _seed_database("rdp"))),
}


def survive(name: str, data: bytes) -> bool:
    """Whether ``data`` was accepted; every error of the package is a refusal, every other exception a finding."""
    try:
        TARGETS[name].run(data)
    except DPBudgetError:
        return False
    return True


__all__ = ["TARGETS", "Entry", "survive"]
