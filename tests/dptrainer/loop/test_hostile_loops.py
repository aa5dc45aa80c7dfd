"""Ordinary habits in a loop of one's own that would step past the clipping, or print what is private."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from loopkit import NoNoise, linear_data, linear_model, make_run, unchanged
from torch import nn

from dpbudget.errors import PrivacyViolation
from dptrainer.private import make_private
from dptrainer.trainer import PrivateTrainer


def test_parameters_added_to_the_optimizer_later_are_refused_and_do_not_move() -> None:
    model, head = linear_model(), nn.Linear(3, 2)
    _, optimizer, loader = make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), linear_data(), run=make_run(2, rate=1.0), noise=NoNoise()
    )
    optimizer.add_param_group({"params": list(head.parameters())})
    batches = iter(loader)
    x, y = next(batches)
    F.cross_entropy(head(model(x)), y.clamp(max=1)).backward()
    with unchanged(model), unchanged(head), pytest.raises(PrivacyViolation, match="DP011"):
        optimizer.step()


def test_parameters_added_by_a_callback_are_refused_before_the_next_step() -> None:
    model, optimizer_of = linear_model(), torch.optim.SGD
    optimizer, other, run = optimizer_of(model.parameters(), lr=1.0), nn.Linear(3, 2), make_run(3, rate=1.0)

    def callback(steps: int, _: object) -> None:
        optimizer.add_param_group({"params": list(other.parameters())})

    trainer = PrivateTrainer(
        model, optimizer, nn.CrossEntropyLoss(), linear_data(), run, callbacks=[callback], noise=NoNoise()
    )
    with pytest.raises(PrivacyViolation, match="DP011"):
        trainer.fit()


def test_a_replaced_layer_is_refused_until_the_optimizer_knows_it() -> None:
    model = nn.Sequential(linear_model())
    _, optimizer, loader = make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), linear_data(), run=make_run(2, rate=1.0), noise=NoNoise()
    )
    model[0] = linear_model()
    with unchanged(model), pytest.raises(PrivacyViolation, match="DP011"):
        next(iter(loader))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    batches = iter(loader)
    x, y = next(batches)
    before = model[0].weight.detach().clone()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


ROWS = 37


def _scalar_loss() -> None:
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    PrivateTrainer(model, optimizer, lambda o, y: o.sum(), linear_data(ROWS), make_run(1, rate=1.0)).fit()


def _loop(passes: int) -> None:
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = make_private(model, optimizer, linear_data(ROWS), run=make_run(1, rate=1.0))
    for x, _ in loader:
        if passes:
            model(torch.cat([x] * passes)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("mistake", [_scalar_loss, lambda: _loop(0), lambda: _loop(2)])
def test_no_message_names_the_size_of_a_drawn_batch(mistake: Callable[[], None]) -> None:
    with pytest.raises(PrivacyViolation) as caught:
        mistake()
    assert str(ROWS) not in str(caught.value)
    assert str(2 * ROWS) not in str(caught.value)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_head_with_an_optimizer_of_its_own_is_refused_and_neither_moves() -> None:
    model, head = linear_model(), Head()
    _, optimizer, loader = make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), linear_data(), run=make_run(2, rate=1.0), noise=NoNoise()
    )
    batches = iter(loader)
    x, y = next(batches)
    F.cross_entropy(head(model(x)), y).backward()
    with unchanged(model), unchanged(head), pytest.raises(PrivacyViolation, match="DP031"):
        optimizer.step()
    assert all(p.grad is None for p in head.parameters())


def test_a_frozen_head_and_another_model_beside_it_are_left_alone() -> None:
    model, head, other = linear_model(), Head().requires_grad_(False), Head()
    _, optimizer, loader = make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), linear_data(), run=make_run(3, rate=1.0), noise=NoNoise()
    )
    plain, before = torch.optim.SGD(other.parameters(), lr=1.0), other.inner.weight.detach().clone()
    steps = 0
    for x, y in loader:
        plain.zero_grad()
        other(torch.ones(2, 3)).sum().backward()
        F.cross_entropy(head(model(x)), y).backward()
        plain.step()
        optimizer.step()
        steps += 1
    assert steps == 3
    assert not torch.equal(other.inner.weight, before)
    assert not torch.nn.modules.module._global_forward_pre_hooks, "no hook outlives the loop"


@pytest.mark.parametrize("in_place", [False, True])
def test_a_part_that_was_compiled_is_refused(in_place: bool) -> None:
    model = nn.Sequential(linear_model(), nn.ReLU())
    if in_place:
        model[0].compile(backend="eager")
    else:
        model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(PrivacyViolation, match="DP019"):
        make_private(
            model, torch.optim.SGD(model.parameters(), lr=1.0), linear_data(), run=make_run(2), noise=NoNoise()
        )
