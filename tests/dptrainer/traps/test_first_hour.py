"""What a newcomer does in the first hour with a loop of his own: it works, or it is refused with its own reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clipping_oracle import assert_equal_to_the_oracle
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
    private,
    refused,
    reopen,
    same,
    snapshot,
    step,
    unchanged,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dptrainer
from dpbudget.errors import DPBudgetWarning
from dptrainer.trainer import PrivateTrainer


def run_through(model: nn.Module, **options: Any) -> tuple[NoNoise, Any]:
    """The ordinary loop to the end of the plan; what was released, and the run."""
    noise, run = NoNoise(), make_run(3, rate=1.0)
    model, optimizer, loader = private(model, run=run, noise=noise, **options)
    for batch in loader:
        step(model, optimizer, batch)
        optimizer.zero_grad()
    return noise, run


# ---------------------------------------------------------------------- losses and optimizers of one's own


def test_a_loss_of_ones_own_is_clipped_like_any_other() -> None:
    """Finding 1: in another library's ghost mode this update had norm 5.7e-3 under a clipping norm of 1e-6."""
    noise, run = NoNoise(), make_run(1, rate=1.0, clip_norm=1e-6)
    model, optimizer, loader = private(run=run, noise=noise)
    before = snapshot(model)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert 0.0 < norm(noise.sums[0]) <= 40 * 1e-6
    moved = {name: value - before[name] for name, value in model.state_dict().items()}
    assert 0.0 < norm(moved) <= 0.1 * 40 * 1e-6 / 40 * 1.1  # rate, records, divisor, rounding of the weights


def test_a_loss_that_is_summed_is_declared_or_refused() -> None:
    with refused("DP030") as caught:
        private(loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    assert 'loss_reduction="mean" or "sum"' in caught.value.hint
    noise, single = NoNoise(), NoNoise()
    for kept, reduction in ((noise, "sum"), (single, "mean")):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        run = make_run(1, rate=1.0)
        model, optimizer, loader = private(run=run, noise=kept, loss_fn=loss, loss_reduction=reduction)
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()
    assert norm({n: noise.sums[0][n] - single.sums[0][n] for n in noise.sums[0]}) <= 1e-5


def test_clipping_that_was_left_in_the_loop_is_harmless() -> None:
    noise, plain = NoNoise(), NoNoise()
    for kept in (noise, plain):
        model, optimizer, loader = private(run=make_run(2, rate=1.0), noise=kept)
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            if kept is noise:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
            optimizer.step()
    assert all(torch.equal(a[n], b[n]) for a, b in zip(noise.sums, plain.sums, strict=True) for n in a)


def test_a_gradient_scaler_is_refused_before_anything_moves() -> None:
    model, optimizer, loader = private()
    scaler = torch.amp.GradScaler("cpu")
    batches = iter(loader)
    x, y = next(batches)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    # Gradients exist from optimizer.step() on; a scaler that skips steps by what it finds would tell of the data.
    with unchanged(model), pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)


def test_after_the_noise_anything_is_free() -> None:
    """Weight decay, averages of weights and the moments of Adam are computed from noisy sums alone."""
    run, noise = make_run(3, rate=1.0), CountedNoise()
    model = linear_model()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    _, _, loader = private(model, optimizer, run=run, noise=noise)
    for batch in loader:
        step(model, optimizer, batch)
        average.update_parameters(model)
    assert (run.charged, noise.releases) == (3, 3)
    assert bool(average.module.weight.isfinite().all())


# ---------------------------------------------------------------------- three causes, three answers


def test_splitting_a_batch_by_hand_accumulating_and_stepping_twice_are_told_apart() -> None:
    said = []
    for way in ("step each", "accumulate", "step twice"):
        model, optimizer, loader = private()
        batches = iter(loader)
        x, y = next(batches)
        with refused("DP0") as caught:
            for part in (slice(0, 20), slice(20, 40)) if way != "step twice" else (slice(0, 40),):
                F.cross_entropy(model(x[part]), y[part]).backward()
                if way != "accumulate":
                    optimizer.step()
            optimizer.step()
        said.append((caught.value.code, caught.value.hint))
        loader.detach()
    assert [code for code, _ in said] == ["DP030", "DP031", "DP021"]
    assert all("physical_batch_size" in hint for _, hint in said[:2])
    assert "once for each of its batches" in said[2][1]


