"""Compiled functions and frozen modules inside a private model: the same sums, and no way past the guard."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import NoNoise, linear_data, make_run, private, refused, step
from torch import nn

from dptrainer import compiled
from dptrainer.clipping import BookKeeping

# What the compiler itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
compile_part = functools.partial(compiled, backend="aot_eager", dynamic=True)


def activation(h: torch.Tensor) -> torch.Tensor:
    return F.gelu(h) * torch.sigmoid(h) + h.mean(-1, keepdim=True)


class Model(nn.Module):
    def __init__(self, middle: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(5, 6), nn.Linear(6, 3), middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


def sums_of(middle: Callable[..., Any]) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, noise = Model(middle), NoNoise()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in private(model, optimizer, run=make_run(1, rate=1.0), noise=noise, physical_batch_size=11)[2]:
        step(model, optimizer, batch)
    return noise.sums


def frozen_body() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)).requires_grad_(False)


@pytest.mark.parametrize("kind", ["function", "frozen module", "partial"])
def test_a_compiled_part_gives_the_sums_of_the_part_itself(kind: str) -> None:
    body = frozen_body()
    part: Callable[..., Any] = {
        "function": activation,
        "frozen module": body,
        "partial": functools.partial(F.leaky_relu, negative_slope=0.3),
    }[kind]
    plain, fast = sums_of(part), sums_of(compile_part(part))
    for name in plain[0]:
        if name.startswith(("first", "last")):
            torch.testing.assert_close(fast[0][name], plain[0][name], rtol=1e-5, atol=1e-6)


def test_outside_a_private_batch_it_is_the_compiled_function() -> None:
    x = torch.randn(4, 6)
    torch.testing.assert_close(compile_part(activation)(x), activation(x))


def test_a_parameter_that_trains_is_refused_however_it_gets_in() -> None:
    torch.manual_seed(0)
    layer, table = nn.Linear(6, 6), [nn.Parameter(torch.eye(6))]

    class Holding(Model):
        def __init__(self, middle: Callable[..., Any]) -> None:
            super().__init__(middle)
            self.layer, self.table = layer, table[0]

    parts = (
        layer,
        layer.forward,
        lambda h: h @ layer.weight,
        lambda h: h @ table[0],
        functools.partial(torch.matmul, other=table[0]),
    )
    for part in parts:
        model = Holding(compile_part(part))
        engine = BookKeeping(model, clip_norm=1.0, replay=())
        engine.begin(4)
        with refused("DP019"):
            model(torch.randn(4, 5))
        engine.detach()

    class Passing(Holding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.middle(self.first(x), self.layer.weight))

    engine = BookKeeping(Passing(compile_part(torch.matmul)), clip_norm=1.0)
    engine.begin(4)
    with refused("DP019"):
        engine._model(torch.randn(4, 5))
    engine.detach()


def test_a_frozen_part_that_is_unfrozen_later_is_refused() -> None:
    class With(Model):
        def __init__(self, body: nn.Module) -> None:
            super().__init__(compile_part(body))
            self.body = body

    model = With(frozen_body())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = private(model, optimizer, run=make_run(3, rate=1.0))
    with refused("DP019"):
        for batch in loader:
            step(model, optimizer, batch)
            model.body.requires_grad_(True)  # from the second step on


def test_statistics_of_a_compiled_part_are_refused() -> None:
    norm = nn.BatchNorm1d(6).requires_grad_(False)
    with refused("DP010"):
        engine = BookKeeping(Model(compile_part(norm)), clip_norm=1.0)
        engine.begin(4)
        engine._model(torch.randn(4, 5))

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            self.seen += h.detach().sum(0)
            return h

    with refused("DP013"):
        engine = BookKeeping(Model(compile_part(Counting())), clip_norm=1.0)
        engine.begin(4)
        engine._model(torch.randn(4, 5))


def test_positions_stay_positions_through_a_compiled_part() -> None:
    class Positions(nn.Module):
        def __init__(self, middle: Callable[..., Any]) -> None:
            super().__init__()
            self.table, self.last, self.middle = nn.Embedding(5, 4), nn.Linear(4, 3), middle

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            places = self.middle(torch.arange(5))
            return self.last(self.table(places) * x.unsqueeze(2)).mean(1)

    x = linear_data(5).tensors[0]  # as many examples as positions
    engine = BookKeeping(Positions(compile_part(lambda p: p * 1)), clip_norm=1.0)
    engine.begin(5)
    with refused("DP030"):
        engine._model(x)
    engine.detach()


def test_what_cannot_be_called_is_refused() -> None:
    with refused("DP009"):
        compiled(3)  # type: ignore[arg-type]
