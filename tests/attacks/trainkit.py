"""What attacks on a trainer share: forty records, a linear model, runs of cheap plans. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attackkit import (
    reopen,
    signed,
)
from torch import nn
from torch.utils.data import TensorDataset

from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.run import Run
from dptrainer import PrivateTrainer


def some_data(count: int = 40, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(3, (count,), generator=generator))


def new_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(5, 3)


def begin(path: Path, steps: int = 4, **facts: Any) -> tuple[Ledger, Run]:
    """A ledger and the run of a plan for forty records; full batches unless ``facts`` say otherwise."""
    run_id = signed(path, steps, **{"dataset_size": 40, "batch_size": 40, **facts})
    ledger = reopen(path)
    return ledger, ledger.start(run_id, lease_steps=1)


def train(model: nn.Module, run: Run, data: Any = None, **options: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    PrivateTrainer(model, optimizer, F.cross_entropy, some_data() if data is None else data, run, **options).fit()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
