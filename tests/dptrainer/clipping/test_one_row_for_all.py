"""One row serves all examples only where it is known to be the same for all: positions, buffers, parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping import BookKeeping
from dptrainer.clipping.factory import self_test
from dptrainer.values import ClippedSum


class Shared(nn.Module):
    """Adds to the examples what a layer makes of one row."""

    def __init__(self, row: Callable[[Shared, Tensor], Tensor], *, checkpointed: bool = False) -> None:
        super().__init__()
        self.row, self.layer, self.head = row, nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("buffer", torch.linspace(0, 1, 12).view(1, 3, 4))
        self.frozen = nn.Parameter(torch.randn(1, 5, 4), requires_grad=False)
        self._checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        def part(x: Tensor) -> Tensor:
            return x + self.layer(self.row(self, x)).mean(1)

        whole = checkpoint(part, x, use_reentrant=False) if self._checkpointed else part(x)
        return self.head(torch.tanh(whole))


SAME: dict[str, Callable[[Shared, Tensor], Tensor]] = {
    "a buffer": lambda m, x: m.buffer,
    "a part of a buffer": lambda m, x: m.buffer[:, :2],
    "a frozen parameter": lambda m, x: m.frozen,
    "a part of a frozen parameter": lambda m, x: m.frozen[:, :2] * torch.tensor(0.5),
    "positions": lambda m, x: torch.arange(8.0).view(1, 2, 4).sin(),
    "ones": lambda m, x: torch.ones(1, 2, 4),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", SAME)
def test_one_row_that_all_examples_share_is_clipped_exactly(kind: str, checkpointed: bool) -> None:
    self_test(Shared(SAME[kind], checkpointed=checkpointed), (torch.randn(3, 4),))


def written(model: Shared, x: Tensor) -> Tensor:
    row = torch.ones(1, len(x), 4)
    row[0, :] = x
    return row


DATA: dict[str, Callable[[Shared, Tensor], Tensor]] = {
    "the batch as a row": lambda m, x: x.unsqueeze(0),
    "a sum": lambda m, x: x.sum(0).view(1, 1, 4),
    "data added to a buffer": lambda m, x: m.buffer + x[0],
    "data written into ones": written,
}


@pytest.mark.parametrize("kind", DATA)
def test_one_row_of_data_is_no_row_for_all(kind: str) -> None:
    model, x = Shared(DATA[kind]), torch.randn(5, 4)
    engine = BookKeeping(model, clip_norm=1.0)
    with pytest.raises(PrivacyViolation, match="DP030"), engine.record(5):
        engine.backward(model(x).sum(1))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_one_index_in_a_batch_of_bags_belongs_to_one_bag(mode: str) -> None:
    model = nn.EmbeddingBag(10, 4, mode=mode)
    engine = BookKeeping(model, clip_norm=1.0)

    def clipped(index: list[int], starts: list[int]) -> ClippedSum:
        with engine.record(len(starts)):
            values = (
                model(torch.tensor(index), torch.tensor(starts)) * torch.tensor([[5.0], [-5.0], [5.0]])[: len(starts)]
            )
        return engine.backward(values.sum(1))

    one, two = clipped([5], [0, 1]), clipped([5, 5], [0, 1, 1])
    assert float(one.grads["weight"].norm()) == pytest.approx(1.0, abs=1e-4)
    assert float((two.grads["weight"] - one.grads["weight"]).norm()) <= 1.0 + 1e-6
