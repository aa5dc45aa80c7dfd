"""PrivateTrainer against a run of a real ledger."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import (
    OWNER,
    CountedNoise,
    NoNoise,
    linear_data,
    linear_model,
    make_ledger,
    make_plan,
    make_run,
    norm,
    reopen,
    unchanged,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dpbudget.curve import Bounds
from dpbudget.errors import DPBudgetError, InvalidParameter, PlanExhausted, PrivacyViolation
from dpbudget.meter import Meter
from dptrainer.sampling import PoissonSampler
from dptrainer.trainer import PrivateTrainer


def trainer(model: nn.Module | None = None, run: Any = None, data: Any = None, loss: Any = None, **kw: Any) -> Any:
    model = linear_model() if model is None else model
    optimizer = kw.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    return PrivateTrainer(
        model,
        optimizer,
        nn.CrossEntropyLoss() if loss is None else loss,
        linear_data() if data is None else data,
        make_run() if run is None else run,
        **kw,
    )


def test_every_planned_step_is_charged_and_released_once() -> None:
    run, noise = make_run(steps=7), CountedNoise()
    result = trainer(run=run, noise=noise).fit()
    assert (result.steps, result.charged, result.planned, noise.releases) == (7, 7, 7, 7)
    assert (result.stopped, result.epsilon, result.claim, result.delta) == (False, None, 1.0, 5e-7)
    assert result.run_id == run.run_id


def test_past_the_plan_nothing_moves() -> None:
    model, run = linear_model(), make_run(steps=2)
    subject = trainer(model, run)
    subject.fit()
    with unchanged(model), pytest.raises(PlanExhausted) as caught:
        subject.fit()
    assert caught.value.code == "DP050"


def test_an_update_is_the_noisy_sum_over_the_public_divisor() -> None:
    # 40 is the public size; the dataset has 33 records, which must not show anywhere.
    model, noise = linear_model(), NoNoise()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = make_run(steps=1, rate=0.5)
    trainer(model, run, linear_data(33), noise=noise).fit()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * noise.sums[0][name] / 20.0)


def test_the_clipped_sum_is_that_of_single_examples() -> None:
    model, noise, data = linear_model(), NoNoise(), linear_data()
    frozen = linear_model()
    run = make_run(steps=1, rate=1.0, clip_norm=0.3)
    trainer(model, run, data, noise=noise).fit()
    total = {name: torch.zeros_like(p) for name, p in frozen.named_parameters()}
    for x, y in data:
        loss = F.cross_entropy(frozen(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(frozen.parameters()))
        factor = min(1.0, 0.3 / math.sqrt(sum(float(g.square().sum()) for g in grads)))
        for name, grad in zip(total, grads, strict=True):
            total[name] += factor * grad
    for name, expected in total.items():
        torch.testing.assert_close(noise.sums[0][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 13, 100])
def test_physical_batches_give_the_sum_of_the_whole_batch(size: int) -> None:
    sums = []
    for physical in (None, size):
        noise = NoNoise()
        trainer(run=make_run(steps=1, rate=1.0), noise=noise, physical_batch_size=physical).fit()
        sums.append(noise.sums[0])
    for name, whole in sums[0].items():
        torch.testing.assert_close(sums[1][name], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8])
def test_one_example_moves_the_sum_by_at_most_the_clipping_norm(scale: float) -> None:
    model, noise = linear_model(), NoNoise()
    x = scale * torch.ones(1, 5)
    data = TensorDataset(x, model(x).argmin(1))  # wrong, so that the gradient is large
    trainer(model, make_run(steps=1, rate=1.0, clip_norm=0.7), data=data, noise=noise).fit()
    assert 0 < norm(noise.sums[0]) <= 0.7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_record_contributes_nothing(bad: float) -> None:
    clean = linear_data(10)
    inputs, labels = (t.clone() for t in clean.tensors)
    inputs[3, 2] = bad
    sums = []
    for data in (TensorDataset(inputs, labels), TensorDataset(*(torch.cat([t[:3], t[4:]]) for t in clean.tensors))):
        noise = NoNoise()
        trainer(run=make_run(steps=1, rate=1.0), data=data, noise=noise).fit()
        sums.append(noise.sums[0])
    for name, expected in sums[1].items():
        torch.testing.assert_close(sums[0][name], expected, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_a_noise_only_charged_step() -> None:
    model, run = linear_model(), make_run(steps=3, rate=1e-15)
    before = model.weight.detach().clone()
    noise = CountedNoise()
    result = trainer(model, run, noise=noise).fit()
    assert (result.charged, noise.releases) == (3, 3)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
        partial(torch.optim.Adam, lr=0.01),
        partial(torch.optim.AdamW, lr=0.01),
        partial(torch.optim.Adagrad, lr=0.01),
        partial(torch.optim.RMSprop, lr=0.01),
    ],
)
def test_the_optimizers_of_torch_take_noisy_gradients(optimizer: Any) -> None:
    model = linear_model()
    before = model.weight.detach().clone()
    assert trainer(model, make_run(3), optimizer=optimizer(model.parameters())).fit().steps == 3
    assert torch.isfinite(model.weight).all()
    assert not torch.equal(model.weight, before)


def test_training_learns_under_noise() -> None:
    data = linear_data(600)
    model = linear_model()
    run = make_run(steps=60, rate=0.3, sigma=0.6, nominal_size=600)
    trainer(model, run, data, optimizer=torch.optim.SGD(model.parameters(), lr=4.0), physical_batch_size=64).fit()
    accuracy = float((model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean())
    assert accuracy > 0.85


def criteria() -> list[Any]:
    weights = torch.tensor([1.0, 5.0, 0.2])
    per_example = lambda out, y: F.cross_entropy(out, y, reduction="none")  # noqa: E731
    return [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="none"),
        per_example,
        nn.CrossEntropyLoss(reduction="sum"),
        partial(F.cross_entropy, label_smoothing=0.0),
        partial(F.cross_entropy, reduction="sum"),
        nn.CrossEntropyLoss(weight=weights),
    ]


@pytest.mark.parametrize("index", range(8))
def test_every_spelling_of_a_criterion_gives_the_same_per_example_loss(index: int) -> None:
    criterion = criteria()[index]
    sums = []
    for loss in (criterion, criteria()[3]):
        noise = NoNoise()
        trainer(run=make_run(steps=1, rate=1.0, clip_norm=1e6), loss=loss, noise=noise).fit()
        sums.append(noise.sums[0])
    if index == 7:  # class weights act within each example, never through a common denominator
        assert not torch.allclose(sums[0]["weight"], sums[1]["weight"])
    else:
        torch.testing.assert_close(sums[0]["weight"], sums[1]["weight"])


def test_class_weights_do_not_let_one_example_rescale_the_others() -> None:
    # With a weighted mean, the last example's weight would divide everyone's gradient.
    weights = torch.tensor([1.0, 1.0, 1e6])
    inputs, labels = torch.randn(6, 5), torch.tensor([0, 1, 0, 1, 0, 2])
    sums = []
    for rows in (5, 6):
        noise = NoNoise()
        data = TensorDataset(inputs[:rows], labels[:rows])
        run = make_run(steps=1, rate=1.0, clip_norm=0.01)
        trainer(run=run, data=data, loss=nn.CrossEntropyLoss(weight=weights), noise=noise).fit()
        sums.append(noise.sums[0])
    assert norm({name: sums[1][name] - sums[0][name] for name in sums[0]}) <= 0.01 * (1 + 1e-5)


@pytest.mark.parametrize("loss", [lambda out, y: F.cross_entropy(out, y), lambda out, y: out.logsumexp(0)])
def test_a_loss_without_one_value_per_example_is_refused(loss: Any) -> None:
    model = linear_model()
    with unchanged(model), pytest.raises(PrivacyViolation) as caught:
        trainer(model, make_run(1, rate=1.0), loss=loss).fit()
    assert caught.value.code == "DP030"


class Dicts(Dataset[Any]):
    """Records as mappings with labels, as Hugging Face datasets give them."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x, y = linear_data()[index]
        return {"inputs": x, "labels": y}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear_model()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs)


