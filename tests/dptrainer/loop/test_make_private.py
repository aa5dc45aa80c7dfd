"""make_private: ordinary loops work, and everything that would go around the guarantee is refused."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import CountedNoise, NoNoise, linear_data, linear_model, make_run, norm, same, snapshot, unchanged
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from dpbudget.curve import Bounds
from dpbudget.errors import DPBudgetError, InvalidParameter, PlanExhausted, PrivacyViolation
from dpbudget.meter import Meter
from dptrainer import loop as loop_module
from dptrainer.private import make_private
from dptrainer.trainer import PrivateTrainer


def private(model: Any = None, optimizer: Any = None, data: Any = None, run: Any = None, **kw: Any) -> Any:
    model = linear_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    data = linear_data() if data is None else data
    return make_private(model, optimizer, data, run=make_run(rate=1.0) if run is None else run, **kw)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    x, y = batch
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def refused(code: str) -> Any:
    return pytest.raises(DPBudgetError, match=code)


@pytest.fixture(autouse=True)
def _no_loop_outlives_its_test() -> Iterator[None]:
    yield
    for loop in list(loop_module._attached):
        loop.detach()


# ---------------------------------------------------------------------- the ordinary loop


def test_the_loop_of_the_readme_charges_and_releases_every_step() -> None:
    noise, run = CountedNoise(), make_run(steps=6)
    model, optimizer, loader = private(run=run, noise=noise)
    before = model.weight.detach().clone()
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (run.charged, noise.releases) == (6, 6)
    assert not torch.equal(model.weight, before)


def test_the_same_objects_come_back_and_names_do_not_change() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    optimizer = torch.optim.Adam(model.parameters())
    names, kind = list(model.state_dict()), type(model)
    returned = private(model, optimizer)
    assert returned[0] is model
    assert returned[1] is optimizer
    assert type(model) is kind
    for batch in returned[2]:
        step(model, optimizer, batch)
    assert list(model.state_dict()) == names
    nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).load_state_dict(model.state_dict())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", [None, 1, 9, 16])
def test_the_sum_is_that_of_single_examples(reduction: str, size: int | None) -> None:
    noise, data, frozen = NoNoise(), linear_data(), linear_model()
    run = make_run(steps=1, rate=1.0, clip_norm=0.3)
    model, optimizer, loader = private(
        data=data, run=run, noise=noise, loss_reduction=reduction, physical_batch_size=size
    )
    for x, y in loader:
        loss = F.cross_entropy(model(x), y, reduction=reduction)
        (loss.sum() if reduction == "none" else loss).backward()
        optimizer.step()
    total = {name: torch.zeros_like(p) for name, p in frozen.named_parameters()}
    for x, y in data:
        grads = torch.autograd.grad(F.cross_entropy(frozen(x[None]), y[None]), list(frozen.parameters()))
        factor = min(1.0, 0.3 / math.sqrt(sum(float(g.square().sum()) for g in grads)))
        for name, grad in zip(total, grads, strict=True):
            total[name] += factor * grad
    assert len(noise.sums) == 1
    for name, expected in total.items():
        torch.testing.assert_close(noise.sums[0][name], expected, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        moved = dict(frozen.named_parameters())[name] - 0.1 * noise.sums[0][name] / 40.0
        torch.testing.assert_close(parameter.detach(), moved.detach())


def test_the_divisor_is_the_public_one_whatever_the_dataset_holds() -> None:
    for rows in (17, 63):
        noise, model = NoNoise(), linear_model()
        before = model.weight.detach().clone()
        _, optimizer, loader = private(model, data=linear_data(rows), run=make_run(1, rate=1.0), noise=noise)
        for batch in loader:
            step(model, optimizer, batch)
        torch.testing.assert_close(model.weight.detach(), before - 0.1 * noise.sums[0]["weight"] / 40.0)


def test_epochs_are_counted_in_steps_of_the_plan() -> None:
    run = make_run(steps=7)
    model, optimizer, loader = private(run=run, steps_per_epoch=3)
    lengths = []
    for _ in range(3):
        assert len(loader) == min(3, run.remaining)
        lengths.append(0)
        for batch in loader:
            step(model, optimizer, batch)
            lengths[-1] += 1
    assert lengths == [3, 3, 1]


def test_past_the_plan_is_an_error_and_nothing_moves() -> None:
    run = make_run(steps=2)
    model, optimizer, loader = private(run=run)
    for batch in loader:
        step(model, optimizer, batch)
    with unchanged(model), pytest.raises(PlanExhausted, match="DP050"):
        next(iter(loader))
    assert len(loader) == 0


def test_zero_grad_anywhere_is_harmless() -> None:
    noise = NoNoise()
    model, optimizer, loader = private(run=make_run(2, rate=1.0), noise=noise)
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        model.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert all(norm(sums) > 0 for sums in noise.sums)


def test_a_loop_without_zero_grad_does_not_add_up_gradients() -> None:
    noise = NoNoise()
    model, optimizer, loader = private(run=make_run(2, rate=1.0), noise=noise)
    for batch in loader:
        before = model.weight.detach().clone()
        step(model, optimizer, batch)
        torch.testing.assert_close(model.weight.detach(), before - 0.1 * noise.sums[-1]["weight"] / 40.0)


@pytest.mark.parametrize("early", [True, False])
def test_learning_rate_schedules_work(early: bool) -> None:
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if early else None
    _, _, loader = private(model, optimizer, run=make_run(3))
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for batch in loader:
        step(model, optimizer, batch)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_evaluation_in_between_is_untouched() -> None:
    noise = NoNoise()
    model, optimizer, loader = private(run=make_run(2, rate=1.0), noise=noise)
    held_out = torch.randn(11, 5)
    for x, y in loader:
        model.eval()
        with torch.no_grad():
            expected = F.linear(held_out, model.weight, model.bias)
            assert torch.equal(model(held_out), expected)
        model.train()
        loss = F.cross_entropy(model(x), y)
        with torch.no_grad():
            model(held_out)
        loss.backward()
        optimizer.step()
    assert len(noise.sums) == 2


def test_a_validation_pass_in_train_mode_has_no_effect() -> None:
    noise = NoNoise()
    model, optimizer, loader = private(run=make_run(1, rate=1.0), noise=noise)
    model(torch.randn(7, 5))
    for x, y in loader:
        model(torch.randn(13, 5))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert len(noise.sums) == 1


def test_a_parameter_frozen_later_leaves_the_release() -> None:
    noise = NoNoise()
    model, optimizer, loader = private(run=make_run(3, rate=1.0), noise=noise)
    for number, batch in enumerate(loader):
        if number == 0:
            step(model, optimizer, batch)
            model.bias.requires_grad_(False)
            bias = model.bias.detach().clone()
            continue
        step(model, optimizer, batch)
    assert [sorted(sums) for sums in noise.sums] == [["bias", "weight"], ["weight"], ["weight"]]
    assert torch.equal(model.bias, bias)


def test_a_parameter_without_gradient_receives_noise() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = linear_model(), linear_model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Unused()
    before = model.unused.weight.detach().clone()
    _, optimizer, loader = private(model, run=make_run(1, rate=1.0))
    for batch in loader:
        step(model, optimizer, batch)
    assert not torch.equal(model.unused.weight, before)


# ---------------------------------------------------------------------- empty batches, dropped batches


def test_an_empty_draw_runs_the_same_code_and_releases_noise_alone() -> None:
    noise = NoNoise()
    model, optimizer, loader = private(run=make_run(4, rate=1e-15), noise=noise)
    losses = []
    for x, y in loader:
        assert (x.shape, y.shape, x.dtype, y.dtype) == ((1, 5), (1,), torch.float32, torch.int64)
        assert not x.any()
        assert not y.any()
        loss = F.cross_entropy(model(x), y)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert all(math.isfinite(value) for value in losses)
    assert [norm(sums) for sums in noise.sums] == [0.0] * 4


def test_an_empty_draw_takes_a_real_noisy_charged_step() -> None:
    run, noise = make_run(2, rate=1e-15), CountedNoise()
    model, optimizer, loader = private(run=run, noise=noise)
    before = snapshot(model)
    for batch in loader:
        step(model, optimizer, batch)
    assert (run.charged, noise.releases) == (2, 2)
    assert not same(model, before)


class Words(Dataset[Any]):
    """Records of different lengths, padded by a collate function."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.arange(1, 2 + index % 5), index % 3


