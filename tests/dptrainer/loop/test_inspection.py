"""Per-example gradients and norms for public data: against plain autograd, and refused in the private loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model, make_run, private, refused, step, unchanged
from torch import nn

from dptrainer import per_example_gradients, per_example_norms

X, Y = linear_data(9).tensors


def one_by_one(model: nn.Module, x: Any = X, y: Any = Y) -> dict[str, torch.Tensor]:
    rows = [
        torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        for i in range(len(x))
    ]
    return {name: torch.stack([row[k] for row in rows]) for k, (name, _) in enumerate(model.named_parameters())}


@pytest.mark.parametrize("training", [True, False])
def test_they_are_the_gradients_of_each_example_alone(training: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).train(training)
    expected = one_by_one(model)
    with unchanged(model):
        found = per_example_gradients(model, nn.CrossEntropyLoss(), (X, Y))
        norms = per_example_norms(model, F.cross_entropy, [X, Y])
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    everything = torch.cat([g.flatten(1) for g in expected.values()], 1)
    torch.testing.assert_close(norms, everything.double().norm(dim=1), rtol=1e-4, atol=1e-6)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_layers_in_eval_mode_act_as_in_eval_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3)).eval()
    torch.testing.assert_close(
        per_example_gradients(model, F.cross_entropy, (X, Y))["1.weight"], one_by_one(model)["1.weight"]
    )


def test_named_inputs_and_replayed_modules_work() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scale = linear_model(), nn.Parameter(torch.ones(3))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.table(pixels) * self.scale

    model = Named()
    found = per_example_gradients(model, F.cross_entropy, {"pixels": X, "labels": Y})
    for name, expected in one_by_one(model).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
    again = per_example_norms(model, F.cross_entropy, (X, Y), replay=[model.table])
    assert again.shape == (9,)


def test_they_are_refused_while_a_private_batch_is_open_and_given_between_steps() -> None:
    model, optimizer, loader = private(run=make_run(2, rate=1.0))
    for batch in loader:
        with refused("DP031"):
            per_example_norms(model, F.cross_entropy, batch)
        with refused("DP031"):
            per_example_gradients(model, F.cross_entropy, batch)
        step(model, optimizer, batch)
        assert per_example_norms(model, F.cross_entropy, (X, Y)).shape == (9,)


def test_a_loss_over_the_whole_batch_is_refused() -> None:
    with refused("DP030"):
        per_example_norms(linear_model(), lambda outputs, target: outputs.mean(), (X, Y))
