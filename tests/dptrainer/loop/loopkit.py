"""What the tests of the training loop share: ledgers of known shape, runs, models, data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from dpbudget.errors import DPBudgetError
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import Run
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.plan import Budget, Claim, Phase, Plan, Unit, rate_from_float
from dptrainer.noise.source import SecureNoise
from dptrainer.private import make_private
from dptrainer.values import ClippedSum, NoisySum

OWNER = Ed25519Signer.from_seed(b"\x01" * 32)
WRITER = Ed25519Signer.from_seed(b"\x02" * 32)


class SumFilter:
    """Joint claim = sum of the plans' claims: the loop is tested without an accountant."""

    def joint_claim(self, plans: Sequence[Plan], delta: float) -> float:
        return float(sum(plan.claim.epsilon for plan in plans))


def make_plan(steps: int = 4, rate: float = 0.5, sigma: float = 1.0, **changes: Any) -> Plan:
    facts: dict[str, Any] = {
        "phases": (Phase(rate_k=rate_from_float(rate), noise_multiplier=sigma, steps=steps),),
        "clip_norm": 1.0,
        "nominal_size": 40,
        "claim": Claim(epsilon=1.0, delta=5e-7, accountant="prv", accountant_version=1),
    }
    return Plan(**{**facts, **changes})


def make_ledger(path: Path | None = None, unit: Unit = "example") -> Ledger:
    budget = Budget(epsilon=3.0, delta=1e-6)
    return Ledger.create(path, budget=budget, owner=OWNER, writer=WRITER, unit=unit, filter=SumFilter())


def reopen(path: Path, **changes: Any) -> Ledger:
    facts: dict[str, Any] = {"writer": WRITER, "filter": SumFilter(), "trust": OWNER.public}
    return Ledger.open(path, **{**facts, **changes})


def make_run(steps: int = 4, rate: float = 0.5, sigma: float = 1.0, **changes: Any) -> Run:
    ledger = make_ledger(unit=changes.get("unit", "example"))
    run = ledger.start(ledger.sign_plan(make_plan(steps, rate, sigma, **changes), owner=OWNER), lease_steps=1)
    run.kept_ledger = ledger  # type: ignore[attr-defined]  # the run holds its journal; tests look at the ledger
    return run


def linear_data(rows: int = 40, features: int = 5, classes: int = 3, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, features, generator=generator)
    weights = torch.randn(features, classes, generator=generator)
    return TensorDataset(inputs, (inputs @ weights).argmax(1))


def linear_model(features: int = 5, classes: int = 3, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(features, classes)


class NoNoise:
    """Records every clipped sum and releases it as it is: for comparing sums, never for training."""

    def __init__(self) -> None:
        self.sums: list[dict[str, torch.Tensor]] = []
        self.receipts: list[Receipt] = []

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        receipt.use("grad-noise")
        self.receipts.append(receipt)
        self.sums.append({name: grad.clone() for name, grad in clipped.grads.items()})
        return NoisySum(clipped.grads)


class CountedNoise(SecureNoise):
    """The shipped noise, counting its releases."""

    def __init__(self) -> None:
        self.releases = 0

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        noisy = super().privatise(clipped, receipt)
        self.releases += 1
        return noisy


def norm(grads: dict[str, torch.Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in grads.values()) ** 0.5)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    assert same(model, before), "the model changed"


def private(model: Any = None, optimizer: Any = None, data: Any = None, run: Any = None, **kw: Any) -> Any:
    """make_private with defaults: a linear model, SGD, forty records, a run that takes all of them."""
    model = linear_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    data = linear_data() if data is None else data
    return make_private(model, optimizer, data, run=make_run(rate=1.0) if run is None else run, **kw)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    x, y = batch
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def refused(code: str) -> Any:
    return pytest.raises(DPBudgetError, match=code)
