"""A committed run by command: commit, entropy, a start under an expected head, and what verify says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
TRAIN = ("train", "--ledger", "budget.ledger", "--data", "train.npz", "--classes", "2", "--output", "w.safetensors")
VALUE = "5e" * 32


@pytest.fixture
def phrase(folder: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    """--passphrase-fd with one passphrase, a new descriptor each time."""
    (folder / "phrase").write_text("secret\n")
    with ExitStack() as opened:
        yield lambda: ("--passphrase-fd", str(opened.enter_context(open(folder / "phrase", "rb")).fileno()))


@pytest.fixture
def run_id(run_cli: Cli, folder: Path) -> str:
    return str(run_cli("ledger", "runs", "budget.ledger", "--json").json["runs"][0]["run"])


def test_a_run_is_committed_started_and_verified(
    run_cli: Cli, folder: Path, phrase: Callable[[], tuple[str, str]], run_id: str
) -> None:
    made = run_cli("ledger", "commit", "budget.ledger", run_id[:8], "--key-file", "plan.key", *phrase(), "--json")
    assert made.code == 0, made.err
    assert (folder / "plan.key").stat().st_mode & 0o777 == 0o600
    given = run_cli("ledger", "entropy", "budget.ledger", run_id[:8], "--value", VALUE, "--json")
    assert given.json["entropy"] == VALUE
    key = ("--plan-key", "plan.key", "--expect-head", given.json["head"])
    trained = run_cli(*TRAIN, *key, *phrase(), "--json")
    assert trained.code == 0, trained.err
    assert trained.json["charged"] == 20
    report = run_cli("verify", "budget.ledger", "--expect-head", made.json["head"], "--json").json
    assert report["runs"][0]["noise_keys"] == "committed"
    assert (report["runs"][0]["commitment"], report["runs"][0]["entropy"]) == (made.json["commitment"], VALUE)
    said = run_cli("verify", "budget.ledger").out
    assert f"noise keys of run {run_id}: committed to {made.json['commitment']}, with the entropy {VALUE}" in said
    for command, rows in (("runs", "runs"), ("show", "runs"), ("plans", "plans")):
        assert run_cli("ledger", command, "budget.ledger", "--json").json[rows][0]["noise_keys"] == "committed"
    export = run_cli("ledger", "export", "budget.ledger", "budget.jsonl")
    assert export.code == 0
    settles = [json.loads(line) for line in (folder / "budget.jsonl").read_bytes().splitlines() if b'"settle"' in line]
    assert {settle["fresh"] for settle in settles} == {"0" * 32}
    assert None not in {settle["output"] for settle in settles}  # there is something to compare a replay with
    shown = run_cli("ledger", "prove", "budget.ledger", "run.proof", "--run", run_id)
    assert shown.code == 0
    assert "committed to the noise key" in run_cli("verify", "run.proof", "--trust", "budget.ledger.owner.key.pub").out


def test_people_are_told_whom_to_give_the_head_and_what_the_key_can_do(
    run_cli: Cli, folder: Path, phrase: Callable[[], tuple[str, str]], run_id: str
) -> None:
    made = run_cli("ledger", "commit", "budget.ledger", run_id, "--key-file", "plan.key", *phrase())
    assert "Give the head to the auditor" in made.err
    assert "a copy repeats its noise" in made.err
    given = run_cli("ledger", "entropy", "budget.ledger", run_id, "--value", VALUE)
    assert "--expect-head" in given.err
    assert VALUE in given.out


def test_the_plan_key_is_sealed_to_an_auditor_who_replays_steps(
    run_cli: Cli, folder: Path, phrase: Callable[[], tuple[str, str]], run_id: str
) -> None:
    assert run_cli("key", "new", "auditor.key", "--auditor").code == 0
    keep = ("--keep-keys", "noise.sealed", "--auditor", "auditor.key.pub")
    made = run_cli("ledger", "commit", "budget.ledger", run_id, "--key-file", "plan.key", *keep, *phrase(), "--json")
    assert made.json["kept"] == "noise.sealed"
    head = run_cli("ledger", "entropy", "budget.ledger", run_id, "--value", VALUE, "--json").json["head"]
    key = ("--plan-key", "plan.key", "--expect-head", head, *phrase())
    refused = run_cli(*TRAIN, *key, *keep)
    assert "error DP084" in refused.err
    assert run_cli(*TRAIN, *key[:4], *phrase()).code == 0
    replay = ("key", "replay", "noise.sealed", "step.key", "--ledger", "budget.ledger", "--auditor-key", "auditor.key")
    opened = run_cli(*replay, "--step", "3", "--json")
    assert opened.code == 0, opened.err
    assert len(opened.json["output"]) == 64


def test_a_commit_that_was_cut_short_goes_on_with_the_key_that_was_made(
    run_cli: Cli, folder: Path, phrase: Callable[[], tuple[str, str]], run_id: str
) -> None:
    from dpbudget.ledger.plan_key import new_plan_key

    commitment = new_plan_key(folder / "plan.key", b"secret").commitment
    made = run_cli("ledger", "commit", "budget.ledger", run_id, "--key-file", "plan.key", *phrase(), "--json")
    assert made.json["commitment"] == commitment


def test_what_a_committed_run_lacks_is_said_and_nothing_is_charged(
    run_cli: Cli, folder: Path, phrase: Callable[[], tuple[str, str]], run_id: str
) -> None:
    commit = ("ledger", "commit", "budget.ledger", run_id, "--key-file")
    before = sorted(path.name for path in folder.iterdir())
    for words, code, exit_code in (
        ((*commit, "plan.key"), "DP073", 2),  # no terminal to ask at
        ((*commit, "owner.key", *phrase()), "DP070", 4),
        (("ledger", "commit", "budget.ledger", "zz", "--key-file", "plan.key"), "DP081", 2),
        (("ledger", "commit", "budget.ledger", run_id), "DP064", 2),
        (("ledger", "commit", "missing.ledger", run_id, "--key-file", "plan.key"), "DP070", 4),
        ((*commit, "plan.key", "--keep-keys", "x"), "DP064", 2),
        (("ledger", "entropy", "budget.ledger", run_id, "--value", VALUE), "DP084", 2),
        (("ledger", "entropy", "budget.ledger", run_id, "--value", "xyz"), "DP082", 2),
        ((*TRAIN, "--plan-key", "plan.key"), "DP070", 4),
    ):
        answer = run_cli(*words)
        assert f"error {code}: " in answer.err, words
        assert "Fix: " in answer.err
        assert answer.code == exit_code
    assert sorted(path.name for path in folder.iterdir()) == before
    assert run_cli(*commit, "plan.key", *phrase()).code == 0
    head = run_cli("ledger", "head", "budget.ledger", "--json").json["head"]
    key = ("--plan-key", "plan.key")
    assert "no entropy" in run_cli(*TRAIN, *key, "--expect-head", head, *phrase()).err
    assert run_cli("ledger", "entropy", "budget.ledger", run_id, "--value", VALUE).code == 0
    for words, code in (
        ((), "DP084"),
        (("--expect-head", head), "DP084"),
        (key, "DP070"),  # an encrypted key and nobody to ask
        ((*key, *phrase()), "DP084"),
        ((*key, "--expect-head", head, *phrase()), "DP084"),
        ((*key, "--expect-head", "9" * 15 + ":" + "ab" * 32, *phrase()), "DP079"),
        ((*key, "--expect-head", "x", *phrase()), "DP082"),
    ):
        answer = run_cli(*TRAIN, *words)
        assert f"error {code}: " in answer.err, words
        assert "Fix: " in answer.err
    assert "error DP084" in run_cli(*commit, "other.key", *phrase()).err
    assert not (folder / "other.key").exists()
    assert run_cli("ledger", "runs", "budget.ledger", "--json").json["runs"][0]["charged"] == 0
