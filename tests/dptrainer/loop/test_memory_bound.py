"""A physical batch size from a memory bound: from shapes alone, large enough to be of use, never above the bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import (
    NoNoise,
    linear_data,
    linear_model,
    make_plan,
    make_run,
    private,
    refused,
    same,
    snapshot,
    step,
    unchanged,
)
from torch import nn
from torch.utils.data import TensorDataset

from dptrainer import MemoryBound, PrivateTrainer
from dptrainer.clipping import BookKeeping
from dptrainer.data import Records
from dptrainer.memory import _Allocations, physical_size
from dptrainer.users import UserDataset

PLAN = make_plan(nominal_size=1000, rate=0.5)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 5)
    )


def images(rows: int = 10) -> TensorDataset:
    return TensorDataset(torch.randn(rows, 3, 8, 8), torch.zeros(rows, dtype=torch.long))


def peak(model: nn.Module, inputs: torch.Tensor) -> int:
    engine = BookKeeping(model, clip_norm=1.0)
    with _Allocations() as allocations:
        engine.begin(len(inputs))
        model(inputs).square().sum().backward()
        engine.finish("sum")
    engine.detach()
    return allocations.peak


@pytest.mark.parametrize(
    ("model", "data", "bound"),
    [(mlp(), TensorDataset(torch.randn(9, 50), torch.zeros(9)), 2 << 20), (convolutional(), images(), 1 << 20)],
)
def test_the_chosen_size_fits_the_bound_and_is_within_a_factor_of_it(model: Any, data: Any, bound: int) -> None:
    size = physical_size(MemoryBound(bound), model, Records(data), PLAN)
    assert size is not None
    shape = data.tensors[0].shape[1:]
    assert peak(model, torch.randn(size, *shape)) <= bound
    assert peak(model, torch.randn(5 * size, *shape)) > bound


def test_the_choice_is_the_same_for_any_values_and_any_number_of_records() -> None:
    model, sizes = convolutional(), set()
    for data in (images(), images(3), TensorDataset(torch.full((70, 3, 8, 8), 1e9), torch.ones(70).long())):
        sizes.add(physical_size(MemoryBound(1 << 20), model, Records(data), PLAN))
    assert len(sizes) == 1


def test_views_and_users_count_with_all_their_rows() -> None:
    model, bound = convolutional(), MemoryBound(2 << 20)
    alone = physical_size(bound, model, Records(images()), PLAN)
    with_views = physical_size(bound, model, Records(images(), views=4), PLAN)
    of_users = physical_size(bound, model, Records(UserDataset(images(), [0, 1] * 5, max_examples=4)), PLAN)
    assert alone is not None
    assert with_views == of_users
    assert alone / 8 <= with_views <= alone / 2


def test_measuring_changes_neither_model_nor_random_stream() -> None:
    model, records = nn.Sequential(nn.Dropout(0.5), mlp()), Records(TensorDataset(torch.randn(9, 50), torch.zeros(9)))
    state = torch.get_rng_state()
    with unchanged(model):
        physical_size("auto", model, records, PLAN)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_no_more_than_the_planned_batch_is_asked_for() -> None:
    data = TensorDataset(torch.randn(9, 50), torch.zeros(9))
    assert physical_size("auto", mlp(), Records(data), make_plan(nominal_size=100, rate=0.2)) == 64


def test_a_loop_with_a_bound_takes_the_same_steps_in_small_pieces() -> None:
    sums = []
    for size in (None, MemoryBound(6_000)):
        noise = NoNoise()
        model, optimizer, loader = private(noise=noise, run=make_run(1, rate=1.0), physical_batch_size=size)
        items = 0
        for batch in loader:
            step(model, optimizer, batch)
            items += 1
        assert (items > 1) == (size is not None)
        sums.append(noise.sums[0]["weight"])
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-6)


def test_auto_bounds_by_half_of_the_memory_there_is() -> None:
    model = linear_model()
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    PrivateTrainer(model, optimizer, F.cross_entropy, linear_data(), make_run(2), physical_batch_size="auto").fit()
    assert not same(model, before)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "big", "8"])
def test_what_is_no_size_is_refused_before_anything_is_changed(size: Any) -> None:
    with refused("DP009"):
        private(physical_batch_size=size)


def test_a_bound_that_one_record_exceeds_and_a_model_that_cannot_be_called_are_refused() -> None:
    with refused("DP009"):
        MemoryBound(0)
    model = mlp()
    data = TensorDataset(torch.randn(9, 50), torch.zeros(9).long())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused("DP009"):
        private(model, optimizer, data, physical_batch_size=MemoryBound(10))
    F.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    optimizer.step()  # no guard was left behind

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(50, 2)

        def forward(self, *, secret: Any) -> Any:
            return self.inner(secret)

    with refused("DP009"):
        physical_size(MemoryBound(1 << 20), Odd(), Records(data), PLAN)
