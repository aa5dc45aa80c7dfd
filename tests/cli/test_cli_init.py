"""init: answers from flags, proposals or a terminal; all of it is written or nothing; what to type next runs."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpbudget
from dpbudget_cli import init

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
ROOT = Path(__file__).resolve().parents[2]
SIZE = ("--dataset-size", "400")
ALL = ("init", "a.ledger", *SIZE, "--epsilon", "3", "--delta", "1e-5", "--batch-size", "100", "--epochs", "5")
WRITTEN = {"a.ledger", *(f"a.ledger.{role}.key{end}" for role in ("owner", "writer") for end in ("", ".pub"))}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without anything, entered."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_at_terminal", lambda: True)


def test_with_everything_given_nothing_is_asked(run_cli: Cli, place: Path, terminal: None) -> None:
    answer = run_cli(*ALL)
    assert answer.code == 0, answer.err
    assert {path.name for path in place.iterdir()} == WRITTEN | {"dpbudget.toml"}
    assert "took" not in answer.err
    with dpbudget.open_ledger("a.ledger") as ledger:
        assert (ledger.state.epsilon, ledger.state.delta, ledger.plan_delta) == (3.0, 1e-5, 1e-5)
    assert (place / "a.ledger.owner.key").stat().st_mode & 0o777 == 0o600


def test_what_it_says_to_type_next_signs_the_plan_that_it_showed(run_cli: Cli, place: Path) -> None:
    answer = run_cli(*ALL, "--json")
    made = answer.json
    assert made["next"] == "dpbudget plan new --ledger a.ledger"
    plan = run_cli(*shlex.split(made["next"])[1:], "--json").json
    assert (plan["noise_multiplier"], plan["steps"]) == (made["noise_multiplier"], made["steps"])
    assert (plan["sample_rate"], plan["delta"], plan["dataset_size"]) == (0.25, 1e-5, 400)
    assert made["settings"] == "dpbudget.toml"
    assert set(made["keys"]) | {"a.ledger"} == WRITTEN


def test_the_next_command_leads_into_another_folder(run_cli: Cli, place: Path) -> None:
    (place / "my data").mkdir()
    made = run_cli("init", "my data/b.ledger", *ALL[2:], "--json").json
    assert made["next"] == "cd 'my data' && dpbudget plan new --ledger b.ledger"
    assert (place / "my data" / "dpbudget.toml").exists()


def test_settings_are_read_by_the_commands_that_come_after(run_cli: Cli, place: Path) -> None:
    assert run_cli(*ALL).code == 0
    found = run_cli("calibrate", "--epsilon", "3", "--json").json
    assert (found["sample_rate"], found["steps"], found["delta"]) == (0.25, 20, 1e-5)
    assert all(str(place / "dpbudget.toml") in one["why"] for one in found["assumed"] if one["name"] == "epochs")


def test_a_pipe_is_told_all_that_is_missing_and_nothing_is_written(run_cli: Cli, place: Path) -> None:
    answer = run_cli("init")
    assert answer.code == 2
    assert "error DP064: there is no terminal to ask at" in answer.err
    assert "--dataset-size, --epsilon, --delta, --batch-size, --epochs are missing" in answer.err
    assert "Fix: add --dataset-size N --epsilon E --delta D --batch-size B --epochs K; or" in answer.err
    one = run_cli(*ALL[:-2])
    assert "and --epochs is missing" in one.err
    assert "Fix: add --epochs K; or --yes, to take what is proposed" in one.err
    assert list(place.iterdir()) == []


def test_yes_takes_proposals_and_names_them(run_cli: Cli, place: Path) -> None:
    answer = run_cli("init", *SIZE, "--epsilon", "3", "--yes")
    took = [line for line in answer.err.splitlines() if line.startswith("took")]
    assert took == ["took PATH budget.ledger", "took --delta 1.3e-03", "took --batch-size 256", "took --epochs 10"]
    assert (place / "budget.ledger").exists()


@pytest.mark.parametrize("size", [2, 3, 10, 300, 60000, 10**9])
def test_the_proposed_delta_protects_every_record(size: int) -> None:
    delta = float(init.ASKS["delta"].propose({"dataset_size": size}))
    assert 0.0 < delta < 1.0 / size
    assert delta > 0.8 * size**-1.1


def test_size_and_epsilon_are_nobodys_to_propose(run_cli: Cli, place: Path) -> None:
    answer = run_cli("init", "--yes")
    assert "--dataset-size, --epsilon are missing" in answer.err
    assert "Fix: add --dataset-size N --epsilon E" in answer.err
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--epsilon", "0"), "DP001"),
        (("--delta", "1"), "DP002"),
        (("--dataset-size", "0"), "DP009"),
        (("--epochs", "0"), "DP009"),
        (("--batch-size", "500"), "DP008"),
        (("--epsilon", "1e-9"), "DP004"),
    ],
)
def test_a_bad_answer_is_refused_before_anything_is_written(
    run_cli: Cli, place: Path, more: tuple[str, str], code: str
) -> None:
    answer = run_cli(*ALL, *more)
    assert f"error {code}" in answer.err
    assert list(place.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_is_left_behind(run_cli: Cli, place: Path, seen: Seen) -> None:
    for name in ("dpbudget.toml", "a.ledger", "a.ledger.owner.key", "a.ledger.writer.key.pub"):
        (place / name).write_text("" if name.endswith("toml") else "x", encoding="utf-8")
        before = seen(place)
        answer = run_cli(*ALL)
        assert (answer.code, "error DP074" in answer.err) == (2, True), answer.err
        assert seen(place) == before
        (place / name).unlink()
    assert run_cli(*ALL).code == 0


def test_settings_of_a_project_file_are_not_hidden(run_cli: Cli, place: Path) -> None:
    (place / "pyproject.toml").write_text("[tool.dpbudget]\nepochs = 3\n", encoding="utf-8")
    answer = run_cli(*ALL)
    assert "pyproject.toml has settings already" in answer.err
    (place / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    assert run_cli(*ALL).code == 0


def test_a_missing_folder_is_named(run_cli: Cli, place: Path) -> None:
    answer = run_cli("init", "no/a.ledger", *ALL[2:])
    assert (answer.code, "error DP070: the folder no does not exist" in answer.err) == (4, True)


class TestAtATerminal:
    def test_a_place_that_is_taken_is_told_before_the_next_question(
        self, run_cli: Cli, place: Path, terminal: None
    ) -> None:
        (place / "budget.ledger").touch()
        answer = run_cli("init", input="\nother.ledger\n400\n3\n1e-5\n100\n5\n")
        assert answer.code == 0, answer.err
        first, second = answer.err.index("error DP074: budget.ledger exists"), answer.err.index("Public nominal size")
        assert first < second
        assert (place / "other.ledger").exists()
        given = run_cli("init", "budget.ledger", input="")
        assert (given.code, "Public nominal size" in given.err) == (2, False)

    def test_a_wrong_answer_is_explained_and_asked_for_again(self, run_cli: Cli, place: Path, terminal: None) -> None:
        typed = ["", "0", "400", "nan", "3", "", "500", "100", ""]
        answer = run_cli("init", input="\n".join(typed) + "\n")
        assert answer.code == 0, answer.err
        for said in ("error DP009: dataset-size must be", "error DP001", "error DP008: batch size 500 of 400 records"):
            assert said in answer.err
        assert "Batch size; a larger one needs less noise [256]" in answer.err
        assert answer.out.splitlines()[-1].endswith("dpbudget plan new --ledger budget.ledger")
        with dpbudget.open_ledger("budget.ledger") as ledger:
            assert ledger.state.epsilon == 3.0
        assert "batch_size = 100" in (place / "dpbudget.toml").read_text(encoding="utf-8")

    def test_only_what_is_missing_is_asked(self, run_cli: Cli, place: Path, terminal: None) -> None:
        answer = run_cli(*ALL[:-2], input="7\n")
        assert answer.err.count("Epochs [10]") == 1
        assert "Epsilon of all" not in answer.err
        assert "epochs = 7.0" in (place / "dpbudget.toml").read_text(encoding="utf-8")

    def test_the_end_of_the_input_ends_it_with_nothing_written(self, run_cli: Cli, place: Path, terminal: None) -> None:
        answer = run_cli("init", input="\n400\n3\n")
        assert (answer.code, list(place.iterdir())) == (130, [])

    def test_a_real_terminal_is_asked_and_a_pipe_is_not(self, place: Path) -> None:
        inside, outside = pty.openpty()
        program = [sys.executable, "-c", "from dpbudget_cli.main import main; main()", "init"]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
        process = subprocess.Popen(program, stdin=outside, stdout=subprocess.PIPE, stderr=outside, env=env, cwd=place)
        os.close(outside)
        os.write(inside, b"\n400\n3\n1e-5\n100\n5\n")
        assert process.stdout is not None
        told = process.stdout.read().decode()
        process.stdout.close()
        assert process.wait(timeout=200) == 0
        os.close(inside)
        assert "next" in told.splitlines()[-1]
        assert (place / "budget.ledger").exists()
        piped = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, cwd=place)
        assert (piped.returncode, "no terminal" in piped.stderr, piped.stdout) == (2, True, "")
