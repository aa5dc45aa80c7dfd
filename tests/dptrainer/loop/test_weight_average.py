"""The moving average of the weights: the recursion, the swap, and what must not be counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model, make_run, private, refused, same, snapshot, step, unchanged
from torch import nn

from dptrainer import PrivateTrainer, WeightAverage, load_checkpoint, save_checkpoint


def test_the_average_is_the_recursion_of_the_weights_after_each_step() -> None:
    model, optimizer, loader = private(run=make_run(5))
    average = WeightAverage(model, 0.9, warm_up=False)
    expected = model.weight.detach().double().clone()
    for batch in loader:
        step(model, optimizer, batch)
        average.update()
        expected = 0.9 * expected + 0.1 * model.weight.detach().double()
    with average.applied():
        torch.testing.assert_close(model.weight.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_warming_up_forgets_the_initial_weights() -> None:
    model = linear_model()
    start = model.weight.detach().double().clone()
    average, expected = WeightAverage(model, 0.999), start
    for number in range(4):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update()
        decay = (1 + number) / (10 + number)
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(average.state_dict()["mean"]["weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_physical_batches_that_end_no_step_are_not_counted() -> None:
    averages = []
    for size in (None, 7):
        model, optimizer, loader = private(run=make_run(3, rate=1.0), noise=_Silent(), physical_batch_size=size)
        average = WeightAverage(model, 0.5)
        for batch in loader:
            step(model, optimizer, batch)
            average.update()
        assert average.steps == 3
        averages.append(average.state_dict()["mean"]["weight"])
    torch.testing.assert_close(averages[0], averages[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("foreach", [False, True])
def test_every_step_is_seen_whatever_the_optimizer(make: type[torch.optim.Optimizer], foreach: bool) -> None:
    model = linear_model()
    average = WeightAverage(model)
    optimizer = make(model.parameters(), lr=0.1, foreach=foreach)
    for number in range(3):
        F.cross_entropy(model(torch.ones(2, 5)), torch.tensor([0, 1])).backward()
        optimizer.step()
        average.update()
        average.update()
        assert average.steps == number + 1


def test_the_trained_weights_come_back_after_evaluation_even_after_an_error() -> None:
    model = linear_model()
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.mul_(3.0)
    average.update()
    with unchanged(model), pytest.raises(RuntimeError, match="mine"), average.applied():
        raise RuntimeError("mine")
    average.update()
    assert average.steps == 1  # swapping is not a step


def test_a_step_that_was_not_yet_seen_is_seen_after_a_swap() -> None:
    model = linear_model()
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.mul_(3.0)
    with average.applied():
        pass
    average.update()
    assert average.steps == 1


def test_it_is_a_callback_of_the_trainer_and_does_not_stop_it() -> None:
    model = linear_model()
    average = WeightAverage(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    PrivateTrainer(model, optimizer, F.cross_entropy, linear_data(), make_run(4), callbacks=[average.update]).fit()
    assert average.steps == 4


def test_a_checkpoint_keeps_the_average_and_the_schedule(tmp_path: Path) -> None:
    run = make_run(5)
    model, optimizer, loader = private(run=run, steps_per_epoch=3)
    average = WeightAverage(model, 0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for batch in loader:
        step(model, optimizer, batch)
        average.update()
        schedule.step()
    extras = {"average": average, "schedule": schedule}
    saved = save_checkpoint(tmp_path / "c", model, optimizer, run=run, extras=extras)
    assert saved.extras is not None
    other = linear_model(seed=4)
    sgd = torch.optim.SGD(other.parameters(), lr=9.0)
    again, later = WeightAverage(other, 0.9), torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5)
    load_checkpoint(tmp_path / "c", other, sgd, run=run, extras={"average": again, "schedule": later})
    assert same(other, snapshot(model))
    assert (again.steps, later.last_epoch) == (3, 3)
    assert torch.equal(again.state_dict()["mean"]["weight"], average.state_dict()["mean"]["weight"])


def test_extras_that_were_not_saved_or_were_changed_are_refused(tmp_path: Path) -> None:
    run, model = make_run(), linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_checkpoint(tmp_path / "bare", model, optimizer, run=run)
    with refused("DP091"):
        load_checkpoint(tmp_path / "bare", model, run=run, extras={"average": WeightAverage(model)})
    save_checkpoint(tmp_path / "c", model, optimizer, run=run, extras={"average": WeightAverage(model)})
    with refused("DP091"):
        load_checkpoint(tmp_path / "c", model, run=run, extras={"mean": WeightAverage(model)})
    with refused("DP091"):
        wide = nn.Linear(6, 3)
        WeightAverage(wide).load_state_dict(WeightAverage(model).state_dict())
    (tmp_path / "c" / "extras.pt").write_bytes(b"else")
    with refused("DP071"):
        load_checkpoint(tmp_path / "c", model, run=run)


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan"), True, "0.9"])
def test_a_decay_out_of_range_is_refused(bad: object) -> None:
    with refused("DP009"):
        WeightAverage(linear_model(), bad)  # type: ignore[arg-type]


class _Silent:
    def privatise(self, clipped, receipt):  # type: ignore[no-untyped-def]
        from dptrainer.values import NoisySum

        return NoisySum(clipped.grads, clipped.statistics)
