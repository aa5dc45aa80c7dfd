"""A replay audit by command: an auditor's key, kept keys, one step opened, and nothing secret on the screen."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
TRAIN = ("train", "--ledger", "budget.ledger", "--data", "train.npz", "--classes", "2")
KEEP = ("--keep-keys", "noise.sealed", "--auditor", "auditor.key.pub")
REPLAY = ("key", "replay", "noise.sealed", "step.key", "--ledger", "budget.ledger", "--auditor-key", "auditor.key")


@pytest.fixture
def audited(run_cli: Cli, folder: Path) -> Path:
    assert run_cli("key", "new", "auditor.key", "--auditor").code == 0
    assert run_cli(*TRAIN, *KEEP).code == 0
    return folder


def test_one_step_is_opened_into_a_file_and_never_onto_the_screen(run_cli: Cli, audited: Path) -> None:
    answer = run_cli(*REPLAY, "--step", "7", "--trust", "budget.ledger.owner.key.pub", "--json")
    assert answer.code == 0, answer.err
    assert (answer.json["step"], answer.json["purpose"], answer.json["trusted"]) == (7, "grad-noise", True)
    written = json.loads((audited / "step.key").read_bytes())
    assert (audited / "step.key").stat().st_mode & 0o777 == 0o600
    assert written["output"] == answer.json["output"]
    assert len(answer.json["output"]) == 64  # keys that are kept go with hashes of outputs
    assert written["key"] not in answer.out + answer.err


def test_people_are_told_what_the_file_can_do_and_what_was_not_checked(run_cli: Cli, audited: Path) -> None:
    answer = run_cli(*REPLAY, "--step", "0", "--purpose", "sampling")
    assert answer.code == 0, answer.err
    assert "pass --trust" in answer.err
    assert "remove it when you are done" in answer.err
    assert json.loads((audited / "step.key").read_bytes())["key"] not in answer.out + answer.err


def test_without_being_asked_for_no_key_is_kept_and_no_output_hashed(run_cli: Cli, folder: Path) -> None:
    assert run_cli(*TRAIN).code == 0
    assert run_cli("ledger", "export", "budget.ledger", "budget.jsonl").code == 0
    assert b'"output":null' in (folder / "budget.jsonl").read_bytes()
    assert not list(folder.glob("*sealed*"))


@pytest.mark.parametrize(
    ("words", "code", "exit_code"),
    [
        (("--step", "20"), "DP085", 4),
        (("--step", "-1"), "DP009", 2),
        (("--step", "x"), "DP009", 2),
        ((), "DP064", 2),
        (("--step", "0", "--purpose", "init"), "DP060", 2),
        (("--step", "0", "--run", "zz"), "DP081", 2),
        (("--step", "0", "--auditor-key", "owner.key"), "DP070", 4),
        (("--step", "0", "--auditor-key", "other.key"), "DP085", 1),
        (("--step", "0", "--trust", "owner.key.pub"), "DP072", 1),
        (("--step", "0", "--ledger", "missing.ledger"), "DP070", 4),
    ],
)
def test_what_cannot_be_opened_is_refused_and_writes_nothing(
    run_cli: Cli, audited: Path, words: tuple[str, ...], code: str, exit_code: int
) -> None:
    assert run_cli("key", "new", "other.key", "--auditor").code == 0
    answer = run_cli(*REPLAY, *words)
    assert f"error {code}: " in answer.err
    assert "Fix: " in answer.err
    assert answer.code == exit_code
    assert not (audited / "step.key").exists()


def test_a_step_key_is_never_written_over_another(run_cli: Cli, audited: Path) -> None:
    assert run_cli(*REPLAY, "--step", "0").code == 0
    before = (audited / "step.key").read_bytes()
    again = run_cli(*REPLAY, "--step", "1")
    assert (again.code, "DP074" in again.err) == (2, True)
    assert (audited / "step.key").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (KEEP[:2], "DP064"),
        (KEEP[2:], "DP064"),
        ((*KEEP[:2], "--auditor", "owner.key.pub"), "DP070"),
        (("--keep-keys", "no/where", *KEEP[2:]), "DP070"),
        (("--keep-keys", "train.csv", *KEEP[2:]), "DP073"),
    ],
)
def test_keys_that_could_not_be_kept_charge_nothing(
    run_cli: Cli, folder: Path, words: tuple[str, ...], code: str
) -> None:
    assert run_cli("key", "new", "auditor.key", "--auditor").code == 0
    os.chmod("train.csv", 0o644)
    answer = run_cli(*TRAIN, *words)
    assert f"error {code}: " in answer.err
    assert run_cli("ledger", "runs", "budget.ledger", "--json").json["runs"][0]["charged"] == 0


def test_an_auditors_key_is_shown_for_what_it_is(run_cli: Cli, folder: Path) -> None:
    made = run_cli("key", "new", "auditor.key", "--auditor", "--json").json
    for source in ("auditor.key", "auditor.key.pub"):
        shown = run_cli("key", "show", source)
        assert made["public"] in shown.out
        assert "signs nothing" in shown.out
        assert run_cli("key", "show", source, "--json").json == {"public": made["public"], "key_id": None}
    (folder / "phrase").write_text("secret\n")
    with open(folder / "phrase", "rb") as phrase:
        assert run_cli("key", "new", "locked.key", "--auditor", "--passphrase-fd", str(phrase.fileno())).code == 0
    assert run_cli("key", "show", "locked.key").code == 4
    with open(folder / "phrase", "rb") as phrase:
        assert run_cli("key", "show", "locked.key", "--passphrase-fd", str(phrase.fileno())).code == 0
