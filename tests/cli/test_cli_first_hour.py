"""Numbers, words and imports of a first hour: what rows of test_first_hour_list.py ask for and no other test holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


def loaded(*words: str, folder: Path) -> set[str]:
    """The heavy libraries that a process has loaded when a command ends."""
    heavy = "{'numpy', 'scipy', 'pydantic', 'cryptography', 'mpmath', 'rich', 'torch', 'matplotlib', 'sklearn'}"
    code = f"""
import sys
from dpbudget_cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded", *sorted({{name.split(".")[0] for name in sys.modules}} & {heavy}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"},
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_the_help_of_every_command_loads_no_accounting(tmp_path: Path) -> None:
    """One process for all of them: what one loads, the next would have."""
    code = """
import sys
from click.testing import CliRunner
from dpbudget_cli.main import LazyGroup, app

def pages(group, words=()):
    for name in group.lazy:
        command = group.get_command(None, name)
        yield from pages(command, (*words, name)) if isinstance(command, LazyGroup) else [(*words, name)]

for words in pages(app):
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0
print(*sorted({name.split(".")[0] for name in sys.modules} & {"numpy", "scipy", "pydantic", "rich", "torch", "mpmath"}))
"""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_questions_and_ledgers_load_no_torch(folder: Path) -> None:
    for line in (
        "calibrate --epsilon 3 --delta 1e-5",
        "ledger init other.ledger --epsilon 3 --delta 1e-5",
        "plan new --ledger budget.ledger --dataset-size 100 --epochs 1 --epsilon 1",
        "verify budget.ledger",
        "doctor",
    ):
        assert not loaded(*line.split(), folder=folder) & {"torch", "matplotlib", "sklearn"}, line


def test_the_noise_for_epsilon_three_is_that_of_the_survey(run_cli: Cli, empty: Path) -> None:
    """0.69367 is what dp-accounting's PLD accountant answers at this rate and number of steps."""
    (empty / "dpbudget.toml").unlink()
    answer = run_cli(
        "calibrate", "--epsilon", "3", "--delta", "1e-5", "--sample-rate", "256/60000", "--steps", "2343", "--json"
    )
    assert 0.69367 * 0.999 <= answer.json["noise_multiplier"] <= 0.69367 * 1.001
    sizes = ("--dataset-size", "60000", "--batch-size", "256", "--epochs", "10")
    found = run_cli("calibrate", "--epsilon", "3", *sizes, "--json").json
    assert (found["sample_rate"], found["steps"]) == (256 / 60000, 2344)  # 10 epochs and not less
    assert 0.0 < found["delta"] < 1 / 60000
    assert "delta" in [one["name"] for one in found["assumed"]]


def test_planner_trainer_and_verifier_name_one_epsilon(run_cli: Cli, folder: Path) -> None:
    size = ("--dataset-size", "100", "--batch-size", "20", "--steps", "8", "--max-parameters", "5000")
    ask = run_cli("calibrate", "--epsilon", "1.5", "--delta", "1e-5", *size[:-2], "--json").json
    made = run_cli("ledger", "init", "one.ledger", "--epsilon", "1.5", "--delta", "1e-5", "--whole-budget")
    assert made.code == 0, made.err
    plan = run_cli("plan", "new", "--ledger", "one.ledger", *size, "--json").json
    assert plan["noise_multiplier"] == pytest.approx(
        ask["noise_multiplier"], rel=1e-6
    )  # its tail is of fewer parameters
    trained = run_cli("train", "--ledger", "one.ledger", "--data", "train.npz", "--classes", "2", "--json").json
    verified = run_cli("verify", "one.ledger", "--trust", "one.ledger.owner.key.pub", "--json").json
    assert plan["epsilon"]["upper"] == trained["claim"]["epsilon"] == verified["epsilon"]["upper"]
    assert trained["epsilon_so_far"]["upper"] <= trained["claim"]["epsilon"] <= 1.5
    assert plan["steps"] == trained["steps"] == trained["planned"] == verified["steps"] == 8


def test_the_bracket_at_epsilon_three_is_narrow_and_its_upper_end_stands_first(run_cli: Cli, empty: Path) -> None:
    schedule = ("--sample-rate", "256/60000", "--noise-multiplier", "0.69367", "--steps", "2343", "--delta", "1e-5")
    bounds = run_cli("epsilon", *schedule, "--accountant", "prv", "--json").json["epsilon"]
    assert 0.0 <= bounds["upper"] - bounds["lower"] <= 0.01
    assert bounds["upper"] == pytest.approx(3.0, abs=0.01)
    first = run_cli("epsilon", *schedule, "--accountant", "prv").out.splitlines()[0]
    assert re.fullmatch(r"epsilon +(2\.9|3\.0)\d* +\(certified upper bound\)", first), first


def test_an_accountant_that_may_understate_cannot_be_chosen(run_cli: Cli, folder: Path) -> None:
    for name in ("gdp", "clt", "moments", "fft", "estimate"):
        answer = run_cli("calibrate", "--epsilon", "3", "--accountant", name)
        assert (answer.code, "error DP061" in answer.err) == (2, True)
    plan = ("plan", "new", "--ledger", "budget.ledger", "--dataset-size", "100", "--epochs", "1", "--accountant", "pld")
    assert "error DP061" in run_cli(*plan).err


def test_a_second_accountant_is_one_option_away_and_agrees(run_cli: Cli, empty: Path) -> None:
    schedule = (
        "epsilon",
        "--sample-rate",
        "0.02",
        "--noise-multiplier",
        "1",
        "--steps",
        "200",
        "--delta",
        "1e-5",
        "--json",
    )
    prv, pld, rdp = (run_cli(*schedule, "--accountant", name).json["epsilon"] for name in ("prv", "pld", "rdp"))
    assert prv["lower"] <= pld["upper"]
    assert pld["lower"] <= prv["upper"] <= rdp["upper"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epsilon", "-3"),
        ("--delta", "2"),
        ("--sample-rate", "256"),
        ("--noise-multiplier", "-7"),
        ("--steps", "1.5"),
        ("--epochs", "nan"),
        ("--batch-size", "-64"),
        ("--dataset-size", "-400"),
        ("--clip-norm", "-2"),
        ("--accountant", "renyi"),
        ("--adjacency", "swap"),
        ("--advantage", "1.2"),
    ],
)
def test_a_refusal_shows_the_value_that_it_refuses(run_cli: Cli, empty: Path, option: str, value: str) -> None:
    happened, fix = run_cli("calibrate", option, value).err.splitlines()
    assert re.match(r"error DP\d{3}: ", happened)
    assert value in happened
    assert fix.startswith("Fix: ")


def test_the_exit_codes_of_help_page_and_errors_are_the_same(run_cli: Cli) -> None:
    from dpbudget import errors

    text = " ".join(run_cli("-h").out.split())
    shown = {int(code) for code in re.findall(r"(\d+) [a-z]", text[text.index("Exit codes:") :])}
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    kinds = [errors.DPBudgetError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert shown == listed
    assert {kind.exit_code for kind in kinds} <= shown


def test_one_answer_and_nothing_else_goes_down_a_pipe(tmp_path: Path) -> None:
    program = f"{sys.executable} -c 'from dpbudget_cli.main import main; main()'"
    reader = f"{sys.executable} -c 'import json, sys; print(json.load(sys.stdin)[\"steps\"])'"
    done = subprocess.run(
        f"{program} calibrate --epsilon 3 --json 2>/dev/null | {reader}",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"},
    )
    assert json.loads(done.stdout) == 2344
