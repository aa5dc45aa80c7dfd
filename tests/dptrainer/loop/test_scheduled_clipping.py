"""A clipping threshold by the step: each step is that of a plan with the threshold as its clipping norm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model, make_run, norm, private, refused, step

from dpbudget.ledger.receipt import Receipt
from dptrainer import PrivateTrainer, ScheduledClipping, TreeTrainer, load_checkpoint, save_checkpoint
from dptrainer.values import ClippedSum, NoisySum


class Silent:
    """Releases sums without noise, and keeps how they were."""

    def __init__(self) -> None:
        self.sums: list[dict[str, torch.Tensor]] = []

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        receipt.use("grad-noise")
        self.sums.append({name: value.clone() for name, value in clipped.grads.items()})
        return NoisySum(clipped.grads, clipped.statistics)


def gradients(clipping: Any, run: Any, **options: Any) -> list[torch.Tensor]:
    """``.grad`` of every step, with a model that stands still."""
    model, found = linear_model(), []

    class Still(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    optimizer = Still(model.parameters(), lr=1.0)
    PrivateTrainer(model, optimizer, F.cross_entropy, linear_data(), run, clipping=clipping, **options).fit()
    return found


def test_every_step_is_that_of_a_plan_with_the_threshold_as_its_clipping_norm() -> None:
    thresholds = {0: 2.0, 1: 0.25, 3: 0.01}
    found = gradients(ScheduledClipping(thresholds), make_run(5, rate=1.0), noise=Silent())
    for at, threshold in enumerate((2.0, 0.25, 0.25, 0.01, 0.01)):
        (expected,) = gradients(None, make_run(1, rate=1.0, clip_norm=threshold), noise=Silent())
        torch.testing.assert_close(found[at], expected, rtol=1e-5, atol=1e-7)


def test_noise_follows_the_threshold() -> None:
    found = gradients(ScheduledClipping(lambda t: 4.0**t), make_run(4, rate=1.0, sigma=1e4, nominal_size=40))
    spreads = [float(grad.std()) for grad in found]
    for at, spread in enumerate(spreads):
        assert spread == pytest.approx(1e4 * 4.0**at / 40, rel=0.6)  # 18 values


@pytest.mark.parametrize("threshold", [1 / 60_000, 0.3, 1.0, 60_000.0])
def test_one_example_contributes_at_most_the_plans_c(threshold: float) -> None:
    noise = Silent()
    model, optimizer, loader = private(
        run=make_run(2, rate=1.0, clip_norm=1.0), noise=noise, clipping=ScheduledClipping({0: threshold}),
        data=linear_data(1),
    )  # fmt: skip
    for batch in loader:
        step(model, optimizer, batch)
    assert all(norm(grads) <= 1.0 for grads in noise.sums)
    if threshold < 1.0:
        assert norm(noise.sums[0]) == pytest.approx(1.0, rel=1e-3)


def test_the_threshold_stays_for_all_physical_batches_of_a_step() -> None:
    whole = gradients(ScheduledClipping({0: 0.5, 1: 0.1}), make_run(2, rate=1.0), noise=Silent())
    pieces = gradients(
        ScheduledClipping({0: 0.5, 1: 0.1}), make_run(2, rate=1.0), noise=Silent(), physical_batch_size=7
    )
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other)


def test_a_checkpoint_goes_on_at_its_step(tmp_path: Path) -> None:
    policy, run = ScheduledClipping({0: 1.0, 3: 0.5, 4: 0.25}), make_run(3)
    model, optimizer, loader = private(run=run, clipping=policy)
    assert policy.threshold == 1.0
    for batch in loader:
        step(model, optimizer, batch)
    assert policy.threshold == 0.5
    save_checkpoint(tmp_path / "c", model, optimizer, run=run, extras={"clipping": policy})
    again = ScheduledClipping({0: 1.0, 3: 0.5, 4: 0.25})
    load_checkpoint(tmp_path / "c", model, optimizer, run=run, extras={"clipping": again})
    assert again.threshold == 0.5
    for bad in ({"step": -1}, {"step": 1.0}, {"step": True}, {}):
        with refused("DP091"):
            again.load_state_dict(bad)


NO_SCHEDULES = [
    {},
    {1: 1.0},
    {0: 0.0},
    {0: -1.0},
    {0: math.nan},
    {0: math.inf},
    {0: True},
    {0: "1"},
    {0.5: 1.0},
    0.5,
    None,
]


@pytest.mark.parametrize("schedule", [*NO_SCHEDULES, {-1: 1.0, 0: 1.0}])
def test_what_is_no_schedule_is_refused(schedule: Any) -> None:
    with refused("DP007"):
        ScheduledClipping(schedule)


@pytest.mark.parametrize("schedule", [{0: 1.0, 9: 1e6}, lambda t: 1e6, lambda t: 1e-6, lambda t: math.nan])
def test_a_threshold_far_from_the_plans_is_refused_at_set_up(schedule: Any) -> None:
    run = make_run(3, clip_norm=1.0)
    with refused("DP007"):
        private(run=run, clipping=ScheduledClipping(schedule))
    assert run.charged == 0


def test_a_function_that_leaves_its_range_later_releases_nothing_then() -> None:
    noise, model = Silent(), linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = ScheduledClipping(lambda t: 1.0 if t < 2 else math.nan)
    trainer = PrivateTrainer(
        model, optimizer, F.cross_entropy, linear_data(), make_run(5), clipping=policy, noise=noise
    )
    with refused("DP007"):
        trainer.fit()
    assert len(noise.sums) == 2


def test_a_pass_of_dp_ftrl_takes_no_schedule() -> None:
    model = linear_model()
    with refused("DP019"):
        TreeTrainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, linear_data(),
            make_run(2, rate=1.0), steps_per_pass=4, clipping=ScheduledClipping({0: 1.0}),
        )  # fmt: skip
