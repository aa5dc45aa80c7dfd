"""DP-FTRL in whole passes: one receipt a pass, every record in one step of it, noise that adds up over prefixes."""

from __future__ import annotations

import hashlib
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loopkit import (
    OWNER,
    NoNoise,
    linear_data,
    linear_model,
    make_ledger,
    make_plan,
    make_run,
    norm,
    refused,
    reopen,
    snapshot,
    unchanged,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpbudget
from dpbudget.curve import Bounds
from dpbudget.errors import DPBudgetError, PlanExhausted, ReceiptSpent
from dpbudget.ledger.receipt import Receipt
from dptrainer import (
    DPAdamBC,
    MemoryBound,
    PrivateTrainer,
    QuantileClipping,
    TreeTrainer,
    UserDataset,
    load_checkpoint,
    save_checkpoint,
)
from dptrainer.allocation import UniformAllocation
from dptrainer.clipping import NormalisedClipping
from dptrainer.noise import source as source_module
from dptrainer.noise import tree as tree_module
from dptrainer.noise.keys import Purpose
from dptrainer.noise.nodes import levels
from dptrainer.noise.tree import SecurePass, SecureTreeNoise, node_scale
from dptrainer.update import output_digest
from dptrainer.values import ClippedSum, NoisySum


class NoTreeNoise:
    """Releases the sums of every pass as they are and keeps them: for comparing sums, never for training."""

    def __init__(self) -> None:
        self.passes: list[list[dict[str, Tensor]]] = []
        self.receipts: list[Receipt] = []
        self.closed = 0

    def open(self, receipt: Receipt, steps: int) -> NoTreeNoise:
        receipt.use("grad-noise")
        self.receipts.append(receipt)
        self.passes.append([])
        return self

    std = 0.0

    def privatise(self, clipped: ClippedSum) -> NoisySum:
        self.passes[-1].append({name: grad.clone() for name, grad in clipped.grads.items()})
        return NoisySum(clipped.grads)

    def close(self) -> None:
        self.closed += 1


class KeptNoise(SecureTreeNoise):
    """The shipped noise; keeps the sums of every step before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[dict[str, Tensor]] = []
        self.released: list[dict[str, Tensor]] = []

    def open(self, receipt: Receipt, steps: int) -> SecurePass:
        opened = super().open(receipt, steps)
        privatise = opened.privatise

        def kept(clipped: ClippedSum) -> NoisySum:
            self.sums.append({name: grad.clone() for name, grad in clipped.grads.items()})
            noisy = privatise(clipped)
            self.released.append({name: grad.clone() for name, grad in noisy.grads.items()})
            return noisy

        opened.privatise = kept  # type: ignore[method-assign]
        return opened


def passes_run(passes: int = 1, **changes: Any) -> Any:
    return make_run(passes, rate=1.0, **changes)


def trainer(model: Any = None, run: Any = None, data: Any = None, loss: Any = None, **kw: Any) -> TreeTrainer:
    model = linear_model() if model is None else model
    optimizer = kw.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=kw.pop("lr", 0.1))
    kw.setdefault("steps_per_pass", 5)
    loss = nn.CrossEntropyLoss() if loss is None else loss
    data = linear_data() if data is None else data
    return TreeTrainer(model, optimizer, loss, data, passes_run() if run is None else run, **kw)


@pytest.fixture
def fixed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run draws the same allocation and the same noise, so that two runs differ in their data alone."""

    def same(receipt: Receipt, purpose: Purpose) -> bytes:
        receipt.use(purpose.value)
        return hashlib.sha256(f"{purpose} {receipt.step}".encode()).digest()

    for module in (tree_module, source_module, __import__("dptrainer.allocation").allocation):
        monkeypatch.setattr(module, "step_key", same)


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.double().flatten() for grad in grads.values()])


# ---------------------------------------------------------------------- passes and receipts