def pad(items: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    words = nn.utils.rnn.pad_sequence([item[0] for item in items], batch_first=True)
    return words, torch.tensor([item[1] for item in items])


@pytest.mark.parametrize("rate", [0.5, 1e-15])
def test_collated_batches_and_empty_ones_pass_through_user_code(rate: float) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(words).mean(1))

    noise = CountedNoise()
    model, optimizer, loader = private(Bag(), data=Words(), run=make_run(3, rate), collate_fn=pad, noise=noise)
    for batch in loader:
        step(model, optimizer, batch)
    assert noise.releases == 3


def test_leaving_a_batch_midway_drops_the_partial_sum() -> None:
    noise, run = NoNoise(), make_run(2, rate=1.0)
    model, optimizer, loader = private(run=run, noise=noise, physical_batch_size=10)
    with unchanged(model):
        for number, batch in enumerate(loader):
            if number == 2:
                break
            step(model, optimizer, batch)
    assert run.charged == 1
    assert noise.sums == []
    for batch in loader:
        step(model, optimizer, batch)
    assert len(noise.sums) == 1
    other = NoNoise()
    whole, opt, plain = private(run=make_run(1, rate=1.0), noise=other)
    for batch in plain:
        step(whole, opt, batch)
    torch.testing.assert_close(noise.sums[0]["weight"], other.sums[0]["weight"], rtol=1e-5, atol=1e-6)


