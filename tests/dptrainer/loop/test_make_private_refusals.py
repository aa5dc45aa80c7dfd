"""make_private: everything that would go around the guarantee is refused, at set-up or before the step."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import (
    NoNoise,
    linear_data,
    linear_model,
    make_run,
    private,
    refused,
    same,
    snapshot,
    step,
    unchanged,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from dpbudget.curve import Bounds
from dpbudget.errors import DPBudgetError, InvalidParameter, PrivacyViolation
from dpbudget.meter import Meter
from dptrainer import loop as loop_module
from dptrainer.trainer import PrivateTrainer


def test_another_optimizer_over_the_same_parameters_is_refused() -> None:
    model = linear_model()
    original = torch.optim.SGD(model.parameters(), lr=0.1)
    _, optimizer, loader = private(model, torch.optim.Adam(model.parameters()))
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        with unchanged(model), refused("DP032"):
            original.step()
        optimizer.step()
        with unchanged(model), refused("DP032"):
            original.step()


def test_another_optimizer_finds_no_gradient_even_without_hooks() -> None:
    model, optimizer, loader = private()
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()


def test_optimizers_of_other_models_are_left_alone() -> None:
    private()
    other = linear_model()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    before = other.weight.detach().clone()
    other(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(other.weight, before)


def test_the_old_loader_is_refused() -> None:
    model, optimizer, _ = private()
    with unchanged(model):
        for x, y in DataLoader(linear_data(), batch_size=8, shuffle=True):
            with refused("DP021"):
                F.cross_entropy(model(x), y).backward()
            with refused("DP021"):
                optimizer.step()
            break
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rows", [7, 41])
def test_a_foreign_batch_in_place_of_the_drawn_one_is_refused(rows: int) -> None:
    model, optimizer, loader = private()
    next(batches := iter(loader))
    with unchanged(model), pytest.raises(PrivacyViolation, match="DP030"):
        step(model, optimizer, linear_data(rows).tensors)
    batches.close()


def test_two_backward_passes_before_a_step_are_refused() -> None:
    model, optimizer, loader = private()
    with unchanged(model), refused("DP031"):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def test_a_step_without_backward_is_refused_and_charged() -> None:
    run = make_run(2, rate=1.0)
    model, optimizer, loader = private(run=run)
    with unchanged(model), refused("DP031"):
        for _ in loader:
            optimizer.step()
    assert run.charged == 1


def test_a_second_step_for_one_batch_is_refused() -> None:
    model, optimizer, loader = private()
    for batch in loader:
        step(model, optimizer, batch)
        with unchanged(model), refused("DP021"):
            optimizer.step()
        break


def test_a_step_after_a_broken_off_iteration_is_refused() -> None:
    model, optimizer, loader = private()
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        break
    with unchanged(model), refused("DP021"):
        optimizer.step()


def test_a_loss_kept_from_an_earlier_batch_is_refused() -> None:
    model, optimizer, loader = private()
    kept = None
    with refused("DP031"):
        for x, y in loader:
            if kept is not None:
                kept.backward()
            kept = F.cross_entropy(model(x), y)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def test_a_closure_is_refused() -> None:
    model, optimizer, loader = private()
    with unchanged(model), refused("DP017"):
        for x, y in loader:
            optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))


def test_a_penalty_on_parameters_in_the_loss_is_refused() -> None:
    model, optimizer, loader = private()
    with unchanged(model), refused("DP031"):
        for x, y in loader:
            (F.cross_entropy(model(x), y) + model.weight.square().sum()).backward()
            optimizer.step()


def test_backward_in_eval_mode_is_refused() -> None:
    model, optimizer, loader = private()
    with unchanged(model), refused("DP014"):
        for batch in loader:
            model.eval()
            step(model, optimizer, batch)


def test_a_second_iteration_drops_the_open_batch_of_the_first() -> None:
    noise, run = NoNoise(), make_run(4, rate=1.0)
    model, optimizer, loader = private(run=run, noise=noise)
    outer = iter(loader)
    kept = next(outer)
    for inner in loader:
        step(model, optimizer, inner)
        break
    with refused("DP0"):
        step(model, optimizer, kept)
    assert [receipt.step for receipt in noise.receipts] == [1]


def test_two_iterations_at_once_never_add_their_partial_sums() -> None:
    # One example in both would count twice under one receipt.
    noise, run = NoNoise(), make_run(4, rate=1.0)
    model, optimizer, loader = private(run=run, noise=noise, physical_batch_size=20)
    outer = iter(loader)
    step(model, optimizer, next(outer))
    inner = iter(loader)
    step(model, optimizer, next(inner))
    with refused("DP023"):
        next(outer)
    step(model, optimizer, next(inner))
    assert [receipt.step for receipt in noise.receipts] == [1]
    alone = NoNoise()
    fresh, other, plain = private(run=make_run(1, rate=1.0), noise=alone)
    for batch in plain:
        step(fresh, other, batch)
    torch.testing.assert_close(noise.sums[0]["weight"], alone.sums[0]["weight"], rtol=1e-5, atol=1e-6)


def test_an_abandoned_iteration_does_not_disturb_the_next() -> None:
    noise = NoNoise()
    model, optimizer, loader = private(run=make_run(4, rate=1.0), noise=noise)
    abandoned = iter(loader)
    next(abandoned)
    second = iter(loader)
    batch = next(second)
    abandoned.close()
    step(model, optimizer, batch)
    assert len(noise.sums) == 1


def test_a_trainer_takes_a_model_over_from_a_loop() -> None:
    model, optimizer, loader = private()
    for batch in loader:
        step(model, optimizer, batch)
        break
    result = PrivateTrainer(model, optimizer, F.cross_entropy, linear_data(), make_run(2)).fit()
    assert result.steps == 2
    with refused("DP021"):
        next(iter(loader))


def test_a_detached_model_is_an_ordinary_one() -> None:
    model, optimizer, loader = private()
    for batch in loader:
        step(model, optimizer, batch)
        break
    loader.detach()
    before = snapshot(model)
    optimizer.zero_grad()
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert not same(model, before)
    with refused("DP021"):
        next(iter(loader))


def test_a_second_make_private_replaces_the_first() -> None:
    model, optimizer, old = private()
    _, _, new = private(model, optimizer, run=make_run(2, rate=1.0))
    with refused("DP021"):
        next(iter(old))
    for batch in new:
        step(model, optimizer, batch)


def test_copies_and_pickles_of_the_model_are_plain() -> None:
    model, optimizer, loader = private()
    for batch in loader:
        step(model, optimizer, batch)
        break
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for plain in (twin, torch.load(file, weights_only=False)):
        plain.zero_grad()
        plain(torch.ones(2, 5)).sum().backward()
        assert plain.weight.grad is not None


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(linear_data())


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + x.mean(0))


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear_model()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x)


def frozen_batch_norm() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm1d(5), linear_model())
    model[0].requires_grad_(False)
    return model


def optimizer_of(model: nn.Module, kind: Any = torch.optim.SGD, **kw: Any) -> tuple[nn.Module, Any]:
    return model, kind(model.parameters(), **kw)


@pytest.mark.parametrize(
    ("build", "code"),
    [
        (lambda: private(data=DataLoader(linear_data(), batch_size=4, shuffle=True)), "DP020"),
        (lambda: private(data=DataLoader(linear_data(), batch_size=4)), "DP020"),
        (lambda: private(data=DataLoader(linear_data(), sampler=WeightedRandomSampler([1.0] * 40, 40))), "DP022"),
        (lambda: private(data=DataLoader(Stream())), "DP024"),
        (lambda: private(data=Stream()), "DP024"),
        (lambda: private(data=(torch.zeros(40, 3), torch.zeros(40, dtype=torch.long))), "DP024"),
        (lambda: private(data=(item for item in linear_data())), "DP024"),
        (lambda: private(optimizer=torch.optim.SGD(linear_model(seed=1).parameters())), "DP011"),
        (lambda: private(m := linear_model(), torch.optim.SGD([m.weight])), "DP012"),
        (lambda: private(*optimizer_of(linear_model(), torch.optim.LBFGS)), "DP017"),
        (lambda: private(Mixing()), "DP033"),
        (lambda: private(RunningMean()), "DP013"),
        (lambda: private(frozen_batch_norm()), "DP010"),
        (lambda: private(linear_model().eval()), "DP014"),
        (lambda: private(run=make_run(max_parameters=17)), "DP018"),
        (lambda: private(linear_model().requires_grad_(False), torch.optim.SGD([torch.zeros(1)])), "DP0"),
        (lambda: private(loss_reduction="average"), "DP030"),
        (lambda: private(physical_batch_size=0), "DP009"),
        (lambda: private(steps_per_epoch=0), "DP009"),
        (lambda: private(run="run"), "DP081"),
    ],
)
def test_what_cannot_be_made_private_is_refused_untouched(build: Any, code: str) -> None:
    with pytest.raises(DPBudgetError, match=code) as caught:
        build()
    assert caught.value.hint
    assert not list(loop_module._attached)


def test_a_refused_set_up_charges_nothing_and_leaves_the_model_plain() -> None:
    run, model = make_run(), Mixing()
    before = snapshot(model)
    with refused("DP033"):
        private(model, run=run)
    assert run.charged == 0
    assert same(model, before)
    model(torch.ones(2, 5)).sum().backward()
    assert model.linear.weight.grad is not None


def test_misspelt_options_are_errors() -> None:
    with pytest.raises(TypeError, match="loss_redction"):
        private(loss_redction="sum")
    with pytest.raises(TypeError, match="noise_multiplier"):
        private(noise_multiplier=1.0)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="no record"):
        private(data=TensorDataset(torch.randn(0, 5), torch.zeros(0)))


def test_a_collate_function_that_loses_records_is_refused() -> None:
    said: list[str] = []
    model, optimizer, loader = private(collate_fn=lambda items: torch.zeros(2, 5), note=said.append)
    assert "not tested" in said[0]
    with refused("DP023"):
        for batch in loader:
            step(model, optimizer, batch)


def test_live_epsilon_comes_from_the_meter_of_the_run() -> None:
    run = make_run(2)
    model, optimizer, loader = private(run=run)
    assert loader.epsilon is None
    run.meter = Meter((2,), (Bounds(0.9, 1.0),), 5e-7, 1.0)
    assert loader.epsilon == Bounds(0.0, 0.0)
    for batch in loader:
        step(model, optimizer, batch)
        assert loader.epsilon.upper == 1.0


def test_nothing_is_printed_or_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, loader = private(run=make_run(3))
    for batch in loader:
        step(model, optimizer, batch)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
