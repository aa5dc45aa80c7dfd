"""Views of an example and examples of a user in whole loops: what is drawn, clipped, divided and released."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loopkit import CountedNoise, NoNoise, linear_data, linear_model, make_run, norm, private, refused, step
from torch.utils.data import Dataset, TensorDataset

from dptrainer import PrivateTrainer, UserDataset, make_private


class Shifted(Dataset[Any]):
    """An augmentation that is different at each reading, and known: reading n of a record adds n."""

    def __init__(self) -> None:
        self.inner, self.read = linear_data(), [0] * 40

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        x, y = self.inner[index]
        self.read[index] += 1
        return x + (self.read[index] - 1) % 3, y


def clipped_sum(units: list[list[tuple[torch.Tensor, torch.Tensor]]], divisor: int, clip_norm: float) -> Any:
    model = linear_model()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for rows in units:
        losses = [F.cross_entropy(model(x[None]), y[None]) for x, y in rows]
        loss = torch.stack(losses).sum() / divisor
        grads = dict(zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        for name, grad in grads.items():
            total[name] += min(1.0, clip_norm / norm(grads)) * grad
    return total


def train(loop: bool, data: Any, noise: Any, run: Any, reduction: str = "mean", **options: Any) -> Any:
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if not loop:
        PrivateTrainer(model, optimizer, F.cross_entropy, data, run, noise=noise, **options).fit()
        return model
    _, _, loader = make_private(model, optimizer, data, run=run, noise=noise, loss_reduction=reduction, **options)
    for x, y in loader:
        F.cross_entropy(model(x), y, reduction=reduction).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("loop", "reduction"), [(True, "mean"), (True, "sum"), (False, "mean")])
@pytest.mark.parametrize("size", [None, 7])
def test_the_mean_over_the_views_of_an_example_is_clipped_once(loop: bool, reduction: str, size: int | None) -> None:
    noise, data = NoNoise(), Shifted()
    run = make_run(1, rate=1.0, clip_norm=0.5)
    data.read = [-1] + [0] * 39  # set-up reads the first record once
    train(loop, data, noise, run, reduction, views=3, physical_batch_size=size)
    rows = linear_data()
    views = [[(x + n, y) for n in range(3)] for x, y in rows]
    expected = clipped_sum(views, 3, 0.5)
    for name in expected:
        torch.testing.assert_close(noise.sums[0][name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("size", [None, 2])
def test_the_summed_gradient_of_a_user_is_clipped_once(loop: bool, size: int | None) -> None:
    noise, rows = NoNoise(), linear_data()
    owners = ["anna"] * 3 + ["ben"] * 1 + ["carla", "dan"] * 2 + [f"user {n % 8}" for n in range(32)]
    data = UserDataset(rows, owners, max_examples=4)
    run = make_run(1, rate=1.0, clip_norm=0.2, nominal_size=12, unit="user")
    train(loop, data, noise, run, physical_batch_size=size)
    units = [[rows[i] for i in range(40) if owners[i] == name] for name in dict.fromkeys(owners)]
    expected = clipped_sum(units, 4, 0.2)
    for name in expected:
        torch.testing.assert_close(noise.sums[0][name], expected[name], rtol=1e-4, atol=1e-5)
    assert norm(noise.sums[0]) <= 0.2 * 12


def test_users_are_drawn_whole_and_with_the_rate_of_the_plan() -> None:
    rows = TensorDataset(torch.arange(60.0)[:, None].expand(60, 5).contiguous(), torch.zeros(60).long())
    owners = np.arange(60) // 3
    _, _, loader = private(data=UserDataset(rows, owners, max_examples=3), run=make_run(300, rate=0.25, unit="user"))
    seen = torch.zeros(20)
    for x, _ in loader:
        if not x.any():
            continue
        drawn, counts = torch.div(x[:, 0].long(), 3, rounding_mode="floor").unique(return_counts=True)
        assert (counts == 3).all()
        seen[drawn] += 1
    assert seen.sum() == pytest.approx(300 * 20 * 0.25, abs=5 * math.sqrt(300 * 20 * 0.25 * 0.75))


def test_a_user_brings_at_most_k_examples_drawn_anew() -> None:
    data = UserDataset(linear_data(), torch.arange(40) // 20, max_examples=6)
    assert len(data) == 2
    picks = {tuple(data.chosen(np.array([1]))[0].tolist()) for _ in range(20)}
    assert len(picks) > 1
    assert all(len(set(rows)) == 6 and min(rows) >= 20 for rows in picks)
    rows, counts = data.chosen(np.array([0, 1]))
    assert counts == (6, 6)
    assert (rows[:6] < 20).all()
    assert len(data[0]) == 6


def test_one_user_moves_the_sum_by_at_most_c_however_much_it_brings() -> None:
    """The worst that a user can do: many examples, all alike, all huge."""
    inputs, labels = (t.clone() for t in linear_data().tensors)
    inputs[20:] = 1e3
    sums = []
    for count in (20, 40):
        noise = NoNoise()
        owners = [*range(20), *[99] * 20][:count]
        data = UserDataset(TensorDataset(inputs[:count], labels[:count]), owners, max_examples=20)
        train(True, data, noise, make_run(1, rate=1.0, clip_norm=0.3, unit="user"))
        sums.append(noise.sums[0])
    moved = {name: sums[1][name] - sums[0][name] for name in sums[0]}
    assert 0.2 < norm(moved) <= 0.3 * (1 + 1e-4)


@pytest.mark.parametrize("loop", [True, False])
def test_views_of_the_examples_of_users_and_empty_draws(loop: bool) -> None:
    noise = CountedNoise()
    data = UserDataset(linear_data(), torch.arange(40) // 7, max_examples=5)
    train(loop, data, noise, make_run(3, rate=1e-15, unit="user"), views=2)
    train(loop, data, noise, make_run(3, rate=0.5, unit="user"), views=2)
    assert noise.releases == 6


@pytest.mark.parametrize("bad", [0, True, 1.5, -1])
def test_bounds_that_are_no_counts_are_refused(bad: Any) -> None:
    with refused("DP009"):
        UserDataset(linear_data(), torch.arange(40), max_examples=bad)
    with refused("DP009"):
        private(views=bad)


def test_names_that_do_not_match_the_examples_are_refused_without_telling_how_many() -> None:
    with refused("DP009") as caught:
        UserDataset(linear_data(), torch.arange(39), max_examples=2)
    assert not any(character.isdigit() for character in caught.value.message)
    with refused("DP024"):
        UserDataset(iter([1]), [1], max_examples=2)  # type: ignore[arg-type]
    with refused("DP009"):
        private(data=UserDataset(TensorDataset(torch.zeros(0, 5), torch.zeros(0).long()), [], max_examples=2))


@pytest.mark.parametrize("missing", [float("nan"), None, object(), torch.tensor([1, 2]), ("a", 1)])
def test_a_name_that_only_equals_itself_is_refused_and_does_not_make_two_users_of_one(missing: Any) -> None:
    with refused("DP009"):
        UserDataset(linear_data(), ["anna"] * 39 + [missing], max_examples=2)
    for one in (torch.tensor(7), np.int64(7), np.float32(7), 7.0, True):
        names = [one] * 20 + [int(one)] * 20
        assert len(UserDataset(linear_data(), names, max_examples=2)) == 1


@pytest.mark.parametrize("loop", [True, False])
def test_the_plan_and_the_dataset_must_speak_of_the_same_unit(loop: bool) -> None:
    people = UserDataset(linear_data(), torch.arange(40) // 4, max_examples=4)
    for data, unit in ((people, "example"), (linear_data(), "user")):
        run = make_run(2, unit=unit)
        with refused("DP025"):
            train(loop, data, NoNoise(), run)
        assert run.charged == 0


def test_a_step_with_views_stays_one_receipt() -> None:
    run = make_run(3, rate=0.5)
    model, optimizer, loader = private(run=run, views=4, physical_batch_size=3)
    releases = 0
    for batch in loader:
        step(model, optimizer, batch)
        releases += loader.step_complete
    assert (run.charged, releases) == (3, 3)
