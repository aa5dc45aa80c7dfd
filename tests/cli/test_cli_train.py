"""train: steps from the ledger alone, weights whole or not at all, and nothing told about private data."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dpbudget._verify import verify

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("train", "--ledger", "budget.ledger", "--data", "train.npz", "--classes", "2")
PLAN_NEW = (
    *("plan", "new", "--ledger", "budget.ledger", "--epsilon", "1"),
    *("--dataset-size", "100", "--batch-size", "20", "--steps", "8"),  # fewer are hard to account for
)

MODELS = """
import torch
def small(features, classes):
    return torch.nn.Sequential(torch.nn.Linear(features, 3), torch.nn.ReLU(), torch.nn.Linear(3, classes))
def broken(features, classes):
    raise ValueError("no such thing")
def mixing(features, classes):
    return torch.nn.Sequential(torch.nn.Linear(features, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, classes))
def number(features, classes):
    return 3
class Late(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 2)
    def forward(self, x):
        if x.any():
            raise RuntimeError(f"batch of {tuple(x.shape)}")
        return self.inner(x)
def misfit(features, classes):
    return torch.nn.Linear(features + 1, classes)
def narrow(features, classes):
    return torch.nn.Linear(features, 1)
def lazy(features, classes):
    return torch.nn.LazyLinear(classes)
def late(features, classes):
    return Late()
