"""The second verifier and the package agree: on what valid ledgers say, and on every corruption."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpbudget.errors import DPBudgetError
from dpbudget.ledger.entries import Entry, read
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.signing import STATEMENT_TYPE, sign_envelope
from dpbudget.plan import Budget
from tests.fuzz.mutations import _VALUES, chained

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "dpbudget" / "ledger")]
from bothkit import agree, exported, ours, theirs  # noqa: E402
from ledgerkit import (  # noqa: E402
    NEXT_OWNER,
    NEXT_WRITER,
    OWNER,
    WRITER,
    committed_ledger,
    committed_run,
    export_bytes,
    lived_in_ledger,
    make_ledger,
    make_plan,
    rdp_ledger,
    snapshot_of,
)

GOLDEN = (HERE.parent / "dpbudget" / "ledger" / "golden.jsonl").read_bytes()
EXPORTS = {
    "golden": GOLDEN,
    "portfolio": export_bytes(lived_in_ledger()),
    "rdp": export_bytes(rdp_ledger()),
    "committed": export_bytes(committed_ledger()),
}


def test_the_second_verifier_is_short_and_shares_no_code_with_the_package() -> None:
    source = (HERE / "verifier.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 210
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    imported |= {a.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for a in node.names}
    assert {str(name).split(".")[0] for name in imported} <= {*sys.stdlib_module_names, "cryptography"}


@pytest.mark.parametrize("name", EXPORTS)
def test_both_agree_on_what_a_valid_ledger_says(name: str) -> None:
    assert agree(EXPORTS[name])
    assert theirs(EXPORTS[name])["charged"]  # type: ignore[index]


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    place = tmp_path / "export"
    place.write_bytes(GOLDEN)
    command = [sys.executable, str(HERE / "verifier.py"), str(place)]
    done = subprocess.run([*command, OWNER.public.hex], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ours(GOLDEN)
    refused = subprocess.run([*command, WRITER.public.hex], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert done.stderr == refused.stdout == ""


def test_both_refuse_every_changed_byte_of_a_small_ledger() -> None:
    small = export_bytes(make_ledger())
    for at in range(len(small)):
        for byte in (small[at] ^ 1, 0x20 if small[at] != 0x20 else 0x30):
            assert not agree(small[:at] + bytes([byte]) + small[at + 1 :]), at


@pytest.mark.parametrize("name", ["portfolio", "rdp", "committed"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_both_refuse_bytes_that_were_changed_anywhere(name: str, data: st.DataObject) -> None:
    export = EXPORTS[name]
    at = data.draw(st.integers(0, len(export) - 1))
    assert not agree(export[:at] + bytes([export[at] ^ data.draw(st.integers(1, 255))]) + export[at + 1 :])


@pytest.mark.parametrize("name", ["portfolio", "rdp", "committed"])
def test_both_refuse_lines_that_are_dropped_doubled_swapped_or_cut(name: str) -> None:
    lines = EXPORTS[name].splitlines(keepends=True)
    for at in range(len(lines)):
        assert not agree(b"".join(lines[:at] + lines[at + 1 :]))
        assert not agree(b"".join(lines[: at + 1] + lines[at:]))
        assert not agree(b"".join(lines[:at]))
        if at:
            assert not agree(b"".join([*lines[: at - 1], lines[at], lines[at - 1], *lines[at + 1 :]]))


# --- signed again: only rules and schema are left to refuse ---------------------------------------------------------


def plain_ledger(kind: str) -> list[Entry]:
    """Every type but rekey, whose keys would sign what a test signs again."""
    ledger = make_ledger(kind=kind)
    run = ledger.start(ledger.sign_plan(make_plan(5), owner=OWNER), lease_steps=2)
    for _ in range(3):
        run.next_receipt()
    run.close()
    ledger.change_budget(Budget(epsilon=4.0, delta=2e-6), owner=OWNER)
    ledger.note("checked")
    with ledger.start(ledger.sign_plan(make_plan(2, delta=ledger.plan_delta), owner=OWNER)) as other:
        other.next_receipt()
    if kind == "portfolio":
        with committed_run(ledger, make_plan(3, epsilon=0.25, delta=ledger.plan_delta), lease_steps=2) as last:
            assert len(list(last)) == 3
    return list(snapshot_of(ledger).entries)


PLAIN = {kind: plain_ledger(kind) for kind in ("portfolio", "rdp")}
# Genesis is left alone, since plans name its hash.
PLACES = [
    (kind, at, name)
    for kind, entries in PLAIN.items()
    for at, entry in enumerate(entries)
    if at
    for name in read(entry.line)
    if name not in ("v", "type", "seq", "prev")
]


def test_signing_again_changes_no_verdict() -> None:
    for entries in PLAIN.values():
        records = [(json.loads(entry.line), entry.envelope) for entry in entries]
        assert agree(exported(*chained(records, OWNER, WRITER)))


@pytest.mark.parametrize(("kind", "at", "name"), PLACES)
def test_both_say_the_same_of_every_field_with_any_value(kind: str, at: int, name: str) -> None:
    old = json.loads(PLAIN[kind][at].line)[name]
    near = [old + 1, old - 1] if type(old) is int else [old[::-1], [*old, *old][:2]] if isinstance(old, list) else []
    for value in [*_VALUES, *near, (2.0).hex(), (1e-7).hex()]:
        records = [(json.loads(entry.line), entry.envelope) for entry in PLAIN[kind]]
        records[at] = ({**records[at][0], name: value}, records[at][1])
        agree(exported(*chained(records, OWNER, WRITER)))


@pytest.mark.parametrize("kind", PLAIN)
def test_both_say_the_same_of_records_that_move(kind: str) -> None:
    entries = PLAIN[kind]
    for at in range(1, len(entries)):
        for to in range(1, len(entries)):
            records = [(json.loads(entry.line), entry.envelope) for entry in entries]
            records.insert(to, records.pop(at))
            agree(exported(*chained(records, OWNER, WRITER)))
        records = [(json.loads(entry.line), entry.envelope) for entry in entries]
        records.insert(at, records[at])
        agree(exported(*chained(records, OWNER, WRITER)))


def changed_plans() -> list[tuple[str, str, Any]]:
    found = []
    for kind, entries in PLAIN.items():
        statement = statement_in(entries)
        for name in [*statement["predicate"], "_type", "predicateType", "subject"]:
            found += [(kind, name, value) for value in [*_VALUES, (0.5).hex(), [[]], [{"a": 1}]]]
        for part in ("claim", "phases"):
            inner = statement["predicate"][part]
            inner = inner[0] if part == "phases" else inner
            found += [(kind, f"{part}.{name}", value) for name in inner for value in [*_VALUES, (0.5).hex(), "0" * 17]]
    return found


def statement_in(entries: Sequence[Entry]) -> dict[str, Any]:
    import base64

    plan = next(entry for entry in entries if read(entry.line)["type"] == "plan")
    return dict(json.loads(base64.b64decode(json.loads(plan.envelope or b"")["payload"])))


def test_both_say_the_same_of_every_field_of_a_plan() -> None:
    import hashlib

    for kind, name, value in changed_plans():
        entries = PLAIN[kind]
        statement, (part, _, inner) = statement_in(entries), name.partition(".")
        if inner:
            place = statement["predicate"][part]
            (place[0] if part == "phases" else place)[inner] = value
        else:
            (statement["predicate"] if part in statement["predicate"] else statement)[part] = value
        payload = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
        records = [(json.loads(entry.line), entry.envelope) for entry in entries]
        at = next(at for at, (record, _) in enumerate(records) if record["type"] == "plan")
        changed = {**records[at][0], "statement": hashlib.sha256(payload).hexdigest()}
        records[at] = (changed, sign_envelope(payload, STATEMENT_TYPE, OWNER))
        agree(exported(*chained(records, OWNER, WRITER)))


# --- ledgers that lived at random -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["portfolio", "rdp"]), st.lists(st.integers(0, 7), max_size=14), st.randoms(use_true_random=False)
)
def test_both_agree_on_ledgers_that_lived_at_random(kind: str, deeds: list[int], chance: Any) -> None:
    ledger, owner, runs = make_ledger(kind=kind), OWNER, []
    for deed in deeds:
        try:
            owner = live(ledger, deed, owner, runs, chance)
        except DPBudgetError:
            continue
    assert agree(export_bytes(ledger))


def live(ledger: Ledger, deed: int, owner: Any, runs: list[Any], chance: Any) -> Any:
    """One deed; the owner's key after it."""
    if deed <= 2:
        plan = make_plan(chance.randint(1, 9), epsilon=chance.choice([0.25, 1.0]), delta=ledger.plan_delta)
        runs.append(ledger.start(ledger.sign_plan(plan, owner=owner), lease_steps=1))
    elif deed == 3 and runs:
        runs.pop(chance.randrange(len(runs))).close()
    elif deed == 4:
        ledger.change_budget(Budget(epsilon=chance.choice([2.0, 3.0, 5.0]), delta=1e-6), owner=owner)
    elif deed == 5:
        ledger.rekey("writer", new=NEXT_WRITER, by=owner)
    elif deed == 6:
        ledger.rekey("owner", new=NEXT_OWNER, by=owner)
        return NEXT_OWNER
    elif runs:
        run = chance.choice(runs)
        run.settle(run.next_receipt(), chance.choice([None, "ab" * 32]))
    return owner