def test_a_batch_without_a_step_is_dropped_and_stays_charged() -> None:
    noise, run = CountedNoise(), make_run(4, rate=1.0)
    model, optimizer, loader = private(run=run, noise=noise)
    for number, batch in enumerate(loader):
        if number % 2:
            continue
        step(model, optimizer, batch)
    assert (run.charged, noise.releases) == (4, 2)


def test_a_skipped_physical_batch_drops_its_whole_step() -> None:
    noise, run = NoNoise(), make_run(2, rate=1.0)
    model, optimizer, loader = private(run=run, noise=noise, physical_batch_size=10)
    for number, batch in enumerate(loader):
        if number == 1:
            continue
        step(model, optimizer, batch)
    assert run.charged == 2
    assert len(noise.sums) == 1
    assert len(noise.receipts) == 1
    assert noise.receipts[0].step == 1


def test_parameters_stay_put_until_the_last_physical_batch() -> None:
    model, optimizer, loader = private(run=make_run(1, rate=1.0), physical_batch_size=16)
    before, moves = snapshot(model), []
    for batch in loader:
        step(model, optimizer, batch)
        moves.append((not same(model, before), loader.step_complete))
    assert moves == [(False, False), (False, False), (True, True)]


def test_a_schedule_that_counts_physical_batches_is_refused() -> None:
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    _, _, loader = private(model, optimizer, run=make_run(1, rate=1.0), physical_batch_size=16)
    with unchanged(model), refused("DP034"):
        for batch in loader:
            step(model, optimizer, batch)
            scheduler.step()


def test_a_schedule_that_counts_steps_is_fine_with_physical_batches() -> None:
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    _, _, loader = private(model, optimizer, run=make_run(2, rate=1.0), physical_batch_size=16)
    for batch in loader:
        step(model, optimizer, batch)
        if loader.step_complete:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_record_contributes_nothing(bad: float) -> None:
    clean = linear_data(10)
    inputs, labels = (t.clone() for t in clean.tensors)
    inputs[3, 2] = bad
    sums = []
    for data in (TensorDataset(inputs, labels), TensorDataset(*(torch.cat([t[:3], t[4:]]) for t in clean.tensors))):
        noise = NoNoise()
        model, optimizer, loader = private(data=data, run=make_run(1, rate=1.0), noise=noise, loss_reduction="sum")
        for x, y in loader:
            F.cross_entropy(model(x), y, reduction="sum").backward()
            optimizer.step()
        sums.append(noise.sums[0])
    torch.testing.assert_close(sums[0]["weight"], sums[1]["weight"], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- going around it


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


# ---------------------------------------------------------------------- refusals at set-up


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
    model, optimizer, loader = private(collate_fn=lambda items: pad([(torch.ones(2), 0)]))
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
