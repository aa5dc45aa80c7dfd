"""One integer an example may be its length: the tests at set-up then sort and pack as the training would."""

from __future__ import annotations

import pytest
import torch
from loopkit import private, refused
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import TensorDataset


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 2)


class SortedByHand(Recurrent):
    """Between sorting and unsorting, a row is another example than in the layers around."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        lengths, order = lengths.sort(descending=True)
        _, (hidden, _) = self.lstm(pack_padded_sequence(x[order], lengths.cpu(), batch_first=True))
        return self.head(hidden[-1][order.argsort()])


class Packed(Recurrent):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))
        return self.head(hidden[-1])


class LastStep(Recurrent):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][torch.arange(len(x)), lengths - 1])


class Category(nn.Module):
    """A table of two rows: the integer is no length."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return self.head(x.mean(1) + self.table(kind))


def data(steps: int) -> TensorDataset:
    rows = torch.randn(40, steps, 3)
    return TensorDataset(rows, torch.ones(40, dtype=torch.long), torch.zeros(40, dtype=torch.long))


@pytest.mark.parametrize("steps", [2, 5, 12])
def test_sorting_by_length_within_the_model_is_refused(steps: int) -> None:
    with refused("DP019"):
        private(SortedByHand(), data=data(steps))


@pytest.mark.parametrize("steps", [2, 5, 12])
@pytest.mark.parametrize("kind", [Packed, LastStep, Category])
def test_lengths_and_categories_that_move_no_example_are_accepted(kind: type[nn.Module], steps: int) -> None:
    notes: list[str] = []
    private(kind(), data=data(steps), note=notes.append)[2].detach()
    assert [said for said in notes if "loss_fn" not in said] == []  # two inputs: the criterion is not the subject
