"""Training under plans with exact noise: what is released, what is refused, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loopkit import (
    CountedNoise,
    NoNoise,
    linear_data,
    linear_model,
    make_plan,
    make_run,
    private,
    refused,
    unchanged,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dpbudget.grid import grid_for
from dptrainer.clipping.engine import SHRINK
from dptrainer.noise.exact import ExactNoise
from dptrainer.noise.source import SecureNoise
from dptrainer.trainer import PrivateTrainer
from dptrainer.tree import TreeTrainer
from dptrainer.values import ClippedSum


def exact_run(steps: int = 4, rate: float = 0.5, sigma: float = 1.0, **changes: Any) -> Any:
    return make_run(steps, rate, sigma, noise="exact", **{"max_parameters": 1000, **changes})


def trainer(model: nn.Module | None = None, run: Any = None, data: Any = None, **kw: Any) -> PrivateTrainer:
    model = linear_model() if model is None else model
    optimizer = kw.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    loss = kw.pop("loss", None) or nn.CrossEntropyLoss()
    return PrivateTrainer(
        model, optimizer, loss, linear_data() if data is None else data, exact_run() if run is None else run, **kw
    )


class Zeros(nn.Module):
    """A model whose loss does not move with its parameters: what is released is noise alone."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + 0.0 * self.weight.sum()


def test_every_planned_step_is_charged_and_released_once() -> None:
    model, run = linear_model(), exact_run(steps=7)
    before = [p.detach().clone() for p in model.parameters()]
    result = trainer(model, run).fit()
    assert (result.steps, result.charged, result.planned) == (7, 7, 7)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_noise_of_a_step_has_the_standard_deviation_of_the_plan() -> None:
    model, size = Zeros(20_000), 20_000
    run = exact_run(steps=1, rate=0.5, sigma=3.0, clip_norm=0.25, max_parameters=size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    PrivateTrainer(model, optimizer, lambda out, y: out[:, 0], linear_data(), run).fit()
    noise = model.weight.detach() * 20.0  # the divisor: rate 1/2 of the nominal size 40
    assert float(noise.std()) == pytest.approx(3.0 * 0.25, rel=0.03)
    assert abs(float(noise.mean())) < 0.75 * 4 / size**0.5
    unit = grid_for(3.0, size).unit(0.25)
    multiples = noise.double() / unit
    # float32 rounds the released value: it is a multiple of the unit up to that
    assert float((multiples - multiples.round()).abs().max()) < 1e-6 * float(multiples.abs().max()) + 1e-3


def test_an_empty_draw_is_noise_alone() -> None:
    model, run = linear_model(), exact_run(steps=3, rate=2.0**-60)
    before = [p.detach().clone() for p in model.parameters()]
    result = trainer(model, run).fit()
    assert result.steps == 3
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_exact_and_secure_training_reach_the_same_place_without_noise_to_speak_of() -> None:
    data, models = linear_data(200), [linear_model(), linear_model()]
    for mode, model in zip(("exact", "secure"), models, strict=True):
        run = make_run(20, rate=1.0, sigma=1e-3, noise=mode, max_parameters=1000)
        trainer(model, run, data, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).fit()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parameters_of_every_type_train(dtype: torch.dtype) -> None:
    model = linear_model().to(dtype)
    inputs, targets = linear_data().tensors
    result = trainer(model, exact_run(steps=2), TensorDataset(inputs.to(dtype), targets)).fit()
    assert result.steps == 2
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in model.parameters())


def test_frozen_parameters_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    frozen = [p.detach().clone() for p in model[0].parameters()]
    trainer(model, optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1)).fit()
    assert all(torch.equal(old, new) for old, new in zip(frozen, model[0].parameters(), strict=True))


def test_dropout_and_sparse_gradients_are_no_obstacle() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out, self.drop = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.drop(self.table(x).mean(1)))

    words = torch.randint(0, 9, (40, 6), generator=torch.Generator().manual_seed(0))
    assert trainer(Words(), data=TensorDataset(words, torch.arange(40) % 3)).fit().steps == 4