def test_a_pass_is_one_receipt_and_one_charge_whatever_its_steps() -> None:
    run, noise, seen = passes_run(3), NoTreeNoise(), []
    result = trainer(
        run=run, noise=noise, steps_per_pass=7, callbacks=[lambda s, e: seen.append((s, run.charged))]
    ).fit()
    assert (result.steps, result.charged, result.planned, result.stopped) == (21, 3, 3, False)
    assert seen == [(step, 1 + (step - 1) // 7) for step in range(1, 22)]  # charged before the first step of each
    assert [len(steps) for steps in noise.passes] == [7, 7, 7]
    assert [receipt.step for receipt in noise.receipts] == [0, 1, 2]
    assert all(receipt.was_used(purpose) for receipt in noise.receipts for purpose in ("sampling", "grad-noise"))
    assert noise.closed == 3


def test_past_the_plan_nothing_moves() -> None:
    model, run = linear_model(), passes_run(1)
    subject = trainer(model, run)
    subject.fit()
    with unchanged(model), pytest.raises(PlanExhausted):
        subject.fit()


@pytest.mark.parametrize("steps", [1, 2, 7, 40, 100])
def test_the_steps_of_a_pass_add_up_to_the_sum_over_all_records(steps: int) -> None:
    noise, whole = NoTreeNoise(), NoNoise()
    trainer(run=passes_run(2), noise=noise, steps_per_pass=steps, lr=0.0).fit()
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), linear_data(), passes_run(1), noise=whole).fit()
    for taken in noise.passes:
        total = torch.stack([flat(grads) for grads in taken]).sum(0)
        torch.testing.assert_close(total, flat(whole.sums[0]), rtol=1e-5, atol=1e-5)


def test_an_update_is_the_noisy_sum_over_the_public_expected_batch_size() -> None:
    # 40 is the public size; the dataset has 33 records, which must not show anywhere.
    model, noise = linear_model(), NoTreeNoise()
    before = snapshot(model)
    trainer(model, passes_run(nominal_size=40), linear_data(33), noise=noise, steps_per_pass=8, lr=0.1).fit()
    total = {name: sum(grads[name] for grads in noise.passes[0]) for name in before}
    for name, start in before.items():
        torch.testing.assert_close(model.state_dict()[name], start - 0.1 * total[name] / (40 / 8))


@pytest.mark.usefixtures("fixed_keys")
def test_a_pass_of_one_step_is_one_step_of_private_gradient_descent() -> None:
    models = [linear_model(), linear_model()]
    trainer(models[0], passes_run(3, sigma=2.0), steps_per_pass=1).fit()
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.1)
    PrivateTrainer(models[1], optimizer, nn.CrossEntropyLoss(), linear_data(), passes_run(3, sigma=2.0)).fit()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.usefixtures("fixed_keys")
def test_physical_batches_give_the_same_sums(size: int) -> None:
    found = []
    for physical in (None, size):
        noise = NoTreeNoise()
        trainer(noise=noise, physical_batch_size=physical).fit()
        found.append([flat(grads) for grads in noise.passes[0]])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)


def test_a_step_without_a_record_is_noise_alone_and_hands_out_a_gradient() -> None:
    noise, model = KeptNoise(), linear_model()
    result = trainer(model, data=linear_data(3), steps_per_pass=50, noise=noise).fit()
    empty = [index for index, grads in enumerate(noise.sums) if norm(grads) == 0]
    assert result.steps == 50
    assert len(empty) >= 47
    assert all(norm(noise.released[index]) > 0 for index in empty)
    assert torch.isfinite(model.weight).all()


def test_two_passes_and_two_runs_allocate_and_draw_anew() -> None:
    noise = KeptNoise()
    for _ in range(2):
        trainer(run=passes_run(2), noise=noise, lr=0.0).fit()
    sums = [flat(noise.sums[index]) for index in (0, 5, 10, 15)]
    drawn = [flat(noise.released[index]) - one for index, one in zip((0, 5, 10, 15), sums, strict=True)]
    for values in (sums, drawn):
        assert all(not torch.equal(values[i], values[j]) for i in range(4) for j in range(i))


