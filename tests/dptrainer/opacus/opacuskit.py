"""What the tests of the facade share: data, models, the usual loop, and the sums that were released."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpbudget.errors import DPBudgetError
from dpbudget.ledger.receipt import Receipt
from dptrainer.noise.source import SecureNoise
from dptrainer.opacus import PrivacyEngine
from dptrainer.values import ClippedSum, NoisySum

WIDE = {"noise_multiplier": 4.0, "max_grad_norm": 1.0}


def data(rows: int = 60, features: int = 6, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, features, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def loader(rows: int = 60, batch: int = 5, **options: Any) -> DataLoader[Any]:
    return DataLoader(data(rows), batch_size=batch, shuffle=True, **options)


def net(features: int = 6, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, 2))


def parts(**changes: Any) -> dict[str, Any]:
    """Module, optimizer and loader, as keyword arguments of make_private."""
    module = changes.get("module", net())
    given = {"module": module, "optimizer": None, "data_loader": None, **changes}
    if given["optimizer"] is None:
        given["optimizer"] = torch.optim.SGD(module.parameters(), lr=0.1)
    if given["data_loader"] is None:
        given["data_loader"] = loader()
    return given


def open_ended(engine: PrivacyEngine | None = None, **changes: Any) -> Any:
    return (engine or PrivacyEngine()).make_private(**parts(**{**WIDE, **changes}))


def planned(engine: PrivacyEngine | None = None, epochs: int = 2, **changes: Any) -> Any:
    target = {"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": epochs, "max_grad_norm": 1.0}
    return (engine or PrivacyEngine()).make_private_with_epsilon(**parts(**{**target, **changes}))


def train(model: Any, optimizer: Any, batches: Any, criterion: Any = None) -> None:
    """One epoch of the usual loop."""
    criterion = criterion or nn.CrossEntropyLoss()
    for x, y in batches:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()


def refused(code: str) -> Any:
    return pytest.raises(DPBudgetError, match=code)


class Released:
    """Every clipped sum before its noise, and how much noise was added."""

    def __init__(self, *, noise: bool = True) -> None:
        self.sums: list[dict[str, Tensor]] = []
        self.moved: list[float] = []
        self._noise = noise

    def watch(self, patch: pytest.MonkeyPatch) -> Released:
        add = SecureNoise.privatise

        def privatise(source: SecureNoise, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
            before = {name: grad.clone() for name, grad in clipped.grads.items()}
            self.sums.append(before)
            noisy = add(source, clipped, receipt)
            self.moved.append(max(float((noisy.grads[name] - before[name]).abs().max()) for name in before))
            return noisy if self._noise else NoisySum({name: grad.clone() for name, grad in before.items()})

        patch.setattr(SecureNoise, "privatise", privatise)
        return self


def norm(grads: dict[str, Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in grads.values()) ** 0.5)
