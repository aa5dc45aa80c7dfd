"""Held-out records: a split that decides about each record by itself, and an accuracy that is paid for or refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dptrainer.trainer
from dpbudget._verify import verify
from dpbudget_cli._data import Table
from dpbudget_cli._heldout import _per_unit, _score, held_out_rows
from dptrainer.noise.source import SecureNoise
from dptrainer.values import ClippedSum

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
TRAIN = ("train", "--ledger", "budget.ledger", "--data", "train.npz", "--classes", "2")
PAYS = ("--epsilon", "0.5", "--dataset-size", "100", "--sample-rate", "1", "--steps", "1")
KEY = bytes(range(32))


def table_of(values: list[int], users: list[str] | None = None) -> Table:
    features = np.array(values, dtype=np.float32).reshape(-1, 1)
    return Table(features, np.zeros(len(values), dtype=np.int64), None if users is None else np.array(users))


@pytest.fixture
def paying(run_cli: Cli, folder: Path) -> str:
    """The prepared folder with a second plan, of one step; its run."""
    (first,) = run_cli("ledger", "plans", "budget.ledger", "--json").json["plans"]
    run = run_cli("plan", "new", "--ledger", "budget.ledger", *PAYS, "--json").json["run"]
    assert run != first["run"]
    return str(run)


class TestTheSplit:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(0, 29))
    def test_a_record_more_or_less_moves_no_other_record(self, values: list[int], place: int) -> None:
        place %= len(values)
        whole = held_out_rows(table_of(values), KEY, 0.5)
        less = held_out_rows(table_of(values[:place] + values[place + 1 :]), KEY, 0.5)
        assert np.array_equal(np.delete(whole, place), less)

    def test_equal_records_are_on_one_side_and_a_label_makes_another_record(self) -> None:
        values = list(range(200)) * 2
        chosen = held_out_rows(table_of(values), KEY, 0.5)
        assert np.array_equal(chosen[:200], chosen[200:])
        relabelled = Table(table_of(values[:200]).features, np.ones(200, dtype=np.int64))
        assert not np.array_equal(held_out_rows(relabelled, KEY, 0.5), chosen[:200])

    def test_its_share_is_what_was_asked_for_and_a_larger_one_holds_the_smaller(self) -> None:
        table = table_of(list(range(4000)))
        small, large = held_out_rows(table, KEY, 0.1), held_out_rows(table, KEY, 0.3)
        assert abs(small.mean() - 0.1) < 0.03
        assert abs(large.mean() - 0.3) < 0.04
        assert not (small & ~large).any()
        assert not np.array_equal(held_out_rows(table, KEY[::-1], 0.1), small)

    def test_a_user_is_held_out_with_all_rows(self) -> None:
        users = [f"user {number % 50}" for number in range(500)]
        chosen = held_out_rows(table_of(list(range(500)), users), KEY, 0.4)
        sides = {user: {bool(side) for name, side in zip(users, chosen, strict=True) if name == user} for user in users}
        assert all(len(side) == 1 for side in sides.values())
        assert 0 < chosen.sum() < 500

    def test_what_is_held_out_is_never_trained_on_in_any_run_of_the_ledger(
        self, run_cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trained: list[set[tuple[float, ...]]] = []
        scales = (1, 2, 0.5)
        build = dptrainer.trainer.PrivateTrainer.__init__

        def seeing(self: Any, model: Any, optimizer: Any, loss: Any, dataset: Any, *args: Any, **more: Any) -> None:
            trained.append({tuple((x / scales[len(trained)]).tolist()) for x, _ in dataset})
            build(self, model, optimizer, loss, dataset, *args, **more)

        monkeypatch.setattr(dptrainer.trainer.PrivateTrainer, "__init__", seeing)
        for number, scale in enumerate(scales):
            more = ("--hold-out", "0.3", "--max-steps", "2", "--output", f"{number}.safetensors", "--feature-scale")
            assert run_cli(*TRAIN, *more, str(scale)).code == 0
        assert trained[0] == trained[1] == trained[2]
        assert 40 < len(trained[0]) < 100


class TestTheScore:
    def test_a_plan_of_one_step_pays_for_it(self, run_cli: Cli, folder: Path, paying: str) -> None:
        answer = run_cli(*TRAIN, "--hold-out", "0.5", "--score-plan", paying[:10], "--lr", "2", "--json")
        assert answer.code == 0, answer.err
        held_out = answer.json["held_out"]
        assert held_out["run"] == paying
        report = verify("budget.ledger")
        assert (report.ok, report.steps, report.head) == (True, 21, answer.json["head"])
        card = Path(answer.json["card"]).read_text(encoding="utf-8")
        assert ("accuracy on held-out data" in card) == (held_out["accuracy"] is not None)

    def test_what_gets_noise_are_the_counts_of_right_and_wrong_at_the_plans_norm(
        self, run_cli: Cli, folder: Path, paying: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: list[ClippedSum] = []
        privatise = SecureNoise.privatise

        def seeing(self: SecureNoise, clipped: ClippedSum, receipt: Any) -> Any:
            if "right" in clipped.grads:
                given.append(ClippedSum({k: v.clone() for k, v in clipped.grads.items()}, clipped.sensitivity))
                assert (receipt.run_id, receipt.rate_k) == (paying, 1 << 64)
            return privatise(self, clipped, receipt)

        monkeypatch.setattr(SecureNoise, "privatise", seeing)
        np.savez("held.npz", **np.load("train.npz"))
        answer = run_cli(*TRAIN, "--validation", "held.npz", "--score-plan", paying, "--json")
        assert answer.code == 0, answer.err
        (clipped,) = given
        assert clipped.sensitivity == 1.0
        counts = {name: float(total) for name, total in clipped.grads.items()}
        assert set(counts) == {"right", "wrong"}
        assert sum(counts.values()) == 100.0
        assert all(value == int(value) for value in counts.values())
        told = answer.json["held_out"]["accuracy"]
        assert told is None or told != counts["right"] / 100.0

    def test_a_user_adds_no_more_than_one_whatever_the_number_of_rows(self) -> None:
        users = np.array(["a"] * 9 + ["b"])
        right = np.array([1.0] * 6 + [0.0] * 4)
        table = Table(np.zeros((10, 1), dtype=np.float32), np.zeros(10, dtype=np.int64), users)
        assert _per_unit(right, table).tolist() == [6 / 9, 0.0]
        assert _per_unit(right, Table(table.features, table.labels)).tolist() == right.tolist()

    @pytest.mark.parametrize(("right", "wrong", "accuracy"), [(90.0, 10.0, 0.9), (104.0, -3.0, 1.0), (-2.0, 80.0, 0.0)])
    def test_it_is_computed_from_the_noisy_counts_alone(self, right: float, wrong: float, accuracy: float) -> None:
        assert _score(right, wrong, 5.0, "run").accuracy == pytest.approx(accuracy)

    def test_its_noise_is_that_of_a_simulation(self) -> None:
        noisy = torch.Generator().manual_seed(3)
        right, wrong = (centre + 8.0 * torch.randn(20000, generator=noisy) for centre in (700.0, 300.0))
        spread = float((right / (right + wrong)).std())
        stated = _score(700.0, 300.0, 8.0, "run").noise
        assert stated == pytest.approx(2.0 * spread, rel=0.05)

    def test_counts_below_the_noise_tell_no_accuracy(self) -> None:
        assert _score(10.0, 9.0, 5.0, "run").accuracy is None

    def test_without_a_plan_no_accuracy_is_computed_on_private_records(self, run_cli: Cli, folder: Path) -> None:
        answer = run_cli(*TRAIN, "--hold-out", "0.5", "--json")
        assert (answer.code, answer.json["held_out"]) == (0, None)
        assert "--score-plan RUN would pay for it" in answer.err
        why = "each record with probability 0.5, by a keyed hash of it alone: one record more or less moves no other"
        assert why in answer.err
        assert why in Path(answer.json["card"]).read_text(encoding="utf-8")

    def test_a_private_validation_file_without_a_plan_is_refused(self, run_cli: Cli, folder: Path, seen: Seen) -> None:
        before = seen(folder)
        answer = run_cli(*TRAIN, "--validation", "train.npz")
        assert (answer.code, "DP064" in answer.err, seen(folder) == before) == (2, True, True)
        assert "--score-plan RUN" in answer.err
        assert "--public-eval" in answer.err

    def test_where_the_owner_declared_the_data_public_it_is_free_and_exact(self, run_cli: Cli, folder: Path) -> None:
        made = ("ledger", "init", "open.ledger", "--epsilon", "3", "--delta", "1e-5", "--public-data")
        assert run_cli(*made).code == 0
        small = ("--dataset-size", "100", "--batch-size", "20", "--steps", "8", "--epsilon", "1")
        assert run_cli("plan", "new", "--ledger", "open.ledger", *small).code == 0
        answer = run_cli(*TRAIN, "--ledger", "open.ledger", "--hold-out", "0.5", "--json")
        assert answer.json["held_out"]["run"] is None
        assert 0.0 <= answer.json["held_out"]["accuracy"] <= 1.0
        assert verify("open.ledger").steps == 8

    def test_a_score_plan_with_exact_noise_is_refused_with_the_plan_that_would_do(
        self, run_cli: Cli, folder: Path, seen: Seen
    ) -> None:
        exact = run_cli("plan", "new", "--ledger", "budget.ledger", *PAYS, "--noise", "exact", "--json").json["run"]
        training = next(
            plan["run"]
            for plan in run_cli("ledger", "plans", "budget.ledger", "--json").json["plans"]
            if plan["run"] != exact
        )
        words = (*TRAIN, "--plan", training, "--hold-out", "0.5")
        before = seen(folder)
        refused = run_cli(*words, "--score-plan", exact)
        assert (refused.code, "DP081" in refused.err, seen(folder) == before) == (2, True, True)
        assert "dpbudget plan new --sample-rate 1 --steps 1 --noise secure" in refused.err
        sizes = (*PAYS[2:], "--epsilon", "0.3", "--noise", "secure")
        secure = run_cli("plan", "new", "--ledger", "budget.ledger", *sizes, "--json").json["run"]
        assert run_cli(*words, "--score-plan", secure).code == 0

    @pytest.mark.parametrize("which", ["itself", "many steps", "spent"])
    def test_a_plan_that_cannot_pay_is_refused_before_any_charge(
        self, run_cli: Cli, folder: Path, paying: str, which: str
    ) -> None:
        plans = [plan["run"] for plan in run_cli("ledger", "plans", "budget.ledger", "--json").json["plans"]]
        training = next(run for run in plans if run != paying)
        if which == "spent":
            assert run_cli(*TRAIN, "--plan", paying, "--output", "w").code == 0
        score = {"itself": training, "many steps": training, "spent": paying}[which]
        plan = paying if which == "many steps" else training
        before = verify("budget.ledger").steps
        answer = run_cli(*TRAIN, "--plan", plan, "--hold-out", "0.5", "--score-plan", score)
        assert (answer.code, "DP081" in answer.err) == (2, True), answer.err
        assert verify("budget.ledger").steps == before

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--score-plan", "x"), "there are none"),
            (("--hold-out", "0.1", "--validation", "train.npz"), "two sets of held-out records"),
            (("--user-column", "who"), "belong together"),
            (("--max-examples", "3"), "belong together"),
        ],
    )
    def test_options_that_contradict_each_other_are_refused(
        self, run_cli: Cli, folder: Path, seen: Seen, options: tuple[str, ...], words: str
    ) -> None:
        before = seen(folder)
        answer = run_cli(*TRAIN, *options, "--json")
        assert (answer.code, answer.json["error"]["code"]) == (2, "DP064")
        assert words in answer.json["error"]["message"]
        assert seen(folder) == before

    def test_files_of_other_features_are_refused(self, run_cli: Cli, folder: Path, seen: Seen) -> None:
        np.savez("wide.npz", x=np.zeros((3, 5)), y=np.zeros(3, dtype=int))
        before = seen(folder)
        answer = run_cli(*TRAIN, "--public-eval", "wide.npz")
        assert (answer.code, "DP091" in answer.err, "[5]" in answer.err) == (2, True, True)
        assert seen(folder) == before


def test_a_model_of_the_user_answers_for_one_held_out_record_at_a_time(
    run_cli: Cli, folder: Path, paying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "together.py").write_text(
        "import torch\n"
        "rows = []\n"
        "class Together(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if not self.training:\n"
        "            rows.append(len(x))\n"
        "        return super().forward(x if self.training else x - x.mean(0))\n"
        "def make(features, classes):\n"
        "    return Together(features, classes)\n"
    )
    monkeypatch.delitem(sys.modules, "together", raising=False)
    answer = run_cli(*TRAIN, "--model", "together:make", "--hold-out", "0.5", "--score-plan", paying)
    assert answer.code == 0, answer.err
    assert set(sys.modules["together"].rows[1:]) == {1}  # the first call is with zeros


def test_a_model_that_fails_on_held_out_records_does_not_tell_how_many_there_are(
    run_cli: Cli, folder: Path, paying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "picky.py").write_text(
        "import torch\n"
        "class Picky(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x if self.training or len(x) == 2 else x.reshape(7, -1, 11))\n"
        "def make(features, classes):\n"
        "    return Picky(features, classes)\n"
    )
    monkeypatch.delitem(sys.modules, "picky", raising=False)
    answer = run_cli(*TRAIN, "--model", "picky:make", "--hold-out", "0.5", "--score-plan", paying)
    assert (answer.code, "DP093" in answer.err, "RuntimeError" in answer.err) == (2, True, True)
    assert not re.search(r"input of size|[0-9]{2,} *$", answer.err.split("error DP093", 1)[1])


def test_a_score_that_fails_still_leaves_weights_and_their_card(
    run_cli: Cli, folder: Path, paying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("dpbudget_cli.train.charged_score", broken)
    answer = run_cli(*TRAIN, "--hold-out", "0.5", "--score-plan", paying, "--output", "w.safetensors", "--json")
    assert answer.code == 6
    assert json.loads(answer.out)["error"]["code"] == "DP099"
    assert Path("w.safetensors").exists()
    assert "Model card" in Path("w.safetensors.md").read_text(encoding="utf-8")
