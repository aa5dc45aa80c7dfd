"""Attacks 1 to 6: records edited, dropped, reordered, repeated and cut."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
from attackkit import (
    OWNER,
    STRANGER,
    WRITER,
    call,
    export,
    forged,
    problem,
    problem_of,
    rows,
    signed,
    spend,
    spent,
    swap_statement,
    verify,
    written,
)

from dpbudget.errors import Tampered
from dpbudget.ledger.journal import check_head
from dpbudget.ledger.rules import Machine
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.ledger.state import LedgerState
from dpbudget.ledger.store.jsonl import ExportReading, read_export


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An export of fifty records."""
    path = tmp_path_factory.mktemp("fifty") / "ledger"
    spent(path, 15)
    data = export(path)
    assert len(read_export(data).entries) >= 48
    return data


def _goes_on(state: LedgerState, tail: bytes) -> bool:
    """Whether a reader who is in ``state`` accepts the rest of an export."""
    reading, machine = ExportReading(io.BytesIO(tail)), Machine(state, remember=True)
    try:
        machine.feed(reading.entries())
        check_head(machine.state(), reading.newest() or b"")
    except Tampered:
        return False
    return True


def test_attack_01_every_flipped_byte_of_fifty_records_is_noticed(fifty: bytes) -> None:
    state, start, flips = LedgerState(trust=OWNER.public), 0, 0
    for entry in [*read_export(fifty).entries, None]:
        # Any reader has reached this state when it meets the changed record; only the rest is read for every flip.
        end = len(fifty) if entry is None else start + len(entry.line) + 1 + len(entry.envelope or b"")
        end += 0 if entry is None or entry.envelope is None else 1
        tail = bytearray(fifty[start:])
        assert _goes_on(state, tail)
        for at in range(end - start):
            tail[at] ^= 1 << (at % 7)
            assert not _goes_on(state, bytes(tail)), start + at
            tail[at] ^= 1 << (at % 7)
            flips += 1
        if entry is not None:
            machine = Machine(state)
            machine.feed((entry,))
            state, start = machine.state(), end
    assert flips == len(fifty)


@pytest.mark.parametrize("signer", [None, WRITER, STRANGER], ids=["unsigned", "writer", "stranger"])
def test_attack_01_sigma_edited_in_a_signed_plan_is_noticed(
    fifty: bytes, signer: Ed25519Signer | None, tmp_path: Path
) -> None:
    def halve_sigma(predicate: dict[str, Any]) -> None:
        (phase,) = predicate["phases"]
        phase["noise_multiplier"] = (float.fromhex(phase["noise_multiplier"]) / 2).hex()

    def edit(record: dict[str, Any], envelope: bytes | None) -> bytes | None:
        if record["type"] != "plan":
            return envelope
        swapped = swap_statement(record, envelope, signer or OWNER, halve_sigma)
        # Unsigned: the owner's old signature around the new statement.
        return swapped if signer else _with_signature_of(swapped, envelope or b"")

    # The writer may sign the whole chain again; the owner's signature on the plan is not his to give.
    found = problem_of(forged(fifty, edit), tmp_path)
    assert found is not None
    assert "signed by key" in found or "signature does not verify" in found


def _with_signature_of(envelope: bytes, other: bytes) -> bytes:
    mark = b'"signatures":'
    return envelope[: envelope.index(mark)] + other[other.index(mark) :]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "ledger"
    spent(path, 5)
    return export(path)


def test_attacks_02_to_04_a_record_dropped_reordered_or_repeated_is_noticed(small: bytes, tmp_path: Path) -> None:
    snapshot = read_export(small)
    entries, note = list(snapshot.entries), snapshot.note or b""
    assert problem_of(written(entries, note), tmp_path) is None
    attacks = [entries[:at] + entries[at + 1 :] for at in range(len(entries))]
    for a, b in itertools.combinations(range(len(entries)), 2):
        swapped = list(entries)
        swapped[a], swapped[b] = entries[b], entries[a]
        attacks.append(swapped)
    attacks += [[*entries[:to], entry, *entries[to:]] for entry in entries for to in range(1, len(entries) + 1)]
    assert len(attacks) > 400
    for attack in attacks:
        assert problem_of(written(attack, note), tmp_path) is not None


def _cut(path: Path, size: int) -> None:
    """Put a ledger back to ``size`` records, with the newest head that was kept up to there."""
    rows(path, f"DELETE FROM record WHERE seq >= {size}", f"DELETE FROM head WHERE size > {size}")


def test_attack_05_a_tail_cut_at_a_signed_size_is_seen_with_an_anchor_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    spent(path, 4)
    whole, head = path.read_bytes(), verify(path).head
    sizes = [size for (size,) in rows(path, "SELECT size FROM head ORDER BY size")]
    assert len(sizes) > 5
    for size in sizes[:-1]:
        path.write_bytes(whole)
        _cut(path, size)
        alone, anchored = verify(path), verify(path, expect_head=head)
        assert (alone.ok, alone.anchored) == (True, False)
        assert any("unanchored" in warning for warning in alone.warnings)
        assert (anchored.ok, anchored.exit_code) == (False, 5)
        assert f"{sizes[-1]} records and this ledger {size}: its tail was cut" in anchored.problems[0]
    call("ledger", "verify", path, "--trust", OWNER.public.hex, "--expect-head", head or "", code=5)
    assert "unanchored" in call("ledger", "verify", path, "--trust", OWNER.public.hex)


def test_attack_06_a_tail_cut_at_an_unsigned_size_is_noticed_without_an_anchor(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    run_id = signed(path)
    spend(path, run_id, 4)
    whole = path.read_bytes()
    signed_sizes = {size for (size,) in rows(path, "SELECT size FROM head")}
    total = max(signed_sizes)
    for size in range(1, total):
        path.write_bytes(whole)
        rows(path, f"DELETE FROM record WHERE seq >= {size}")  # k lines gone, the newest head left
        assert f"the signed head covers {total} records" in str(problem(path))
        if size not in signed_sizes:
            _cut(path, size)  # and with the newest head that covers no more than what is left
            assert f"the store holds {size} records" in str(problem(path)) or size == 1
