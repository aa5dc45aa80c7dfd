"""The export: every byte, every cut, every missing, repeated or swapped line is noticed."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledgerkit import (
    NEXT_WRITER,
    OWNER,
    STRANGER,
    WRITER,
    committed_run,
    export_bytes,
    lived_in_ledger,
    make_ledger,
    make_plan,
    snapshot_in,
)

from dpbudget._record import encode
from dpbudget.errors import DPBudgetError, InvalidParameter, StorageFailed, Tampered, Unreadable
from dpbudget.ledger.entries import FIELDS, Entry, build, read
from dpbudget.ledger.head import sign_head
from dpbudget.ledger.journal import check_head, check_kept_heads, replay
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.rules import admit
from dpbudget.ledger.signing import PublicKey
from dpbudget.ledger.state import LedgerState
from dpbudget.ledger.store.base import Snapshot
from dpbudget.ledger.store.jsonl import read_export, write_export
from dpbudget.ledger.tree import Frontier, leaf_hash
from dpbudget.plan import Budget


@pytest.fixture(scope="module")
def export() -> bytes:
    return export_bytes(lived_in_ledger())


def check(data: bytes, trust: PublicKey | None = OWNER.public) -> LedgerState:
    snapshot = read_export(data)
    return replay(snapshot.entries, snapshot.note, trust)[0]


def test_an_export_verifies_and_says_what_was_spent(export: bytes) -> None:
    state = check(export)
    assert [run.charged for run in state.runs.values()] == [6, 2, 3]
    assert [run.reserved for run in state.runs.values()] == [4, 2, 3]
    assert [portfolio.claim for portfolio in state.portfolios] == [2.0, 0.5]


def test_an_export_is_reproduced_byte_for_byte(export: bytes) -> None:
    file = io.BytesIO()
    write_export(read_export(export).reading(), file)
    assert file.getvalue() == export


def small_exports() -> list[bytes]:
    """Three complete exports with, together, records of every type."""
    portfolio, rdp = make_ledger(), make_ledger(kind="rdp")
    for ledger in (portfolio, rdp):
        run_id = ledger.sign_plan(make_plan(3), owner=OWNER)
        with ledger.start(run_id, lease_steps=2) as run:
            run.settle(run.next_receipt(), "ab" * 32)
    rdp.change_budget(Budget(epsilon=4.0, delta=1e-6), owner=OWNER)
    rdp.note("checked")
    rdp.rekey("writer", new=NEXT_WRITER, by=WRITER)
    committed = make_ledger()
    with committed_run(committed, make_plan(2), lease_steps=1) as run:
        run.settle(run.next_receipt(), "ab" * 32)
    return [export_bytes(portfolio), export_bytes(rdp), export_bytes(committed)]


SMALL = small_exports()


def test_the_small_exports_hold_every_type_of_record() -> None:
    kinds = {read(entry.line)["type"] for small in SMALL for entry in read_export(small).entries}
    assert kinds == set(FIELDS)


@pytest.mark.parametrize("small", SMALL, ids=["portfolio", "rdp", "committed"])
def test_every_changed_byte_is_noticed(small: bytes) -> None:
    """Two substitutions of every byte; what stands before the changed record is the same for any verifier."""
    state, start = LedgerState(trust=OWNER.public), 0
    for entry in read_export(small).entries:
        end = start + len(entry.line) + 1 + (len(entry.envelope) + 1 if entry.envelope is not None else 0)
        for at in range(start, end):
            for byte in other_bytes(small[at]):
                tail = small[start:at] + bytes([byte]) + small[at + 1 :]
                assert not _continues(state, tail), (at, byte)
        state, start = admit(state, entry), end
    for at in range(start, len(small)):
        for byte in other_bytes(small[at]):
            assert not _accepts(small[:at] + bytes([byte]) + small[at + 1 :]), (at, byte)
    assert _accepts(small)


def other_bytes(byte: int) -> set[int]:
    return {byte ^ 0x01, 0x20 if byte != 0x20 else 0x30}


def _continues(state: LedgerState, tail: bytes) -> bool:
    try:
        snapshot = read_export(tail)
        for entry in snapshot.entries:
            state = admit(state, entry)
        assert snapshot.note is not None
        check_head(state, snapshot.note)
    except Tampered:
        return False
    return True


@pytest.mark.slow
def test_every_changed_byte_of_a_lived_in_ledger_is_noticed(export: bytes) -> None:
    for at in range(len(export)):
        for byte in other_bytes(export[at]):
            assert not _accepts(export[:at] + bytes([byte]) + export[at + 1 :]), (at, byte)


def _accepts(data: bytes) -> bool:
    try:
        check(data)
    except Tampered:
        return False
    return True


@pytest.mark.slow
def test_every_flipped_bit_and_a_few_characters_are_noticed() -> None:
    short = export_bytes(make_ledger())
    for at in range(len(short)):
        for byte in {short[at] ^ 1 << bit for bit in range(8)} | set(b'\0\n\r "0aA=,\xff'):
            if byte != short[at]:
                assert not _accepts(short[:at] + bytes([byte]) + short[at + 1 :]), (at, byte)


def test_every_cut_is_noticed(export: bytes) -> None:
    for at in range(0, len(export), 7):
        assert not _accepts(export[:at]), at
    for at in range(max(0, len(export) - 400), len(export)):
        assert not _accepts(export[:at]), at


def test_a_cut_before_every_line_is_noticed(export: bytes) -> None:
    lines = export.splitlines(keepends=True)
    for count in range(len(lines)):
        assert not _accepts(b"".join(lines[:count])), count
        # With the old head put back behind the shortened ledger, size and root differ.
        if count < len(lines) - 1:
            assert not _accepts(b"".join([*lines[:count], lines[-1]])), count


def test_every_dropped_or_repeated_line_is_noticed(export: bytes) -> None:
    lines = export.splitlines(keepends=True)
    for at in range(len(lines)):
        assert not _accepts(b"".join(lines[:at] + lines[at + 1 :])), at
        assert not _accepts(b"".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])), at


def test_every_swap_of_two_lines_is_noticed(export: bytes) -> None:
    lines = export.splitlines(keepends=True)
    for a in range(len(lines)):
        for b in range(a + 1, len(lines)):
            swapped = list(lines)
            swapped[a], swapped[b] = lines[b], lines[a]
            assert not _accepts(b"".join(swapped)), (a, b)


@pytest.mark.parametrize("tail", [b"\n", b" ", b"{}\n", b'{"note":""}\n', b"\0"])
def test_nothing_may_follow_the_head(export: bytes, tail: bytes) -> None:
    assert not _accepts(export + tail)


def test_a_line_feed_of_windows_is_refused(export: bytes) -> None:
    assert not _accepts(export.replace(b"\n", b"\r\n"))


def test_every_prefix_under_its_own_head_verifies_as_a_shorter_history(export: bytes) -> None:
    # The limit of a hash chain: a writer who signs a shorter history is caught by an outside head alone.
    snapshot = read_export(export)
    whole = check(export)
    for size in range(3, len(snapshot.entries)):
        state = LedgerState()
        for entry in snapshot.entries[:size]:
            state = admit(state, entry)
        head = sign_head(whole.genesis.ledger_id, size, state.tree.root, WRITER)
        shorter, signed = replay(snapshot.entries[:size], head.note.encode(), OWNER.public)
        assert signed.size == shorter.size == size
        assert signed.root != whole.tree.root.hex()


def test_a_history_signed_by_another_writer_is_refused(export: bytes) -> None:
    snapshot = read_export(export)
    whole = check(export)
    head = sign_head(whole.genesis.ledger_id, whole.size, whole.tree.root, STRANGER)
    with pytest.raises(Tampered, match="not the writer's"):
        replay(snapshot.entries, head.note.encode(), None)


def test_a_self_consistent_ledger_of_a_foreign_owner_is_refused_under_trust() -> None:
    foreign = lived_in_foreign_ledger()
    assert check(foreign, trust=None).size > 3  # consistent in itself, which proves nothing
    with pytest.raises(Tampered, match="the trusted key is") as caught:
        check(foreign)
    assert caught.value.code == "DP072"


def lived_in_foreign_ledger() -> bytes:
    ledger = make_ledger(owner=STRANGER)
    run_id = ledger.sign_plan(make_plan(), owner=STRANGER)
    with ledger.start(run_id) as run:
        assert len(list(run)) == 4
    return export_bytes(ledger)


def test_repeated_randomness_marks_a_cloned_process() -> None:
    ledger = make_ledger()
    run_id = ledger.sign_plan(make_plan(), owner=OWNER)
    with ledger.start(run_id, lease_steps=2) as run:
        run.next_receipt()
        run.next_receipt()
    snapshot = read_export(export_bytes(ledger))
    state = check(export_bytes(ledger))
    old = next(json.loads(entry.line) for entry in snapshot.entries if b'"type":"lease"' in entry.line)
    for name in ("nonce", "commitment"):
        fields = {"nonce": "01" * 32, "commitment": "02" * 32, name: old[name]}
        line = build("lease", seq=state.size, prev=state.last, run=run_id, first=2, count=2, claim=None, **fields)
        after = admit(state, Entry(line))
        head = sign_head(after.genesis.ledger_id, after.size, after.tree.root, WRITER)
        with pytest.raises(Tampered, match=f"repeats the {name}"):
            replay([*snapshot.entries, Entry(line)], head.note.encode(), OWNER.public)


def roots_of(snapshot: Snapshot) -> dict[int, bytes]:
    """The Merkle root at every size."""
    tree, roots = Frontier(), {}
    for entry in snapshot.entries:
        tree = tree.append(leaf_hash(entry.line))
        roots[tree.size] = tree.root
    return roots


def test_kept_heads_are_checked_against_their_prefixes() -> None:
    ledger = lived_in_ledger()
    snapshot = snapshot_in(ledger)
    roots = roots_of(snapshot)
    assert check_kept_heads(snapshot.heads, ledger.state, roots) == len(snapshot.heads) > 5
    first, second = snapshot.heads[:2]
    for heads in ((second, first, *snapshot.heads[2:]), (*snapshot.heads, snapshot.heads[-1])):
        with pytest.raises(Tampered):
            check_kept_heads(heads, ledger.state, roots)
    forged = sign_head(ledger.id, 2, b"\x07" * 32, WRITER).note.encode()
    with pytest.raises(Tampered, match="another root"):
        check_kept_heads((forged, *snapshot.heads[1:]), ledger.state, roots)


# --- hostile input ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(Tampered):
        check(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.data())
def test_a_mutated_export_is_refused_in_words(export: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(export)))
    end = data.draw(st.integers(at, min(len(export), at + 60)))
    piece = data.draw(st.binary(max_size=30))
    changed = export[:at] + piece + export[end:]
    if changed != export:
        assert not _accepts(changed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["v", "type", "seq", "prev", "note", "run", "payload"]), JSON))
def test_any_json_is_refused_in_words(value: dict[str, Any]) -> None:
    with pytest.raises(Tampered):
        check(json.dumps(value).encode() + b"\n")


@pytest.mark.parametrize(
    "data",
    [
        b"{" * 1_000_000 + b"\n",
        b'{"a":' * 500_000 + b"\n",
        b'{"note":"' + b"A" * 3_000_000 + b'"}\n',
        b'{"v":' + b"9" * 1_000_000 + b"}\n",
        b'{"v":1e999999}\n',
        b"{}" * 2_000_000,
        b"\n" * 100_000,
    ],
)
def test_bombs_are_refused_at_once(data: bytes) -> None:
    begin = time.perf_counter()
    with pytest.raises(Tampered):
        check(data)
    assert time.perf_counter() - begin < 2


def test_a_note_line_has_one_form(export: bytes) -> None:
    body, last = export[: export.rindex(b"\n", 0, -1) + 1], export.splitlines()[-1]
    note = json.loads(last)["note"]
    for line in (
        encode({"note": note, "more": 1}),
        encode({"note": None}),
        encode({"note": note.rstrip("=") + "A"}),
        encode({"note": base64.b64encode(b"").decode()}),
        b'{"note": "' + note.encode() + b'"}',
    ):
        assert not _accepts(body + line + b"\n")


# --- files -----------------------------------------------------------------------------------------------------------


def test_an_export_opens_as_a_ledger_for_reading(tmp_path: Path, export: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(export)
    with Ledger.open(path, trust=OWNER.public) as ledger:
        assert ledger.trusted
        assert not ledger.durable
        assert ledger.state.size == ledger.head.size
        assert export_bytes(ledger) == export
        with pytest.raises(InvalidParameter, match="opened for reading"):
            ledger.start(next(iter(ledger.state.runs))).next_receipt()
    with Ledger.open(path) as ledger:
        assert not ledger.trusted


def test_an_export_is_never_written_over_a_file(tmp_path: Path) -> None:
    ledger, path = lived_in_ledger(), tmp_path / "export.jsonl"
    head = ledger.export(path)
    assert head == ledger.head
    before = path.read_bytes()
    with pytest.raises(InvalidParameter) as caught:
        ledger.export(path)
    assert caught.value.code == "DP074"
    assert path.read_bytes() == before


def test_other_files_are_named_as_such(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("text", b"hello\n"), ("pickle", b"\x80\x04.")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Unreadable, match="neither a ledger nor an export"):
            Ledger.open(tmp_path / name)
    (tmp_path / "json").write_bytes(b'{"a": 1}\n')
    with pytest.raises(Tampered) as caught:
        Ledger.open(tmp_path / "json")
    assert caught.value.code == "DP070"
    for path in (tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(DPBudgetError):
            Ledger.open(path)


def test_a_hundred_thousand_records_verify_in_seconds() -> None:
    ledger = make_ledger()
    run_id = ledger.sign_plan(make_plan(20_000), owner=OWNER)
    with ledger.start(run_id) as run:
        for _ in zip(range(10_000), run, strict=False):
            pass
    snapshot = read_export(export_bytes(ledger))
    begin = time.perf_counter()
    state, _ = replay(snapshot.entries, snapshot.note, OWNER.public)
    seconds = (time.perf_counter() - begin) * 100_000 / state.size
    assert state.tree.size > 10_000
    assert leaf_hash(snapshot.entries[-1].line) == state.last
    assert seconds < 60  # 6 s on the machine of the measurement; the bound catches a quadratic cost alone


def test_an_export_to_a_full_disk_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="No space left"), open("/dev/full", "wb", buffering=0) as full:
        _export_to_device(full, tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())


def _export_to_device(full: BinaryIO, place: Path) -> None:
    """An export whose file is the device that is always full."""
    real = os.fdopen

    def fdopen(descriptor: int, mode: str) -> Any:
        os.dup2(full.fileno(), descriptor)
        return real(descriptor, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpbudget.ledger.store.jsonl.os.fdopen", fdopen)
        lived_in_ledger().export(place)


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    ledger = lived_in_ledger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpbudget.ledger.store.jsonl.encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ledger.export(tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())
    ledger.export(tmp_path / "x.jsonl")


def interrupt(_: object) -> bytes:
    raise KeyboardInterrupt
