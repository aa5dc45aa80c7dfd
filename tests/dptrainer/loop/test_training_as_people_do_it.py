"""Schedules of noise, rate and learning rate, several losses, checkpointing, autocast and a compiled loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import CountedNoise, NoNoise, linear_data, linear_model, make_run, norm, private, refused, step
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from dpbudget.plan import Phase, rate_from_float
from dptrainer import PrivateTrainer


def phase(rate: float, sigma: float, steps: int) -> Phase:
    return Phase(rate_k=rate_from_float(rate), noise_multiplier=sigma, steps=steps)


# ---------------------------------------------------------------------- phases of a plan


@pytest.mark.parametrize("loop", [True, False])
def test_each_phase_of_the_plan_has_its_own_noise(loop: bool) -> None:
    """Empty draws: what is in .grad is the noise of the step, over the expected batch of the step."""
    run = make_run(phases=(phase(1e-12, 0.5, 3), phase(1e-12, 4.0, 3)), clip_norm=0.3)
    model = nn.Linear(60, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = TensorDataset(torch.zeros(40, 60), torch.zeros(40).long())
    stds: list[float] = []
    optimizer.register_step_post_hook(lambda *_: stds.append(float(model.weight.grad.std()) * 1e-12 * 40))
    if loop:
        for batch in private(model, optimizer, data, run)[2]:
            step(model, optimizer, batch)
    else:
        PrivateTrainer(model, optimizer, F.cross_entropy, data, run).fit()
    assert stds[:3] == pytest.approx([0.5 * 0.3] * 3, rel=0.07)
    assert stds[3:] == pytest.approx([4.0 * 0.3] * 3, rel=0.07)


def test_each_phase_of_the_plan_has_its_own_rate_and_divisor_and_one_clipping_norm() -> None:
    run = make_run(phases=(phase(1.0, 1.0, 1), phase(0.25, 1.0, 40)), clip_norm=0.2, nominal_size=50)
    noise, model = NoNoise(), linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    divided: list[float] = []
    optimizer.register_step_post_hook(lambda *_: divided.append(float(model.weight.grad.norm())))
    sizes = []
    for x, y in private(model, optimizer, run=run, noise=noise)[2]:
        sizes.append(len(x))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert sizes[0] == 40
    assert sum(sizes[1:]) / 40 == pytest.approx(10, abs=5 * math.sqrt(7.5 / 40))
    for expected, got, sums in zip([50.0] + [12.5] * 40, divided, noise.sums, strict=True):
        assert got * expected == pytest.approx(float(sums["weight"].norm()), rel=1e-5)
        assert norm(sums) <= 0.2 * 40


# ---------------------------------------------------------------------- learning rate schedules

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=12),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=12),
    "warm-up, then exponential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[4],
    ),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("size", [None, 13])
def test_schedules_of_steps_give_the_learning_rates_of_ordinary_training(name: str, size: int | None) -> None:
    def rates(optimizer: Any, steps: Any) -> list[float]:
        schedule, found = SCHEDULES[name](optimizer), []
        for _ in steps(optimizer):
            found.append(optimizer.param_groups[0]["lr"])
            schedule.step()
        return found

    def ordinary(optimizer: Any) -> Any:
        for _ in range(12):
            optimizer.step()
            yield

    def privately(optimizer: Any) -> Any:
        _, _, loader = private(model, optimizer, run=make_run(12, rate=1.0), physical_batch_size=size)
        for batch in loader:
            step(model, optimizer, batch)
            if loader.step_complete:
                yield

    model = linear_model()
    plain = rates(torch.optim.SGD(linear_model().parameters(), lr=0.3), ordinary)
    assert rates(torch.optim.SGD(model.parameters(), lr=0.3), privately) == pytest.approx(plain)


def test_a_plateau_schedule_on_public_data_works() -> None:
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    _, _, loader = private(model, optimizer, run=make_run(4), steps_per_epoch=1)
    for _ in range(4):
        for batch in loader:
            step(model, optimizer, batch)
        schedule.step(1.0)  # the loss on public records, which does not get better
    assert optimizer.param_groups[0]["lr"] == 0.125


# ---------------------------------------------------------------------- the forward and the loss


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.label, self.size = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.body(x))
        return self.label(h), self.size(h).squeeze(1)


def single_sum(model: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], clip_norm: float) -> Any:
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in linear_data():
        grads = torch.autograd.grad(loss(x[None], y[None]), list(model.parameters()))
        factor = min(1.0, clip_norm / math.sqrt(sum(float(g.square().sum()) for g in grads)))
        for name, grad in zip(total, grads, strict=True):
            total[name] += factor * grad
    return total


def test_several_losses_of_a_step_are_added_before_one_backward() -> None:
    torch.manual_seed(0)
    model, noise = TwoHeads(), NoNoise()

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        label, size = model(x)
        return F.cross_entropy(label, y) + 0.3 * F.mse_loss(size, x[:, 0]) + 0.01 * label.square().mean()

    expected = single_sum(model, loss, 0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = private(model, optimizer, run=make_run(1, rate=1.0, clip_norm=0.4), noise=noise)
    for x, y in loader:
        loss(x, y).backward()
        optimizer.step()
    for name in expected:
        torch.testing.assert_close(noise.sums[0][name], expected[name], rtol=1e-4, atol=1e-5)


def test_two_backward_passes_of_two_losses_are_refused() -> None:
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = private(model, optimizer, run=make_run(1, rate=1.0))
    for x, y in loader:
        label, size = model(x)
        F.cross_entropy(label, y).backward(retain_graph=True)
        with refused("DP031"):
            F.mse_loss(size, x[:, 0]).backward()
        break


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.block, self.reentrant = nn.Linear(5, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), reentrant
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if self.reentrant is None:
            return self.last(self.block(h))
        return self.last(checkpoint(self.block, h, use_reentrant=self.reentrant))


# The tests at set-up run without gradients, of which the reentrant kind warns.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("views", [1, 3])
def test_gradient_checkpointing_of_both_kinds_gives_the_same_sums(reentrant: bool, views: int) -> None:
    sums = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        model, noise = Checkpointed(kind), NoNoise()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = make_run(1, rate=1.0, clip_norm=0.2)
        for batch in private(model, optimizer, run=run, noise=noise, views=views, physical_batch_size=17)[2]:
            step(model, optimizer, batch)
        sums.append(noise.sums[0])
    for name in sums[0]:
        torch.testing.assert_close(sums[1][name], sums[0][name], rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_trains_in_float32_sums_near_the_exact_ones() -> None:
    sums = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model, noise = Checkpointed(None), NoNoise()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        _, _, loader = private(
            model, optimizer, run=make_run(1, rate=1.0, clip_norm=0.2), noise=noise, loss_reduction="sum", views=2
        )
        for x, y in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                outputs = model(x)
            F.cross_entropy(outputs.float(), y, reduction="sum").backward()
            optimizer.step()
        assert all(value.dtype == torch.float32 for value in noise.sums[0].values())
        sums.append(noise.sums[0])
    difference = norm({name: sums[1][name] - sums[0][name] for name in sums[0]})
    assert 0 < difference < 0.02 * norm(sums[0])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiled_loss_gives_the_same_sums() -> None:
    compiled = torch.compile(lambda o, y: F.cross_entropy(o, y) + 0.1 * o.square().mean(), backend="aot_eager")
    sums = []
    for loss in (lambda o, y: F.cross_entropy(o, y) + 0.1 * o.square().mean(), compiled):
        noise, model = NoNoise(), linear_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = make_run(1, rate=1.0)
        _, _, loader = private(model, optimizer, run=run, noise=noise, loss_fn=loss, physical_batch_size=15)
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()
        sums.append(noise.sums[0])
    for name in sums[0]:
        torch.testing.assert_close(sums[1][name], sums[0][name], rtol=1e-5, atol=1e-6)


def test_policies_views_users_and_averages_work_together() -> None:
    from dptrainer import DPAdamBC, MemoryBound, QuantileClipping, UserDataset, WeightAverage

    noise, model = CountedNoise(), linear_model()
    average, optimizer = WeightAverage(model), DPAdamBC(model.parameters(), lr=0.01)
    data = UserDataset(linear_data(), torch.arange(40) // 4, max_examples=3)
    _, _, loader = private(
        model, optimizer, data, make_run(phases=(phase(0.5, 1.0, 3), phase(0.3, 2.0, 3)), nominal_size=10, unit="user"),
        noise=noise, clipping=QuantileClipping(), views=2, physical_batch_size=MemoryBound(50_000),
    )  # fmt: skip
    for batch in loader:
        step(model, optimizer, batch)
        average.update()
    assert (noise.releases, average.steps) == (6, 6)
    assert model.weight.isfinite().all()
