"""Whatever bytes are given: one clear error in under 10 s and 200 MB, nothing written, nothing lost."""

from __future__ import annotations

import gzip
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ledgerkit import BUDGET, OWNER, STRANGER, WRITER, SumFilter, WideFilter, make_plan

from dpbudget.errors import InvalidParameter
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.rules import MAX_ALL_COSTS
from dpbudget.ledger.store.sqlite import APPLICATION_ID, SCHEMA
from dpbudget.plan import Claim, Phase, rate_from_float

ROOT = Path(__file__).resolve().parents[3]
SECONDS, MEGABYTES = 10.0, 200.0
# The peak of the memory map, which begins anew at exec; the peak of a process would include that of its parent.
CHILD = """
import atexit, pathlib, sys
peak = pathlib.Path(sys.argv[1])
atexit.register(lambda: peak.write_text(pathlib.Path("/proc/self/status").read_text()))
from dpbudget_cli.main import main
main(sys.argv[2:])
"""


def answer(*words: str, folder: Path) -> tuple[int, str, float, float]:
    """Exit code, standard error, seconds and peak memory in MB of one command in a process of its own."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "HOME": str(folder)}
    begin = time.monotonic()
    with tempfile.NamedTemporaryFile() as peak:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, peak.name, *words],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        seconds = time.monotonic() - begin
        found = re.search(r"VmHWM:\s+([0-9]+) kB", Path(peak.name).read_text())
    assert found is not None
    return done.returncode, done.stderr.decode(), seconds, int(found[1]) / 1024


def state_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    return {
        path.name: (path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_mode) for path in folder.iterdir()
    }


def check(name: str, folder: Path, *, codes: tuple[int, ...] = (1, 4), command: tuple[str, ...] = ("verify",)) -> str:
    before = state_of(folder)
    code, said, seconds, peak = answer(*command, name, folder=folder)
    assert code in codes, said
    assert "Traceback" not in said
    assert said.count("error DP") <= 1
    assert len(said) < 4000
    assert seconds < SECONDS
    assert peak < MEGABYTES
    assert state_of(folder) == before
    return said


def zeros(place: Path) -> None:
    place.touch()
    os.truncate(place, 1 << 30)


def zeros_of_a_database(place: Path) -> None:
    place.write_bytes(b"SQLite format 3\0")
    os.truncate(place, 1 << 30)


def one_line(place: Path) -> None:
    place.write_bytes(b'{"a":"')
    os.truncate(place, 1 << 30)


def nested(place: Path) -> None:
    place.write_bytes(b'{"a":' + b"[" * 3_000_000)


def numbers(place: Path) -> None:
    place.write_bytes(b'{"a":' + b"9" * 3_000_000 + b"}\n")


def exponent(place: Path) -> None:
    place.write_bytes(b'{"a":1e' + b"9" * 1000 + b"}\n")


def gzip_bomb(place: Path) -> None:
    place.write_bytes(gzip.compress(bytes(50_000_000)))


def zip_bomb(place: Path) -> None:
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(50_000_000))


def many_lines(place: Path) -> None:
    place.write_bytes(b'{"a":1}\n' * 2_000_000)


def many_rows(place: Path) -> None:
    connection = sqlite3.connect(place)
    for _, statement in SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    connection.execute("PRAGMA user_version=1")
    rows = ((seq, b'{"type":"settle"}', None) for seq in range(500_000))
    connection.executemany("INSERT INTO record VALUES (?, ?, ?)", rows)
    connection.commit()
    connection.close()


def many_tables(place: Path) -> None:
    connection = sqlite3.connect(place)
    for number in range(3000):
        connection.execute(f"CREATE TABLE t{number} (x)")
    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    "make",
    [
        zeros,
        zeros_of_a_database,
        one_line,
        nested,
        numbers,
        exponent,
        gzip_bomb,
        zip_bomb,
        many_lines,
        many_rows,
        many_tables,
        lambda place: place.write_bytes(b""),
        lambda place: place.write_bytes(b"\x80\x04\x95cposix\nsystem\n(S'touch pwned'\ntR."),
        lambda place: place.write_bytes(b"!!python/object/apply:os.system ['touch pwned']\n"),
        lambda place: place.mkdir(),
        lambda place: os.mkfifo(place),
        lambda place: place.symlink_to("/dev/zero"),
    ],
    ids=lambda make: make.__name__ if make.__name__ != "<lambda>" else "small",
)
def test_bombs_of_every_kind_end_in_one_error(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "hostile")
    check("hostile", tmp_path)


def hostile_ledger(place: Path, plans: int, **facts: object) -> None:
    """A ledger that a hostile owner signed, with plans that are valid and costly to recompute."""

    class Yes(SumFilter):
        def joint_claim(self, plans: object, delta: float) -> float:
            return 0.0

    with Ledger.create(None, budget=BUDGET, owner=STRANGER, writer=WRITER, filter=Yes()) as bad:
        for number in range(plans):
            plan = make_plan(**{**facts, "nominal_size": 1000 + number})  # type: ignore[arg-type]
            bad.sign_plan(plan, owner=STRANGER)
        bad.start(next(iter(bad.state.runs)), lease_steps=1).next_receipt()
        bad.export(place)


def hard_phases(seed: int) -> tuple[Phase, ...]:
    return tuple(
        Phase(rate_k=rate_from_float(10.0 ** -(2 + (seed + part) % 5)), noise_multiplier=0.3 + part / 7, steps=10**6)
        for part in range(3)
    )


@pytest.mark.parametrize("trusted", [False, True], ids=["by nobody", "by another"])
def test_hard_plans_of_a_hostile_owner_cost_seconds_and_no_more(tmp_path: Path, trusted: bool) -> None:
    claim = Claim(epsilon=1e-9, delta=5e-7, accountant="prv", accountant_version=1)
    hostile_ledger(tmp_path / "hostile", 40, phases=hard_phases(1), claim=claim)
    trust = ("--trust", OWNER.public.hex) if trusted else ()
    check("hostile", tmp_path, codes=(1,), command=("verify", *trust))


def test_a_thousand_plans_of_a_hostile_owner_are_read_in_time(tmp_path: Path) -> None:
    hostile_ledger(tmp_path / "hostile", 1000)
    lines = (tmp_path / "hostile").read_bytes().splitlines()
    assert len([line for line in lines if json.loads(line).get("type") == "plan"]) == 1000
    check("hostile", tmp_path, codes=(0, 1))


def rdp_ledger_of_large_tables(place: Path, plans: int, phases: int) -> None:
    """Valid by the rules: every phase another, with costs at 64 orders that somebody made up."""

    with Ledger.create(None, budget=BUDGET, owner=STRANGER, writer=WRITER, filter=WideFilter(), kind="rdp") as bad:
        for number in range(plans):
            parts = (
                Phase(rate_k=rate_from_float((1 + part + number / plans) / 1e5), noise_multiplier=1.0, steps=1)
                for part in range(phases)
            )
            bad.sign_plan(make_plan(phases=tuple(parts)), owner=STRANGER)
        bad.export(place)


def test_one_plan_of_hundreds_of_phases_and_orders_is_given_up_in_time(tmp_path: Path) -> None:
    rdp_ledger_of_large_tables(tmp_path / "hostile", 1, 600)
    check("hostile", tmp_path, codes=(1,))


@pytest.mark.slow
def test_megabytes_of_signed_costs_are_given_up_in_time(tmp_path: Path) -> None:
    rdp_ledger_of_large_tables(tmp_path / "hostile", 26, 600)
    check("hostile", tmp_path, codes=(1,))


def test_more_than_a_million_costs_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ALL_COSTS == 1_000_000
    monkeypatch.setattr("dpbudget.ledger.admission.MAX_ALL_COSTS", 10_000)
    with pytest.raises(InvalidParameter, match="would hold 12800 costs; 10000 is the most"):
        rdp_ledger_of_large_tables(tmp_path / "hostile", 2, 100)


@pytest.mark.parametrize("command", [("ledger", "show"), ("ledger", "runs"), ("ledger", "head"), ("key", "show")])
def test_other_readers_are_bounded_too(command: tuple[str, ...], tmp_path: Path) -> None:
    for make in (zeros, one_line, zeros_of_a_database):
        place = tmp_path / "hostile"
        place.unlink(missing_ok=True)
        make(place)
        check("hostile", tmp_path, command=command)
