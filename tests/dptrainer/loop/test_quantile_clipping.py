"""Adaptive clipping in whole loops: one charge, one Gaussian, a threshold that finds the quantile."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model, make_run, norm, private, refused, step
from torch import nn
from torch.utils.data import TensorDataset

from dpbudget.ledger.receipt import Receipt
from dptrainer import PrivateTrainer, QuantileClipping, load_checkpoint, save_checkpoint
from dptrainer.clipping import Clipping
from dptrainer.noise.source import SecureNoise
from dptrainer.values import ClippedSum, NoisySum


class Kept:
    """Releases sums as they are, or with the noise of the receipt, and keeps what was released."""

    def __init__(self, noisy: bool = False) -> None:
        self.inner = SecureNoise() if noisy else None
        self.seen: list[ClippedSum] = []
        self.noise: list[torch.Tensor] = []

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        before = [v.clone() for v in (*clipped.grads.values(), *clipped.statistics.values())]
        self.seen.append(clipped)
        if self.inner is None:
            receipt.use("grad-noise")
            return NoisySum(clipped.grads, clipped.statistics)
        released = self.inner.privatise(clipped, receipt)
        after = (*released.grads.values(), *released.statistics.values())
        self.noise.append(torch.cat([(a - b).double().flatten() for a, b in zip(after, before, strict=True)]))
        return released


def norms(model: nn.Module, data: TensorDataset) -> torch.Tensor:
    found = []
    for x, y in data:
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        found.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("quantile", "initial"),
    [(0.5, 0.01), *(pytest.param(q, c, marks=pytest.mark.slow) for q in (0.2, 0.5, 0.8) for c in (0.01, 100.0))],
)
def test_the_threshold_finds_the_quantile_of_the_norms(quantile: float, initial: float) -> None:
    model, data = linear_model(), linear_data(400)
    policy = QuantileClipping(quantile, rate=0.3, initial=initial)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = make_run(150, rate=0.5, nominal_size=400)
    PrivateTrainer(model, optimizer, F.cross_entropy, data, run, clipping=policy).fit()
    assert policy.threshold is not None
    below = float((norms(model, data) <= policy.threshold).float().mean())
    assert below == pytest.approx(quantile, abs=0.12)


def test_without_noise_gradients_and_threshold_are_those_of_the_paper() -> None:
    noise, data, model = Kept(), linear_data(), linear_model()
    policy = QuantileClipping(0.4, rate=0.5, share=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    _, _, loader = private(model, optimizer, data, make_run(4, rate=1.0, clip_norm=0.8), noise=noise, clipping=policy)
    threshold, twin = 0.8, linear_model()
    for batch in loader:
        sizes = norms(twin, data)
        total = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
        for (x, y), size in zip(data, sizes, strict=True):
            grads = torch.autograd.grad(F.cross_entropy(twin(x[None]), y[None]), list(twin.parameters()))
            for name, grad in zip(total, grads, strict=True):
                total[name] += grad * min(1.0, threshold / float(size))
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p -= 0.5 * total[name] / 40
        step(model, optimizer, batch)
        bits = ((threshold - sizes) / (threshold / 32)).clamp(-0.5, 0.5) + 0.5  # the paper's step, smoothed
        assert ((bits > 0) & (bits < 1)).float().mean() < 0.2
        threshold *= math.exp(-0.5 * (float(bits.mean()) - 0.4))
        assert policy.threshold == pytest.approx(threshold, rel=1e-4)
        torch.testing.assert_close(model.weight, twin.weight, rtol=1e-4, atol=1e-5)


def test_one_gaussian_of_the_plans_noise_covers_gradients_and_bits() -> None:
    noise = Kept(noisy=True)
    run = make_run(400, rate=1e-15, sigma=1.5, clip_norm=0.8)
    model, optimizer, loader = private(run=run, noise=noise, clipping=QuantileClipping(share=0.3))
    for batch in loader:
        step(model, optimizer, batch)
    assert run.charged == 400
    drawn = torch.stack(noise.noise)  # 400 releases of 18 gradient elements and one bit
    for part in (drawn[:, :-1], drawn[:, -1:]):
        assert float(part.std()) == pytest.approx(1.5 * 0.8, rel=5 / math.sqrt(2 * part.numel()))
    both = torch.corrcoef(torch.stack([drawn[:, 0], drawn[:, -1]]))
    assert abs(float(both[0, 1])) < 0.25


def test_the_joint_noise_multiplier_is_that_of_the_plan() -> None:
    """(1/s^2 + d^2/s_b^2)^(-1/2) with d = 1/2, s relative to the threshold and s_b in units of one bit."""
    for share in (0.001, 0.1, 0.5, 0.9):
        for initial in (0.01, 1.0, 30.0):
            policy, sigma, clip_norm = QuantileClipping(share=share, initial=initial), 1.3, 0.7
            s = sigma * clip_norm * policy.unit(clip_norm) / initial
            one = torch.zeros(1, dtype=torch.float64)
            bit = float(next(iter(policy.statistics(one, clip_norm).values()))) / 0.5
            s_b = sigma * clip_norm / bit
            assert (s**-2 + 0.25 * s_b**-2) ** -0.5 == pytest.approx(sigma, rel=1e-12)


def test_the_noise_on_gradients_grows_and_shrinks_with_the_threshold_and_optimizers_are_told() -> None:
    told: list[float] = []

    class Listening(torch.optim.SGD):
        def gradient_noise(self, std: float) -> None:
            told.append(std)

    stds = []
    for initial in (0.05, 5.0):
        model = nn.Linear(60, 50)
        optimizer = Listening(model.parameters(), lr=0.0)
        data = TensorDataset(torch.randn(40, 60), torch.zeros(40).long())
        policy = QuantileClipping(initial=initial, share=0.1)
        run = make_run(1, rate=1e-15, sigma=2.0)
        _, _, loader = private(model, optimizer, data, run, clipping=policy)
        for batch in loader:
            step(model, optimizer, batch)
        stds.append(float(model.weight.grad.std()))  # type: ignore[union-attr]
        expected = 2.0 * initial / math.sqrt(1 - 0.01) / (1e-15 * 40)
        assert stds[-1] == pytest.approx(expected, rel=0.06)
        assert told[-1] == pytest.approx(expected, rel=1e-3)


def test_the_threshold_moves_once_a_step_however_many_physical_batches_it_has() -> None:
    thresholds = []
    for size in (None, 7):
        policy = QuantileClipping(0.9)
        model, optimizer, loader = private(
            run=make_run(1, rate=1.0), noise=Kept(), clipping=policy, physical_batch_size=size
        )
        for batch in loader:
            assert policy.threshold is None
            step(model, optimizer, batch)
        assert policy.threshold is not None
        thresholds.append(policy.threshold)
    assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-6)  # a bit near the threshold feels rounding


def test_a_step_that_is_dropped_moves_no_threshold() -> None:
    policy = QuantileClipping(0.9)
    model, optimizer, loader = private(run=make_run(2, rate=1.0), clipping=policy, physical_batch_size=7)
    for number, batch in enumerate(loader):
        if number == 3:
            break
        step(model, optimizer, batch)
    assert policy.threshold is None


def test_an_empty_draw_says_half_below_on_average() -> None:
    policy = QuantileClipping(0.5)
    model, optimizer, loader = private(run=make_run(1, rate=1e-15), noise=Kept(), clipping=policy)
    for batch in loader:
        step(model, optimizer, batch)
    assert policy.threshold == 1.0  # no bit at all: share one half, which is the quantile


def test_noise_that_leaves_the_bits_out_is_refused_and_moves_nothing() -> None:
    class Partial(Kept):
        def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
            return NoisySum(super().privatise(clipped, receipt).grads)

    model, optimizer, loader = private(run=make_run(1), noise=Partial(), clipping=QuantileClipping())
    before = model.weight.detach().clone()
    with refused("DP031"):
        for batch in loader:
            step(model, optimizer, batch)
    assert torch.equal(model.weight, before)


def test_elements_of_the_bits_count_against_the_plan() -> None:
    model, optimizer, loader = private(
        run=make_run(1, max_parameters=20), clipping=QuantileClipping()
    )  # ten pairs for 15 + 3 parameters, and no room for a bit
    with refused("DP018"):
        for batch in loader:
            step(model, optimizer, batch)


def test_a_checkpoint_keeps_the_threshold(tmp_path: Path) -> None:
    policy, run = QuantileClipping(), make_run(3)
    model, optimizer, loader = private(run=run, clipping=policy)
    for batch in loader:
        step(model, optimizer, batch)
    save_checkpoint(tmp_path / "c", model, optimizer, run=run, extras={"clipping": policy})
    again = QuantileClipping()
    load_checkpoint(tmp_path / "c", model, optimizer, run=run, extras={"clipping": again})
    assert again.threshold == policy.threshold is not None
    for bad in ({"threshold": math.inf}, {"threshold": "1"}, {"threshold": -1.0}):
        with refused("DP091"):
            again.load_state_dict(bad)


def test_the_digest_of_a_release_covers_the_bits() -> None:
    from dptrainer.update import output_digest

    grads = {"w": torch.ones(2)}
    one, two = ({"b": torch.tensor([value], dtype=torch.float64)} for value in (1.0, 2.0))
    assert output_digest(NoisySum(grads, one)) != output_digest(NoisySum(grads, two))


def test_policies_meet_the_loop_in_one_place() -> None:
    """A policy of one's own: half of the flat factor."""

    class Half(Clipping):
        def factors(self, squared: Any, clip_norm: float) -> dict[str, torch.Tensor]:
            return {name: factor / 2 for name, factor in super().factors(squared, clip_norm).items()}

    sums = []
    for policy in (None, Half()):
        noise = Kept()
        model, optimizer, loader = private(run=make_run(1, rate=1.0), noise=noise, clipping=policy)
        for batch in loader:
            step(model, optimizer, batch)
        sums.append(norm({n: g.clone() for n, g in noise.seen[0].grads.items()}))
    assert sums[1] == pytest.approx(sums[0] / 2, rel=1e-5)


def test_norms_at_the_threshold_do_not_flip_their_bits_by_rounding() -> None:
    policy = QuantileClipping(0.5, initial=1.0)
    at = torch.ones(300, dtype=torch.float64)
    (before,), (after,) = (policy.statistics(at * scale, 1.0).values() for scale in (1.0, 1.0 + 2e-7))
    assert float((before - after).abs()) < 0.01  # all of them together, where one may move it by 0.1
    (ends,) = policy.statistics(torch.tensor([0.0, 0.9, 1.1, 1e30, math.inf, math.nan]), 1.0).values()
    assert float(ends) == pytest.approx(0.2 * (0.5 + 0.5 - 4 * 0.5))  # two below, and whatever is broken is above
