"""calibrate, epsilon, delta and explain: one JSON object, honest numbers, every assumption named."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from dpbudget._calibrate import calibrate, delta_of, epsilon_of
from dpbudget.curve import Bounds
from dpbudget.errors import CODES, WAYS_OUT
from dpbudget_cli._options import parse_number, to_count, to_float

ROOT = Path(__file__).resolve().parents[2]
Cli = Callable[..., Any]


class TestEpsilonAndDelta:
    ARGUMENTS = ("--sample-rate", "256/60000", "--noise-multiplier", "1.1", "--steps", "1000")

    def test_epsilon_has_the_fields_of_the_contract(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("epsilon", *self.ARGUMENTS, "--delta", "1e-5", "--accountant", "prv", "--json")
        exact = epsilon_of([(256 / 60000, 1.1, 1000)], delta=1e-5)
        assert answer.code == 0
        assert answer.json["epsilon"] == {
            "lower": exact.lower, "upper": exact.upper, "kind": "certified", "approximate": None
        }  # fmt: skip
        assert {key: answer.json[key] for key in ("delta", "accountant", "adjacency")} == {
            "delta": 1e-5, "accountant": "prv", "adjacency": "add-remove"
        }  # fmt: skip
        assert {item["name"] for item in answer.json["assumed"]} == {"adjacency", "noise"}

    def test_delta_has_the_fields_of_the_contract(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("delta", *self.ARGUMENTS, "--epsilon", "2", "--adjacency", "zero-out", "--json")
        exact = delta_of([(256 / 60000, 1.1, 1000)], epsilon=2.0, accountant="rdp")
        assert (answer.json["delta"]["lower"], answer.json["delta"]["upper"]) == (exact.lower, exact.upper)
        assert (answer.json["epsilon"], answer.json["adjacency"]) == (2.0, "zero-out")
        assert answer.json["accountant"] == "rdp"

    def test_phases_compose(self, run_cli: Cli, empty: Path) -> None:
        phases = ("--phase", "0.01,1,500", "--phase", "1/50, 1.5, 5e2")
        answer = run_cli("epsilon", *phases, "--delta", "1e-5", "--json")
        exact = epsilon_of([(0.01, 1.0, 500), (0.02, 1.5, 500)], delta=1e-5, accountant="rdp")
        assert answer.json["epsilon"]["upper"] == exact.upper

    def test_people_see_the_upper_bound_rounded_up_and_the_assumptions_aside(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("epsilon", *self.ARGUMENTS, "--delta", "1e-5")
        shown = answer.out.splitlines()[0].split()
        assert shown[0] == "epsilon"
        assert float(shown[1]) >= epsilon_of([(256 / 60000, 1.1, 1000)], delta=1e-5, accountant="rdp").upper
        assert "assumed adjacency = add-remove (documented default)" in answer.err
        assert "assumed" not in answer.out

    @pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
    def test_no_upper_bound_is_no_answer(
        self, run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
    ) -> None:
        monkeypatch.setattr("dpbudget._calibrate.epsilon_of", lambda *a, **k: Bounds(0.0, math.inf))
        answer = run_cli("epsilon", *self.ARGUMENTS, "--delta", "1e-5", *form)
        assert answer.code == 6
        assert "DP063" in answer.out + answer.err


class TestCalibrate:
    def test_a_target_alone_is_answered_and_every_assumption_named(self, run_cli: Cli, empty: Path) -> None:
        (empty / "dpbudget.toml").unlink()
        answer = run_cli("calibrate", "--epsilon", "3", "--json")
        plan = calibrate(epsilon=3.0, dataset_size=60000, batch_size=256, epochs=10)
        assert answer.json["noise_multiplier"] == plan.phases[0].noise_multiplier
        assert answer.json["epsilon"]["upper"] == plan.claim.epsilon <= 3.0
        assert answer.json["epsilon"]["lower"] > 2.99999
        assert (answer.json["sample_rate"], answer.json["steps"]) == (256 / 60000, 2344)
        assert answer.json["delta"] == 60000**-1.1
        assumed = {item["name"]: item["value"] for item in answer.json["assumed"]}
        assert assumed == {
            "dataset_size": 60000, "batch_size": 256, "epochs": 10.0, "delta": 60000**-1.1, "accountant": "prv",
            "adjacency": "add-remove", "clip_norm": 1.0, "max_parameters": 2**30, "noise": "secure",
        }  # fmt: skip
        assert all(item["why"] for item in answer.json["assumed"])

    def test_nothing_is_assumed_where_everything_was_said(self, run_cli: Cli, empty: Path) -> None:
        arguments = "--delta 1e-5 --sample-rate 0.01 --steps 100 --clip-norm 2 --accountant rdp --adjacency add-remove"
        answer = run_cli("calibrate", "--epsilon", "1", *arguments.split(), "--json")
        assert [item["name"] for item in answer.json["assumed"]] == ["max_parameters", "noise"]
        assert answer.json["clip_norm"] == 2.0

    def test_settings_come_before_defaults_and_options_before_settings(self, run_cli: Cli, empty: Path) -> None:
        (empty / "dpbudget.toml").write_text('accountant = "rdp"\ndataset_size = 5000\nepochs = 2\n', encoding="utf-8")
        answer = run_cli("calibrate", "--epsilon", "1", "--epochs", "4", "--json")
        assert answer.json["steps"] == -(-4 * 5000 // 256)
        why = {item["name"]: item["why"] for item in answer.json["assumed"]}
        assert why["dataset_size"].endswith("dpbudget.toml")
        assert "epochs" not in why

    def test_with_a_noise_multiplier_it_solves_for_the_steps(self, run_cli: Cli, empty: Path) -> None:
        arguments = ["--epsilon", "2", "--delta", "1e-5", "--sample-rate", "0.01", "--noise-multiplier", "1.2"]
        answer = run_cli("calibrate", *arguments, "--json")
        assert answer.json["noise_multiplier"] == 1.2
        more = epsilon_of([(0.01, 1.2, answer.json["steps"] + 1)], delta=1e-5, accountant="rdp")
        assert answer.json["epsilon"]["upper"] <= 2.0 < more.upper * (1 + 1e-6)

    def test_a_default_batch_never_exceeds_a_small_dataset(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("calibrate", "--epsilon", "3", "--dataset-size", "100", "--json")
        assert answer.json["sample_rate"] == 1.0
        assert next(item for item in answer.json["assumed"] if item["name"] == "batch_size")["value"] == 100

    def test_a_delta_that_publishes_records_is_warned_of(self, run_cli: Cli, empty: Path) -> None:
        talk = run_cli("calibrate", "--epsilon", "3", "--delta", "0.01")
        assert talk.code == 0
        assert talk.err.count("warning DP003") == 1
        steps = run_cli("calibrate", "--epsilon", "3", "--noise-multiplier", "2", "--delta", "0.01")
        assert steps.err.count("warning DP003") == 1, "asked twice, said once"
        facts = ("--dataset-size", "400", "--batch-size", "100", "--epochs", "2", "--noise-multiplier", "2")
        assert run_cli("epsilon", *facts, "--delta", "0.01").err.count("warning DP003") == 1
        assert "DP003" not in run_cli("epsilon", *facts, "--delta", "1e-5").err
        assert (
            run_cli("calibrate", "--epsilon", "3", "--delta", "0.01", "--json").json["warnings"][0].startswith("DP003")
        )

    def test_an_unreachable_target_is_not_computable(self, run_cli: Cli, empty: Path) -> None:
        answer = run_cli("calibrate", "--epsilon", "1e-9")
        assert answer.code == 6
        assert answer.err.count("DP004") == 1
        assert "smallest reachable" in answer.err


class TestExplain:
    def test_every_code_is_explained(self, run_cli: Cli) -> None:
        for code, meaning in CODES.items():
            answer = {"code": code, "meaning": meaning, "way_out": WAYS_OUT[code]}
            assert run_cli("explain", code.lower(), "--json").json == answer
        assert run_cli("explain", "--json").json == {"codes": CODES, "ways_out": WAYS_OUT}
        assert f"Fix    {WAYS_OUT['DP078']}" in run_cli("explain", "DP078").out

    def test_an_unknown_code_is_refused_with_the_nearest(self, run_cli: Cli) -> None:
        answer = run_cli("explain", "DP51")
        assert answer.code == 2
        assert "Did you mean DP051?" in answer.err


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-5", Fraction(1, 100000)),
            ("256/60000", Fraction(256, 60000)),
            (" 1 / 3 ", Fraction(1, 3)),
            ("60_000", Fraction(60000)),
            (".5", Fraction(1, 2)),
            ("-2", Fraction(-2)),
        ],
    )
    def test_a_number_is_read_exactly(self, text: str, value: Fraction) -> None:
        assert parse_number(text) == value

    @pytest.mark.parametrize(
        "text", ["nan", "inf", "-inf", "1/0", "", "1e99999", "0x10", "1//2", "1/2/3", "١", "1e5 6", "9" * 100]
    )
    def test_what_is_no_number_is_kept_as_text_to_be_refused(self, text: str) -> None:
        assert parse_number(text) is None
        assert to_float(text) == text
        assert to_count(text) == text

    def test_a_count_must_be_whole(self) -> None:
        assert to_count("6e4") == 60000
        assert to_count("1.5") == "1.5"


class TestRealProcesses:
    def program(self, *args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        code = "from dpbudget_cli.main import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "PATH": "/usr/bin:/bin", **env},
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    def test_a_pipe_gets_json_on_one_stream_and_talk_on_the_other(self, empty: Path) -> None:
        done = self.program("calibrate", "--epsilon", "3", "--json", cwd=empty)
        assert done.returncode == 0
        assert json.loads(done.stdout)["steps"] == 2344
        assert done.stderr == ""

    def test_no_escape_sequences_reach_a_pipe(self, empty: Path) -> None:
        done = self.program("calibrate", "--epsilon", "3", cwd=empty, NO_COLOR="1")
        assert "\x1b" not in done.stdout + done.stderr

    def test_the_version_is_printed_and_the_exit_code_is_real(self, empty: Path) -> None:
        assert self.program("--version", cwd=empty).stdout.startswith("dpbudget 0.")
        assert self.program("calibrate", "--epsilon", "-1", cwd=empty).returncode == 2

    def test_a_prompt_never_waits_in_a_pipe(self, empty: Path) -> None:
        done = self.program("key", "new", "x.key", "--passphrase", cwd=empty)
        assert done.returncode == 2
        assert "--passphrase-fd" in done.stderr
        assert not (empty / "x.key").exists()