def test_outputs_can_be_settled() -> None:
    run = exact_run(steps=2)
    settled: list[Any] = []
    settle, run.settle = run.settle, lambda receipt, digest: (settled.append(digest), settle(receipt, digest))
    trainer(run=run, record_outputs=True).fit()
    assert len(set(settled)) == 2
    assert all(len(digest) == 64 for digest in settled)


def test_a_loss_that_takes_probabilities_is_tested_for_repeating_itself() -> None:
    inputs, _ = linear_data().tensors
    data = TensorDataset(inputs, torch.rand(40, 3))
    model = nn.Sequential(nn.Linear(5, 3), nn.Sigmoid())
    said: list[str] = []
    assert trainer(model, data=data, loss=nn.BCELoss(), note=said.append).fit().steps == 4
    assert not [text for text in said if "to the bit" in text]


def test_under_autocast_every_step_meets_the_weights_of_that_step() -> None:
    model, outputs = linear_model(), list[Tensor]()
    subject = trainer(model, exact_run(steps=3, rate=1.0), linear_data(1))
    model.register_forward_hook(lambda module, args, out: outputs.append(out.detach().clone()))
    with torch.autocast("cpu", torch.bfloat16):
        subject.fit()
    last = outputs[-3:]  # the hook is tested before the first
    assert {out.dtype for out in last} == {torch.bfloat16}
    assert not torch.equal(last[0], last[1])
    assert not torch.equal(last[1], last[2])


