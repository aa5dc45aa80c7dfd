"""Attacks 27 to 35: clocks, spellings, bombs, refunds, paths, keys in the open, code in data."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from attackkit import (
    OWNER,
    WRITER,
    as_is,
    call,
    export,
    forged,
    make,
    plan,
    problem,
    problem_of,
    reopen,
    signed,
    spend,
    spent,
    verify,
)

import dpbudget
from dpbudget.errors import DPBudgetError, InvalidParameter, Unreadable
from dpbudget.ledger.store.jsonl import read_export
from dpbudget_cli._data import read_table
from dpbudget_cli.main import app

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("readers") / "ledger"
    spent(path, 2)
    return export(path)


@pytest.mark.parametrize("moment", [0.0, 1e9, 4e9, 2.0**40], ids=["1970", "2001", "2096", "year 36812"])
@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "<X>-99"])
def test_attack_27_a_clock_put_back_forward_or_elsewhere_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: float, zone: str
) -> None:
    path = tmp_path / "ledger"
    run_id = signed(path)
    spend(path, run_id, 2)
    with monkeypatch.context() as frozen:
        frozen.setenv("TZ", zone)
        time.tzset()
        frozen.setattr(time, "time", lambda: moment)
        frozen.setattr(time, "time_ns", lambda: int(moment * 1e9))
        spend(path, run_id, 2)
        under_it = verify(path)
    time.tzset()
    spend(path, run_id, 2)
    records = [json.loads(entry.line) for entry in read_export(export(path)).entries]
    # Sequence numbers order the records, and none holds a time that could disagree with them.
    assert [record["seq"] for record in records] == list(range(len(records)))
    assert not {name for record in records for name in record if "time" in name or "date" in name}
    assert (under_it.ok, under_it.steps, verify(path).ok, verify(path).steps) == (True, 4, True, 6)


#: What stands in place of the number 1 of a reserve's count, or around it.
SPELLINGS = {
    "NaN": b"NaN",
    "infinity": b"Infinity",
    "minus infinity": b"-Infinity",
    "minus zero": b"-0",
    "1e400": b"1e400",
    "a float": b"1.0",
    "an exponent": b"1e0",
    "a huge integer": b"9" * 400,
    "2^53": b"9007199254740992",
    "a leading zero": b"01",
    "a plus": b"+1",
    "true": b"true",
    "a string": b'"1"',
    "hexadecimal": b"0x1",
    "white space": b" 1",
    "a duplicate key": b'1,"count":1',
    "a second count": b'3,"count":1',
    "an escaped key": b'1,"coun\\u0074":1',
    "an unknown field": b'1,"d":1',
    "a lone surrogate": b'"\\ud800"',
    "raw UTF-8": '"é"'.encode(),
    "broken UTF-8": b'"\xff"',
    "a control character": b'"\x00"',
    "null": b"null",
    "an array": b"[1]",
    "a comment": b"1/**/",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_attack_28_a_number_in_another_spelling_is_refused(data: bytes, name: str, tmp_path: Path) -> None:
    (line,) = {line for line in data.splitlines() if b'"step":1,' in line and b'"type":"reserve"' in line}
    assert problem_of(data, tmp_path) is None
    assert b'"count":1' in line
    attacked = data.replace(line, line.replace(b'"count":1', b'"count":' + SPELLINGS[name]))
    assert "DP082" in str(problem_of(attacked, tmp_path))


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "-0x0.0p+0", "0x1p+99999", "0x1.8p+1", "3.0", "1e400", "0X1p0"]
)
def test_attack_28_a_float_in_another_spelling_is_refused_though_all_is_signed(
    data: bytes, value: str, tmp_path: Path
) -> None:
    def edit(record: dict[str, Any], envelope: bytes | None) -> bytes | None:
        if record["type"] == "lease" and record["claim"] is not None:
            record["claim"] = value
        return envelope

    assert "DP082" in str(problem_of(forged(data, edit), tmp_path))


@pytest.mark.parametrize("prefix", [b"\xef\xbb\xbf", b" ", b"\n", b"\xff\xfe", b"\x00"])
def test_attack_28_bytes_before_the_first_record_are_refused(data: bytes, prefix: bytes, tmp_path: Path) -> None:
    assert problem_of(prefix + data, tmp_path) is not None


def test_attack_28_random_damage_is_refused_and_never_crashes_the_reader(data: bytes, tmp_path: Path) -> None:
    chance = random.Random(28)
    tokens = [b"NaN", b"-0", b"1e400", b"\\ud800", b"true", b"{", b"[", b'"', b"\n", b"\xef\xbb\xbf", b"", b"null"]
    for _ in range(400):
        at = chance.randrange(len(data))
        end = min(len(data), at + chance.choice((0, 1, 1, 2, 8, 300)))
        attacked = data[:at] + chance.choice(tokens) + data[end:]
        assert attacked == data or problem_of(attacked, tmp_path) is not None


BOMBS = """
import gzip, io, json, os, resource, sys, time, zipfile
from pathlib import Path
import dpbudget
from dpbudget.errors import DPBudgetError
folder, whole = Path(sys.argv[1]), Path(sys.argv[1], "whole.jsonl").read_bytes()
first, rest = whole.split(b"\\n", 1)
deep = b"[" * 2_000_000
zipped = io.BytesIO()
with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("ledger.jsonl", bytes(100_000_000))
bombs = {
    "arrays": b'{"a":' + deep,
    "objects": b'{"a":' * 700_000,
    "deep record": first[:-1] + b',"z":' + b"[" * 3000 + b"]" * 3000 + b"}\\n" + rest,
    "deep envelope": first + b'\\n{"payload":' + b"[" * 1_000_000 + b"\\n" + rest,
    "zip": zipped.getvalue(),
    "gzip": gzip.compress(bytes(100_000_000)),
    "gzip of a ledger": gzip.compress(whole),
    "exponent": first.replace(b'"v":1', b'"v":1e999999999') + b"\\n" + rest,
    "digits": first.replace(b'"v":1', b'"v":' + b"9" * 3000) + b"\\n" + rest,
    "hexadecimal exponent": first.replace(b"p+1", b"p+999999999") + b"\\n" + rest,
    "many empty lines": b"{}" + b"\\n" * 5_000_000,
}
for name, data in bombs.items():
    (folder / "bomb").write_bytes(data)
    bombs[name] = None
    del data
    start = time.monotonic()
    try:
        report = dpbudget.verify(folder / "bomb")
        refused = not report.ok
    except DPBudgetError:
        refused = True
    print(json.dumps([name, refused, time.monotonic() - start]))
