"""What the private batch would train outside the private model is refused, also where no module is called."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model, make_run, private, refused, unchanged
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dptrainer.trainer import PrivateTrainer


class Temperature(nn.Module):
    """A criterion that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.scale.exp(), target, reduction="none")


head, scale, plain = nn.Linear(3, 3), nn.Parameter(torch.zeros(())), torch.zeros((), requires_grad=True)
USES: dict[str, Callable[[Tensor], Tensor]] = {
    "a bare parameter": lambda h: h * scale.exp(),
    "a tensor that is no parameter": lambda h: h * plain.exp(),
    "weights of a module that is not called": lambda h: F.linear(h, head.weight),
    "a module": lambda h: head(h),
}


@pytest.fixture(scope="module", autouse=True)
def _objects_of_this_module_are_seen() -> Iterator[None]:
    """What was made while tests were collected is frozen, and nobody finds it (``tests/conftest.py``)."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


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
    assert plain.grad is None


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
    assert plain.grad is None


class Asks(nn.Module):
    """Makes a leaf of what a frozen layer gives, as libraries do for gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4).requires_grad_(False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).requires_grad_())


def test_leaves_that_the_forward_pass_makes_are_left_alone() -> None:
    model = Asks()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    _, _, loader = private(model, optimizer)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    loader.detach()
    model = Asks()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), linear_data(), make_run(rate=1.0)).fit()


def own_pass(model: nn.Module, other: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(other(model(x).detach()), y).backward()


def own_model(model: nn.Module, other: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(other[0](other[1](x)), y).backward()


def on_features(model: nn.Module, other: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        features = nn.Flatten()(model(x))
    F.cross_entropy(other(features), y).backward()


def by_hand(model: nn.Module, other: nn.Module, x: Tensor, y: Tensor) -> None:
    parameters = list(other.parameters())
    found = torch.autograd.grad(F.cross_entropy(other(model(x)), y), parameters)
    for parameter, grad in zip(parameters, found, strict=True):
        parameter.grad = grad


def by_keyword(model: nn.Module, other: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(other(input=model(x).detach()), y).backward()


Trains = Callable[[nn.Module, nn.Module, Tensor, Tensor], None]
BESIDE: dict[str, tuple[Trains, Callable[[], nn.Module]]] = {
    "a head on detached outputs": (own_pass, lambda: nn.Linear(3, 3)),
    "a head of several layers": (own_pass, lambda: nn.Sequential(nn.ReLU(), nn.Linear(3, 3))),
    "a head on features": (on_features, lambda: nn.Linear(3, 3)),
    "a head given its input by name": (by_keyword, lambda: nn.Linear(3, 3)),
    "another model": (own_model, lambda: nn.Sequential(nn.Linear(5, 3), nn.Identity())),
    "autograd.grad": (by_hand, lambda: nn.Linear(3, 3)),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_a_loop_trains_beside_the_model_is_refused_before_its_own_optimizer_moves_it(kind: str) -> None:
    trains, build = BESIDE[kind]
    model, other = linear_model(), build()
    mine = torch.optim.SGD(other.parameters(), lr=1.0)
    _, _, loader = private(model)
    batches = iter(loader)
    x, y = next(batches)
    with unchanged(model), unchanged(other), refused("DP031"):
        trains(model, other, x, y)
        mine.step()
    loader.detach()
    assert all(p.grad is None for p in other.parameters())
    assert not torch.nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("on", ["outputs", "inputs"])
def test_training_on_the_batch_after_its_step_is_refused_too(on: str) -> None:
    model, other = linear_model(), nn.Linear(3 if on == "outputs" else 5, 3)
    mine = torch.optim.SGD(other.parameters(), lr=1.0)
    _, optimizer, loader = private(model)
    batches = iter(loader)
    x, y = next(batches)
    outputs = model(x)
    F.cross_entropy(outputs, y).backward()
    optimizer.step()
    with unchanged(other), refused("DP031"):
        F.cross_entropy(other(outputs.detach() if on == "outputs" else x), y).backward()
        mine.step()


def test_an_update_by_hand_ends_the_loop() -> None:
    model, other = linear_model(), nn.Linear(5, 3)
    _, optimizer, loader = private(model)
    steps = 0
    with refused("DP031"):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps += 1
            F.cross_entropy(other(x), y).backward()
    assert steps == 1


def test_a_teacher_that_could_be_trained_and_is_not_is_left_alone() -> None:
    model, teacher, steps = linear_model(), nn.Sequential(nn.Linear(5, 3), nn.ReLU()), 0
    _, optimizer, loader = private(model)
    for x, y in loader:
        target = teacher(x).detach()
        (F.cross_entropy(model(x), y) + (model(x) - target).square().sum(1).mean()).backward()
        optimizer.step()
        steps += 1
    assert steps == 4


def test_another_model_on_other_data_is_left_alone_in_an_open_batch() -> None:
    model, other = linear_model(), nn.Sequential(nn.Linear(5, 3), nn.Tanh())
    plain, before = torch.optim.SGD(other.parameters(), lr=1.0), other[0].weight.detach().clone()
    _, optimizer, loader = private(model)
    for x, y in loader:
        other(torch.ones(4, 5)).sum().backward()
        torch.autograd.grad(other(torch.ones(4, 5)).sum(), list(other.parameters()))
        plain.step()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        other(torch.ones(4, 5)).sum().backward()
    assert not torch.equal(before, other[0].weight)


@pytest.mark.parametrize("kind", USES)
def test_what_is_used_within_a_reentrant_checkpoint_is_refused_too(kind: str) -> None:
    """Its gradients come in a backward pass of their own, within that of the private model."""
    model = linear_model()
    _, optimizer, loader = private(model)
    with unchanged(model), refused("DP031"):
        for x, y in loader:
            F.cross_entropy(checkpoint(USES[kind], model(x), use_reentrant=True), y).backward()
            optimizer.step()
    loader.detach()
    assert head.weight.grad is None
    assert scale.grad is None
