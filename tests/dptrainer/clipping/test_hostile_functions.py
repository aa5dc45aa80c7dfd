"""Parameters used where torch functions do not show it: in an ``autograd.Function``, or frozen on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clipping_oracle import assert_equal_to_the_oracle, clipped, refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dptrainer.clipping import BookKeeping
from dptrainer.isolation import isolation_test


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ x


class ByPointer(Product):
    """As a kernel in another language would: no torch function is given the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        assert weight.data_ptr()
        ctx.save_for_backward(x, weight)
        return x.clone()


class Shared(nn.Module):
    """Uses the weight of its layer a second time, through ``use``."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.use = nn.Linear(6, 6), use

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.use(x, self.fc.weight)


def under_no_grad(x: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        scale = weight.norm()
    with torch.no_grad(), torch.enable_grad():
        pass
    with torch.inference_mode():
        size = float(weight.abs().max())
    return x * scale + x * size + Product.apply(x, weight.detach())


def after_other_modes(x: Tensor, weight: Tensor) -> Tensor:
    x = checkpoint(torch.tanh, x.clone().requires_grad_(), use_reentrant=True)
    with torch.no_grad():
        weight.norm()
    return Product.apply(x, weight)


@pytest.mark.parametrize("use", [Product.apply, ByPointer.apply, after_other_modes])
def test_a_parameter_given_to_an_autograd_function_outside_its_layer_is_refused(
    use: Callable[[Tensor, Tensor], Tensor],
) -> None:
    said = refused("DP019", lambda: clipped(Shared(use), (torch.randn(4, 6),), 1.0))
    assert '"fc.weight"' in said


def test_a_module_replayed_as_a_whole_may_do_so() -> None:
    model = Shared(Product.apply)
    assert_equal_to_the_oracle(model, (torch.randn(4, 6),), replay=[model])


def test_what_is_meant_to_have_no_gradient_is_left_alone() -> None:
    assert_equal_to_the_oracle(Shared(under_no_grad), (torch.randn(4, 6),))


class OwnFunction(nn.Linear):
    """A linear layer written with an ``autograd.Function``: no rule fits, and it is replayed."""

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight) + self.bias


def test_a_layer_that_applies_one_to_its_own_weight_is_replayed() -> None:
    assert_equal_to_the_oracle(nn.Sequential(OwnFunction(6, 5), nn.Tanh(), nn.Linear(5, 3)), (torch.randn(4, 6),))


def test_a_parameter_that_is_frozen_within_a_forward_pass_is_refused() -> None:
    class Freezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.fc.weight.requires_grad = False
            return self.fc(x)

    refused("DP019", lambda: clipped(Freezes(), (torch.randn(4, 6),), 1.0))


def test_a_frozen_parameter_that_keeps_statistics_is_refused_when_it_moves() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.centre = nn.Linear(6, 3), nn.Parameter(torch.zeros(6), requires_grad=False)
            self.moves = False

        def forward(self, x: Tensor) -> Tensor:
            if self.moves:
                with torch.no_grad():
                    self.centre.mul_(0.9).add_(0.1 * x.mean(0))
            return self.fc(x - self.centre)

    model = Centred()
    assert_equal_to_the_oracle(model, (torch.randn(4, 6),))
    model = model.float()
    model.moves = True  # on a path that set-up did not take
    assert 'frozen parameter "centre"' in refused("DP013", lambda: clipped(model, (torch.randn(4, 6),), 1.0))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_in_words(layout: torch.layout) -> None:
    model, rows = nn.Linear(6, 3), [torch.randn(1 + i, 6) for i in range(3)]
    engine = BookKeeping(model, clip_norm=1.0)
    engine.begin(3)
    refused("DP019", lambda: model(torch.nested.nested_tensor(rows, layout=layout)))
    engine.detach()

    class Nests(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.nested.as_nested_tensor(list(x.unsqueeze(1)), layout=layout)).to_padded_tensor(0.0)

    refused("DP019", lambda: isolation_test(Nests(), [torch.randn(3, 6)]))