long = folder / "long"
for name, head in (("one line", b'{"a":"'), ("spaces", first + b"\\n"), ("database", b"SQLite format 3\\0")):
    long.write_bytes(head)
    os.truncate(long, (1 << 30) + 4096)  # sparse: a gigabyte to whoever reads it
    start = time.monotonic()
    try:
        refused = not dpbudget.verify(long).ok
    except DPBudgetError:
        refused = True
    print(json.dumps([name, refused, time.monotonic() - start]))
os.truncate(long, (1 << 30) - 4096)
long.open("r+b").write(b'{"a":"')
start = time.monotonic()
refused = not dpbudget.verify(long).ok
print(json.dumps(["one line within the limit", refused, time.monotonic() - start]))
try:  # of this program alone; on Linux the other figure begins with what its parent had
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]))
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_attacks_29_to_31_bombs_are_refused_within_ten_seconds_and_two_hundred_megabytes(
    data: bytes, tmp_path: Path
) -> None:
    (tmp_path / "whole.jsonl").write_bytes(data)
    done = subprocess.run([sys.executable, "-c", BOMBS, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *found, peak = map(json.loads, done.stdout.splitlines())
    assert len(found) == 15
    assert [name for name, refused, _ in found if not refused] == []
    assert sum(seconds for _, _, seconds in found) < 10
    assert peak < 200 * 1024  # kilobytes


@pytest.mark.parametrize("value", [2**62, 2**53 - 1, 10**15])
@pytest.mark.parametrize(("kind", "name"), [("reserve", "count"), ("reserve", "step"), ("lease", "count")])
def test_attack_31_a_count_beyond_any_plan_is_refused_at_once_though_the_writer_signs_it(
    data: bytes, kind: str, name: str, value: int, tmp_path: Path
) -> None:
    def edit(record: dict[str, Any], envelope: bytes | None) -> bytes | None:
        if record["type"] == kind:
            record[name] = value
        return envelope

    attacked = forged(data, edit)
    start = time.monotonic()
    assert "DP082" in str(problem_of(attacked, tmp_path))
    assert time.monotonic() - start < 2


def test_attack_31_a_plan_of_a_billion_steps_costs_a_verifier_no_more_than_a_short_one(tmp_path: Path) -> None:
    many = dpbudget.plan_for(
        noise_multiplier=3e5, delta=1e-5, dataset_size=1000, batch_size=1000, steps=10**9, max_parameters=100
    )
    with make(tmp_path / "ledger") as ledger, ledger.start(ledger.sign_plan(many, owner=OWNER)) as run:
        run.next_receipt()
    start = time.monotonic()
    report = verify(tmp_path / "ledger")
    assert (report.ok, report.runs[0].steps) == (True, 10**9)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("value", [-3, 0, True])
@pytest.mark.parametrize(("kind", "name"), [("reserve", "count"), ("lease", "count"), ("lease", "claim")])
def test_attack_32_a_negative_or_empty_charge_is_refused_though_the_writer_signs_it(
    data: bytes, kind: str, name: str, value: int, tmp_path: Path
) -> None:
    def refund(record: dict[str, Any], envelope: bytes | None) -> bytes | None:
        if record["type"] == kind and record.get(name) is not None:
            record[name] = float(value - 4).hex() if name == "claim" else value
        return envelope

    assert "DP082" in str(problem_of(forged(data, refund), tmp_path))


def test_attack_32_a_close_gives_nothing_back(data: bytes, tmp_path: Path) -> None:
    run_id = json.loads(read_export(data).entries[2].line)["run"]
    lease = {"type": "lease", "run": run_id, "nonce": "ab" * 32, "commitment": "cd" * 32, "first": 2, "claim": None}
    close = {"type": "close", "run": run_id, "first": 2}
    honest = forged(data, as_is, {**lease, "count": 3}, {**close, "unspent": 3})
    (tmp_path / "closed.jsonl").write_bytes(honest)
    assert verify(tmp_path / "closed.jsonl").steps == 5  # the three unspent steps stay charged
    for unspent in (-3, 0, 2, 4, 5):
        attacked = forged(data, as_is, {**lease, "count": 3}, {**close, "unspent": unspent})
        assert problem_of(attacked, tmp_path) is not None
    again = forged(
        data, as_is, {**lease, "count": 3}, {**close, "unspent": 3}, {**lease, "nonce": "ef" * 32, "count": 3}
    )
    assert "the run is charged to step 5" in str(problem_of(again, tmp_path))  # nor may the same steps be leased again


@pytest.mark.parametrize("name", ["../../../tmp/x", "/etc/passwd", "..", "a/b", "x\x00y", "run-1"])
def test_attack_33_a_run_named_like_a_path_is_refused(data: bytes, name: str, tmp_path: Path) -> None:
    run_id = json.loads(read_export(data).entries[2].line)["run"]
    attacked = data.replace(run_id.encode(), json.dumps(name)[1:-1].encode())
    assert problem_of(attacked, tmp_path) is not None
    with reopen(_ledger(tmp_path)) as ledger, pytest.raises(InvalidParameter):
        ledger.start(name)


def _ledger(folder: Path) -> Path:
    signed(folder / "a.ledger")
    return folder / "a.ledger"


def _symlink(place: Path, target: Path) -> None:
    place.symlink_to(target)


def _through_the_folder(place: Path, target: Path) -> None:
    place.symlink_to(target.parent / ".." / target.parent.name / target.name)


def _fifo(place: Path, target: Path) -> None:
    os.mkfifo(place, 0o600)


def _hard_link(place: Path, target: Path) -> None:
    os.link(target, place)


def _socket(place: Path, target: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as other:
        here = Path.cwd()
        os.chdir(place.parent)  # the name of a socket is short
        try:
            other.bind(place.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize("plant", [_symlink, _through_the_folder, _fifo, _hard_link, _socket])
def test_attack_33_a_link_a_fifo_or_a_socket_in_place_of_a_ledger_is_refused(
    tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    target, place = _ledger(tmp_path), tmp_path / "planted"
    plant(place, target)
    for act in (lambda: reopen(place), lambda: verify(place), lambda: make(place)):
        with pytest.raises((Unreadable, InvalidParameter)) as caught:
            act()
        assert caught.value.code in ("DP070", "DP074", "DP083")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
def test_attack_33_a_device_in_place_of_a_ledger_or_a_key_is_refused(device: str) -> None:
    for act in (
        lambda: verify(Path(device)),
        lambda: reopen(Path(device)),
        lambda: dpbudget.load_key(device),
        lambda: dpbudget.load_public_key(device),
    ):
        with pytest.raises(Unreadable):
            act()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o644, 0o610])
def test_attack_34_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    dpbudget.new_key(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(Unreadable) as caught:
        dpbudget.load_key(tmp_path / "key")
    assert (caught.value.code, f"{mode:04o}" in caught.value.message) == ("DP073", True)
    arguments = ("ledger", "init", tmp_path / "ledger", "--epsilon", "1", "--delta", "1e-5")
    call(*arguments, "--owner-key", tmp_path / "key", code=4)
    assert not (tmp_path / "ledger").exists()


def test_attack_34_a_planted_link_to_a_key_is_refused(tmp_path: Path) -> None:
    dpbudget.new_key(tmp_path / "key")
    (tmp_path / "link").symlink_to(tmp_path / "key")
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name in ("link", "fifo"):
        with pytest.raises(Unreadable) as caught:
            dpbudget.load_key(tmp_path / name)
        assert caught.value.code == "DP073"


def _options(command: click.Command) -> list[click.Parameter]:
    below = command.list_commands(click.Context(command)) if isinstance(command, click.Group) else []
    found = list(command.params)
    for name in below:
        child = command.get_command(click.Context(command), name) if isinstance(command, click.Group) else None
        assert child is not None
        found += _options(child)
    return found


def test_attack_34_no_option_and_no_variable_takes_a_secret() -> None:
    options = _options(app)
    assert len(options) > 30
    secret = [
        option for option in options if re.search("key|pass|secret|seed", str(option.name)) and option.name != "seed"
    ]
    # Names of files, and the number of a file descriptor; trust is a public key.
    files = {"owner_key", "writer_key", "key_file", "new_key", "passphrase_fd", "auditor_key", "plan_key", "keep_keys"}
    flags = {"passphrase", "keyring"}
    assert {str(option.name) for option in secret} <= files | flags
    for option in secret:
        assert option.name not in flags or option.is_flag  # type: ignore[attr-defined]
        assert option.envvar is None
    read = {
        found
        for path in _sources("dpbudget", "dptrainer", "cli")
        for found in re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text(encoding="utf-8"))
    }
    assert read == {
        "DPBUDGET_STATE", "XDG_STATE_HOME", "NO_COLOR", "DPBUDGET_TRACEBACK", "CC", "DPTRAINER_NATIVE", "SHELL", "TERM",
        "DPBUDGET_BROWSER", "TRITON_INTERPRET",
    }  # fmt: skip


def test_attack_34_no_key_reaches_a_log_a_message_or_a_pickle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "ledger"
    ledger = make(path)
    run = ledger.start(ledger.sign_plan(plan(), owner=OWNER), lease_steps=1)
    receipt = run.next_receipt()
    key = receipt.key.reveal()
    seen = [repr(value) for value in (receipt, receipt.key, run, ledger, ledger.state, OWNER, WRITER, vars(run))]
    receipt.use("grad-noise")
    with pytest.raises(DPBudgetError) as caught:
        receipt.use("grad-noise")
    seen += [str(caught.value), caplog.text, *capsys.readouterr()]
    for value in (receipt, receipt.key, OWNER):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(value)
    ledger.close()
    seen += [path.read_bytes().hex(), export(path).hex()]
    for secret in (key, b"\x11" * 32, b"\x12" * 32):
        for text in seen:
            assert secret.hex() not in text
            assert repr(secret) not in text
            assert secret.hex().encode().hex() not in text


def _sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def _imported(path: Path) -> set[str]:
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _called(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


CODE_IN_DATA = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "yaml", "jsonpickle", "cloudpickle"}


@pytest.mark.parametrize("path", _sources("dpbudget", "dptrainer", "cli"), ids=lambda path: str(path.relative_to(ROOT)))
def test_attack_35_no_module_can_run_code_that_stands_in_data(path: Path) -> None:
    assert not _imported(path) & CODE_IN_DATA
    assert not _called(path) & {"eval", "exec", "compile", "__import__"}
    text = path.read_text(encoding="utf-8")
    assert "allow_pickle=True" not in text
    assert all("weights_only=True" in line for line in text.splitlines() if "torch.load(" in line)
    if "ledger" in path.parts or path.name in ("_verify.py", "_recompute.py", "_record.py", "_verdict.py", "plan.py"):
        assert not _imported(path) & {"importlib", "runpy", "code", "ctypes"}


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def test_attack_35_a_pickle_in_place_of_a_ledger_a_key_or_data_is_never_loaded(tmp_path: Path) -> None:
    exploded, evil = tmp_path / "exploded", tmp_path / "evil"
    bomb = pickle.dumps(Bomb(exploded))
    yaml = b"!!python/object/apply:os.mkdir [" + str(exploded).encode() + b"]\n"
    for content in (bomb, b"{" + bomb, yaml, b"{" + yaml):
        evil.write_bytes(content)
        evil.chmod(0o600)
        assert problem(evil) is not None
        for act in (lambda: reopen(evil), lambda: dpbudget.load_key(evil), lambda: dpbudget.load_public_key(evil)):
            with pytest.raises(DPBudgetError):
                act()
    objects = np.array([Bomb(exploded)], dtype=object)
    np.savez(tmp_path / "evil.npz", x=objects, y=np.zeros(1, dtype=np.int64))
    with pytest.raises(Unreadable) as caught:
        read_table(str(tmp_path / "evil.npz"), "y", 2)
    assert caught.value.code == "DP091"
    assert not exploded.exists()
