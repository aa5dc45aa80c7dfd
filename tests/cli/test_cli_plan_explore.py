"""plan explore: estimates are shown as such, the chosen row is certified, and the printed command signs it."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpbudget import calibrate
from dpbudget._explore import explore
from dpbudget.report.sweeps import SweepPicture, save_sweeps
from dpbudget_cli._progress import bar

Cli = Callable[..., Any]
#: Few cells, so that a command takes a tenth of a second.
SMALL = ("--dataset-size", "5000", "--points", "4", "--max-epochs", "20", "--min-steps", "50")


def explored(run_cli: Cli, *more: str) -> Any:
    return run_cli("plan", "explore", "--epsilon", "3", *SMALL, *more)


def test_every_cell_is_named_an_estimate_and_the_plan_certified(run_cli: Cli, empty: Path) -> None:
    answer = explored(run_cli, "--epsilon", "1", "--json").json
    assert [sweep["epsilon"] for sweep in answer["sweeps"]] == [3.0, 1.0]
    for sweep in answer["sweeps"]:
        assert sweep["kind"] == "numerical"
        assert len(sweep["cells"]) == 16
        assert sweep["plan"]["epsilon"]["kind"] == "certified"
        assert sweep["plan"]["epsilon"]["upper"] <= sweep["epsilon"]
        assert sweep["chosen"] in sweep["cells"]
        assert [cell["why"] for cell in sweep["frontier"]].count("") == 0
        assert sum("chosen" in cell["why"] for cell in sweep["frontier"]) == 1
        near = sweep["chosen"]["noise_multiplier"]
        assert near == pytest.approx(sweep["plan"]["noise_multiplier"], rel=0.01)
    assert answer["noise_multiplier_of_cells"] == "an estimate, no guarantee"
    assert {item["name"] for item in answer["assumed"]} == {
        "adjacency", "max_parameters", "noise", "delta", "max_batch"
    }  # fmt: skip


def test_people_see_estimates_marked_and_one_certified_claim(run_cli: Cli, empty: Path) -> None:
    answer = explored(run_cli)
    assert answer.code == 0
    rows = [line for line in answer.out.splitlines() if re.match(r"\d+ ", line)]
    assert len(rows) >= 2
    assert all(re.match(r"\d+ +\S+ +\d+ +~\S+ +\d+(\.\d+)? +\d+ +\S", row) for row in rows)
    assert sum("chosen" in row for row in rows) == 1
    assert answer.out.count("(certified claim)") == 1
    claim = re.search(r"^epsilon +(\S+) +\(certified claim\)$", answer.out, re.MULTILINE)
    assert claim is not None
    assert float(claim[1]) <= 3.0
    assert "signal/noise is batch size / noise multiplier" in answer.err


def test_without_an_epsilon_three_are_swept_and_their_chosen_rows_stand_together(run_cli: Cli, empty: Path) -> None:
    found = run_cli("plan", "explore", *SMALL, "--json").json
    assert [sweep["epsilon"] for sweep in found["sweeps"]] == [1.0, 3.0, 8.0]
    assert {item["name"]: item["value"] for item in found["assumed"]}["epsilon"] == [1.0, 3.0, 8.0]
    lines = run_cli("plan", "explore", *SMALL).out.splitlines()
    together = lines[lines.index("the chosen row of every epsilon, its noise certified") + 2 :]
    for line, sweep in zip(together, found["sweeps"], strict=True):
        epsilon, batch, _, steps, noise, *_ = line.split()
        assert (float(epsilon), int(batch)) == (sweep["epsilon"], sweep["chosen"]["batch_size"])
        assert int(steps) == sweep["plan"]["steps"]
        assert float(noise) == pytest.approx(sweep["plan"]["noise_multiplier"], rel=1e-3)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_printed_command_signs_the_plan_that_was_shown(run_cli: Cli, empty: Path, accountant: str) -> None:
    (empty / "dpbudget.toml").write_text(f'accountant = "{accountant}"\nmax_parameters = 5000\n', encoding="utf-8")
    (sweep,) = explored(run_cli, "--delta", "1e-6", "--json").json["sweeps"]
    made = run_cli("ledger", "init", "budget.ledger", "--epsilon", "3", "--delta", "1e-6", "--whole-budget")
    assert made.code == 0
    signed = run_cli(*shlex.split(sweep["next"])[1:], "--json")
    assert signed.code == 0, signed.err
    for name in ("noise_multiplier", "epsilon", "delta", "sample_rate", "steps", "accountant", "noise"):
        assert signed.json[name] == sweep["plan"][name], name
    assert ("--accountant" in sweep["next"]) == (accountant == "rdp")


def test_limits_narrow_the_sweep(run_cli: Cli, empty: Path) -> None:
    (sweep,) = explored(run_cli, "--max-batch", "100", "--json").json["sweeps"]
    assert max(cell["batch_size"] for cell in sweep["cells"]) == 100
    assert max(cell["epochs"] for cell in sweep["cells"]) == 20.0
    assert all(cell["steps"] >= 50 for cell in sweep["frontier"])
    exact = ("--batch-size", "64", "--batch-size", "500", "--epochs", "1/3", "--epochs", "40")
    (own,) = explored(run_cli, *exact, "--json").json["sweeps"]
    shape = [(cell["batch_size"], cell["epochs"]) for cell in own["cells"]]
    assert shape == [(64, 1 / 3), (500, 1 / 3), (64, 40.0), (500, 40.0)]


@pytest.mark.parametrize(
    ("more", "code", "exit_code"),
    [
        (["--min-steps", "1e6"], "DP009", 2),
        (["--epsilon", "1e-5"], "DP001", 2),
        (["--epsilon", "0"], "DP001", 2),
        (["--delta", "1e-60"], "DP053", 2),
        (["--points", "1"], "DP009", 2),
        (["--points", "40", "--epsilon", "1"], "DP009", 2),
        (["--max-epochs", "nan"], "DP009", 2),
        (["--dataset-size", "1e30"], "DP009", 2),
        (["--delta", "inf"], "DP002", 2),
        (["--batch-size", "6000"], "DP008", 2),
        (["--plot", "sweep.jpg"], "DP060", 2),
        (["--max-batchs", "3"], "DP060", 2),
    ],
)
def test_what_cannot_be_swept_is_refused(run_cli: Cli, empty: Path, more: list[str], code: str, exit_code: int) -> None:
    answer = explored(run_cli, *more)
    assert (answer.code, f"error {code}: " in answer.err, answer.out) == (exit_code, True, "")
    assert "Fix: " in answer.err


def test_a_delta_that_publishes_records_is_warned_of(run_cli: Cli, empty: Path) -> None:
    assert explored(run_cli, "--delta", "0.01").err.count("warning DP003") == 1
    assert explored(run_cli, "--delta", "0.01", "--json").json["warnings"][0].startswith("DP003")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, terminal = io.StringIO(), Terminal()
    monkeypatch.setenv("TERM", "xterm")
    for stream in (pipe, terminal):
        monkeypatch.setattr("sys.stderr", stream)
        with bar(3, "cells") as advance:
            advance("cells")
    assert pipe.getvalue() == ""
    assert "1/3" in terminal.getvalue()


class TestPicture:
    def test_a_file_is_written_and_the_same_sweep_gives_the_same_bytes(self, run_cli: Cli, empty: Path) -> None:
        assert explored(run_cli, "--epsilon", "8", "--plot", "one.svg").code == 0
        facts = {"dataset_size": 5000, "points": 4, "max_epochs": 20, "max_batch": 2000, "min_steps": 50}
        again = tuple(explore(epsilon=epsilon, **facts) for epsilon in (3.0, 8.0))
        save_sweeps(SweepPicture(again, 50), empty / "other.svg")
        assert (empty / "one.svg").read_bytes() == (empty / "other.svg").read_bytes()
        assert (empty / "one.svg").read_bytes().startswith(b"<?xml")

    @pytest.mark.parametrize(
        "shape", [{"batch_sizes": [64], "epochs": [3]}, {"points": 2}, {"epochs": [3], "points": 3}]
    )
    @pytest.mark.parametrize("min_steps", [1, 10**6])
    def test_few_cells_and_no_frontier_are_drawn_without_a_warning(
        self, tmp_path: Path, shape: dict[str, Any], min_steps: int
    ) -> None:
        sweep = explore(epsilon=3.0, dataset_size=5000, **shape)
        save_sweeps(SweepPicture((sweep,), min_steps), tmp_path / "few.png")
        assert (tmp_path / "few.png").read_bytes().startswith(b"\x89PNG")

    def test_cells_without_an_answer_are_left_out(self, tmp_path: Path) -> None:
        nothing = explore(epsilon=3.0, dataset_size=5000, delta=1e-60, points=3)
        save_sweeps(SweepPicture((nothing,), 1), tmp_path / "nothing.png")
        assert (tmp_path / "nothing.png").stat().st_size > 10000


def test_the_shown_plan_is_that_of_calibrate(run_cli: Cli, empty: Path) -> None:
    (sweep,) = explored(run_cli, "--json").json["sweeps"]
    cell = sweep["chosen"]
    plan = calibrate(epsilon=3.0, dataset_size=5000, batch_size=cell["batch_size"], epochs=cell["epochs"])
    assert sweep["plan"]["noise_multiplier"] == plan.phases[0].noise_multiplier