def test_accumulating_over_batches_is_told_that_gradients_are_dropped() -> None:
    run = make_run(6, rate=1.0)
    model, optimizer, loader = private(run=run)

    def accumulate() -> None:
        for number, (x, y) in enumerate(loader):
            F.cross_entropy(model(x), y).backward()
            if number % 3 == 2:
                optimizer.step()

    with pytest.warns(DPBudgetWarning, match="not added up") as caught:
        accumulate()
    assert ([warning.filename for warning in caught], run.charged) == ([__file__], 6)


def test_batches_that_are_passed_over_or_broken_off_need_no_warning() -> None:
    model, _, loader = private(run=make_run(4, rate=1.0))
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        break
    for _ in loader:
        pass


def test_epochs_over_a_loader_that_was_not_cut_into_them_are_told_how() -> None:
    model, optimizer, loader = private(run=make_run(2))
    with refused("DP050") as caught:
        for _ in range(2):
            for batch in loader:
                step(model, optimizer, batch)
    assert "steps_per_epoch" in caught.value.hint
    model, optimizer, loader = private(run=make_run(2), steps_per_epoch=2)
    with refused("DP050") as caught:
        for _ in range(2):
            for batch in loader:
                step(model, optimizer, batch)
    assert "steps_per_epoch" not in caught.value.hint


def test_physical_batches_do_what_accumulation_by_hand_was_meant_to_do() -> None:
    whole, parts = NoNoise(), NoNoise()
    for kept, size in ((whole, None), (parts, 7)):
        run = make_run(1, rate=1.0)
        model, optimizer, loader = private(run=run, noise=kept, physical_batch_size=size)
        for batch in loader:
            step(model, optimizer, batch)
        assert run.charged == 1
    assert norm({n: whole.sums[0][n] - parts.sums[0][n] for n in whole.sums[0]}) <= 1e-5


# ---------------------------------------------------------------------- what was spent stays spent


def test_weights_that_torch_saved_and_loaded_do_not_reset_what_was_spent(tmp_path: Path) -> None:
    """Finding 3: elsewhere 5 + 5 epochs were reported as 5."""
    path, file = tmp_path / "a.ledger", tmp_path / "weights.pt"
    ledger = make_ledger(path)
    run_id = ledger.sign_plan(make_plan(steps=4, rate=1.0), owner=OWNER)
    run = ledger.start(run_id, lease_steps=1)
    model, optimizer, loader = private(run=run)
    batches = iter(loader)
    for _ in range(2):
        step(model, optimizer, next(batches))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run.close()
    ledger.close()

    ledger, model = reopen(path), linear_model(seed=1)
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])  # the names are those of the plain model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.load_state_dict(saved["optimizer"])
    run = ledger.start(run_id, lease_steps=1)
    assert (run.charged, run.remaining) == (2, 2)
    model, optimizer, loader = private(model, optimizer, run=run)
    for batch in loader:
        step(model, optimizer, batch)
    assert run.charged == 4
    with unchanged(model), refused("DP050"):
        next(iter(loader))
    run.close()
    ledger.close()


