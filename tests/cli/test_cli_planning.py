"""compare, and every unknown that calibrate solves for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpbudget import plan_for
from dpbudget._targets import min_dataset_size
from dpbudget.errors import InvalidParameter

Cli = Callable[..., Any]
PRV = "--accountant=prv"
SCHEDULE = ("--dataset-size", "60000", "--batch-size", "256", "--epochs", "10", "--noise-multiplier", "0.695")


class TestCompare:
    def test_every_row_says_what_it_is_worth(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("compare", *SCHEDULE, "--delta", "1e-5", "--group", "2", "--json").json
        assert answer["epsilon"]["kind"] == "certified"
        assert {row["standing"] for row in answer["rows"]} == {"certified", "upper bound", "not a bound"}
        names = ["prv", "pld", "rdp", "opacus-rdp", "opacus-prv", "dp-accounting-rdp", "tf-poisson"]
        assert [row["name"] for row in answer["rows"]] == [
            *names, "classic-rdp", "gdp", "opacus-loader", "shuffled", "shuffled-replace", "tf-once-per-epoch", "group"
        ]  # fmt: skip
        assert all(set(row) == {"name", "epsilon", "ratio", "standing", "question", "note"} for row in answer["rows"])
        assert (answer["rows"][0]["ratio"], answer["delta"], answer["adjacency"]) == (1.0, 1e-5, "add-remove")

    def test_people_see_bounds_rounded_up_and_that_one_row_is_none(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("compare", *SCHEDULE, "--delta", "1e-5")
        exact = run_cli("compare", *SCHEDULE, "--delta", "1e-5", "--json").json["rows"]
        lines = answer.out.splitlines()[2:]
        assert len(lines) == len(exact)
        for line, row in zip(lines, exact, strict=True):
            name, epsilon, *_ = line.split()
            assert name == row["name"]
            assert row["standing"] in line
            assert row["standing"] == "not a bound" or float(epsilon) >= row["epsilon"]
        assert sum("not a bound" in line for line in lines) == 1

    def test_phases_and_replace_one_are_compared_too(self, run_cli: Cli, empty: Path) -> None:
        phases = ("--phase", "0.01,1.0,500", "--phase", "0.02,1.5,500")
        answer = run_cli("compare", *phases, "--delta", "1e-5", "--adjacency", "replace-one", "--json").json
        assert [row["name"] for row in answer["rows"]] == ["prv", "pld", "rdp", "shuffled", "shuffled-replace"]

    @pytest.mark.parametrize(
        ("more", "code"),
        [
            (["--group", "0"], "DP009"),
            (["--delta", "2"], "DP002"),
            (["--steps", "9"], "DP064"),
            (["--gruop", "2"], "DP060"),
        ],
    )
    def test_a_bad_question_is_refused(self, run_cli: Cli, empty: Path, more: list[str], code: str) -> None:
        answer = run_cli("compare", *SCHEDULE, "--delta", "1e-5", *more)
        assert (answer.code, f"error {code}: " in answer.err) == (2, True)


class TestUnknowns:
    def test_without_epsilon_the_noise_says_what_it_claims(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("calibrate", "--noise-multiplier", "1.1", "--dataset-size", "60000", "--json").json
        facts = {"dataset_size": 60000, "batch_size": 256, "epochs": 10, "accountant": "rdp"}
        plan = plan_for(noise_multiplier=1.1, **facts)
        assert answer["solved_for"] == "epsilon"
        assert answer["epsilon"]["upper"] == plan.claim.epsilon
        assert {"batch_size", "epochs"} <= {item["name"] for item in answer["assumed"]}

    @pytest.mark.parametrize("length", [("--epochs", "10"), ("--steps", "2000")])
    @pytest.mark.parametrize("delta", [(), ("--delta", "1e-6")])
    def test_without_a_dataset_size_the_smallest_is_found(
        self, run_cli: Cli, empty: Path, length: tuple[str, str], delta: tuple[str, ...]
    ) -> None:
        given = ("--epsilon", "3", "--noise-multiplier", "1.1", "--batch-size", "256")
        answer = run_cli("calibrate", *given, *length, *delta, "--json").json
        assert answer["solved_for"] == "dataset_size"
        size = answer["dataset_size"]
        facts: dict[str, Any] = {length[0].lstrip("-"): int(length[1]), "batch_size": 256, "accountant": "rdp"}
        facts |= {"delta": 1e-6} if delta else {}
        assert (
            answer["epsilon"]["upper"]
            <= 3.0
            < plan_for(noise_multiplier=1.1, dataset_size=size - 1, **facts).claim.epsilon
        )
        assert answer["delta"] == (1e-6 if delta else size**-1.1)
        assert answer["sample_rate"] == 256 / size
        assert f"dataset size      {size}" in run_cli("calibrate", *given, *length, *delta).out

    @pytest.mark.parametrize(
        ("given", "unknown"),
        [
            (("--epsilon", "3"), "noise_multiplier"),
            (("--advantage", "0.1"), "noise_multiplier"),
            (("--epsilon", "3", "--noise-multiplier", "2"), "steps"),
            (("--epsilon", "3", "--noise-multiplier", "2", "--epochs", "3"), "batch_size"),
        ],
    )
    def test_what_was_found_is_named(self, run_cli: Cli, empty: Path, given: tuple[str, ...], unknown: str) -> None:
        assert run_cli("calibrate", *given, "--json").json["solved_for"] == unknown

    @pytest.mark.parametrize(
        ("target", "noise"), [(("--epsilon", "3"), 0.704597), (("--max-attack-advantage", "0.3"), 0.579)]
    )
    def test_a_newcomers_line_needs_no_arithmetic_and_no_delta(
        self, run_cli: Cli, empty: Path, target: tuple[str, str], noise: float
    ) -> None:
        """The second figure is riskcal's."""
        answer = run_cli("calibrate", "--batch", "256", "--examples", "60000", "--epochs", "10", *target, PRV, "--json")
        assert answer.json["noise_multiplier"] == pytest.approx(noise, rel=5e-3)
        assert (answer.json["steps"], answer.json["delta"]) == (2344, 60000**-1.1)

    def test_the_epochs_that_are_found_fit_and_one_step_more_does_not(self, run_cli: Cli, empty: Path) -> None:
        given = ("--batch", "256", "--examples", "60000", "--epsilon", "3", "--noise-multiplier", "1.1", PRV)
        answer = run_cli("calibrate", *given, "--json").json
        facts = {"noise_multiplier": 1.1, "dataset_size": 60000, "batch_size": 256}
        assert answer["epsilon"]["kind"] == "certified"
        assert answer["epsilon"]["upper"] == plan_for(**facts, steps=answer["steps"]).claim.epsilon
        assert answer["epsilon"]["upper"] <= 3.0 < plan_for(**facts, steps=answer["steps"] + 1).claim.epsilon

    def test_nothing_unknown_is_refused(self, run_cli: Cli, empty: Path) -> None:
        given = ("--epsilon", "3", "--noise-multiplier", "1.1", "--epochs", "10")
        for rest in (("--batch-size", "256", "--dataset-size", "60000"), ("--sample-rate", "0.1")):
            answer = run_cli("calibrate", *given, *rest)
            assert (answer.code, "leave nothing to solve for" in answer.err) == (2, True)

    def test_an_epsilon_that_no_dataset_reaches_is_not_computable(self, run_cli: Cli, empty: Path) -> None:
        given = ("--epsilon", "1e-4", "--noise-multiplier", "0.2", "--batch-size", "256", "--epochs", "10")
        answer = run_cli("calibrate", *given)
        assert (answer.code, "error DP004: not even the largest dataset" in answer.err) == (6, True)

    def test_a_dataset_is_never_smaller_than_its_batch(self) -> None:
        facts = {"epsilon": 100.0, "noise_multiplier": 5.0, "epochs": 1, "delta": 1e-5, "accountant": "rdp"}
        assert min_dataset_size(batch_size=64, **facts) == 64
        with pytest.raises(InvalidParameter, match="batch size"):
            min_dataset_size(batch_size=0, **facts)


def test_a_plan_is_signed_for_an_attackers_advantage_if_the_ledger_has_its_epsilon(run_cli: Cli, empty: Path) -> None:
    run_cli("ledger", "init", "budget.ledger", "--epsilon", "8", "--delta", "1e-6", "--whole-budget")
    schedule = ("--batch", "256", "--examples", "60000", "--epochs", "10")
    new = ("plan", "new", "--ledger", "budget.ledger", *schedule, PRV, "--json")
    assert run_cli(*new, "--advantage", "0.5").code == 3
    assert run_cli(*new, "--advantage", "0.3", "--epsilon", "1").json["error"]["code"] == "DP064"
    signed = run_cli(*new, "--advantage", "0.3").json
    asked = run_cli("calibrate", *schedule, PRV, "--delta", "1e-6", "--advantage", "0.3", "--json").json
    assert signed["noise_multiplier"] == asked["noise_multiplier"]
    assert signed["epsilon"]["upper"] <= 8.0
