"""Somebody new goes from a question to a report by what each command says comes next."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpbudget.ledger.run import default_lease_steps
from dpbudget_cli._progress import lease_steps

Cli = Callable[..., Any]
TRAIN = ("train", "--ledger", "budget.ledger", "--data", "train.csv", "--target", "label", "--classes", "2")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, entered, in which a test may write."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row(text: str, name: str) -> str:
    """The value of a row of a table, or of a line ``name: value``."""
    (value,) = re.findall(rf"^{name}(?:  +|: )(\S.*)$", text, re.MULTILINE)
    return str(value)


def typed(run_cli: Cli, line: str, *more: str) -> Any:
    return run_cli(*shlex.split(line)[1:], *more)


@pytest.mark.parametrize(
    ("words", "solved", "same"),
    [
        ("--epsilon 2.5 --epochs 3 --batch-size 50", "noise multiplier", "noise_multiplier"),
        ("--epsilon 2.5 --noise-multiplier 1.5 --batch-size 50", "steps", "steps"),
        ("--epsilon 2.5 --noise-multiplier 1.5 --epochs 3", "batch size", "sample_rate"),
        ("--noise-multiplier 1.5 --epochs 3 --sample-rate 1/20", "epsilon", "epsilon"),
        ("--advantage 0.2 --epochs 3 --batch-size 50 --clip-norm 0.5", "noise multiplier", "clip_norm"),
    ],
)
@pytest.mark.parametrize("settings", ["", 'accountant = "rdp"\n'])
def test_the_commands_that_calibrate_prints_make_a_ledger_and_sign_that_plan(
    run_cli: Cli, fresh: Path, words: str, solved: str, same: str, settings: str
) -> None:
    Path("dpbudget.toml").write_text(settings, encoding="utf-8")
    line = ("calibrate", *words.split(), "--dataset-size", "1000", "--delta", "1e-5")
    said, wanted = run_cli(*line).out, run_cli(*line, "--json").json
    assert row(said, "solved for") == solved
    assert float(row(said, "epochs")) == pytest.approx(wanted["steps"] * wanted["sample_rate"], rel=1e-3)
    made = typed(run_cli, row(said, "first"))
    assert made.code == 0, made.err
    signed = typed(run_cli, row(said, "next"), "--json")
    assert signed.code == 0, signed.err
    for name in (same, "noise_multiplier", "epsilon", "delta", "sample_rate", "steps", "clip_norm", "accountant"):
        assert signed.json[name] == wanted[name], name
    assert "\nfirst " not in run_cli(*line).out, "the ledger is there now"


def test_explore_names_the_ledger_that_its_next_command_needs(run_cli: Cli, fresh: Path) -> None:
    small = ("--epsilon", "3", "--dataset-size", "5000", "--points", "3", "--max-epochs", "20", "--min-steps", "50")
    said = run_cli("plan", "explore", *small)
    assert "compared with the row above" in said.err
    assert typed(run_cli, row(said.out, "first")).code == 0
    signed = typed(run_cli, row(said.out, "next"))
    assert signed.code == 0, signed.err


def test_room_that_a_first_step_takes_away_is_told_when_a_plan_leaves_it(run_cli: Cli, fresh: Path) -> None:
    assert run_cli("init", "budget.ledger", "--dataset-size", "1000", "--epsilon", "3", "--yes").code == 0
    plan = ("plan", "new", "--ledger", "budget.ledger", "--batch-size", "20", "--epochs", "1")
    left = run_cli(*plan, "--epsilon", "1", "--quiet").err
    assert re.search(r"^warning epsilon 2(\.\d+)? is left, and may be planned only until a first step", left)
    whole = run_cli(*plan)
    assert (whole.code, "until a first step" in whole.err) == (0, False)
    assert row(whole.err, "next") == "dpbudget train --ledger budget.ledger --data FILE --target COL --classes K"


def test_of_several_runs_it_is_said_what_is_left_of_each(run_cli: Cli, folder: Path) -> None:
    again = ("--epsilon", "1", "--dataset-size", "100", "--batch-size", "20", "--steps", "7")
    assert run_cli("plan", "new", "--ledger", "budget.ledger", *again).code == 0
    fix = run_cli(*TRAIN).err
    assert re.search(r"--plan: [0-9a-f]{32} \(20 of 20 steps left\), [0-9a-f]{32} \(7 of 7 steps left\)", fix)


def test_training_by_another_name_of_its_options_ends_with_the_way_to_a_report(run_cli: Cli, folder: Path) -> None:
    words = [{"--target": "--label"}.get(word, word) for word in TRAIN]
    done = run_cli(*words, "--learning-rate", "0.1")
    assert done.code == 0, done.err
    assert "by constants that are public, or all of them by --feature-scale" in done.err
    report = row(done.err, "next").partition(",")[0]
    assert typed(run_cli, report).code == 0
    assert "scaled" not in done.err


def test_scaled_features_are_not_spoken_of(run_cli: Cli, folder: Path) -> None:
    done = run_cli(*TRAIN, "--feature-scale", "1/2", "--max-steps", "1")
    assert (done.code, "SGD wants" in done.err) == (0, False)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_call_of_few_steps_charges_hardly_more_than_it_takes(planned: int, most: int) -> None:
    count, usual = lease_steps(planned, most), default_lease_steps(planned)
    assert count is not None
    taken = min(most, planned)
    leases = -(-taken // count)
    assert 1 <= count <= usual
    assert leases * count - taken < leases <= -(-taken // usual), "less than a step a lease, and no more leases"
    assert lease_steps(planned, None) is None


def test_steps_that_were_charged_in_vain_are_counted(run_cli: Cli, folder: Path) -> None:
    assert run_cli("ledger", "init", "long.ledger", "--epsilon", "3", "--delta", "1e-5", "--whole-budget").code == 0
    plan = ("--dataset-size", "100", "--batch-size", "2", "--steps", "5000", "--max-parameters", "100")
    assert run_cli("plan", "new", "--ledger", "long.ledger", *plan).code == 0
    train = ("long.ledger" if word == "budget.ledger" else word for word in TRAIN)
    done = run_cli(*train, "--max-steps", "65")
    assert row(done.out, "steps") == "66 of 5000 charged"
    assert "1 of the charged steps were not taken" in done.err


@pytest.mark.parametrize("command", ["calibrate --epsilon 3", "plan explore", "plan new --ledger budget.ledger"])
def test_a_learning_rate_is_no_matter_of_privacy(run_cli: Cli, folder: Path, command: str) -> None:
    answer = run_cli(*command.split(), "--lr", "0.1")
    assert (answer.code, "privacy does not depend on it" in answer.err) == (2, True)


def test_compare_proposes_the_delta_that_the_others_do(run_cli: Cli, fresh: Path) -> None:
    schedule = ("--noise-multiplier", "1.1", "--epochs", "1", "--batch-size", "100", "--dataset-size", "5000")
    found = run_cli("compare", *schedule, "--json").json
    assert found["delta"] == pytest.approx(5000**-1.1, rel=1e-12)
    refused = run_cli("compare", "--sample-rate", "0.01", "--noise-multiplier", "1", "--steps", "9")
    assert (refused.code, "pass --delta D, or --dataset-size N" in refused.err) == (2, True)


@pytest.mark.parametrize("section", ["[dpbudget]", "[tool.dpbudget]"])
def test_a_settings_file_with_a_section_is_told_that_it_needs_none(run_cli: Cli, fresh: Path, section: str) -> None:
    Path("dpbudget.toml").write_text(f"{section}\nepochs = 5\n", encoding="utf-8")
    answer = run_cli("config", "show")
    assert (answer.code, "has a section [" in answer.err, "write the keys without [" in answer.err) == (4, True, True)


def test_a_picture_is_named_when_it_is_drawn(run_cli: Cli, fresh: Path) -> None:
    assert "drawn into p.svg" in run_cli("calibrate", "--epsilon", "3", "--plot", "p.svg").err
    assert Path("p.svg").stat().st_size > 0
