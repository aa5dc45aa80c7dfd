"""A model that is changed after set-up is tested again, and refused where nobody could test it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import NoNoise, linear_data, linear_model, make_run, private, refused, unchanged
from torch import Tensor, nn

from dpbudget.errors import PrivacyViolation
from dptrainer.trainer import PrivateTrainer


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class MixingCall(nn.Tanh):
    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = super().__call__(x)
        return found - found.mean(0)


class Double(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


def doubled(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, 2 * self.weight, self.bias)


def another_forward(model: nn.Sequential) -> None:
    model[0].forward = types.MethodType(doubled, model[0])  # type: ignore[method-assign]  # as people do it


def another_class(model: nn.Sequential) -> None:
    model[0].__class__ = type("Doubled", (nn.Linear,), {"forward": doubled})


def another_module(model: nn.Sequential) -> None:
    model[0] = Double(model[0])


def exchanged(place: int, module: nn.Module) -> Callable[[nn.Sequential], None]:
    return lambda model: model.__setitem__(place, module)


Change = Callable[[nn.Sequential], Any]
MIXING: dict[str, Change] = {
    "a hook": lambda m: m[0].register_forward_hook(lambda layer, args, out: out - out.mean(0)),
    "a hook before": lambda m: m[2].register_forward_pre_hook(lambda layer, args: args[0] - args[0].mean(0)),
    "a backward hook": lambda m: m[2].register_full_backward_hook(lambda layer, below, _: (below[0].flip(0),)),
    "a module": exchanged(1, Mixing()),
    "a batch norm": exchanged(1, nn.BatchNorm1d(6, affine=False)),
    "a forward": lambda m: setattr(m[1], "forward", lambda x: x - x.mean(0)),
    "a call": lambda m: setattr(m[1], "__class__", MixingCall),
}
HARMLESS: dict[str, Change] = {
    "a hook": lambda m: m[0].register_forward_hook(lambda layer, args, out: 2 * out),
    "a hook in front of ours": lambda m: m[0].register_forward_hook(lambda layer, args, out: 2 * out, prepend=True),
    "a hook before": lambda m: m[2].register_forward_pre_hook(lambda layer, args: 2 * args[0]),
    "a forward": another_forward,
    "a class": another_class,
    "a module with the same parameters": another_module,
    "a module": exchanged(1, nn.ReLU()),
}
USING: dict[str, Change] = {
    "before": lambda m: m[2].register_forward_pre_hook(lambda layer, args: args[0] * layer.weight.sum()),
    "after": lambda m: m[2].register_forward_hook(lambda layer, args, out: out * layer.weight.sum()),
    "in front": lambda m: m[2].register_forward_hook(lambda layer, args, out: out * layer.weight.sum(), prepend=True),
}


@pytest.mark.parametrize("change", MIXING)
def test_what_mixes_examples_is_refused_also_when_it_comes_after_set_up(change: str) -> None:
    model = small()
    _, _, loader = private(model, run=make_run(3, rate=1.0))
    MIXING[change](model)
    with unchanged(model), pytest.raises(PrivacyViolation, match=r"DP033|DP019|DP010"):
        next(iter(loader))


@pytest.mark.parametrize("change", MIXING)
def test_the_trainer_tests_again_what_a_callback_changed(change: str) -> None:
    model = small()
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.1), list[int]()

    def callback(done: int, _: object) -> None:
        MIXING[change](model)
        steps.append(done)

    trainer = PrivateTrainer(
        model, optimizer, nn.CrossEntropyLoss(), linear_data(), make_run(3, rate=1.0), callbacks=[callback]
    )
    with pytest.raises(PrivacyViolation, match=r"DP033|DP019|DP010"):
        trainer.fit()
    assert steps == [1]


@pytest.mark.parametrize("change", HARMLESS)
def test_what_keeps_examples_apart_is_trained_with_exact_gradients(change: str) -> None:
    model, noise = small(), NoNoise()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    _, _, loader = private(model, optimizer, run=make_run(2, rate=1.0, clip_norm=1e6), noise=noise)
    first = iter(loader)
    x, y = next(first)
    HARMLESS[change](model)
    with refused("DP019"):
        model(x)  # while the batch is open that nobody tested it for
    first.close()
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    loader.detach()
    model.zero_grad()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(noise.sums[0][name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", USING)
def test_a_later_hook_that_uses_a_parameter_is_refused_wherever_it_stands(place: str) -> None:
    model = small()
    _, _, loader = private(model, run=make_run(3, rate=1.0))
    USING[place](model)
    with unchanged(model), refused("DP019"):
        next(iter(loader))


def test_a_forward_that_was_wrapped_and_put_back_is_no_change() -> None:
    model = small()
    _, optimizer, loader = private(model, run=make_run(2, rate=1.0))
    for x, y in loader:
        model[1].forward = model[1].forward  # type: ignore[method-assign]  # as transformers leaves it behind
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert not loader._loop.run.remaining


def test_a_layer_that_is_compiled_in_place_after_set_up_is_refused() -> None:
    model = small()
    _, _, loader = private(model, run=make_run(2, rate=1.0))
    model[0].compile(backend="eager")
    with unchanged(model), refused("DP019"):
        next(iter(loader))


def test_hooks_that_are_taken_off_are_missed() -> None:
    model = small()
    _, _, loader = private(model, run=make_run(3, rate=1.0))
    batches = iter(loader)
    x, _ = next(batches)
    model[0]._forward_hooks.clear()
    with unchanged(model), refused("DP019"):
        model(x)


def test_freezing_within_a_batch_is_refused_and_stays() -> None:
    for place in ("before forward", "before step"):
        model = small()
        _, optimizer, loader = private(model, run=make_run(3, rate=1.0))
        batches = iter(loader)
        x, y = next(batches)
        with unchanged(model), refused("DP031"):
            if place == "before forward":
                model[0].requires_grad_(False)
            F.cross_entropy(model(x), y).backward()
            model[0].requires_grad_(False)
            optimizer.step()
        loader.detach()
        assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_freezing_between_steps_is_followed() -> None:
    model, noise = small(), NoNoise()
    _, optimizer, loader = private(model, run=make_run(2, rate=1.0), noise=noise)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        model[0].requires_grad_(False)
    assert [len(found) for found in noise.sums] == [4, 2]


def test_a_model_that_cannot_be_copied_is_refused_in_words() -> None:
    model = linear_model()
    model.seen = model(torch.ones(1, 5))  # type: ignore[assignment]  # an activation with its graph
    with refused("DP019"):
        private(model)