class TestRefusals:
    """Nothing is charged."""

    def test_a_loop_of_ones_own_clips_by_book_keeping(self) -> None:
        run = exact_run()
        with refused("DP054") as caught:
            private(run=run)
        assert "book-keeping" in str(caught.value)
        assert "PrivateTrainer" in caught.value.hint
        assert run.charged == 0

    def test_trees_too(self) -> None:
        model, run = linear_model(), exact_run(rate=1.0)
        with refused("DP054"):
            TreeTrainer(
                model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), linear_data(), run,
                steps_per_pass=4,
            )  # fmt: skip
        assert run.charged == 0

    def test_noise_of_another_mode(self) -> None:
        for mode, noise in (("exact", SecureNoise()), ("secure", ExactNoise()), ("exact", CountedNoise())):
            run = make_run(noise=mode, max_parameters=1000)
            with refused("DP054") as caught:
                trainer(run=run, noise=noise)
            assert f"the plan's noise is {mode}" in str(caught.value)
            assert run.charged == 0

    def test_a_source_that_does_not_say_that_its_noise_is_exact(self) -> None:
        run = exact_run()
        with refused("DP054"):
            trainer(run=run, noise=NoNoise())
        assert run.charged == 0

    def test_static_shapes(self) -> None:
        with pytest.raises(InvalidParameter, match="static_shapes"):
            trainer(static_shapes=True, physical_batch_size=8)

    def test_a_model_of_more_parameters_than_the_grid_is_made_for(self) -> None:
        run = exact_run(max_parameters=10)
        with refused("DP018"):
            trainer(run=run)
        assert run.charged == 0

    def test_a_model_that_remembers_earlier_records(self) -> None:
        class Remembers(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.calls = nn.Linear(5, 3), 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return self.layer(x) * (1.0 + 1e-6 * self.calls)

        run = exact_run()
        said: list[str] = []
        with refused("DP054"):
            trainer(Remembers(), run, note=said.append)
        assert any("nobody tested for mixing" in text for text in said)
        assert run.charged == 0

    def test_what_a_model_remembers_is_seen_though_a_record_of_zeros_would_not_show_it(self) -> None:
        class Remembers(nn.Linear):
            calls = 0

            def forward(self, x: Tensor) -> Tensor:
                Remembers.calls += 1
                return super().forward(x * (1.0 + 2.0**-20 * (Remembers.calls % 5)))

        run = exact_run()
        with refused("DP054"):
            trainer(Remembers(5, 3), run, note=lambda said: None)
        assert run.charged == 0

    def test_weights_that_forward_scales_anew_every_time(self) -> None:
        class Renormalised(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
                return super().forward(x)

        run = exact_run()
        with refused("DP031"):
            trainer(Renormalised(5, 3), run, note=lambda said: None)
        assert run.charged == 0

    def test_a_gradient_that_is_another_every_time(self) -> None:
        class Wanders(torch.autograd.Function):
            turns = 0

            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                Wanders.turns += 1
                return grad * (1.0 + 2.0**-20 * (Wanders.turns % 7))

        class Model(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return Wanders.apply(super().forward(x))

        run = exact_run()
        with refused("DP054") as caught:
            trainer(Model(5, 3), run)
        assert "every time" in str(caught.value)
        assert run.charged == 0

    def test_an_operation_without_a_deterministic_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Model(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                if torch.are_deterministic_algorithms_enabled():
                    raise RuntimeError("put_ does not have a deterministic implementation")
                return super().forward(x)

        run = exact_run()
        with refused("DP054") as caught:
            trainer(Model(5, 3), run)
        assert "another order every time: put_" in str(caught.value)
        assert run.charged == 0

    def test_a_policy_that_is_none(self) -> None:
        with refused("DP060"):
            trainer(clipping="flat")

    def test_a_model_without_anything_to_train(self) -> None:
        with refused("DP018"):
            trainer(linear_model().requires_grad_(False), optimizer=torch.optim.SGD([torch.zeros(1)], lr=0.1))


class TestWithinAStep:
    """The step stays charged, nothing is released, the model does not move."""

    def test_a_buffer_that_follows_the_records_is_found_before_the_noise(self) -> None:
        class Counts(nn.Module):
            seen: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(5, 3)
                self.register_buffer("seen", torch.zeros(5))
                self.watching = False

            def forward(self, x: Tensor) -> Tensor:
                if self.watching:
                    self.seen += x.detach().sum(0)
                return self.layer(x)

        model, run = Counts(), exact_run(rate=1.0)
        subject = trainer(model, run)
        model.watching = True
        weights = model.layer.weight.detach().clone()
        with refused("DP013"):
            subject.fit()
        assert torch.equal(weights, model.layer.weight)
        assert run.charged == 1

    def test_eval_mode_is_noticed(self) -> None:
        model, run = linear_model(), exact_run(rate=1.0)
        subject = trainer(model, run)
        model.eval()
        with unchanged(model), refused("DP014"):
            subject.fit()

    def test_a_parameter_that_forward_changes(self) -> None:
        class Drifts(nn.Linear):
            drifting = False

            def forward(self, x: Tensor) -> Tensor:
                if self.drifting:
                    with torch.no_grad():
                        self.bias += x.mean()
                return super().forward(x)

        model = Drifts(5, 3)
        subject = trainer(model, exact_run(rate=1.0))
        model.drifting = True
        with refused("DP031"):
            subject.fit()

    def test_a_hook_on_a_gradient_would_see_all_records(self) -> None:
        model = linear_model()
        subject = trainer(model, exact_run(rate=1.0))
        model.weight.register_hook(lambda grad: grad * 2.0)
        with unchanged(model), refused("DP031"):
            subject.fit()

    def test_operations_add_in_the_same_order_and_the_program_gets_its_choice_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[bool] = []
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

        class Looks(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark)
                return super().forward(x)

        model = Looks(5, 3)
        subject = trainer(model, exact_run(rate=1.0))
        seen.clear()
        subject.fit()
        assert seen
        assert all(seen)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.backends.cudnn.benchmark

    def test_a_hook_that_came_later_is_tested_again(self) -> None:
        model = nn.Sequential(nn.Linear(5, 3))
        subject = trainer(model, exact_run(rate=1.0))
        model.append(nn.BatchNorm1d(3, affine=False))
        with refused("DP010|DP012|DP013"):
            subject.fit()


class TestTheSource:
    def clipped(self, receipt: Any, **changes: Any) -> ClippedSum:
        facts: dict[str, Any] = {
            "grads": {"w": torch.zeros(6, dtype=torch.int64)}, "sensitivity": 1.0, "grid": receipt.grid,
        }  # fmt: skip
        return ClippedSum(**{**facts, **changes})

    def test_a_sum_on_another_grid_is_refused(self) -> None:
        receipt = exact_run().next_receipt()
        for bad in (None, grid_for(2.0, 1000), grid_for(1.0, 10**6)):
            with refused("DP019"):
                ExactNoise().privatise(self.clipped(receipt, grid=bad), receipt)
        assert not receipt.was_used("grad-noise")

    def test_a_sum_of_floating_point_numbers_is_refused(self) -> None:
        receipt = exact_run().next_receipt()
        with refused("DP019"):
            ExactNoise().privatise(self.clipped(receipt, grads={"w": torch.zeros(6)}), receipt)

    def test_a_larger_clipping_norm_than_the_plan_s_is_refused(self) -> None:
        receipt = exact_run(clip_norm=0.5).next_receipt()
        with refused("DP031"):
            ExactNoise().privatise(self.clipped(receipt), receipt)

    def test_a_receipt_of_a_secure_plan_is_refused(self) -> None:
        receipt = make_run().next_receipt()
        with refused("DP054"):
            ExactNoise().privatise(self.clipped(receipt), receipt)
        assert not receipt.was_used("grad-noise")

    def test_secure_noise_refuses_the_receipt_of_an_exact_plan(self) -> None:
        receipt = exact_run().next_receipt()
        with refused("DP054"):
            SecureNoise().privatise(ClippedSum({"w": torch.zeros(6)}, 1.0), receipt)
        assert not receipt.was_used("grad-noise")

    def test_a_sum_shows_none_of_its_numbers(self) -> None:
        receipt = exact_run().next_receipt()
        clipped = self.clipped(receipt, grads={"w": torch.full((2,), 7654321)}, statistics={"s": torch.tensor([24680])})
        assert "tensor" not in repr(clipped)

    def test_a_receipt_works_once(self) -> None:
        receipt = exact_run().next_receipt()
        ExactNoise().privatise(self.clipped(receipt), receipt)
        with refused("DP077"):
            ExactNoise().privatise(self.clipped(receipt), receipt)

    def test_what_is_released_is_integers_times_the_unit(self) -> None:
        receipt = exact_run(sigma=1.7).next_receipt()
        noisy = ExactNoise().privatise(self.clipped(receipt, grads={"w": torch.full((6,), 5)}), receipt)
        assert noisy.grads["w"].dtype == torch.float64
        units = noisy.grads["w"] / receipt.grid.unit(1.0)
        assert torch.allclose(units, units.round(), atol=1e-9)
        assert units.unique().numel() > 1

    def test_sums_that_wrap_around_lose_use_and_no_privacy(self) -> None:
        receipt = exact_run().next_receipt()
        largest = torch.full((1000,), (1 << 63) - 1)
        noisy = ExactNoise().privatise(self.clipped(receipt, grads={"w": largest}), receipt)
        assert bool((noisy.grads["w"] < 0).any())
        assert bool((noisy.grads["w"] > 0).any())


def test_a_gradient_alone_is_never_longer_than_the_margin_of_the_bound() -> None:
    # an honest record never hits the integer check: what clipping leaves is below the bound by SHRINK
    for sigma, parameters in ((0.5, 10), (1.0, 1 << 30), (30.0, 1000)):
        grid = grid_for(sigma, parameters)
        assert (SHRINK * 2**grid.log2_width / sigma) ** 2 <= grid.bound + 1


def test_the_plan_s_mode_reaches_the_receipt(tmp_path: Path) -> None:
    assert exact_run().next_receipt().noise == "exact"
    assert make_run().next_receipt().noise == "secure"
    assert make_plan(noise="exact").bounded_values == 0


def test_nothing_private_is_in_the_representation_of_a_refusal() -> None:
    with pytest.raises(PrivacyViolation) as caught:
        trainer(run=exact_run(max_parameters=10))
    assert "tensor(" not in repr(caught.value)
