"""Traps of released libraries that are met in the whole loop: once a release, on every row, for every shape."""

from __future__ import annotations

import pytest
import torch
from clipping_oracle import assert_equal_to_the_oracle, typical_norm
from loopkit import CountedNoise, NoNoise, make_run, norm, private, snapshot, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dptrainer.clipping import BookKeeping
from dptrainer.trainer import PrivateTrainer


@pytest.mark.parametrize("size", [None, 7, 1])
def test_noise_is_added_once_a_release_however_many_physical_batches(size: int | None) -> None:
    noise, run = CountedNoise(), make_run(3, rate=1.0)
    model, optimizer, loader = private(run=run, noise=noise, physical_batch_size=size)
    items = 0
    for batch in loader:
        step(model, optimizer, batch)
        items += 1
    assert items == 3 * (1 if size is None else -(-40 // size))
    assert noise.releases == run.charged == 3


class Late(nn.Module):
    """Uses its second layer from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.open = nn.Linear(5, 3), nn.Linear(5, 3), False

    def forward(self, x: Tensor) -> Tensor:
        return self.early(x) + self.late(x) if self.open else self.early(x)


def test_a_parameter_that_is_used_late_is_trained_from_then_on() -> None:
    model, noise = Late(), NoNoise()
    _, optimizer, loader = private(model, run=make_run(3, rate=1.0), noise=noise)
    for batch in loader:
        step(model, optimizer, batch)
        model.open = True
    sizes = [norm({"late.weight": total["late.weight"]}) for total in noise.sums]
    assert sizes[0] == 0.0
    assert min(sizes[1:]) > 0.0


def test_rows_of_a_table_that_no_record_uses_get_noise_too() -> None:
    model = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(12, 2))
    data = TensorDataset(torch.arange(40).unsqueeze(1).expand(40, 3) % 5, torch.arange(40) % 2)
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)  # so that no weight swallows its noise in rounding
    PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), data, make_run(1, rate=1.0)).fit()
    moved = (model[0].weight.detach() - before["0.weight"]).abs()
    assert bool((moved > 0).all()), "a row that stands still says that no record uses it"


class Sizes(nn.Module):
    """Any length, any size of image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.over_places, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = self.second(torch.tanh(self.first(x))).flatten(2).transpose(1, 2)
        return self.out(torch.tanh(self.over_places(places)).mean(1))


def test_every_length_and_size_is_decided_for_itself() -> None:
    """One engine, images of nine places, of thousands and of nine again: each time the sum of single examples."""
    torch.manual_seed(0)
    model = Sizes()
    y = torch.tensor([0, 1, 1, 0])
    clip_norm = typical_norm(model, [torch.randn(4, 2, 3, 3)])
    engine = BookKeeping(model.float(), clip_norm=clip_norm)
    for height, width in ((3, 3), (40, 33), (3, 3), (2, 50)):
        x = torch.randn(4, 2, height, width)
        with engine.record(4):
            losses = F.cross_entropy(model(x), y, reduction="none")
        found = engine.backward(losses).grads
        expected = _one_by_one(model, x, y, clip_norm)
        assert norm({n: found[n].double() - expected[n] for n in expected}) <= 1e-5 * norm(expected)


def _one_by_one(model: nn.Module, x: Tensor, y: Tensor, clip_norm: float) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for index in range(len(x)):
        loss = F.cross_entropy(model(x[index : index + 1]), y[index : index + 1])
        grads = [g.double() for g in torch.autograd.grad(loss, list(model.parameters()))]
        factor = min(1.0, clip_norm / norm({str(i): g for i, g in enumerate(grads)}))
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            total[name] += factor * grad
    return total


class Segments(nn.Module):
    """As in BERT: a buffer of one row gives every example its segment numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.segments, self.out = nn.Embedding(7, 4), nn.Embedding(2, 4), nn.Linear(4, 2)
        self.register_buffer("numbers", torch.zeros(1, 9, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        numbers = self.numbers[:, : x.shape[1]].expand(x.shape[0], x.shape[1])
        return self.out(torch.tanh(self.words(x) + self.segments(numbers)))


@pytest.mark.parametrize("length", [6, 4])
def test_one_row_that_is_copied_for_every_example_has_examples_as_rows(length: int) -> None:
    torch.manual_seed(0)
    assert_equal_to_the_oracle(Segments(), [torch.randint(0, 7, (4, length))])