"""


@pytest.fixture
def job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prepared folder with a module of models of its own name."""
    (folder / "my_models.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    return folder


class TestTraining:
    def test_it_takes_every_planned_step_and_writes_the_weights(self, run_cli: Cli, job: Path) -> None:
        answer = run_cli(*TRAIN, "--output", "w.safetensors", "--json")
        assert answer.code == 0
        assert (answer.json["steps"], answer.json["charged"], answer.json["planned"]) == (20, 20, 20)
        report = verify("budget.ledger")
        assert (report.ok, report.steps, report.head) == (True, 20, answer.json["head"])
        assert report.epsilon is not None
        assert answer.json["claim"]["epsilon"] == report.epsilon.upper <= 1.0
        assert answer.json["epsilon_so_far"]["upper"] <= answer.json["claim"]["epsilon"]
        assert {name: tuple(value.shape) for name, value in load_file("w.safetensors").items()} == {
            "1.weight": (2, 4),
            "1.bias": (2,),
        }
        with safe_open("w.safetensors", framework="pt") as file:
            assert file.metadata()["run"] == answer.json["run"]
        assert not list(job.glob(".w.safetensors*"))

    def test_a_used_up_plan_is_refused_and_writes_nothing(self, run_cli: Cli, job: Path, seen: Seen) -> None:
        run_cli(*TRAIN)
        before = seen(job)
        answer = run_cli(*TRAIN, "--output", "w.safetensors")
        assert (answer.code, "DP050" in answer.err) == (3, True)
        assert seen(job) == before

    def test_csv_and_a_declared_public_file_give_an_accuracy(self, run_cli: Cli, job: Path) -> None:
        data = ("--data", "train.csv", "--target", "label", "--public-eval", "train.csv")
        answer = run_cli(*TRAIN, *data, "--lr", "2", "--json")
        assert 0.6 < answer.json["public_accuracy"] <= 1.0

    def test_without_public_data_nothing_is_told_about_the_data(self, run_cli: Cli, job: Path) -> None:
        answer = run_cli(*TRAIN)
        assert answer.code == 0
        said = re.sub("[0-9a-f]{8,}", "", (answer.out + answer.err).lower())  # digits of names and hashes by chance
        for word in ("loss", "accuracy", "batch size", "records", "100"):
            assert word not in said, word

    @pytest.mark.parametrize("model", ["linear", "mlp", "my_models:small", "my_models:lazy"])
    def test_every_kind_of_model_trains(self, run_cli: Cli, job: Path, model: str) -> None:
        assert run_cli(*TRAIN, "--model", model, "--physical-batch-size", "7", "--momentum", "0.5").code == 0

    @pytest.mark.parametrize(("shape", "channels"), [((8, 8), 1), ((3, 6, 10), 3), ((1, 2, 2), 1)])
    def test_a_cnn_takes_images_of_any_size_with_or_without_channels(
        self, run_cli: Cli, job: Path, shape: tuple[int, ...], channels: int
    ) -> None:
        assert run_cli(*PLAN_NEW, "--json").code == 0
        run = run_cli("ledger", "plans", "budget.ledger", "--json").json["plans"][-1]["run"]
        np.savez("images.npz", x=np.zeros((100, *shape), dtype=np.uint8), y=np.arange(100) % 2)
        answer = run_cli(*TRAIN, "--plan", run, "--data", "images.npz", "--model", "cnn", "--output", "w.safetensors")
        assert answer.code == 0, answer.err
        assert load_file("w.safetensors")["1.weight"].shape == (16, channels, 3, 3)
        again = ("--init", "w.safetensors", "--plan", run, "--data", "images.npz", "--model", "cnn")
        assert "DP050" in run_cli(*TRAIN, *again).err  # the weights fit the model; only the plan is used up

    @pytest.mark.parametrize(("shape", "hint"), [((5,), "--model mlp"), ((8, 8, 3), "x.transpose(0, 3, 1, 2)")])
    def test_a_cnn_refuses_what_is_no_image_and_says_what_one_is(
        self, run_cli: Cli, job: Path, seen: Seen, shape: tuple[int, ...], hint: str
    ) -> None:
        np.savez("images.npz", x=np.zeros((100, *shape)), y=np.arange(100) % 2)
        before = seen(job)
        answer = run_cli(*TRAIN, "--data", "images.npz", "--model", "cnn")
        assert (answer.code, "DP091" in answer.err, seen(job) == before) == (2, True, True)
        assert "[H, W] or [C, H, W]" in answer.err
        assert hint in answer.err

    def test_two_runs_differ_by_their_noise_though_the_seed_is_one(
        self, run_cli: Cli, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import shutil

        shutil.copytree(job, tmp_path / "twin")
        run_cli(*TRAIN, "--output", "w.safetensors", "--seed", "5")
        monkeypatch.chdir(tmp_path / "twin")
        refused = run_cli(*TRAIN, "--output", "w.safetensors", "--seed", "5")
        assert (refused.code, "DP079" in refused.err) == (1, True)  # two copies that both spend, on one machine
        monkeypatch.setenv("DPBUDGET_STATE", str(tmp_path / "another machine"))
        run_cli(*TRAIN, "--output", "w.safetensors", "--seed", "5")
        one, other = (load_file(place / "w.safetensors")["1.weight"] for place in (job, tmp_path / "twin"))
        assert not torch.equal(one, other)

    def test_values_beyond_float32_do_not_stop_the_training(self, run_cli: Cli, job: Path) -> None:
        features = np.zeros((100, 4))
        features[3] = [1e300, np.nan, np.inf, -np.inf]
        np.savez("odd.npz", x=features, y=np.zeros(100, dtype=int))
        answer = run_cli(*TRAIN, "--data", "odd.npz", "--fill-missing", "0", "--output", "w.safetensors")
        assert answer.code == 0, answer.err
        assert all(torch.isfinite(value).all() for value in load_file("w.safetensors").values())


class TestMissingExtras:
    @pytest.mark.parametrize("missing", ["torch", "safetensors"])
    def test_a_missing_extra_is_named_with_its_command(
        self, run_cli: Cli, job: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch, missing: str
    ) -> None:
        before = seen(job)
        monkeypatch.setitem(sys.modules, missing, None)
        answer = run_cli(*TRAIN)
        assert (answer.code, "DP090" in answer.err) == (2, True)
        assert missing in answer.err
        assert "pip install 'dpbudget[train]'" in answer.err
        assert seen(job) == before


class TestUserModels:
    @pytest.mark.parametrize(
        ("model", "code", "words"),
        [
            ("my_models:broken", "DP093", "ValueError: no such thing"),
            ("my_models:number", "DP093", "returned int"),
            ("my_models:misfit", "DP093", "shapes cannot be multiplied (2x4 and 5x2)"),
            ("my_models:narrow", "DP093", "returns [2, 1]"),
            ("my_models:absent", "DP093", "AttributeError"),
            ("my_models:mixing", "DP010", "BatchNorm1d"),
        ],
    )
    def test_a_model_that_cannot_be_trained_is_refused_before_any_charge(
        self, run_cli: Cli, job: Path, seen: Seen, model: str, code: str, words: str
    ) -> None:
        before = {name: mark for name, mark in seen(job).items() if not name.startswith("__pycache__")}
        answer = run_cli(*TRAIN, "--model", model, "--output", "w.safetensors")
        after = {name: mark for name, mark in seen(job).items() if not name.startswith("__pycache__")}
        assert answer.code == 2
        assert code in answer.err
        assert words in answer.err
        assert after == before
        assert "Traceback" not in answer.err

    def test_a_model_that_fails_on_data_is_named_without_its_message(self, run_cli: Cli, job: Path) -> None:
        answer = run_cli(*TRAIN, "--model", "my_models:late")
        assert answer.code == 2
        assert "batch of" not in answer.err
        assert "Traceback" not in answer.err
        assert verify("budget.ledger").steps <= 1


def test_too_little_memory_for_the_data_does_not_tell_their_size(
    run_cli: Cli, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: object) -> None:
        raise MemoryError("Unable to allocate 1.84 GiB for an array with shape (1234567, 400) and data type float32")

    monkeypatch.setattr("dpbudget_cli._data.Table.scaled", short)
    answer = run_cli(*TRAIN)
    assert (answer.code, "DP099" in answer.err, "MemoryError" in answer.err) == (6, True, True)
    assert "1234567" not in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("error", "told"), [(OSError(5, "Input/output error"), True), (OSError("record 77 of 100"), False)]
)
def test_of_what_the_system_says_nothing_is_hidden(
    run_cli: Cli, job: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, told: bool
) -> None:
    def failing(*args: object) -> None:
        raise error

    monkeypatch.setattr("dpbudget_cli._data.Table.scaled", failing)
    answer = run_cli(*TRAIN)
    assert ("Input/output error" in answer.err) == told
    assert "77" not in answer.err.split("error DP", 1)[1]


class TestInterrupts:
    def test_the_first_interrupt_keeps_the_weights_and_the_second_call_goes_on(self, run_cli: Cli, job: Path) -> None:
        code = f"""
import os, signal
import dptrainer.trainer as trainer
from dpbudget_cli.main import main
tell = trainer.PrivateTrainer._tell
def interrupt(self, steps):
    if steps == 3:
        os.kill(os.getpid(), signal.{signal.SIGINT.name})
    tell(self, steps)
trainer.PrivateTrainer._tell = interrupt
main({[*TRAIN, "--output", "w.safetensors", "--json"]!r})
"""
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
        first = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
        assert first.returncode == 130, first.stderr
        assert "stopping after this step" in first.stderr
        assert "--init w.safetensors and another --output" in first.stderr
        assert json.loads(first.stdout)["steps"] == 3
        assert (job / "w.safetensors").exists()
        more = [*TRAIN, "--init", "w.safetensors", "--output", "end.safetensors", "--json"]
        second = run_cli(*more)
        assert second.code == 0, second.err
        answer = second.json
        assert answer["charged"] == answer["planned"] == 20
        assert answer["steps"] <= 17


class TestCheckpoints:
    KILLED = """
import os, signal
import dptrainer.trainer as trainer
from dpbudget_cli.main import main
tell = trainer.PrivateTrainer._tell
def kill(self, steps):
    tell(self, steps)
    if steps == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.PrivateTrainer._tell = kill
main({words!r})
"""
    WORDS = (*TRAIN, "--output", "w.safetensors", "--checkpoint-every", "2", "--momentum", "0.5", "--json")

    def killed_at(self, step: int) -> None:
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
        code = self.KILLED.format(step=step, words=[*self.WORDS])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr

    def weights(self, job: Path) -> dict[str, torch.Tensor]:
        folders = list((job / "w.safetensors.checkpoint").iterdir())
        assert len(folders) == 1  # older ones are dropped, none is half written
        return load_file(folders[0] / "model.safetensors")

    def test_a_killed_process_goes_on_from_its_checkpoint_under_the_same_command(
        self, run_cli: Cli, job: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import dptrainer.trainer

        self.killed_at(5)
        kept, first = self.weights(job), []
        fit = dptrainer.trainer.PrivateTrainer.fit
        monkeypatch.setattr(
            dptrainer.trainer.PrivateTrainer,
            "fit",
            lambda self: (first.append({k: v.clone() for k, v in self._model.state_dict().items()}), fit(self))[1],
        )
        answer = run_cli(*self.WORDS)
        assert answer.code == 0, answer.err
        assert "going on from the checkpoint of step 4\n" in answer.err
        assert all(torch.equal(first[0][name], kept[name]) for name in kept)
        assert (answer.json["charged"], answer.json["output"]) == (20, "w.safetensors")
        assert not (job / "w.safetensors.checkpoint").exists()
        assert verify("budget.ledger").steps == 20

    def test_a_process_killed_after_the_last_step_still_gives_its_weights(self, run_cli: Cli, job: Path) -> None:
        self.killed_at(20)
        kept = self.weights(job)
        answer = run_cli(*self.WORDS)
        assert answer.code == 0, answer.err
        assert (answer.json["steps"], answer.json["charged"]) == (0, 20)
        final = load_file("w.safetensors")
        assert all(torch.equal(final[name], kept[name]) for name in kept)
        assert run_cli(*TRAIN).code == 3

    def test_a_checkpoint_of_another_model_is_refused_before_any_step(self, run_cli: Cli, job: Path) -> None:
        self.killed_at(3)
        before = verify("budget.ledger").steps
        answer = run_cli(*self.WORDS, "--model", "mlp")
        assert (answer.code, answer.json["error"]["code"]) == (4, "DP091")
        assert verify("budget.ledger").steps == before

    def test_without_output_the_weights_are_kept_beside_the_ledger(self, run_cli: Cli, job: Path) -> None:
        answer = run_cli(*TRAIN, "--json")
        assert answer.json["output"] == f"budget.ledger.{answer.json['run'][:8]}.safetensors"
        assert set(load_file(answer.json["output"])) == {"1.weight", "1.bias"}


class TestExactNoise:
    """A plan says how noise is made, and training follows it."""

    def test_a_plan_with_exact_noise_trains_and_verify_says_so(self, run_cli: Cli, job: Path) -> None:
        size = ("--dataset-size", "100", "--batch-size", "20", "--steps", "8", "--max-parameters", "5000")
        plan = run_cli(
            "plan", "new", "--ledger", "budget.ledger", "--epsilon", "1", "--noise", "exact", *size, "--json"
        )
        assert plan.code == 0, plan.err
        assert plan.json["noise"] == "exact"
        answer = run_cli(*TRAIN, "--plan", plan.json["run"], "--output", "w.safetensors", "--json")
        assert answer.code == 0, answer.err
        assert (answer.json["steps"], answer.json["charged"]) == (8, 8)
        assert {run.noise: run.charged for run in verify("budget.ledger").runs} == {"secure": 0, "exact": 8}
        said = run_cli("verify", "budget.ledger").out
        assert "exact noise: integer sums and noise; the claim holds down to the bit" in said
        assert "secure noise" not in said  # nothing of it was charged
        assert run_cli(*TRAIN, "--plan", other_run(plan.json["run"]), "--output", "v.safetensors").code == 0
        both = run_cli("verify", "budget.ledger").out
        assert "exact noise in 1 runs" in both
        assert "secure noise in 1 runs: bounded tail charged" in both

    def test_a_word_that_is_no_mode_is_answered_with_those_that_are(self, run_cli: Cli, job: Path) -> None:
        answer = run_cli("calibrate", "--epsilon", "1", "--noise", "exakt")
        assert answer.code == 2
        assert "DP060" in answer.err
        assert "Did you mean exact?" in answer.err


def other_run(run: str) -> str:
    """The run of the ledger that is not this one."""
    (other,) = (found.run_id for found in verify("budget.ledger").runs if found.run_id != run)
    return other
