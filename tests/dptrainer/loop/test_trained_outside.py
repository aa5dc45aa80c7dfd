"""What the private batch would train outside the private model is refused, also where no module is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model, make_run, private, refused, unchanged
from torch import Tensor, nn

from dptrainer.trainer import PrivateTrainer


class Temperature(nn.Module):
    """A criterion that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.scale.exp(), target, reduction="none")


head, scale = nn.Linear(3, 3), nn.Parameter(torch.zeros(()))
USES: dict[str, Callable[[Tensor], Tensor]] = {
    "a bare parameter": lambda h: h * scale.exp(),
    "weights of a module that is not called": lambda h: F.linear(h, head.weight),
    "a module": lambda h: head(h),
}


@pytest.mark.parametrize("kind", USES)
def test_a_loop_that_trains_something_else_is_refused_and_neither_moves(kind: str) -> None:
    model = linear_model()
    _, optimizer, loader = private(model)
    with unchanged(model), refused("DP031"):
        for x, y in loader:
            F.cross_entropy(USES[kind](model(x)), y).backward()
            optimizer.step()
    loader.detach()
    assert head.weight.grad is None
    assert scale.grad is None


def test_what_is_trained_by_another_backward_pass_or_frozen_is_left_alone() -> None:
    model, other, frozen = linear_model(), nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()), False)
    _, optimizer, loader = private(model)
    for x, y in loader:
        other.square().backward()
        F.cross_entropy(model(x) * frozen, y).backward()
        optimizer.step()
    assert other.grad is not None


def test_a_lazy_module_elsewhere_in_the_program_disturbs_nothing() -> None:
    model, elsewhere = linear_model(), nn.LazyLinear(3)
    before = [p.detach().clone() for p in model.parameters()]
    _, optimizer, loader = private(model)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert elsewhere.has_uninitialized_params()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_lazy_head_that_the_private_batch_itself_makes_is_refused_in_that_batch() -> None:
    model, lazy = linear_model(), nn.LazyLinear(3)
    _, optimizer, loader = private(model)
    with unchanged(model), refused("DP031"):
        for x, y in loader:
            F.cross_entropy(lazy(model(x)), y).backward()
            optimizer.step()
    loader.detach()
    assert lazy.weight.grad is None
    assert not lazy._forward_hooks


def test_a_criterion_with_trainable_parameters_is_refused_by_both_surfaces() -> None:
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused("DP031"):
        PrivateTrainer(model, optimizer, Temperature(), linear_data(), make_run())
    with refused("DP031"):
        private(model, loss_fn=Temperature(), loss_reduction="none")
    PrivateTrainer(model, optimizer, Temperature().requires_grad_(False), linear_data(), make_run()).fit()


@pytest.mark.parametrize("kind", USES)
def test_a_loss_function_that_trains_something_is_refused_by_the_trainer(kind: str) -> None:
    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(USES[kind](outputs), target, reduction="none")

    model = linear_model()
    trainer = PrivateTrainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss, linear_data(), make_run(rate=1.0)
    )
    with unchanged(model), refused("DP031"):
        trainer.fit()
    assert scale.grad is None
