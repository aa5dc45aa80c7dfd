"""Random numbers in forward hide nothing: models that draw are tested for clipping like any other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, private, refused
from torch import Tensor, nn

import dptrainer.probe as probing


def _scripted() -> Callable[[Tensor], Tensor]:
    def drop(x: Tensor) -> Tensor:
        return torch.dropout(x, 0.4, True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: Callable[[Tensor], Tensor] = torch.jit.script(drop)
    return compiled


scripted = _scripted()


def drop_path(h: Tensor) -> Tensor:
    return h * (torch.rand(len(h), 1) < 0.9) / 0.9


def attention(h: Tensor) -> Tensor:
    one = h.unsqueeze(1)
    return F.scaled_dot_product_attention(one, one, one, dropout_p=0.4).squeeze(1)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.dropout": lambda h: F.dropout(h, 0.4),
    "torch.dropout": lambda h: torch.dropout(h, 0.4, train=True),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.4, training=True),
    "feature dropout": lambda h: F.dropout2d(h.view(-1, 2, 3, 1), 0.4).view_as(h),
    "TorchScript": lambda h: scripted(h),
    "dropout of attention": attention,
    "rrelu": lambda h: F.rrelu(h, training=True),
    "dropped paths": drop_path,
    "paths dropped in place": lambda h: h * h.new_empty(len(h), 1).bernoulli_(0.3).div_(0.3),
    "added noise": lambda h: h + 0.1 * torch.randn_like(h),
    "normal": lambda h: torch.normal(h, 0.1),
    "Gumbel softmax": F.gumbel_softmax,
}


class Draws(nn.Module):
    """Draws between two layers; may hide a gradient from the engine, which a custom Function can."""

    def __init__(self, draw: Callable[[Tensor], Tensor], *, hiding: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self._draw, self._hiding = draw, hiding

    def forward(self, x: Tensor) -> Tensor:
        h = self._draw(self.first(x))
        return self.second(_Hidden.apply(h, self.first.bias) if self._hiding else h)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor) -> Tensor:
        return h + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].sum(0)


@pytest.mark.parametrize("kind", DRAWS)
def test_a_model_that_draws_is_tested_in_full_and_accepted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[nn.Module] = []
    real = probing.self_test

    def counting(model: nn.Module, *args: Any, **options: Any) -> None:
        tested.append(model)
        real(model, *args, **options)

    monkeypatch.setattr(probing, "self_test", counting)
    before, notes = torch.get_rng_state(), []
    model = Draws(DRAWS[kind])
    torch.set_rng_state(before)
    private(model, loss_fn=F.cross_entropy, note=notes.append)[2].detach()
    assert tested == [model]
    assert notes == []
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_do_not_hide_a_gradient_that_would_be_lost(kind: str) -> None:
    with refused("DP019|DP030"):
        private(Draws(DRAWS[kind], hiding=True))


def test_what_no_test_can_repeat_is_mentioned() -> None:
    def draw(h: Tensor) -> Tensor:
        return h * torch.distributions.Dirichlet(torch.ones(6)).sample((len(h),))

    notes: list[str] = []
    private(Draws(draw), loss_fn=F.cross_entropy, note=notes.append)[2].detach()
    assert notes == [probing.UNTESTED_CLIPPING]
    with pytest.warns(UserWarning, match="clipping was not compared"):
        private(Draws(draw))[2].detach()


class TimeMajorOneStep(nn.Module):
    """x [B, d] is taken for one step of a time-major sequence; dropout used to hide that from the test."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x.unsqueeze(0))
        return self.head(F.dropout(hidden, 0.1, self.training))[-1]


def test_examples_in_another_dimension_are_refused_whatever_is_dropped() -> None:
    with refused("DP019|DP030"):
        private(TimeMajorOneStep(), data=linear_data(classes=2))