# ---------------------------------------------------------------------- neighbours


CLIP, STEPS = 1e-3, 11


def one_pass(data: TensorDataset | int, lr: float = 0.0) -> KeptNoise:
    """A pass over these records, or so many, with keys that do not depend on them."""
    noise = KeptNoise()
    if isinstance(data, int):
        data = TensorDataset(*(column[:data] for column in linear_data(40).tensors))
    trainer(run=passes_run(clip_norm=CLIP), data=data, noise=noise, steps_per_pass=STEPS, lr=lr).fit()
    return noise


def distances(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> list[float]:
    return [float((flat(a) - flat(b)).norm()) for a, b in zip(first, second, strict=True)]


@pytest.mark.usefixtures("fixed_keys")
@pytest.mark.parametrize("rows", [2, 20, 40])
def test_a_record_moves_the_sum_of_one_step_by_at_most_c_and_no_other(rows: int) -> None:
    with_it, without = one_pass(rows), one_pass(rows - 1)
    # The noise is the same, so noisy sums are as far apart as sums.
    for apart in (distances(with_it.sums, without.sums), distances(with_it.released, without.released)):
        moved = [distance for distance in apart if distance > 0.01 * CLIP]
        assert len(moved) == 1
        assert 0.99 * CLIP < moved[0] < 1.001 * CLIP


@pytest.mark.usefixtures("fixed_keys")
def test_a_record_that_is_replaced_moves_the_sum_of_one_step_by_at_most_twice_c() -> None:
    inputs, labels = (column.clone() for column in linear_data(40).tensors)
    inputs[7] = -1e9 * inputs[7]
    apart = distances(one_pass(40).sums, one_pass(TensorDataset(inputs, labels)).sums)
    moved = [distance for distance in apart if distance > 0.01 * CLIP]
    assert len(moved) == 1
    assert moved[0] <= 2.001 * CLIP


@pytest.mark.usefixtures("fixed_keys")
def test_a_record_moves_at_most_l_noisy_nodes_by_at_most_c_each() -> None:
    with_it, without = ([flat(grads) for grads in one_pass(rows).released] for rows in (40, 39))
    moved = []
    for node in range(1, STEPS + 1):
        held = range(node - (node & -node), node)
        distance = float((sum(with_it[i] for i in held) - sum(without[i] for i in held)).norm())
        moved += [distance] * (distance > 0.01 * CLIP)
    assert 1 <= len(moved) <= levels(STEPS)
    assert max(moved) < 1.001 * CLIP
    assert math.hypot(*moved) < 1.001 * math.sqrt(levels(STEPS)) * CLIP


@pytest.mark.usefixtures("fixed_keys")
def test_everything_before_the_step_of_a_record_is_the_same_without_it() -> None:
    """Adaptively, with a learning rate: models are equal up to its step and a clipped gradient apart at it."""
    with_it, without = one_pass(40, lr=50.0), one_pass(39, lr=50.0)
    apart = distances(with_it.released, without.released)
    step = next(index for index, distance in enumerate(apart) if distance > 0)
    assert apart[:step] == [0.0] * step
    assert 0.99 * CLIP < apart[step] < 1.001 * CLIP


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.usefixtures("fixed_keys")
def test_a_broken_record_counts_as_one_that_is_not_there(bad: float) -> None:
    inputs, labels = (column.clone() for column in linear_data(40).tensors)
    inputs[39, 2] = bad
    for broken, missing in zip(one_pass(TensorDataset(inputs, labels)).sums, one_pass(39).sums, strict=True):
        torch.testing.assert_close(flat(broken), flat(missing), rtol=1e-5, atol=1e-8)


def test_the_allocation_is_asked_with_the_receipt_the_steps_and_the_population_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, real = [], UniformAllocation.draw

    def draw(self: UniformAllocation, receipt: Receipt, steps: int, population: int) -> Any:
        asked.append((steps, population))
        return real(self, receipt, steps, population)

    monkeypatch.setattr(UniformAllocation, "draw", draw)
    state = torch.random.get_rng_state()
    trainer(run=passes_run(2), data=linear_data(31)).fit()
    assert asked == [(5, 31), (5, 31)]
    assert torch.equal(state, torch.random.get_rng_state())  # no torch generator takes part


# ---------------------------------------------------------------------- what optimizers make of it


@pytest.mark.parametrize(("steps", "averaged", "nodes"), [(8, False, 1), (11, False, 3), (8, True, 1 / (2 - 1 / 8))])
def test_gradient_descent_leaves_the_noise_of_the_prefix_in_the_weights(
    steps: int, averaged: bool, nodes: float
) -> None:
    """Chi-squared of the weights after a pass: catches noise after averaging, a wrong divisor, or no cancellation."""
    model = linear_model(200, 100)
    before = flat(dict(model.named_parameters())).detach()
    data = TensorDataset(torch.randn(30, 200), torch.zeros(30, dtype=torch.long))
    run, noise = passes_run(sigma=1.7, clip_norm=0.4), SecureTreeNoise(averaged=averaged)
    trainer(model, run, data, lambda out, y: 0.0 * out.sum(1), steps_per_pass=steps, lr=1.0, noise=noise).fit()
    drawn = (flat(dict(model.named_parameters())).detach() - before) * 40 / steps
    std = math.sqrt(4 * nodes) * 1.7 * 0.4  # four levels
    assert abs(float((drawn / std).square().sum()) - len(drawn)) < 6 * math.sqrt(2 * len(drawn))
    assert abs(float((drawn / std).sum())) < 6 * math.sqrt(len(drawn))


def test_momentum_is_that_of_the_paper() -> None:
    """DP-FTRLM: v_t = beta v_{t-1} + noisy prefix sum, theta_t = theta_0 - lr v_t."""
    model, noise = linear_model(), KeptNoise()
    before = flat(dict(model.named_parameters())).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8)
    trainer(model, noise=noise, optimizer=optimizer, steps_per_pass=9).fit()
    prefix = velocity = torch.zeros_like(before)
    for released in noise.released:
        prefix = prefix + flat(released) / (40 / 9)
        velocity = 0.8 * velocity + prefix
    after = flat(dict(model.named_parameters())).detach()
    torch.testing.assert_close(after, before - 0.05 * velocity, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
        partial(torch.optim.Adam, lr=0.01),
        partial(torch.optim.Adagrad, lr=0.01),
        partial(DPAdamBC, lr=0.01),
    ],
)
def test_any_optimizer_of_torch_takes_the_gradients(optimizer: Any) -> None:
    model = linear_model()
    before = model.weight.detach().clone()
    assert trainer(model, passes_run(2), optimizer=optimizer(model.parameters())).fit().steps == 10
    assert torch.isfinite(model.weight).all()
    assert not torch.equal(model.weight, before)