class OutOfMemory(nn.Module):
    """Fails for more than twenty examples, like a device that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = linear_model(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) > 20:
            raise torch.OutOfMemoryError("too many examples")
        return self.linear(x)


def test_out_of_memory_is_never_tried_again_with_a_smaller_batch() -> None:
    model, noise, run = OutOfMemory(), NoNoise(), make_run(2, rate=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), linear_data(), run, noise=noise)
    with unchanged(model), pytest.raises(torch.OutOfMemoryError):
        trainer.fit()
    assert (run.charged, len(noise.sums), model.calls) == (1, 0, 1)


# ---------------------------------------------------------------------- what is said, and where the data is not


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = linear_model(), linear_model()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("trainer", [True, False])
def test_a_parameter_without_a_gradient_is_noted_once_at_set_up_and_trains_on_noise(trainer: bool) -> None:
    model, noise, said = Branch(), NoNoise(), list[str]()
    optimizer, run = torch.optim.SGD(model.parameters(), lr=0.1), make_run(2, rate=1.0)
    if trainer:
        loss = nn.CrossEntropyLoss()
        PrivateTrainer(model, optimizer, loss, linear_data(), run, noise=noise, note=said.append).fit()
    else:
        for batch in private(model, optimizer, run=run, noise=noise, loss_fn=F.cross_entropy, note=said.append)[2]:
            step(model, optimizer, batch)
    (note,) = said
    assert note.startswith("DP015 unused.weight, unused.bias")
    assert "requires_grad_(False)" in note
    assert list(noise.sums[-1]) == [name for name, _ in model.named_parameters()]


def test_a_good_model_is_met_with_silence() -> None:
    said: list[str] = []
    private(loss_fn=F.cross_entropy, note=said.append)
    assert said == []


def test_sequences_with_examples_in_dimension_one_are_told_of_batch_first() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(4, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0].mean(1))

    with refused("DP033") as caught:
        private(Attends(), data=TensorDataset(torch.randn(40, 6, 4), torch.arange(40) % 3))
    assert "batch_first=True" in caught.value.hint


class Capacity(nn.Module):
    """A mixture of experts of which each takes the first two examples that come to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(5, 4), nn.ModuleList(nn.Linear(5, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gates, total = self.gate(x).softmax(1), torch.zeros(len(x), 3)
        for index, expert in enumerate(self.experts):
            rows = (gates.argmax(1) == index).nonzero()[:2, 0]
            total = total.index_add(0, rows, expert(x[rows]) * gates[rows, index].unsqueeze(1))
        return total


def test_experts_with_a_capacity_let_examples_meet_and_are_refused() -> None:
    torch.manual_seed(0)
    with refused("DP03[03]"):  # by the probe, or because an expert does not see one row an example
        private(Capacity())


# ---------------------------------------------------------------------- what simply works


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.scale = nn.Bilinear(5, 5, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x) * self.scale


class TiedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.unsqueeze(2))[0][:, -1])


WORKS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)),
    "tied weights": TiedLayers,
    "bare parameters and bilinear": Bare,
    "LSTM": Remembers,
    "in-place activation": lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
    "frozen before": lambda: nn.Sequential(nn.Linear(5, 8).requires_grad_(False), nn.Linear(8, 3)),
    "frozen after": lambda: nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3).requires_grad_(False)),
}


@pytest.mark.parametrize("case", WORKS)
def test_what_people_bring_trains_as_it_is(case: str) -> None:
    torch.manual_seed(0)
    model = WORKS[case]()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = snapshot(model)
    noise, run = run_through(model)
    assert run.charged == len(noise.sums) == 3
    assert list(noise.sums[0]) == names
    assert all(norm({name: total}) > 0.0 for name, total in noise.sums[0].items())
    now = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], now[name])] == [
        n for n in before if n in names or n == "second.weight"
    ]


def test_a_deep_copy_of_a_private_model_is_a_plain_model() -> None:
    model, optimizer, loader = private()
    batches = iter(loader)
    step(model, optimizer, next(batches))
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    before = snapshot(twin)
    F.cross_entropy(twin(torch.ones(2, 5)), torch.tensor([0, 1])).backward()
    other.step()
    assert not same(twin, before)


IN_PLACE = {
    "after a linear layer over positions": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 2)),
        lambda: torch.randn(5, 3, 4),
    ),
    "after an instance norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True), nn.ReLU(True), nn.Flatten(), nn.Linear(12, 2)
        ),
        lambda: torch.randn(5, 2, 3, 3),
    ),
    "after a group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.SiLU(True), nn.Flatten(), nn.Linear(16, 2)),
        lambda: torch.randn(5, 2, 3, 3),
    ),
    "before every layer": (lambda: nn.Sequential(nn.ReLU(True), nn.Linear(4, 2)), lambda: torch.randn(5, 4)),
    "of a lookup": (
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Hardtanh(inplace=True), nn.Flatten(), nn.Linear(12, 2)),
        lambda: torch.randint(0, 5, (5, 3)),
    ),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_activations_lose_no_gradient(case: str) -> None:
    torch.manual_seed(0)
    build, data = IN_PLACE[case]
    assert_equal_to_the_oracle(build(), [data()])


