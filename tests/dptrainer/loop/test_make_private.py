"""make_private: ordinary loops work, empty and dropped batches included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import (
    CountedNoise,
    NoNoise,
    linear_data,
    linear_model,
    make_run,
    norm,
    private,
    refused,
    same,
    snapshot,
    step,
    unchanged,
)
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dpbudget.errors import PlanExhausted


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


def test_a_run_that_was_begun_before_is_noted() -> None:
    notes: list[str] = []
    run = make_run(3)
    private(run=run, loss_fn=F.cross_entropy, note=notes.append)
    assert notes == []
    run.next_receipt()
    private(run=run, loss_fn=F.cross_entropy, note=notes.append)
    assert notes == ["1 steps of this run are charged already; load the checkpoint of their weights."]
