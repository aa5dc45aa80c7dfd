"""What tests of exact plans share: the integer sum of a step, kept and never released, and how far two are apart."""

from __future__ import annotations

from typing import Any

import torch
from loopkit import make_run
from torch import nn
from torch.utils.data import TensorDataset

from dpbudget.ledger.receipt import Receipt
from dptrainer import PrivateTrainer
from dptrainer.clipping.engine import trainable_parameters
from dptrainer.values import ClippedSum, NoisySum

CLIP = 1e-2


class KeptIntegers:
    """Keeps the integer sum and releases zeros: for comparing sums, never for training."""

    mode = "exact"

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        receipt.use("grad-noise")
        assert clipped.grid == receipt.grid
        self.grid = receipt.grid
        self.sums = {name: one.clone() for name, one in {**clipped.grads, **clipped.statistics}.items()}
        zeros = ({n: torch.zeros(t.shape) for n, t in part.items()} for part in (clipped.grads, clipped.statistics))
        return NoisySum(*zeros)


def integers(
    model: nn.Module, loss: Any, data: Any, *, clipping: Any = None, unit: Any = "example", **options: Any
) -> KeptIntegers:
    """The integer sum of a step over all records, through the trainer; ``begun`` is told of the model before it."""
    noise, begun = KeptIntegers(), options.pop("begun", None)
    size = sum(p.numel() + p.numel() % 2 for p in trainable_parameters(model).values()) + 2
    run = make_run(1, rate=1.0, clip_norm=CLIP, noise="exact", max_parameters=size, unit=unit)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    trainer = PrivateTrainer(model, optimizer, loss, data, run, noise=noise, clipping=clipping, **options)
    if begun is not None:
        begun(model)
    trainer.fit()
    return noise


def picked(data: TensorDataset, rows: list[int]) -> TensorDataset:
    return TensorDataset(*(column[rows] for column in data.tensors))


def apart(first: KeptIntegers, second: KeptIntegers) -> int:
    """Squared distance, in Python's integers."""
    assert list(first.sums) == list(second.sums)
    return sum(int((first.sums[n] - second.sums[n]).double().square().sum()) for n in first.sums)


def equal(first: KeptIntegers, second: KeptIntegers) -> bool:
    return all(torch.equal(first.sums[name], second.sums[name]) for name in first.sums)


def plus(first: KeptIntegers, second: KeptIntegers) -> KeptIntegers:
    both = KeptIntegers()
    both.sums = {name: first.sums[name] + second.sums[name] for name in first.sums}
    return both
