"""A beginner's error is answered by what to type next, with the names that were meant."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpbudget

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
PLAN = "plan new --ledger budget.ledger --epsilon 1"
TRAIN = "train --ledger budget.ledger --classes 2 --data"

#: What is typed, and what its "Fix:" line must say.
NEXT = {
    "calibrate --epsilon 0": "pass epsilon > 0",
    "epsilon --sample-rate 0.01 --noise-multiplier 1 --steps 9": "pass --delta D: Delta, such as 1e-5 or 1/60000.",
    "epsilon --epochs 9 --batch-size 20 --noise-multiplier 1 --delta 1e-5": "pass --dataset-size",
    "ledger init new.ledger --epsilon 3": "pass --delta D: Total delta of all runs, such as 1e-5.",
    f"{PLAN} --epochs 9": "pass --dataset-size N, the public nominal size",
    "ledger show budget.ledgr": "Did you mean {folder}/budget.ledger?",
    "train --ledger bugdet.ledger --data train.csv --classes 2": "Did you mean budget.ledger?",
    "plan new --ledger elsewhere.ledger": "dpbudget ledger init elsewhere.ledger --epsilon E --delta D",
    "key show owner.kye": "Did you mean {folder}/owner.key?",
    "verify budget.ledger --trust budget.ledger.owner.pub": "Did you mean {folder}/budget.ledger.owner.key.pub?",
    f"{TRAIN} trian.csv": "Did you mean train.csv?",
    f"{TRAIN} train.csv --target lable": "name the labels with --target. Did you mean label?",
    f"{TRAIN} train.csv": "name the labels with --target. The columns are a, b, c, d, label",
    f"{TRAIN} train.csv --target label --modle mlp": "Did you mean --model?",
    f"{TRAIN} train.csv --target label --epochs 9": "the signed plan has it (dpbudget plan show)",
    f"{TRAIN} train.csv --target label --plan 0000": "the runs are {run}",
    f"{TRAIN} train.csv --target label --writer-key owner.key": "whose public half is",
    "help": "write dpbudget --help",
    "ledger help": "write dpbudget ledger --help",
    "show budget.ledger": "write dpbudget key show or dpbudget ledger show or dpbudget plan show",
    "calibrate --eps 3": "write --epsilon",
    "calibrate -e 3": "write --epsilon or --examples or --epochs",
    "calibrate 3": "name the option of every value",
    "ledger grant budget.ledger --epsilon 4 --owner-key sealed.key": "--passphrase-fd FD",
    f"{TRAIN} train.npz --init none.safetensors": "check the path",
    f"{TRAIN} bare.csv": "name the columns in the first line, as in a,b,label",
    f"{TRAIN} twice.csv --target label": "name the columns in the first line, as in a,b,label",
    f"{TRAIN} other.csv": "separate values by commas",
    "explain DP5": "Did you mean DP005?",
    "explain 52": "Did you mean DP052?",
}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key with a passphrase."""
    place = tmp_path_factory.mktemp("keys") / "sealed.key"
    dpbudget.new_key(place, passphrase=b"secret")
    return place


@pytest.mark.parametrize("line", NEXT, ids=NEXT.keys())
def test_the_fix_says_what_to_type(run_cli: Cli, folder: Path, seen: Seen, sealed: Path, line: str) -> None:
    run = run_cli("ledger", "runs", "budget.ledger", "--json").json["runs"][0]["run"]
    Path("bare.csv").write_text("4177,77.31,0\n5288,80.5,1\n", encoding="utf-8")
    Path("twice.csv").write_text("4177,4177,0\n5288,80.5,1\n", encoding="utf-8")
    Path("other.csv").write_text("77.31;0\n80.5;1\n", encoding="utf-8")
    shutil.copy(sealed, "sealed.key")
    before = seen(folder)
    answer = run_cli(*shlex.split(line))
    assert answer.code in (2, 4)
    (fix,) = re.findall(r"^Fix: (.+)$", answer.err, re.MULTILINE)
    assert NEXT[line].format(folder=folder, run=run) in fix
    assert not re.search(r"4177|77\.31|5288|80\.5", answer.err), "a first line may be a record"
    assert seen(folder) == before


@pytest.mark.parametrize("name", ["nothing-like-it", "no-folder/budget.ledger"])
def test_a_file_that_is_like_no_other_is_not_guessed(run_cli: Cli, folder: Path, name: str) -> None:
    answer = run_cli("ledger", "show", name)
    assert (answer.code, "check the path\n" in answer.err, "Did you mean" in answer.err) == (4, True, False)


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_used_up_plan_leads_to_what_is_left_of_the_budget(run_cli: Cli, folder: Path, command: str) -> None:
    writer = dpbudget.load_key("budget.ledger.writer.key")
    with dpbudget.open_ledger("budget.ledger", writer=writer) as ledger, dpbudget.start(ledger) as run:
        for _ in run:
            pass
    words = f"{TRAIN} train.csv --target label" if command == "train" else "run --ledger budget.ledger -- true"
    answer = run_cli(*shlex.split(words))
    assert (answer.code, "error DP050" in answer.err) == (3, True)
    (show,) = re.findall(r"dpbudget (ledger show \S+)$", answer.err, re.MULTILINE)
    shown = run_cli(*show.split())
    assert (shown.code, "plannable" in shown.out) == (0, True)


def test_a_full_portfolio_leads_to_the_plans_that_are_in_it(run_cli: Cli, folder: Path) -> None:
    sizes = ("--ledger", "budget.ledger", "--dataset-size", "100", "--epochs", "1")
    assert run_cli("plan", "new", *sizes).code == 0
    refused = run_cli("plan", "new", *sizes)
    assert (refused.code, "error DP052" in refused.err) == (3, True)
    (show,) = re.findall(r"dpbudget (plan show --ledger \S+) lists", refused.err)
    assert run_cli(*show.split()).code == 0


def test_a_report_that_is_there_is_replaced_by_the_option_that_is_named(run_cli: Cli, folder: Path) -> None:
    assert run_cli("report", "budget.ledger").code == 0
    refused = run_cli("report", "budget.ledger")
    assert (refused.code, "Fix: pass --replace" in refused.err) == (2, True)
    assert run_cli("report", "budget.ledger", "--replace").code == 0


def test_an_export_is_no_place_to_spend_from(run_cli: Cli, folder: Path, seen: Seen) -> None:
    assert run_cli("ledger", "export", "budget.ledger", "budget.jsonl").code == 0
    shutil.copy("budget.ledger.writer.key", "writer.key")
    before = seen(folder)
    answer = run_cli("train", "--ledger", "budget.jsonl", "--data", "train.npz", "--classes", "2")
    assert answer.code in (2, 4)
    assert "dpbudget ledger import budget.jsonl" in answer.err
    assert seen(folder) == before


def test_a_missing_name_shows_nothing_of_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    from dpbudget.ledger.store.files import check_path

    assert check_path(tmp_path / "no" / "a.csv") == "check the path"
    (tmp_path / "train.csv").touch()
    assert check_path(tmp_path / "train.csv") == "check the path"  # it is there: something else is wrong
    assert check_path(tmp_path / "trian.csv") == f"check the path. Did you mean {tmp_path / 'train.csv'}?"
