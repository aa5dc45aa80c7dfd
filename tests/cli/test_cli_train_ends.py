"""How training ends and what is said of it: by public facts alone, with the time only where somebody has a clock."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpbudget
from dpbudget._verify import verify
from dpbudget_cli._progress import StopRule

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("train", "--ledger", "budget.ledger", "--data", "train.npz", "--classes", "2")


class TestEarlyEnds:
    def test_after_so_many_steps_the_weights_are_written_and_another_call_goes_on(
        self, run_cli: Cli, folder: Path
    ) -> None:
        first = run_cli(*TRAIN, "--max-steps", "3", "--output", "a.safetensors", "--json")
        assert (first.code, first.json["steps"], first.json["charged"]) == (0, 3, 3)
        assert "to go on, call it again with --init a.safetensors and another --output" in first.err
        more = ("--init", "a.safetensors", "--output", "b.safetensors", "--json")
        second = run_cli(*TRAIN, *more)
        assert (second.code, second.json["steps"], second.json["charged"]) == (0, 17, 20)
        assert "to go on" not in second.err

    def test_the_live_epsilon_of_what_is_charged_stays_at_the_bound(self, run_cli: Cli, folder: Path) -> None:
        answer = run_cli(*TRAIN, "--stop-epsilon", "0.8", "--json")
        assert answer.code == 0, answer.err
        reached = answer.json["epsilon_so_far"]["upper"]
        assert 0.6 < reached <= 0.8
        assert 10 < answer.json["charged"] < 20
        assert answer.json["claim"]["epsilon"] > 0.99  # what holds is the plan's claim, and the answer says so
        with dpbudget.open_ledger("budget.ledger", writer=dpbudget.load_key("budget.ledger.writer.key")) as ledger:
            run = dpbudget.start(ledger)
            assert run.meter is not None
            assert run.meter.epsilon(run.charged + 1).upper > 0.8

    def test_a_bound_below_the_first_step_is_refused_before_any_charge(
        self, run_cli: Cli, folder: Path, seen: Seen
    ) -> None:
        before = seen(folder)
        answer = run_cli(*TRAIN, "--stop-epsilon", "0.0001")
        assert (answer.code, "DP009" in answer.err, seen(folder) == before) == (2, True, True)
        assert verify("budget.ledger").steps == 0

    def test_steps_of_a_lease_that_is_paid_for_are_taken_whatever_the_next_would_cost(self, folder: Path) -> None:
        with dpbudget.open_ledger("budget.ledger", writer=dpbudget.load_key("budget.ledger.writer.key")) as ledger:
            run = dpbudget.start(ledger, lease_steps=5)
            for _ in range(11):
                run.next_receipt()
            assert (run.charged, run.meter is None) == (15, False)
            rule = StopRule(epsilon=run.meter.epsilon(15).upper)
            ends = [rule.ends(run, 11)]
            for steps in range(12, 16):
                run.next_receipt()
                ends.append(rule.ends(run, steps))
            assert ends == [False, False, False, False, True]


class TestTheLastLine:
    def test_it_says_what_was_charged_of_what_is_claimed_and_no_time_in_a_log(self, run_cli: Cli, folder: Path) -> None:
        answer = run_cli(*TRAIN)
        assert answer.err.splitlines()[-1] == "epsilon 1 of 1 (delta 1e-05)"
        assert not re.search(r"\d s\b", answer.err)

    def test_an_accuracy_on_public_data_belongs_to_it(self, run_cli: Cli, folder: Path) -> None:
        answer = run_cli(*TRAIN, "--public-eval", "train.npz")
        assert re.fullmatch(r"epsilon 1 of 1 \(delta 1e-05\), public accuracy [01]\.\d{3}", answer.err.splitlines()[-1])

    def test_on_a_terminal_a_bar_shows_live_epsilon_and_the_last_line_the_time(self, folder: Path) -> None:
        ours, theirs = pty.openpty()
        code = "from dpbudget_cli.main import main; main()"
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "TERM": "xterm", "COLUMNS": "100"}
        with subprocess.Popen(
            [sys.executable, "-c", code, *TRAIN, "--json"], stdout=subprocess.PIPE, stderr=theirs, env=env
        ) as process:
            os.close(theirs)
            seen = _read_all(ours)
            assert process.stdout is not None
            assert process.stdout.read().count(b"\n") == 1  # nothing of the bar beside the answer
        assert process.returncode == 0, seen
        assert re.search(r"\d+/20", seen)
        assert re.search(r"epsilon 0?\.?\d+ of 1\b", seen)
        assert re.search(r"epsilon 1 of 1 \(delta 1e-05\), \d+\.\d s", seen.splitlines()[-1])


def _read_all(descriptor: int) -> str:
    """Everything that a terminal shows until its other end is closed."""
    pieces = []
    while True:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:  # Linux: no process holds the other end any more
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(descriptor)
    return b"".join(pieces).decode("utf-8", "replace")


class TestHelp:
    def test_options_that_few_calls_need_are_shown_by_help_all_alone(self, run_cli: Cli) -> None:
        short, long = run_cli("train", "-h"), run_cli("train", "--help-all")
        assert (short.code, long.code) == (0, 0)
        for name in ("--momentum", "--fill-missing", "--stop-epsilon", "--validation"):
            assert name not in short.out
            assert name in long.out
        assert run_cli("train", "-h").out == short.out  # asking once shows them once
        assert set(re.findall(r"--[a-z-]+", short.out)) <= set(re.findall(r"--[a-z-]+", long.out))

    def test_help_says_which_accuracies_there_are(self, run_cli: Cli) -> None:
        said = " ".join(run_cli("train", "-h").out.split())
        assert "No loss, size or accuracy of private data is shown" in said
        assert "--public-eval" in said
        assert "pays for a noisy one (--score-plan)" in said


@pytest.mark.parametrize("option", ["--stop-epsilon=0", "--max-steps=0", "--hold-out=1", "--fill-missing=nan"])
def test_an_option_out_of_its_range_is_refused(run_cli: Cli, folder: Path, seen: Seen, option: str) -> None:
    before = seen(folder)
    answer = run_cli(*TRAIN, option)
    assert (answer.code, "error DP0" in answer.err, seen(folder) == before) == (2, True, True)
