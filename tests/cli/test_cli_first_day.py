"""What a new user runs into: a second process, a path that is not there, an option of another command, users, pipes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dpbudget
from dpbudget._verify import verify
from dpbudget.curve import round_up, show_delta
from dpbudget.errors import InvalidParameter
from dpbudget_cli._lock import hold_output

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("train", "--ledger", "budget.ledger", "--data", "train.npz", "--classes", "2")
SMALL = ("--dataset-size", "100", "--batch-size", "20", "--steps", "20", "--max-parameters", "5000")


@contextmanager
def held_elsewhere(name: str) -> Iterator[None]:
    """The lock as another process would hold it: a descriptor of its own."""
    descriptor = os.open(name, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


class TestTwoProcesses:
    def test_the_second_is_refused_before_anything_is_charged(self, run_cli: Cli, folder: Path, seen: Seen) -> None:
        with held_elsewhere("w.safetensors.lock"):
            before = seen(folder)
            answer = run_cli(*TRAIN, "--output", "w.safetensors")
            assert answer.code == 2
            assert "error DP078: another dpbudget train works on this run and output" in answer.err
            assert "Fix: wait for it, or pass another --output" in answer.err
            assert seen(folder) == before  # nor is the lock of the first removed
            assert verify("budget.ledger").steps == 0
        assert run_cli(*TRAIN, "--output", "w.safetensors").code == 0
        assert not (folder / "w.safetensors.lock").exists()

    def test_the_output_that_is_not_named_is_locked_too(self, run_cli: Cli, folder: Path) -> None:
        run = run_cli("ledger", "runs", "budget.ledger", "--json").json["runs"][0]["run"]
        with held_elsewhere(f"budget.ledger.{run[:8]}.safetensors.lock"):
            assert "DP078" in run_cli(*TRAIN).err
            assert run_cli(*TRAIN, "--output", "other.safetensors").code == 0

    def test_the_lock_that_its_holder_removes_is_not_taken_for_a_lock(self, tmp_path: Path) -> None:
        output = str(tmp_path / "w")
        with hold_output(output):
            with pytest.raises(InvalidParameter, match="another dpbudget train"), hold_output(output):
                pass
            assert (tmp_path / "w.lock").exists()
        with hold_output(output):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_a_lock_that_somebody_removed_ends_in_silence_and_takes_no_other_away(self, tmp_path: Path) -> None:
        output, name = str(tmp_path / "w"), tmp_path / "w.lock"
        with hold_output(output):
            name.unlink()
        with hold_output(output):
            name.unlink()
            name.write_text("another process's")
        assert name.read_text() == "another process's"

    def test_a_file_that_is_locked_after_its_holder_removed_it_is_not_the_lock(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output, name = str(tmp_path / "w"), tmp_path / "w.lock"
        flock = fcntl.flock

        def late(descriptor: int, how: int) -> None:
            monkeypatch.setattr(fcntl, "flock", flock)
            name.unlink()  # the first holder ends between our open and our lock
            flock(descriptor, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with hold_output(output):
            assert name.exists()
            with pytest.raises(InvalidParameter), hold_output(output):
                pass


@pytest.mark.parametrize(
    "line",
    [
        (*TRAIN[:1], "--ledger", "nowhere.ledger", *TRAIN[3:]),
        ("plan", "new", "--ledger", "nowhere.ledger", *SMALL),
        ("plan", "new", "--ledger", "nowhere.ledger", *SMALL, "--request", "r"),
        ("ledger", "grant", "nowhere.ledger", "--epsilon", "5"),
        ("ledger", "note", "nowhere.ledger", "checked"),
    ],
    ids=" ".join,
)
def test_a_missing_ledger_is_named_before_its_keys(run_cli: Cli, folder: Path, seen: Seen, line: tuple[str]) -> None:
    before = seen(folder)
    answer = run_cli(*line)
    assert (answer.code, "error DP070: nowhere.ledger: no such ledger" in answer.err) == (4, True), answer.err
    assert "key" not in answer.err
    assert seen(folder) == before


def test_plan_new_says_where_delta_comes_from(run_cli: Cli, folder: Path) -> None:
    answer = run_cli("plan", "new", "--ledger", "budget.ledger", *SMALL, "--delta", "1e-5")
    assert (answer.code, "error DP060: unknown option --delta" in answer.err) == (2, True)
    assert "Fix: leave it out: delta is the ledger's" in answer.err
    assert "ledger init" in answer.err
    assert "ledger grant --delta D" in answer.err


def test_a_ledger_for_users_is_not_trained_by_rows(run_cli: Cli, folder: Path, seen: Seen) -> None:
    total = ("--epsilon", "3", "--delta", "1e-5")
    made = run_cli("ledger", "init", "u.ledger", *total, "--unit", "user")
    planned = run_cli("plan", "new", "--ledger", "u.ledger", *SMALL, "--noise-multiplier", "3")
    assert "count users, not rows" in planned.err
    before = seen(folder)
    refused = run_cli("train", "--ledger", "u.ledger", "--data", "train.npz", "--classes", "2")
    assert (refused.code, "error DP025" in refused.err, seen(folder) == before) == (2, True, True)
    for answer in (made, planned, refused):
        assert "dptrainer.UserDataset (docs/training.md)" in answer.err
    for line in (("init", "e.ledger", *total), ("show", "budget.ledger")):
        assert "UserDataset" not in run_cli("ledger", *line).err


class TestVerifyBeforeTraining:
    def test_it_says_that_nothing_is_spent_and_what_may_be(self, run_cli: Cli, folder: Path) -> None:
        (run,) = run_cli("ledger", "plans", "budget.ledger", "--json").json["plans"]
        answer = run_cli("verify", "budget.ledger", "--trust", "budget.ledger.owner.key.pub")
        lines = answer.out.splitlines()
        assert (answer.code, lines[0]) == (0, "VALID: nothing spent yet")
        claim = f"epsilon {round_up(run['epsilon'])} at delta {show_delta(run['delta'])} by 20 steps"
        assert f"  run {run['run']} may claim {claim}" in lines
        assert "<=" not in answer.out
        assert "  budget epsilon 3, delta 1e-05" in lines

    def test_after_the_first_charge_it_says_what_is_spent(self, run_cli: Cli, folder: Path) -> None:
        with (
            dpbudget.open_ledger("budget.ledger", writer=dpbudget.load_key("budget.ledger.writer.key")) as ledger,
            dpbudget.start(ledger) as run,
        ):
            run.next_receipt()
        answer = run_cli("verify", "budget.ledger", "--trust", "budget.ledger.owner.key.pub")
        assert answer.out.startswith("VALID: epsilon <= ")
        assert "may claim" not in answer.out

    @pytest.mark.parametrize("kind", ["portfolio", "rdp"])
    def test_a_ledger_without_plans_says_so(self, run_cli: Cli, empty: Path, kind: str) -> None:
        assert run_cli("ledger", "init", "a.ledger", "--epsilon", "3", "--delta", "1e-5", "--filter", kind).code == 0
        answer = run_cli("verify", "a.ledger", "--trust", "a.ledger.owner.key.pub")
        assert answer.out.startswith("VALID: nothing spent yet\n  no plan is signed in yet\n")


@pytest.mark.parametrize(
    ("line", "closed"),
    [("explain", "stdout"), ("ledger -h", "stdout"), ("explain DP999 --json", "stdout"), ("explain DP999", "stderr")],
)
def test_a_broken_pipe_is_no_verdict(line: str, closed: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: writer}
    code = "from dpbudget_cli.main import main; main()"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
    try:
        done = subprocess.run([sys.executable, "-c", code, *line.split()], env=env, timeout=60, check=False, **streams)
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert not done.stderr


class TestWhatABeginnerMistakes:
    """Each message names what happened, and its second line what to write."""

    @pytest.mark.parametrize(
        ("words", "said", "fix"),
        [
            ("calibrate", "no target is given", "pass --epsilon E"),
            ("calibrate --epsilon 3 --advantage 0.1", "--advantage and --epsilon are more than one", "keep one of"),
            ("calibrate --tpr 0.1", "--tpr alone is no target", "pass --tpr R and --fpr F together"),
            ("calibrate --epsilon", "option '--epsilon' requires an argument", "pass --epsilon E: What the run"),
            ("calibrate --epsilon 1e-9", "smallest reachable is 2e-9", "larger epsilon"),
            ("key new", "missing argument 'PATH'", "write dpbudget key new [OPTIONS] PATH; see"),
            ("key new owner.key", "owner.key exists", "use the key that is there"),
            (
                "ledger init budget.ledger --epsilon 3 --delta 1e-5",
                "budget.ledger exists",
                "dpbudget ledger show budget",
            ),
            ("ledger init x.ledger --epsilon 3 --delta 1e-5 --filter foo", "unknown filter 'foo'", "choose portfolio"),
            ("train --ledger budget.ledger --data t.csv --classes 2 --epochs 3", "--epochs", "the signed plan has it"),
            (
                "train --ledger new.ledger --data t.csv --classes 2",
                "no plan is signed into this ledger yet",
                "plan new",
            ),
            ("train --ledger budget.ledger --data t.csv --classes 2", "t.csv has no column 'y'", "columns are a, b"),
            ("train --ledger budget.ledger --data e.csv --classes 2", "e.csv is empty", "write a header"),
            ("train --ledger budget.ledger --data d.csv --classes 2", "d.csv has two columns 'a'", "rename one"),
        ],
    )
    def test_it_is_told_what_happened_and_what_to_write(
        self, run_cli: Cli, folder: Path, words: str, said: str, fix: str
    ) -> None:
        new = ("new.ledger", "--epsilon", "1", "--delta", "1e-5", "--writer-key", "budget.ledger.writer.key")
        assert run_cli("ledger", "init", *new).code == 0
        for name, text in (("t.csv", "a,b\n1,2\n"), ("e.csv", ""), ("d.csv", "a,a,y\n1,2,0\n")):
            Path(name).write_text(text)
        answer = run_cli(*words.split(), *(("--writer-key", "budget.ledger.writer.key") if "new.l" in words else ()))
        happened, way_out = answer.err.strip().splitlines()
        assert answer.code != 0
        assert happened.startswith("error DP")
        assert said in happened
        assert way_out.startswith("Fix: ")
        assert fix in way_out

    def test_beside_plans_that_have_all_of_it_no_noise_is_proposed(self, run_cli: Cli, folder: Path) -> None:
        init = ("ledger", "init", "full.ledger", "--epsilon", "3", "--delta", "1e-5", "--whole-budget")
        assert run_cli(*init).code == 0
        plan = ("plan", "new", "--ledger", "full.ledger", *SMALL)
        assert run_cli(*plan).code == 0
        for more in (("--epsilon", "1"), ("--noise-multiplier", "1")):
            answer = run_cli(*plan, *more)
            assert answer.code == 3
            assert "no plan of use fits beside them; the owner can raise the total" in answer.err
            assert "1000000" not in answer.err
        taken = run_cli(*plan).err.split("may claim epsilon ")[1].split(" of ")[0]
        with dpbudget.open_ledger("full.ledger") as ledger:
            (run,) = ledger.state.runs.values()
        assert float(taken) >= run.plan.claim.epsilon, "rounded up"
