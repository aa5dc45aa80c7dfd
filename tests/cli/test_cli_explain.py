"""--explain, --plot and the targets of the command line: plain words with the numbers of the core."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpbudget import epsilon_of, plan_for
from dpbudget.accountants import get_accountant
from dpbudget.mechanisms import Adjacency, Charge, Gaussian, PoissonSampled

Cli = Callable[..., Any]
QUESTION = ["--sample-rate", "0.01", "--noise-multiplier", "1", "--steps", "500", "--delta", "1e-5"]


class TestExplain:
    def test_the_numbers_are_those_of_the_curve(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("epsilon", *QUESTION, "--accountant", "prv", "--explain", "--json").json
        mechanism = PoissonSampled(rate_k=round(0.01 * 2**64), inner=Gaussian(noise_multiplier=1.0))
        curve = get_accountant("prv").curve([Charge(mechanism, 500)], Adjacency.ADD_REMOVE)
        explained = answer["explain"]
        assert explained["advantage"]["upper"] == curve.advantage().upper
        assert explained["tpr_at_fpr_0.01"]["upper"] == curve.tpr_at(0.01).upper
        assert explained["bayes_success_at_prior_0.5"]["upper"] == curve.bayes_risk(0.5).upper
        rdp = epsilon_of([(0.01, 1.0, 500)], delta=1e-5, accountant="rdp").upper
        assert explained["rdp_epsilon"] == rdp
        assert explained["rdp_looser_percent"] == pytest.approx(100 * (rdp / answer["epsilon"]["upper"] - 1))
        assert explained["noise_tail_covered"] is False

    def test_words_say_what_is_meant_and_what_is_not_covered(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("epsilon", *QUESTION, "--accountant", "prv", "--explain")
        text = " ".join(answer.out.split())
        for part in (
            "Poisson sampling",
            "certified",
            "Renyi",
            "true positive",
            "at 1 % false positives",
            "Not covered",
        ):
            assert part in text
        assert answer.out.isascii()
        assert max(len(line) for line in answer.out.splitlines()) <= 100

    @pytest.mark.parametrize("columns", ["50", "72"])
    def test_text_wraps_at_the_width_of_the_terminal(
        self, run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch, columns: str
    ) -> None:
        monkeypatch.setenv("COLUMNS", columns)
        lines = run_cli("epsilon", *QUESTION, "--explain").out.splitlines()
        assert max(map(len, lines)) <= int(columns)

    def test_printed_risks_are_rounded_up(self, run_cli: Cli, empty: Path) -> None:
        explained = run_cli("epsilon", *QUESTION, "--explain", "--json").json["explain"]
        text = run_cli("epsilon", *QUESTION, "--explain").out
        shown = re.search(r"rate is at most ([\d.]+);", " ".join(text.split()))
        assert shown
        assert float(shown[1]) >= explained["advantage"]["upper"]

    def test_a_plan_is_explained_with_its_tail(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("calibrate", "--epsilon", "1", "--explain", "--json").json
        assert answer["explain"]["noise_tail_covered"] is True
        assert not any("tail" in item for item in answer["explain"]["not_covered"])


class TestTargets:
    def test_an_advantage_is_a_target(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("calibrate", "--advantage", "0.1", "--explain", "--accountant", "prv", "--json").json
        assert 0.0999999 <= answer["explain"]["advantage"]["upper"] <= 0.1

    def test_a_rate_at_a_rate_is_a_target(self, run_cli: Cli, empty: Path) -> None:
        arguments = ["--tpr", "0.05", "--fpr", "0.01", "--explain", "--accountant", "prv", "--json"]
        answer = run_cli("calibrate", *arguments).json
        assert 0.04999 <= answer["explain"]["tpr_at_fpr_0.01"]["upper"] <= 0.0500001

    def test_noise_and_epochs_leave_the_batch_to_solve_for(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("calibrate", "--epsilon", "3", "--noise-multiplier", "1.1", "--epochs", "10", "--json").json
        batch = round(answer["sample_rate"] * 60000)
        facts = {"noise_multiplier": 1.1, "epochs": 10, "dataset_size": 60000, "accountant": "rdp"}
        assert answer["epsilon"]["upper"] == plan_for(batch_size=batch, **facts).claim.epsilon <= 3.0
        assert plan_for(batch_size=batch + batch // 20, **facts).claim.epsilon > 3.0
        assert "batch_size" not in {item["name"] for item in answer["assumed"]}

    @pytest.mark.parametrize(
        "arguments",
        [
            "",
            "--epsilon 3 --advantage 0.1",
            "--tpr 0.1",
            "--fpr 0.1",
            "--advantage 0.1 --tpr 0.1 --fpr 0.01",
            "--advantage 0.1 --noise-multiplier 1",
            "--epsilon 3 --noise-multiplier 1 --epochs 2 --batch-size 10 --dataset-size 99",
        ],
    )
    def test_exactly_one_thing_is_unknown(self, run_cli: Cli, empty: Path, arguments: str) -> None:
        answer = run_cli("calibrate", *arguments.split(), "--json")
        assert (answer.code, answer.json["error"]["code"]) == (2, "DP064")
        assert answer.json["error"]["hint"]


class TestScheduleOfEpsilon:
    def test_epochs_and_batches_are_a_schedule_too(self, run_cli: Cli, empty: Path) -> None:
        arguments = "--dataset-size 60000 --batch-size 256 --epochs 10 --noise-multiplier 1.1 --delta 1e-5 --json"
        answer = run_cli("epsilon", *arguments.split()).json
        exact = epsilon_of([(256 / 60000, 1.1, 2344)], delta=1e-5, accountant="rdp")
        assert answer["epsilon"]["upper"] == exact.upper

    @pytest.mark.parametrize("extra", ["--batch-size 10 --dataset-size 1000", "--epochs 3", "--phase 0.1,1,10"])
    def test_nothing_is_said_twice(self, run_cli: Cli, empty: Path, extra: str) -> None:
        answer = run_cli("epsilon", *QUESTION, *extra.split(), "--json")
        assert (answer.code, answer.json["error"]["code"]) == (2, "DP064")


class TestPlot:
    def test_a_figure_is_written_and_replaced(self, run_cli: Cli, empty: Path) -> None:
        (empty / "profile.svg").write_text("old", encoding="utf-8")
        assert run_cli("epsilon", *QUESTION, "--plot", "profile.svg").code == 0
        assert (empty / "profile.svg").read_text(encoding="utf-8").startswith("<?xml")

    def test_a_place_that_cannot_be_written_ends_with_four(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("epsilon", *QUESTION, "--plot", "nowhere/profile.png", "--json")
        assert (answer.code, answer.json["error"]["code"]) == (4, "DP070")

    def test_another_suffix_is_wrong_usage(self, run_cli: Cli, empty: Path) -> None:
        assert run_cli("epsilon", *QUESTION, "--plot", "profile.bmp").code == 2
