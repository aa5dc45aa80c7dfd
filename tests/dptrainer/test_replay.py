"""An auditor with the keys of one step makes its batch and its output again, and sees whether the release was that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from dpbudget.errors import DPBudgetError, InvalidParameter, Unreadable
from dpbudget.grid import grid_for
from dpbudget.ledger.auditor import AuditorKey, new_auditor_key
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.replay import RunReplay, StepKey
from dpbudget.ledger.run import Run
from dpbudget.ledger.sealed import SealedKeys
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.plan import Budget, Claim, NoiseMode, Phase, Plan, rate_from_float
from dptrainer import PrivateTrainer, make_engine
from dptrainer.clipping import OneByOne
from dptrainer.replay import output_matches, replayed_batch, replayed_draws, replayed_output, replayed_record_draws
from dptrainer.sampling import PoissonSampler
from dptrainer.values import ClippedSum

OWNER, WRITER = Ed25519Signer.from_seed(b"\x01" * 32), Ed25519Signer.from_seed(b"\x02" * 32)
STEPS, RECORDS = 4, 60


class PlainFilter:
    def joint_claim(self, plans: list[Plan], delta: float) -> float:
        return 1.0


def some_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(RECORDS, 5, generator=generator), torch.randint(3, (RECORDS,), generator=generator)
    )


def new_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3))


class Trained:
    """A short run whose keys were kept, with the weights before each of its steps."""

    def __init__(self, folder: Path, *, record_outputs: bool = True, noise: NoiseMode = "secure") -> None:
        self.noise = noise
        self.place, self.sealed = folder / "ledger", folder / "noise.sealed"
        self.auditor: AuditorKey = new_auditor_key(folder / "auditor.key")
        ledger = Ledger.create(
            self.place, budget=Budget(epsilon=3.0, delta=1e-6), owner=OWNER, writer=WRITER, filter=PlainFilter()
        )  # type: ignore[arg-type]
        claim = Claim(epsilon=1.0, delta=5e-7, accountant="prv", accountant_version=1)
        phase = Phase(rate_k=rate_from_float(0.4), noise_multiplier=0.7, steps=STEPS)
        plan = Plan(phases=(phase,), clip_norm=0.5, nominal_size=RECORDS, claim=claim, noise=noise, max_parameters=100)
        run_id = ledger.sign_plan(plan, owner=OWNER)
        model, kept = new_model(), SealedKeys(self.sealed, self.auditor.public)
        self.weights: list[dict[str, torch.Tensor]] = []
        self.drawn: list[list[int]] = []
        outer = self

        class Watched(PoissonSampler):
            def draw(self, receipt, population):  # type: ignore[no-untyped-def]
                outer.weights.append({name: value.clone() for name, value in model.state_dict().items()})
                indices = super().draw(receipt, population)
                outer.drawn.append(indices.tolist())
                return indices

        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with ledger.start(run_id, lease_steps=3, keep_keys=kept) as run:
            self._train(model, optimizer, run, Watched(), record_outputs)
        ledger.close()
        self.replay = RunReplay.read(self.place, trust=OWNER.public)

    def _train(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, run: Run, sampler: PoissonSampler, record: bool
    ) -> None:
        trainer = PrivateTrainer(model, optimizer, F.cross_entropy, some_data(), run, record_outputs=record)
        trainer._sampler = sampler
        trainer.fit()

    def key(self, step: int, purpose: str = "grad-noise") -> StepKey:
        return self.replay.step_key(step, purpose, sealed=self.sealed, auditor=self.auditor)

    def clipped(self, step: int, data: TensorDataset | None = None) -> ClippedSum:
        """What the clipping engine makes of the step's batch, at the weights that the step began with."""
        model = new_model()
        model.load_state_dict(self.weights[step])
        inputs, target = (data or some_data())[torch.as_tensor(replayed_batch(self.key(step, "sampling"), RECORDS))]
        if self.noise == "exact":
            alone = OneByOne(model, clip_norm=0.5)
            alone.begin(grid_for(0.7, 100))
            with replayed_record_draws(self.key(step, "record-draws"), len(target)) as begin:
                for row in reversed(range(len(target))):  # in another order than the trainer
                    begin(row)
                    alone.add(F.cross_entropy(model(inputs[row : row + 1]), target[row : row + 1], reduction="none"))
            return alone.finish()
        engine = make_engine(model, 0.5)
        with replayed_draws(self.key(step, "record-draws")), engine.record(len(target)):
            losses = F.cross_entropy(model(inputs), target, reduction="none")
        clipped = engine.backward(losses)
        engine.detach()
        return clipped


@pytest.fixture(scope="module", params=["secure", "exact"])
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Trained:
    return Trained(tmp_path_factory.mktemp("replay"), noise=request.param)


def test_the_batch_of_every_step_is_found_again(trained: Trained) -> None:
    again = [replayed_batch(trained.key(step, "sampling"), RECORDS).tolist() for step in range(STEPS)]
    assert again == trained.drawn
    assert len({len(batch) for batch in again}) > 1


def test_every_release_is_its_clipped_sum_with_the_noise_of_its_key(trained: Trained) -> None:
    for step in range(STEPS):
        clipped = trained.clipped(step)
        before = {name: total.clone() for name, total in clipped.grads.items()}
        assert output_matches(trained.key(step), clipped)
        assert all(torch.equal(before[name], total) for name, total in clipped.grads.items())
        unit = 1.0 if clipped.grid is None else clipped.grid.unit(0.5)
        noise = replayed_output(trained.key(step), clipped).grads["0.weight"] - clipped.grads["0.weight"] * unit
        assert 0.1 < float(noise.std()) < 0.7  # 0.7 * 0.5


def test_another_record_another_step_or_other_weights_do_not_match(trained: Trained) -> None:
    data = some_data()
    data.tensors[0][trained.drawn[1], 2] += 1e-3  # of one alone dropout may hide it
    assert not output_matches(trained.key(1), trained.clipped(1, data))
    assert not output_matches(trained.key(2), trained.clipped(1))
    clipped = trained.clipped(1)
    next(iter(clipped.grads.values()))[0, 0] += 1e-6 if clipped.grid is None else 1
    assert not output_matches(trained.key(1), clipped)


def refused(act: Callable[[], object], kind: type[DPBudgetError], code: str, match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        act()
    assert caught.value.code == code
    assert caught.value.hint


def test_a_key_serves_its_own_purpose_alone(trained: Trained) -> None:
    clipped = trained.clipped(0)
    refused(lambda: replayed_batch(trained.key(0), RECORDS), InvalidParameter, "DP060", "a step key of grad-noise")
    refused(lambda: output_matches(trained.key(0, "sampling"), clipped), InvalidParameter, "DP060", "of sampling")


def test_a_step_without_a_hash_has_nothing_to_compare_with(tmp_path: Path) -> None:
    trained = Trained(tmp_path, record_outputs=False)
    refused(lambda: output_matches(trained.key(0), trained.clipped(0)), Unreadable, "DP085", "without a hash")
