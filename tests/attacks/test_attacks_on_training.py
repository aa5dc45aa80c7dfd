"""Attacks 20 to 26: swapped plans, wrong clipping and noise, foreign sampling, crashes, replays."""

# ruff: noqa: E402 - torch is optional, and without it nothing below can be imported

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from attackkit import (
    OWNER,
    WRITER,
    charged,
    export,
    forged,
    head_of,
    plan,
    problem,
    problem_of,
    released,
    reopen,
    rows,
    signed,
    spend,
    swap_statement,
    verify,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from scipy.stats import chi2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainkit import begin, new_model, same, some_data, train

import dptrainer.base
from dpbudget.errors import PlanExhausted, PrivacyViolation, Tampered
from dpbudget.ledger.noise_keys import LeaseKey, StepKeys, commitment_matches, run_ratchet
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.store.jsonl import read_export
from dptrainer import PrivateTrainer, SecureNoise, load_checkpoint, make_engine, make_private, save_checkpoint
from dptrainer.clipping import policy
from dptrainer.noise.gaussian import add_gaussian_
from dptrainer.noise.keys import Purpose, encode_info
from dptrainer.update import output_digest
from dptrainer.values import ClippedSum, NoisySum

HERE = Path(__file__).resolve().parent


def _program(name: str, *arguments: object) -> subprocess.Popen[str]:
    """A program of this folder, in a process of its own with one thread."""
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "cli")])
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)


def _weaker(predicate: dict[str, Any]) -> None:
    (phase,) = predicate["phases"]
    phase["noise_multiplier"] = (float.fromhex(phase["noise_multiplier"]) / 2).hex()


def _longer(predicate: dict[str, Any]) -> None:
    predicate["phases"][0]["steps"] += 100


@pytest.mark.parametrize("change", [_weaker, _longer], ids=["sigma", "T"])
def test_attack_20_a_plan_swapped_after_the_start_is_noticed_and_the_run_keeps_its_own(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = tmp_path / "ledger"
    run_id = signed(path, 4)
    spend(path, run_id, 1)
    data, seen = export(path), head_of(path)

    def swap(signer: Any) -> bytes:
        return forged(data, lambda r, e: swap_statement(r, e, signer, change) if r["type"] == "plan" else e)

    assert "signed by key" in str(problem_of(swap(WRITER), tmp_path))  # the writer signs the whole chain again
    other = tmp_path / "other.jsonl"
    other.write_bytes(swap(OWNER))  # with the owner's help it is another history than the one that was seen
    assert verify(other, expect_head=seen).exit_code != 0
    assert any("another history" in found for found in verify(other, expect_head=seen).problems)
    # Swapped in the file under an open run: its receipts stay those of the plan that it verified.
    ledger = reopen(path)
    run = ledger.start(run_id, lease_steps=1)
    (entry,) = [e for e in read_export(swap(OWNER)).entries if b'"type":"plan"' in e.line]
    rows(
        path,
        f"UPDATE record SET line = x'{entry.line.hex()}', envelope = x'{(entry.envelope or b'').hex()}' WHERE seq = 2",
    )
    receipt = run.next_receipt()
    assert (receipt.noise_multiplier, receipt.steps) == (plan(4).phases[0].noise_multiplier, 4)
    assert len(list(run)) == 2
    with pytest.raises(PlanExhausted):
        run.next_receipt()
    ledger.close()
    assert problem(path) is not None
    with pytest.raises(Tampered):
        reopen(path)


def test_attack_20_a_checkpoint_does_not_go_on_under_another_plan(tmp_path: Path) -> None:
    ledger, run = begin(tmp_path / "ledger", epsilon=1.0)
    model = new_model()
    train(model, run, callbacks=[lambda *_: False])
    save_checkpoint(tmp_path / "kept", model, torch.optim.SGD(model.parameters()), run=run)
    other_ledger, other = begin(tmp_path / "other", epsilon=2.0)
    with pytest.raises(PrivacyViolation) as caught:
        load_checkpoint(tmp_path / "kept", new_model(), run=other)
    assert caught.value.code == "DP051"
    ledger.close()
    other_ledger.close()


def test_attack_21_a_trainer_that_clips_at_twice_the_norm_of_the_plan_releases_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, run = begin(tmp_path / "ledger")
    monkeypatch.setattr(
        dptrainer.base,
        "make_engine",
        lambda model, clip_norm, **options: make_engine(model, 2 * clip_norm, **options),
    )
    model = new_model()
    with pytest.raises(PrivacyViolation, match=r"clipped to 2\.0, but the plan's clipping norm is 1\.0") as caught:
        train(model, run)
    assert caught.value.code == "DP031"
    assert same(model, new_model())
    ledger.close()
    assert charged(tmp_path / "ledger") == 1  # the step that was to pay for it stays paid


def _measured_sensitivity(clip_norm: float) -> float:
    """The largest change of the clipped sum when one of ten far-away records is left out."""
    inputs, target = torch.randn(10, 5, generator=torch.Generator().manual_seed(1)) * 100, torch.arange(10) % 3

    def clipped(keep: torch.Tensor) -> torch.Tensor:
        model = new_model()
        engine = make_engine(model, clip_norm)
        with engine.record(len(keep)):
            losses = F.cross_entropy(model(inputs[keep]), target[keep], reduction="none")
        grads = engine.backward(losses).grads
        engine.detach()
        return torch.cat([grad.double().flatten() for grad in grads.values()])

    everyone = torch.arange(10)
    return max(float((clipped(everyone) - clipped(everyone[everyone != i])).norm()) for i in range(10))


def test_attack_21_a_clip_factor_that_lies_about_its_norm_fails_the_measured_sensitivity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 0.9 < _measured_sensitivity(1.0) <= 1.0
    honest = policy.clip_factors
    # What a mutated trainer does, and the measure sees it; a policy of the user that lies is held to the plan by the
    # engine (test_clipping_policies).
    monkeypatch.setattr(policy, "clip_factors", lambda squares, norm: honest(squares, 2 * norm))
    assert _measured_sensitivity(1.0) > 1.5


def _chi_squared(released: torch.Tensor, std: float) -> float:
    """The probability of a smaller sum of squares, if ``released`` were Gaussian with this standard deviation."""
    return float(chi2.cdf(float((released / std).square().sum()), released.numel()))


def test_attack_22_the_noise_is_absolute_and_only_then_divided_by_the_public_batch_size(tmp_path: Path) -> None:
    # Records of zeros: every gradient is zero, and what moves the weights is the noise alone.
    data = TensorDataset(torch.zeros(40, 50, dtype=torch.float64), torch.zeros(40, dtype=torch.int64))
    ledger, run = begin(tmp_path / "ledger", 20, dataset_size=2000, batch_size=400, clip_norm=3.0)
    model = nn.Linear(50, 10, bias=False, dtype=torch.float64)
    weights = [model.weight.detach().clone()]
    PrivateTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        F.cross_entropy,
        data,
        run,
        physical_batch_size=3,  # many physical batches, as on many ranks: noise once, at the end
        callbacks=[lambda *_: weights.append(model.weight.detach().clone())],
    ).fit()
    ledger.close()
    moved = torch.stack(weights).diff(dim=0)
    std = run.plan.phases[0].noise_multiplier * 3.0 / 400
    assert moved.shape == (20, 10, 50)
    assert 1e-6 < _chi_squared(moved, std) < 1 - 1e-6
    assert all(1e-9 < _chi_squared(step, std) < 1 - 1e-9 for step in moved)
    # Two ranks that each add a share or a whole, noise after the mean, a divisor from the drawn batch: all would fail.
    for wrong in (0.5, 2**-0.5, 2**0.5, 2.0, 400.0, 1 / 400, 400 / 8, 3.0, 1 / 3.0):
        assert not 1e-6 < _chi_squared(moved, std * wrong) < 1 - 1e-6, wrong


