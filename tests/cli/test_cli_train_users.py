"""``dpbudget train`` for users: who owns each row is a column, how many rows count in a step is public."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dptrainer.trainer
from dpbudget._verify import verify

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
TRAIN = ("train", "--ledger", "users.ledger", "--data", "rows.csv", "--target", "label", "--classes", "2")
USERS = ("--user-column", "who", "--max-examples", "3")


@pytest.fixture
def people(run_cli: Cli, folder: Path) -> Path:
    """The prepared folder with a ledger for users, a plan in it, and a table of 60 rows of 20 users."""
    total = ("--epsilon", "8", "--delta", "1e-5", "--whole-budget", "--unit", "user")
    assert run_cli("ledger", "init", "users.ledger", *total).code == 0
    small = ("--dataset-size", "20", "--batch-size", "5", "--steps", "10", "--epsilon", "4")
    assert run_cli("plan", "new", "--ledger", "users.ledger", *small).code == 0
    rows = [f"u{number % 20},{number % 7},{number % 3},{number % 2}" for number in range(60)]
    Path("rows.csv").write_text("\n".join(["who,a,b,label", *rows, ""]), encoding="utf-8")
    return folder


def test_users_are_the_records_and_bring_at_most_so_many_rows(
    run_cli: Cli, people: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    build = dptrainer.trainer.PrivateTrainer.__init__

    def seeing(self: Any, model: Any, optimizer: Any, loss: Any, dataset: Any, *args: Any, **more: Any) -> None:
        given.append(dataset)
        build(self, model, optimizer, loss, dataset, *args, **more)

    monkeypatch.setattr(dptrainer.trainer.PrivateTrainer, "__init__", seeing)
    answer = run_cli(*TRAIN, *USERS, "--json")
    assert answer.code == 0, answer.err
    (dataset,) = given
    assert (len(dataset), dataset.max_examples, len(dataset.examples)) == (20, 3, 60)
    assert (verify("users.ledger").steps, verify("users.ledger").ok) == (10, True)
    card = Path(answer.json["card"]).read_text(encoding="utf-8")
    assert "with and without any one user with all of that user's records" in card
    assert "Several records of one person" not in card


def test_without_users_the_ledger_for_users_is_refused_with_the_options_that_name_them(
    run_cli: Cli, people: Path, seen: Seen
) -> None:
    before = seen(people)
    answer = run_cli(*TRAIN)
    assert (answer.code, "error DP025" in answer.err, seen(people) == before) == (2, True, True)
    assert "--user-column COL --max-examples K" in answer.err


def test_users_are_refused_where_the_ledger_protects_rows(run_cli: Cli, people: Path, seen: Seen) -> None:
    before = seen(people)
    answer = run_cli(*TRAIN, *USERS, "--ledger", "budget.ledger")
    assert (answer.code, "error DP025" in answer.err, seen(people) == before) == (2, True, True)


def test_a_public_file_needs_no_users_and_may_have_them(run_cli: Cli, people: Path) -> None:
    Path("public.csv").write_text("a,b,label\n1,2,0\n3,1,1\n", encoding="utf-8")
    more = ("--max-steps", "2", "--json", "--output")
    one = run_cli(*TRAIN, *USERS, "--public-eval", "public.csv", *more, "a.safetensors")
    other = run_cli(*TRAIN, *USERS, "--public-eval", "rows.csv", *more, "b.safetensors")
    for answer in (one, other):
        assert answer.code == 0, answer.err
        assert 0.0 <= answer.json["public_accuracy"] <= 1.0


def test_an_archive_names_users_by_an_array(run_cli: Cli, people: Path) -> None:
    np.savez("rows.npz", x=np.zeros((60, 2)), label=np.arange(60) % 2, who=np.arange(60) % 20)
    assert run_cli(*TRAIN, *USERS, "--data", "rows.npz").code == 0
