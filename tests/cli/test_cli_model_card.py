"""What stands beside the weights: the guarantee as a sentence, the ledger's head, and commands that check both."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import dpbudget
from dpbudget.curve import round_up
from dpbudget_cli._card import Facts, _code, card
from dpbudget_cli._heldout import Score

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
TRAIN = ("train", "--ledger", "budget.ledger", "--data", "train.npz", "--classes", "2")


@pytest.fixture
def trained(run_cli: Cli, folder: Path) -> dict[str, Any]:
    answer = run_cli(*TRAIN, "--output", "w.safetensors", "--json")
    assert answer.code == 0, answer.err
    return dict(answer.json)


def facts_of(run: str) -> Facts:
    with dpbudget.open_ledger("budget.ledger") as ledger:
        state = ledger.state
        plan = state.runs[run].plan
        return Facts(
            "budget.ledger", ledger.id, state.owner.hex, str(ledger.head), run, plan, 20, 3.0, 1e-5, public_data=False
        )


def test_the_card_states_the_claim_the_head_and_the_hash_of_the_weights(trained: dict[str, Any]) -> None:
    text = Path("w.safetensors.md").read_text(encoding="utf-8")
    claim = trained["claim"]
    assert f"({round_up(claim['epsilon'])}, {claim['delta']:g})-differentially private" in text
    assert "with and without any one record" in text
    assert f"`{trained['head']}`" in text
    assert f"`{trained['run']}`" in text
    assert f"`{hashlib.sha256(Path('w.safetensors').read_bytes()).hexdigest()}`" in text
    assert "20 of 20 charged" in text
    assert "epsilon 3 at delta 1e-05" in text  # what all runs together may cost


def test_the_commands_of_the_card_verify_the_run_and_a_cut_ledger_fails_them(
    run_cli: Cli, folder: Path, trained: dict[str, Any]
) -> None:
    text = Path("w.safetensors.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\$ dpbudget (.+)$", text, re.MULTILINE)
    answer = run_cli(*shlex.split(command))
    assert answer.code == 0, answer.out
    size, _, root = trained["head"].partition(":")
    assert run_cli(*shlex.split(command.replace(root, root[::-1]))).code == 5
    assert run_cli(*shlex.split(command.replace(f"{size}:", f"{int(size) + 1}:"))).code == 5
    (prove,) = re.findall(r"`dpbudget (ledger prove [^`]+)`", text)
    assert run_cli(*shlex.split(prove.replace("FILE", "run.proof"))).code == 0
    assert run_cli("verify", "run.proof", "--trust", "budget.ledger.owner.key.pub").code == 0
    (report,) = re.findall(r"`dpbudget (report [^`]+)`", text)
    assert run_cli(*shlex.split(report)).code == 0


def test_the_weights_carry_the_same_facts(run_cli: Cli, folder: Path, trained: dict[str, Any]) -> None:
    with safe_open("w.safetensors", framework="pt") as file:
        facts = file.metadata()
    assert (facts["run"], float(facts["epsilon"])) == (trained["run"], trained["claim"]["epsilon"])
    assert (facts["head"], facts["unit"], facts["adjacency"]) == (trained["head"], "example", "add-remove")
    assert facts["guarantee"] in Path("w.safetensors.md").read_text(encoding="utf-8")
    assert run_cli(*shlex.split(facts["verify"])[1:]).code == 0


@pytest.mark.parametrize("name", ["w.safetensors", "w.safetensors.md"])
def test_neither_weights_nor_card_are_written_over(run_cli: Cli, folder: Path, seen: Seen, name: str) -> None:
    Path(name).write_text("mine", encoding="utf-8")
    before = seen(folder)
    answer = run_cli(*TRAIN, "--output", "w.safetensors")
    assert (answer.code, "DP074" in answer.err, seen(folder) == before) == (2, True, True)
    assert "no step was taken" in answer.err


def test_a_card_says_what_its_guarantee_leaves_out(folder: Path, trained: dict[str, Any]) -> None:
    facts, more = facts_of(trained["run"]), {"model": "mlp", "public": None, "score": None}
    plain = card(facts, "w", "0" * 64, init=None, **more)
    assert "The initial weights, unless" not in plain
    assert "kept from training" not in plain
    assert "rounding of sums and noise to floating point" in plain
    exact = replace(facts, plan=facts.plan.replace(noise="exact"))
    assert "rounding" not in card(exact, "w", "0" * 64, init=None, **more)
    assert "Several records of one person" in plain
    started = card(replace(facts, public_data=True), "w", "0" * 64, init="some/where/old.safetensors", **more)
    assert "The initial weights, unless" in started
    assert "`old.safetensors`" in started
    assert "some/where" not in started  # folders may name people
    assert "their owner declared public" in started


def test_a_card_tells_accuracies_only_where_they_may_be_told(folder: Path, trained: dict[str, Any]) -> None:
    facts, more = facts_of(trained["run"]), {"model": "mlp", "init": None}
    assert "accuracy" not in card(facts, "w", "0" * 64, public=None, score=None, **more)
    assert "accuracy" not in card(facts, "w", "0" * 64, public=None, score=Score(None, None, "3f" * 16), **more)
    told = card(facts, "w", "0" * 64, public=0.912, score=Score(0.87, 0.02, "3f" * 16), **more)
    assert "| accuracy on public data | 0.9120 |" in told
    assert "0.8700 +- 0.0200 by its noise, paid for by run 3f3f3f3f" in told


def test_a_name_cannot_break_out_of_its_cell() -> None:
    assert _code("a`|\n| b") == "`a b`"