def test_mappings_with_labels_give_the_same_sum_as_pairs() -> None:
    noise, plain = NoNoise(), NoNoise()
    trainer(Named(), make_run(1, rate=1.0), Dicts(), noise=noise).fit()
    trainer(run=make_run(1, rate=1.0), noise=plain).fit()
    torch.testing.assert_close(noise.sums[0]["linear.weight"], plain.sums[0]["weight"])


def test_callbacks_see_steps_and_epsilon_alone_and_may_stop() -> None:
    seen: list[tuple[int, Bounds | None]] = []

    def watch(step: int, epsilon: Bounds | None) -> bool:
        seen.append((step, epsilon))
        return step < 3

    run = make_run(steps=10)
    run.meter = Meter((5, 10), (Bounds(0.4, 0.5), Bounds(0.9, 1.0)), 5e-7, 1.0)
    result = trainer(run=run, callbacks=[watch]).fit()
    assert seen == [(1, Bounds(0.0, 0.5)), (2, Bounds(0.0, 0.5)), (3, Bounds(0.0, 0.5))]
    assert (result.steps, result.charged, result.stopped) == (3, 3, True)
    assert result.epsilon == Bounds(0.0, 0.5)


def test_training_can_go_on_after_a_stop() -> None:
    run = make_run(steps=5)
    subject = trainer(run=run)
    subject._callbacks = (lambda step, epsilon: subject.stop(),)
    assert subject.fit().steps == 1
    subject._callbacks = ()
    assert subject.fit().steps == 4


