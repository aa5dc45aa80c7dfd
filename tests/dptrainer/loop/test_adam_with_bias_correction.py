"""DPAdamBC: the update written out, the noise told by the receipt, phases, checkpoints, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model, make_run, private, refused, step
from torch import nn

from dpbudget.plan import Phase, rate_from_float
from dptrainer import DPAdamBC, PrivateTrainer


def written_out(gradients: list[torch.Tensor], variances: list[float], lr: float, floor: float) -> torch.Tensor:
    """sum of updates by the formula of the paper, in float64, by explicit sums instead of a recursion."""
    moved = torch.zeros_like(gradients[0], dtype=torch.float64)
    for t in range(1, len(gradients) + 1):
        first = sum(0.1 * 0.9 ** (t - i) * gradients[i - 1].double() for i in range(1, t + 1)) / (1 - 0.9**t)
        second = sum(0.001 * 0.999 ** (t - i) * gradients[i - 1].double() ** 2 for i in range(1, t + 1))
        noise = sum(0.001 * 0.999 ** (t - i) * variances[i - 1] for i in range(1, t + 1))
        corrected = (second - noise) / (1 - 0.999**t)
        moved -= lr * first / corrected.clamp(min=floor).sqrt()
    return moved


def phases(*sigmas: float, steps: int = 2) -> tuple[Phase, ...]:
    return tuple(Phase(rate_k=rate_from_float(0.5), noise_multiplier=s, steps=steps) for s in sigmas)


def test_the_update_is_the_formula_with_the_noise_of_each_phase_from_the_plan() -> None:
    run = make_run(phases=phases(1.0, 3.0), clip_norm=0.7)
    model = linear_model()
    start = model.weight.detach().double().clone()
    optimizer = DPAdamBC(model.parameters(), lr=0.01, floor=1e-6)
    gradients: list[torch.Tensor] = []
    optimizer.register_step_post_hook(lambda *_: gradients.append(model.weight.grad.clone()))
    _, _, loader = private(model, optimizer, run=run)
    for batch in loader:
        step(model, optimizer, batch)
    variances = [(sigma * 0.7 / 20.0) ** 2 for sigma in (1.0, 1.0, 3.0, 3.0)]
    expected = start + written_out(gradients, variances, 0.01, 1e-6)
    torch.testing.assert_close(model.weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_noise_alone_leaves_a_second_moment_near_zero_that_adam_takes_for_signal() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(4000))
    optimizer = DPAdamBC([parameter], lr=1.0, betas=(0.0, 0.9), floor=1e-12)
    for _ in range(100):
        parameter.grad = 0.5 * torch.randn(4000)
        optimizer.gradient_noise(0.5)
        optimizer.step()
    state = optimizer.state[parameter]
    assert state["noise_sq"] == pytest.approx(0.25, rel=1e-4)
    assert float(state["exp_avg_sq"].mean()) == pytest.approx(0.25, rel=0.02)
    assert abs(float((state["exp_avg_sq"] - state["noise_sq"]).mean())) < 0.01


def test_the_trainer_tells_it_too_and_physical_batches_do_no_harm() -> None:
    weights = []
    for size in (None, 7):
        model = linear_model()
        optimizer = DPAdamBC(model.parameters(), lr=0.05, weight_decay=0.1)
        told: list[float] = []
        optimizer.register_step_pre_hook(lambda optimizer, *_, told=told: told.append(optimizer._noise))
        PrivateTrainer(
            model, optimizer, F.cross_entropy, linear_data(), make_run(3, sigma=2.0), physical_batch_size=size
        ).fit()
        assert told == pytest.approx([2.0 / 20.0] * 3)
        weights.append(model.weight.detach().clone())
    assert weights[0].isfinite().all()


def test_physical_batches_of_a_loop_move_nothing_until_the_last() -> None:
    model = linear_model()
    optimizer = DPAdamBC(model.parameters())
    _, _, loader = private(model, optimizer, physical_batch_size=16, run=make_run(2, rate=1.0))
    for batch in loader:
        step(model, optimizer, batch)
    assert optimizer.state[model.weight]["step"] == 2


def test_its_state_survives_saving_and_loading() -> None:
    model = linear_model()
    optimizer = DPAdamBC(model.parameters())
    for _ in range(2):
        optimizer.gradient_noise(1 / 3)
        model.weight.grad, model.bias.grad = torch.ones(3, 5), torch.ones(3)
        optimizer.step()
    other = linear_model()
    again = DPAdamBC(other.parameters())
    again.load_state_dict(optimizer.state_dict())
    assert again.state[other.weight]["noise_sq"] == optimizer.state[model.weight]["noise_sq"]
    assert again.state[other.weight]["step"] == 2


def test_gradients_of_unknown_noise_and_closures_are_refused() -> None:
    model = linear_model()
    optimizer = DPAdamBC(model.parameters())
    optimizer.step()  # nothing to do
    model.weight.grad = torch.ones(3, 5)
    with refused("DP021"):
        optimizer.step()
    optimizer.gradient_noise(1.0)
    optimizer.step()
    with refused("DP021"):  # each step is told anew
        optimizer.step()
    with refused("DP017"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"floor": 0.0}, {"lr": math.nan}])
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with refused("DP009"):
        DPAdamBC(linear_model().parameters(), **bad)