def test_a_part_of_a_layer_that_is_overwritten_in_place_keeps_its_gradient() -> None:
    class Clears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.second(torch.tanh(self.first(x)))
            hidden[:, 0] *= 3.0
            hidden.view(-1)[1::2].clamp_(min=0.0)
            return self.out(hidden)

    torch.manual_seed(0)
    assert_equal_to_the_oracle(Clears(), [torch.randn(5, 3, 4)])


def test_a_model_that_writes_into_its_input_passes_the_probe() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear_model()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mul_(2.0))

    said: list[str] = []
    private(Doubles(), loss_fn=F.cross_entropy, note=said.append)
    assert said == []


def test_a_repaired_model_trains_with_the_optimizer_that_was_built_before() -> None:
    """Elsewhere an optimizer from before the repair is the first dead end."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused("DP010") as caught:
        private(model, optimizer)
    assert "dptrainer.fix(model)" in caught.value.hint
    model = dptrainer.fix(model)
    noise = NoNoise()
    for batch in private(model, optimizer, run=make_run(2, rate=1.0), noise=noise)[2]:
        step(model, optimizer, batch)
    assert norm({"1.weight": noise.sums[0]["1.weight"]}) > 0.0


# ---------------------------------------------------------------------- what a forward pass leaves behind


class Keeps(nn.Module):
    """Writes the mean of its hidden values somewhere, in one of many ways."""

    def __init__(self, write: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.hidden, self.out, self.write = nn.Linear(5, 8), nn.Linear(8, 3), write
        self.frozen = nn.Parameter(torch.zeros(8), requires_grad=False)
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        self.write(self, hidden.detach().mean(0))
        return self.out(hidden)


def _assign(model: Any, mean: Tensor) -> None:
    model.mean = mean


def _assign_data(model: Any, mean: Tensor) -> None:
    model.mean.data = mean


WRITES: dict[str, Callable[[Any, Tensor], object]] = {
    "a new buffer": _assign,
    "in place": lambda model, mean: model.mean.copy_(mean),
    "through .data": _assign_data,
    "through .data in place": lambda model, mean: model.mean.data.add_(mean),
    "through numpy": lambda model, mean: model.mean.numpy().__setitem__(slice(None), mean.numpy()),
    "into a frozen parameter": lambda model, mean: model.frozen.data.add_(mean),
    "into a trainable parameter": lambda model, mean: model.out.weight.data[0].add_(mean),
}


@pytest.mark.parametrize("way", WRITES)
def test_a_running_mean_is_refused_however_it_is_written(way: str) -> None:
    with refused("DP013") as caught:
        private(Keeps(WRITES[way]))
    assert "without noise" in str(caught.value)


def test_values_that_are_kept_outside_the_state_dict_are_noted() -> None:
    said: list[str] = []
    private(Keeps(lambda model, mean: model.seen.append(mean)), loss_fn=F.cross_entropy, note=said.append)
    (note,) = said
    assert '"seen"' in note
    assert "state_dict()" in note


def test_a_table_that_is_filled_once_for_a_length_is_no_trace() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.weights = linear_model(), None

        def forward(self, x: Tensor) -> Tensor:
            if self.weights is None:
                self.weights = torch.linspace(0.5, 1.5, x.shape[1])
            return self.linear(x * self.weights)

    said: list[str] = []
    private(Caches(), loss_fn=F.cross_entropy, note=said.append)
    assert said == []


def test_division_by_the_size_of_the_batch_is_named() -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear_model()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) / len(x)

    with refused("DP033") as caught:
        private(Divides())
    assert "size of the batch" in caught.value.hint