def test_nothing_private_is_printed_logged_or_returned(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    result = trainer(run=make_run(3), data=linear_data(37)).fit()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert "37" not in repr(result).replace(result.run_id, "")


def test_eval_mode_is_refused_before_and_during_training() -> None:
    model = linear_model().eval()
    with pytest.raises(PrivacyViolation) as caught:
        trainer(model)
    assert caught.value.code == "DP014"
    model.train()
    subject = trainer(model, make_run(3, rate=1.0), callbacks=[lambda step, epsilon: model.eval() is None])
    subject._callbacks = (lambda step, epsilon: model.eval(),)
    with pytest.raises(PrivacyViolation) as caught:
        subject.fit()
    assert caught.value.code == "DP014"


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(0))


def model_with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("build", "code"),
    [
        (lambda: trainer(Mixing()), "DP033"),
        (lambda: trainer(model_with_norm()), "DP010"),
        (lambda: trainer(linear_model().requires_grad_(False)), "DP018"),
        (lambda: trainer(run=make_run(max_parameters=17)), "DP018"),
        (lambda: trainer(optimizer=torch.optim.SGD(linear_model().parameters(), lr=0.1)), "DP011"),
        (lambda: trainer(m := linear_model(), optimizer=torch.optim.SGD([m.weight], lr=0.1)), "DP012"),
        (lambda: trainer(m := linear_model(), optimizer=torch.optim.LBFGS(m.parameters())), "DP017"),
        (lambda: trainer(data=DataLoader(linear_data(), shuffle=True)), "DP020"),
        (lambda: trainer(physical_batch_size=0), "DP009"),
        (lambda: trainer(physical_batch_size=2.5), "DP009"),
        (lambda: trainer(data=TensorDataset(torch.randn(4, 5))), "DP091"),
        (lambda: trainer(loss="cross_entropy"), "DP030"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_set_up(build: Any, code: str) -> None:
    with pytest.raises(DPBudgetError) as caught:
        build()
    assert caught.value.code == code
    assert caught.value.hint


def test_a_refused_step_leaves_the_model_and_no_gradient() -> None:
    model = linear_model()
    calls = []

    def loss(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise ValueError("user code fails")
        return F.cross_entropy(outputs, target, reduction="none")

    run = make_run(5, rate=1.0)
    subject = trainer(model, run, loss=loss, note=lambda said: None)
    calls.clear()  # it was tested on synthetic records
    with pytest.raises(ValueError, match="user code fails"):
        subject.fit()
    assert run.charged == 3  # charged before its noise was drawn: the budget errs upward
    assert all(p.grad is None for p in model.parameters())
    x = torch.randn(2, 5)
    model(x).sum().backward()  # the hooks are gone: the model is an ordinary one
    assert model.weight.grad is not None


def test_a_durable_ledger_has_every_step_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    ledger = make_ledger(path)
    run = ledger.start(ledger.sign_plan(make_plan(steps=6), owner=OWNER), lease_steps=2)
    trainer(run=run, record_outputs=True).fit()
    run.close()
    ledger.close()
    again = reopen(path)
    state = again.state.runs[run.run_id]
    assert state.charged == 6
    again.close()
    assert ledger.id == again.id


def test_two_trainings_of_one_ledger_draw_different_noise() -> None:
    models = [linear_model(), linear_model()]
    for model in models:
        trainer(model, make_run(1, rate=1e-15)).fit()
    assert not torch.equal(models[0].weight, models[1].weight)


def test_the_batch_comes_from_the_receipt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = PoissonSampler.draw

    def draw(self: PoissonSampler, receipt: Any, population: int) -> Any:
        drawn.append(population)
        return real(self, receipt, population)

    monkeypatch.setattr(PoissonSampler, "draw", draw)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    trainer(run=make_run(3), data=linear_data(31)).fit()
    assert drawn == [31, 31, 31]
    assert torch.equal(state, torch.random.get_rng_state())  # no torch generator takes part


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="no record"):
        trainer(data=TensorDataset(torch.randn(0, 5), torch.zeros(0, dtype=torch.long)))


def test_the_parameters_of_a_constant_loss_move_by_the_planned_noise_alone() -> None:
    # Chi-squared of the update itself: catches noise after averaging, a second helping of it, or a wrong divisor.
    model = linear_model(200, 100)
    before = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    run = make_run(steps=1, rate=0.5, sigma=1.7, clip_norm=0.4)
    data = TensorDataset(torch.randn(30, 200), torch.zeros(30, dtype=torch.long))
    trainer(
        model,
        run,
        data,
        loss=lambda out, y: 0.0 * out.sum(1),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    ).fit()
    after = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    scaled = (after - before) * 20.0 / (1.7 * 0.4)
    assert abs(float(scaled.square().sum()) - len(scaled)) < 5 * math.sqrt(2 * len(scaled))
    assert abs(float(scaled.sum())) < 5 * math.sqrt(len(scaled))


def test_a_copied_ledger_trains_with_other_batches_and_other_noise(tmp_path: Path) -> None:
    first, second = tmp_path / "a.ledger", tmp_path / "b.ledger"
    with make_ledger(first) as ledger:
        run_id = ledger.sign_plan(make_plan(steps=2), owner=OWNER)
    second.write_bytes(first.read_bytes())
    sums, released = [], []
    for path in (first, second):
        with reopen(path, high_water=False) as ledger:  # as on two machines: on one, the second is refused
            noise, model = NoNoise(), linear_model()
            trainer(model, ledger.start(run_id, lease_steps=1), noise=noise, callbacks=[lambda s, e: False]).fit()
            sums.append(noise.sums[0]["weight"])
            trainer(model, ledger.start(run_id, lease_steps=1), data=linear_data(2)).fit()
            released.append(model.weight.detach().clone())
    assert not torch.equal(*sums)
    assert not torch.equal(*released)


def test_a_forked_child_cannot_continue_the_run() -> None:
    run = make_run(steps=3)
    run.next_receipt()
    pid = os.fork()
    if pid == 0:
        try:
            run.next_receipt()
        except DPBudgetError as error:
            os._exit(0 if error.code == "DP076" else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert run.next_receipt().step == 1
