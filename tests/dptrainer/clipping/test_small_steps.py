"""What makes a small step cheap must not change what it gives or what it notices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping import BookKeeping, buffer_guard
from dptrainer.clipping.guard import every_module
from dptrainer.clipping.per_example import Dense, Outer, packed


def _alone(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """Autograd's gradients of each example by itself."""
    rows = []
    for one in x:
        model.zero_grad()
        model(one.unsqueeze(0)).square().sum().backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return rows


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.GroupNorm(2, 8), (8, 200, 200)),
        (nn.LayerNorm(512), (600, 512)),
        (nn.RMSNorm(512), (600, 512)),
        (nn.InstanceNorm2d(8, affine=True), (8, 200, 200)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_normalisation_a_few_examples_at_a_time_gives_what_each_example_gives_alone(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    model = model.double()
    x = x.double()
    engine = BookKeeping(model, clip_norm=1e9)
    with engine.record(3):
        losses = model(x).square().flatten(1).sum(1)
    found = engine.per_example(losses)
    for index, row in enumerate(_alone(model, x)):
        for name, expected in row.items():
            torch.testing.assert_close(found[name].dense(slice(index, index + 1))[0], expected)


@pytest.mark.parametrize(("width", "joined"), [(16, True), (40, False)])
def test_a_small_rank_one_gradient_is_joined_with_the_biases_and_a_large_one_is_not(width: int, joined: bool) -> None:
    grads, activations = torch.randn(5, width), torch.randn(5, width)
    forms = packed({"weight": Outer(grads, activations), "bias": Dense(grads)})
    assert (len(forms) == 1) is joined
    squared = sum(form.squared_norms() for form, _ in forms)
    expected = (grads.unsqueeze(2) * activations.unsqueeze(1)).double().square().sum(
        (1, 2)
    ) + grads.double().square().sum(1)
    torch.testing.assert_close(squared, expected, rtol=1e-5, atol=0.0)


def test_every_module_is_found_once_also_where_it_is_used_twice_or_added_later() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    assert set(every_module(model)) == set(model.modules())
    assert len(every_module(model)) == len(list(model.modules()))
    model.append(nn.BatchNorm1d(2))
    assert set(every_module(model)) == set(model.modules())


class _Replaces(nn.Module):
    """Replaces its buffer several times, so that the last one may lie where the first one lay."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("state", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            self.state = self.state.detach() + x.detach().sum(0)
        return self.inner(x)


def test_a_buffer_that_is_replaced_several_times_within_a_forward_pass_is_noticed() -> None:
    model = nn.Sequential(_Replaces())
    with pytest.raises(PrivacyViolation, match=r'"0\.state"'), buffer_guard(model):
        model(torch.randn(3, 2))


def test_a_batch_norm_that_is_added_after_the_set_up_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    engine = BookKeeping(model, clip_norm=1.0)
    model.append(nn.Sequential(nn.BatchNorm1d(2, affine=False)))
    engine.begin(3)
    with pytest.raises(PrivacyViolation, match=r'"1\.0"'):
        model(torch.randn(3, 2))
    engine.abort()