def test_optimizers_are_told_the_noise_of_each_step() -> None:
    told: list[float] = []

    class Listening(torch.optim.SGD):
        def gradient_noise(self, std: float) -> None:
            told.append(std)

    model = linear_model()
    optimizer = Listening(model.parameters(), lr=0.1)
    run, noise = passes_run(sigma=1.5, clip_norm=2.0), SecureTreeNoise(averaged=False)
    trainer(model, run, optimizer=optimizer, steps_per_pass=8, noise=noise).fit()
    node = node_scale(1.5, 2.0, 8) / (40 / 8)
    assert told == [pytest.approx(node * math.sqrt(k)) for k in (1, 2, 1, 3, 1, 2, 1, 4)]


def test_training_learns_under_noise() -> None:
    data, model = linear_data(600), linear_model()
    run = passes_run(10, sigma=2.0, nominal_size=600)
    trainer(model, run, data, steps_per_pass=16, lr=0.5, physical_batch_size=64).fit()
    assert float((model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()) > 0.85


def test_users_and_views_and_policies_work_as_with_sampling() -> None:
    names = [index // 4 for index in range(40)]
    people = UserDataset(linear_data(), names, max_examples=3)
    noise = NoTreeNoise()
    trainer(run=passes_run(unit="user", nominal_size=10), data=people, noise=noise, views=2, lr=0.0).fit()
    moved = [norm(grads) for grads in noise.passes[0]]
    assert 0 < sum(moved) <= 10  # ten users, each of norm at most 1
    trainer(clipping=NormalisedClipping()).fit()


# ---------------------------------------------------------------------- ends


def test_callbacks_see_steps_and_the_epsilon_of_begun_passes_and_may_stop() -> None:
    from dpbudget.meter import Meter

    seen: list[tuple[int, Bounds | None]] = []

    def watch(step: int, epsilon: Bounds | None) -> bool:
        seen.append((step, epsilon))
        return step < 7

    run = passes_run(4)
    run.meter = Meter((1, 4), (Bounds(0.4, 0.5), Bounds(0.9, 1.0)), 5e-7, 1.0)
    result = trainer(run=run, callbacks=[watch]).fit()
    assert [step for step, _ in seen] == list(range(1, 8))
    assert {epsilon for _, epsilon in seen[:5]} == {run.meter.epsilon(1)}
    assert {epsilon for _, epsilon in seen[5:]} == {run.meter.epsilon(2)} == {result.epsilon}
    assert (result.steps, result.charged, result.stopped) == (7, 2, True)


def test_a_pass_that_was_stopped_stays_charged_and_the_next_one_is_whole() -> None:
    run, noise = passes_run(3), NoTreeNoise()
    subject = trainer(run=run, noise=noise)
    subject._callbacks = (lambda step, epsilon: step < 2,)
    assert (subject.fit().steps, run.charged) == (2, 1)
    subject._callbacks = ()
    assert (subject.fit().steps, run.charged) == (10, 3)
    assert [len(steps) for steps in noise.passes] == [2, 5, 5]
    assert noise.closed == 3


def test_an_error_within_a_pass_leaves_it_charged_and_the_model_without_gradients() -> None:
    calls: list[int] = []

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("user code fails")
        return F.cross_entropy(outputs, target, reduction="none")

    model, run, noise = linear_model(), passes_run(2), NoTreeNoise()
    subject = trainer(model, run, loss=loss, noise=noise, note=lambda said: None)
    calls.clear()  # it was tested on synthetic records
    with pytest.raises(ValueError, match="user code fails"):
        subject.fit()
    assert (run.charged, run.remaining, noise.closed) == (1, 1, 1)
    assert all(p.grad is None for p in model.parameters())
    model(torch.randn(2, 5)).sum().backward()  # the hooks are gone: the model is an ordinary one
    model.zero_grad()
    assert (subject.fit().steps, run.charged) == (5, 2)  # a new pass from its first step, with a receipt of its own


def test_a_crash_within_a_pass_loses_the_pass_and_no_charge(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    ledger = make_ledger(path)
    run_id = ledger.sign_plan(make_plan(steps=3, rate=1.0), owner=OWNER)
    ledger.close()
    pid = os.fork()
    if pid == 0:  # a process that dies in the second step of the first pass
        try:
            with reopen(path) as crashing:
                trainer(run=crashing.start(run_id, lease_steps=1), callbacks=[lambda s, e: s < 2 or os._exit(9)]).fit()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with reopen(path) as again:
        run = again.start(run_id, lease_steps=1)
        assert (run.charged, run.remaining) == (1, 2)
        result = trainer(run=run).fit()
        assert (result.steps, result.charged) == (10, 3)


def test_a_run_that_is_closed_within_a_pass_releases_nothing_more() -> None:
    model, run, weights = linear_model(), passes_run(2), []

    def close(step: int, epsilon: Any) -> None:
        weights.append(model.weight.detach().clone())
        if step == 2:
            run.close()

    with pytest.raises(ReceiptSpent) as caught:
        trainer(model, run, callbacks=[close]).fit()
    assert caught.value.code == "DP076"
    assert len(weights) == 2
    assert torch.equal(model.weight, weights[-1])


def test_a_forked_child_cannot_go_on_with_the_pass() -> None:
    ended: list[int] = []

    def fork(step: int, epsilon: Any) -> None:
        if step == 2:
            ended.append(os.fork())

    run = passes_run(1)
    try:
        result = trainer(run=run, callbacks=[fork]).fit()
    except BaseException as error:
        if ended != [0]:
            raise
        os._exit(0 if getattr(error, "code", "") == "DP076" else 2)
    if ended == [0]:
        os._exit(1)
    assert result.steps == 5
    assert os.waitstatus_to_exitcode(os.waitpid(ended[0], 0)[1]) == 0


def test_parameters_may_be_frozen_between_passes_and_not_within_one() -> None:
    for step, allowed in ((5, True), (3, False)):
        model, run = nn.Sequential(linear_model(), nn.Tanh(), linear_model(3, 3, seed=1)), passes_run(2)

        def freeze(now: int, epsilon: Any, model: nn.Module = model, step: int = step) -> None:
            if now == step:
                model[0].requires_grad_(False)

        subject = trainer(model, run, callbacks=[freeze])
        if allowed:
            assert subject.fit().steps == 10
        else:
            with pytest.raises(DPBudgetError, match="within a pass") as caught:
                subject.fit()
            assert (caught.value.code, run.charged) == ("DP031", 1)


def test_eval_mode_is_refused_in_a_pass() -> None:
    model = linear_model()
    subject = trainer(model, steps_per_pass=2)
    subject._callbacks = (lambda step, epsilon: model.eval(),)
    with refused("DP014"):
        subject.fit()


# ---------------------------------------------------------------------- refusals at set-up


@pytest.mark.parametrize(
    ("build", "code"),
    [
        (lambda run: trainer(run=make_run(4, rate=0.5)), "DP026"),
        (lambda run: trainer(run=run, steps_per_pass=0), "DP009"),
        (lambda run: trainer(run=run, steps_per_pass=True), "DP009"),
        (lambda run: trainer(run=run, steps_per_pass=2.0), "DP009"),
        (lambda run: trainer(run=run, steps_per_pass=(1 << 24) + 1), "DP009"),
        (lambda run: trainer(run=run, clipping=QuantileClipping()), "DP019"),
        (lambda run: trainer(run="run"), "DP081"),
        (lambda run: trainer(run=run, data=DataLoader(linear_data(), shuffle=True)), "DP020"),
        (lambda run: trainer(run=run, data=UserDataset(linear_data(), range(40), max_examples=1)), "DP025"),
        (lambda run: trainer(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), run), "DP010"),
        (lambda run: trainer(linear_model().eval(), run), "DP014"),
        (lambda run: trainer(run=run, optimizer=torch.optim.SGD(linear_model().parameters(), lr=0.1)), "DP011"),
        (lambda run: trainer(run=run, physical_batch_size=0), "DP009"),
    ],
)
def test_what_cannot_be_trained_in_passes_is_refused_and_nothing_is_charged(build: Any, code: str) -> None:
    run = passes_run()
    with pytest.raises(DPBudgetError) as caught:
        build(run)
    assert caught.value.code == code
    assert caught.value.hint
    assert run.charged == 0


def test_a_plan_with_phases_that_sample_is_refused_whichever_it_is() -> None:
    from dpbudget.plan import Phase

    phases = tuple(Phase(rate_k=k, noise_multiplier=1.0, steps=1) for k in (1 << 64, 1 << 63))
    with refused("DP026"):
        trainer(run=make_run(phases=phases))


@pytest.mark.parametrize("allowed", [20, 3])  # enough for the model, and there are 4 levels; not enough even for it
def test_a_tree_that_the_plan_is_too_small_for_is_refused_and_the_number_it_names_is_enough(allowed: int) -> None:
    with refused("DP018") as caught:
        trainer(run=passes_run(max_parameters=allowed), steps_per_pass=8)
    number = int(caught.value.hint.split("max_parameters=")[1].split()[0])
    assert number == 4 * 20
    with refused("DP018"):
        trainer(run=passes_run(max_parameters=number - 1), steps_per_pass=8)
    assert trainer(run=passes_run(max_parameters=number), steps_per_pass=8).fit().steps == 8


def test_a_physical_batch_from_a_memory_bound_is_for_a_step_and_not_for_a_pass() -> None:
    sizes = []
    for steps in (1, 1000):
        run = passes_run(nominal_size=4000)
        sizes.append(trainer(run=run, steps_per_pass=steps, physical_batch_size=MemoryBound(1 << 30))._physical)
    assert sizes == [8192, 32]  # the first power of two from twice the expected batch, and 16 more


def test_a_checkpoint_from_within_a_pass_goes_on_with_the_next(tmp_path: Path) -> None:
    model, run = linear_model(), passes_run(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer(model, run, optimizer=optimizer, callbacks=[lambda step, epsilon: step < 3]).fit()
    save_checkpoint(tmp_path / "kept", model, optimizer, run=run)
    again = linear_model(seed=1)
    resumed = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    assert load_checkpoint(tmp_path / "kept", again, resumed, run=run).steps == 1
    assert torch.equal(again.weight, model.weight)
    result = trainer(again, run, optimizer=resumed).fit()
    assert (result.steps, result.charged) == (5, 2)


# ---------------------------------------------------------------------- the ledger


def test_nothing_private_is_printed_or_returned(capfd: pytest.CaptureFixture[str]) -> None:
    result = trainer(run=passes_run(2), data=linear_data(37)).fit()
    assert capfd.readouterr() == ("", "")
    assert "37" not in repr(result).replace(result.run_id, "")


def test_a_pass_is_settled_with_the_hash_of_the_hashes_of_its_sums(tmp_path: Path) -> None:
    noise = KeptNoise()
    ledger = make_ledger(tmp_path / "a.ledger")
    run = ledger.start(ledger.sign_plan(make_plan(steps=2, rate=1.0), owner=OWNER), lease_steps=1)
    trainer(run=run, noise=noise, record_outputs=True).fit()
    run.close()
    ledger.export(tmp_path / "a.jsonl")
    ledger.close()
    text = (tmp_path / "a.jsonl").read_text()
    for one in (0, 5):
        digests = [bytes.fromhex(output_digest(NoisySum(grads))) for grads in noise.released[one : one + 5]]
        assert hashlib.sha256(b"".join(digests)).hexdigest() in text


def test_from_budget_to_verification_without_a_change_of_the_ledger(tmp_path: Path) -> None:
    owner, writer = dpbudget.new_key(tmp_path / "owner.key"), dpbudget.new_key(tmp_path / "writer.key")
    budget = dpbudget.Budget(epsilon=3.0, delta=1e-5)
    plan = dpbudget.calibrate(epsilon=3.0, delta=1e-5, dataset_size=400, batch_size=400, steps=5)
    path = tmp_path / "a.ledger"
    with dpbudget.create_ledger(path, budget=budget, owner=owner, writer=writer, whole_budget=True) as ledger:
        run = dpbudget.start(ledger, ledger.sign_plan(plan, owner=owner))
        result = trainer(run=run, data=linear_data(397), steps_per_pass=20).fit()
        run.close()
    assert (result.steps, result.charged) == (100, 5)
    assert result.epsilon is not None
    report = dpbudget.verify(path, trust=owner.public)
    assert (report.ok, report.steps) == (True, 5)
    assert 2.9 < report.epsilon.lower <= report.epsilon.upper <= 3.0
    assert result.claim == report.epsilon.upper == pytest.approx(result.epsilon.upper)


def test_batches_of_a_pass_are_read_as_numpy_indices_of_the_dataset() -> None:
    read: list[int] = []

    class Read(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return linear_data()[index]

    subject = trainer(data=Read())
    read.clear()  # the first was read for its shape
    subject.fit()
    assert sorted(read) == np.arange(40).tolist()