@pytest.mark.slow
def test_attack_22_two_ranks_add_the_whole_noise_each_and_are_charged_for_both(tmp_path: Path) -> None:
    path, steps = tmp_path / "ledger", 6
    signed(path, 20, dataset_size=40, batch_size=40)
    with _program("two_ranks.py", 0, tmp_path, steps) as one, _program("two_ranks.py", 1, tmp_path, steps) as two:
        outputs = [process.communicate(timeout=120) for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], outputs
    plans = plan(20, dataset_size=40, batch_size=40)
    for output, _ in outputs:
        said = json.loads(output)
        assert said["refused"] == "DP019"  # DistributedDataParallel
        moved = torch.tensor(said["moved"], dtype=torch.float64)
        assert moved.shape == (steps, 10, 50)
        assert 1e-6 < _chi_squared(moved, plans.phases[0].noise_multiplier / 40) < 1 - 1e-6
    assert charged(path) == 2 * steps
    assert problem(path) is None


@pytest.mark.parametrize(
    "entry",
    [
        lambda model, optimizer, loader, run: PrivateTrainer(model, optimizer, F.cross_entropy, loader, run),
        lambda model, optimizer, loader, run: make_private(model, optimizer, loader, run=run),
    ],
    ids=["trainer", "make_private"],
)
def test_attack_23_a_shuffled_loader_is_not_taken_for_poisson_sampling(
    tmp_path: Path, entry: Callable[..., object]
) -> None:
    ledger, run = begin(tmp_path / "ledger", batch_size=20)
    model, loader = new_model(), DataLoader(some_data(), batch_size=20, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(PrivacyViolation, match="shuffled DataLoader is not Poisson sampling") as caught:
        entry(model, optimizer, loader, run)
    assert caught.value.code == "DP020"
    assert same(model, new_model())
    ledger.close()
    assert charged(tmp_path / "ledger") == 0


@pytest.mark.filterwarnings("ignore:DP003")  # the delta of the others, for which ten million are too many
def test_attack_24_empty_poisson_batches_are_noised_and_charged(tmp_path: Path) -> None:
    # One of ten million records a step, of which forty exist: every batch is empty, but for a chance of 1 in 60,000.
    facts = {"dataset_size": 10**7, "batch_size": 1, "accountant": "rdp"}
    ledger, run = begin(tmp_path / "ledger", 4, **facts)
    model, weights = new_model(), [new_model().weight.detach().clone()]
    train(model, run, callbacks=[lambda *_: weights.append(model.weight.detach().clone())])
    ledger.close()
    moved = torch.stack(weights).diff(dim=0)
    assert moved.shape == (4, 3, 5)
    assert bool((moved != 0).all())  # every weight, in every step
    assert 1e-6 < _chi_squared(moved.double(), 0.5 * run.plan.phases[0].noise_multiplier) < 1 - 1e-6
    report = verify(tmp_path / "ledger")
    assert (report.ok, report.runs[0].charged, report.runs[0].released) == (True, 4, 4)


class Kept(SecureNoise):
    """The shipped noise; keeps what a replay needs, which nobody but the trainer ever has."""

    def __init__(self) -> None:
        self.steps: list[tuple[Receipt, bytes, dict[str, torch.Tensor]]] = []

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        sums = {name: grad.clone() for name, grad in clipped.grads.items()}
        self.steps.append((receipt, receipt.key.reveal(), sums))
        return super().privatise(clipped, receipt)


def test_attack_24_a_batch_in_physical_pieces_is_not_truncated(tmp_path: Path) -> None:
    sums = []
    for number, size in enumerate((None, 7, 1)):
        ledger, run = begin(tmp_path / f"{number}.ledger", 1)
        noise = Kept()
        train(new_model(), run, noise=noise, physical_batch_size=size)
        ledger.close()
        sums.append(torch.cat([grad.flatten() for grad in noise.steps[0][2].values()]))
    assert torch.allclose(sums[0], sums[1], atol=1e-5)
    assert torch.allclose(sums[0], sums[2], atol=1e-5)


def test_attack_25_a_stale_checkpoint_gives_no_step_back_in_whatever_phase_the_process_died(tmp_path: Path) -> None:
    with _program("killed_trainer.py", tmp_path) as process:
        output, errors = process.communicate(timeout=120)
    assert output.splitlines() == ["-9 0"] * 7, errors
    for number in range(7):
        n = 10 if number == 4 else 1
        path, steps = tmp_path / f"{number}.ledger", released(tmp_path / f"{number}.log")
        kept = json.loads((tmp_path / f"{number}.checkpoint" / "checkpoint.json").read_bytes())
        report = verify(path)
        # Death after the noise of step 100, with a checkpoint of step 50: 150 were released in the end, and not 100.
        assert kept["steps"] == 5 * n
        assert (report.ok, report.runs[0].charged) == (True, 15 * n)
        assert steps == sorted(set(steps))
        # A charged step that died before its noise is lost.
        assert len(steps) == (14 if number in (1, 2, 3) else 15 * n)


def _replayed(receipt: Receipt, key: bytes, sums: dict[str, torch.Tensor]) -> str:
    """Digest of what the step of a receipt releases for these clipped sums, computed from its public fields and key."""
    info = encode_info(Purpose.GRAD_NOISE, receipt.lease_nonce, receipt.step, receipt.fresh)
    step_key = HKDFExpand(algorithm=SHA256(), length=32, info=info).derive(key)
    std = receipt.noise_multiplier * receipt.clip_norm
    noisy = {n: add_gaussian_(s.clone(), step_key, i, std) for i, (n, s) in enumerate(sums.items())}
    return output_digest(NoisySum(noisy))


def test_attack_26_a_replay_with_a_mutated_example_and_the_same_noise_has_another_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, leases = tmp_path / "ledger", list[bytes]()

    class Seen(LeaseKey):
        def ratchet(self, count: int) -> StepKeys:
            leases.append(self.reveal())
            return super().ratchet(count)

    monkeypatch.setattr("dpbudget.ledger.run.LeaseKey", Seen)
    ledger, run = begin(path, 1)
    noise = Kept()
    train(new_model(), run, noise=noise, record_outputs=True)
    ledger.close()
    ((receipt, key, sums),) = noise.steps
    records = [json.loads(entry.line) for entry in read_export(export(path)).entries]
    (settle,), (lease,) = ([r for r in records if r["type"] == kind] for kind in ("settle", "lease"))
    assert commitment_matches(lease["commitment"], leases[0])
    assert run_ratchet(leases[0], 1) == key
    assert settle["fresh"] == receipt.fresh.hex()
    assert _replayed(receipt, key, sums) == settle["output"]

    def recomputed(data: TensorDataset) -> dict[str, torch.Tensor]:
        model = new_model()
        engine = make_engine(model, run.plan.clip_norm)
        inputs, target = data.tensors
        with engine.record(len(target)):
            losses = F.cross_entropy(model(inputs), target, reduction="none")
        grads = dict(engine.backward(losses).grads)
        engine.detach()
        return grads

    assert _replayed(receipt, key, recomputed(some_data())) == settle["output"]
    mutated = some_data()
    mutated.tensors[0][17, 2] += 1e-3
    assert _replayed(receipt, key, recomputed(mutated)) != settle["output"]
