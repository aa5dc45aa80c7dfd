"""Exact plans: where a program could keep something of one record for another, and that none finds it there."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exactkit import CLIP, KeptIntegers, apart, equal, integers, picked, plus
from loopkit import linear_data, make_run, refused
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from dptrainer import PrivateTrainer, own_draws
from dptrainer.clipping.policy import Clipping

ROWS = 8
DATA = linear_data(ROWS)
REST = picked(DATA, list(range(1, ROWS)))  # every other record has another place
LOSS = nn.CrossEntropyLoss()


class Watched(nn.Module):
    """A linear model that keeps something of every record, once set-up has looked at it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1.0, 1.0, parameter.numel()).view_as(parameter))
        self.register_buffer("table", torch.zeros(5))
        self.mean, self.calls, self.on = torch.zeros(5), 0, False
        self.seen: list[Tensor] = []
        self.known: dict[str, Tensor] = {}
        self.drop = nn.Identity()

    def switch_on(self) -> None:
        self.on = True

    def keep(self, x: Tensor) -> None:
        """What a subclass does with a record."""

    def forward(self, x: Tensor) -> Tensor:
        if self.on:
            self.keep(x.detach())
        past = self.mean + sum(self.seen) + sum(self.known.values()) + 0.5 * self.calls + self.table
        return self.layer(self.drop(x) - past) if self.drop.training else self.layer(-x)


class Averages(Watched):
    def keep(self, x: Tensor) -> None:
        self.mean = 0.5 * self.mean + x[0]


class Counts(Watched):
    def keep(self, x: Tensor) -> None:
        self.calls += 1


class Remembers(Watched):
    def keep(self, x: Tensor) -> None:
        self.seen.append(x[0])


class Files(Watched):
    def keep(self, x: Tensor) -> None:
        self.known["largest"] = torch.maximum(self.known.get("largest", x[0]), x[0])


class TurnsOff(Watched):
    def keep(self, x: Tensor) -> None:
        if torch.equal(x[0], DATA.tensors[0][0]):
            self.drop.eval()


def alone_and_together(make: Callable[[], nn.Module], loss: Any = LOSS, **options: Any) -> tuple[KeptIntegers, ...]:
    """The sum over the first record, over all others, and over all."""
    return tuple(integers(make(), loss, data, **options) for data in (picked(DATA, [0]), REST, DATA))


@pytest.mark.parametrize("model", [Averages, Counts, Remembers, Files, TurnsOff])
def test_what_forward_assigns_to_attributes_is_gone_before_the_next_record(model: type[Watched]) -> None:
    alone, missing, whole = alone_and_together(model, begun=lambda made: made.switch_on(), note=lambda said: None)
    assert equal(plus(alone, missing), whole)


def test_attributes_are_after_a_step_what_they_were_before_it() -> None:
    model = Averages()
    before = model.mean
    integers(model, LOSS, DATA, begun=lambda made: made.switch_on())
    assert model.mean is before
    assert model.on


def test_attributes_are_put_back_when_a_record_ends_the_step_with_an_error() -> None:
    class Fails(Averages):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if self.on:
                raise RuntimeError("a broken record")
            return out

    model = Fails()
    before = model.mean
    with pytest.raises(RuntimeError, match="broken"):
        integers(model, LOSS, DATA, begun=lambda made: made.switch_on())
    assert model.mean is before


class WritesAttribute(Watched):
    def keep(self, x: Tensor) -> None:
        self.mean.mul_(0.5).add_(x[0])


class WritesBufferAround(Watched):
    def keep(self, x: Tensor) -> None:
        self.table.data.mul_(0.5).add_(x[0])


class WritesBufferByNumPy(Watched):
    def keep(self, x: Tensor) -> None:
        self.table.numpy()[:] = x[0].numpy()


class WritesParameterAround(Watched):
    def keep(self, x: Tensor) -> None:
        self.layer.bias.data.add_(x.mean())


class ReplacesParameter(Watched):
    def keep(self, x: Tensor) -> None:
        self.layer.bias = nn.Parameter(self.layer.bias.detach() + x.mean())


class WritesFrozen(Watched):
    def __init__(self) -> None:
        super().__init__()
        self.layer.bias.requires_grad_(False)

    def keep(self, x: Tensor) -> None:
        self.layer.bias.data.add_(x.mean())


class HooksGradient(Watched):
    def keep(self, x: Tensor) -> None:
        self.layer.weight.register_hook(lambda grad: grad * -1.1)


class HooksLayer(Watched):
    def keep(self, x: Tensor) -> None:
        self.layer.register_forward_hook(lambda module, args, out: out * 1.5)


class ExchangesModule(Watched):
    def keep(self, x: Tensor) -> None:
        self.drop = nn.Tanh()


@pytest.mark.parametrize(
    ("model", "code", "named"),
    [
        (WritesAttribute, "DP013", 'attribute "mean"'),
        (WritesBufferAround, "DP013", 'buffer "table"'),
        (WritesBufferByNumPy, "DP013", 'buffer "table"'),
        (WritesFrozen, "DP013", 'frozen parameter "layer.bias"'),
        (WritesParameterAround, "DP031", 'parameter "layer.bias"'),
        (ReplacesParameter, "DP031", 'parameter "layer.bias"'),
        (HooksGradient, "DP031", '"layer.weight"'),
        (HooksLayer, "DP031", "exchanged during forward"),
        (ExchangesModule, "DP031", "exchanged during forward"),
    ],
)
def test_what_forward_writes_elsewhere_is_found_before_the_noise(model: type[Watched], code: str, named: str) -> None:
    noise, made = KeptIntegers(), model()
    run = make_run(1, rate=1.0, noise="exact", max_parameters=100)
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.0)
    trainer = PrivateTrainer(made, optimizer, LOSS, DATA, run, noise=noise, note=lambda said: None)
    made.switch_on()
    with refused(code) as caught:
        trainer.fit()
    assert named in str(caught.value)
    assert not hasattr(noise, "sums")


class Centred(nn.Module):
    """A criterion with a running mean, as self-distillation has."""

    centre: Tensor

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        self.on = False
        self.register_buffer("centre", torch.zeros(3)) if buffer else setattr(self, "centre", torch.zeros(3))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        if self.on:
            self.centre = 0.5 * self.centre + outputs.detach()[0]
        return nn.functional.cross_entropy(outputs - self.centre, target, reduction="none")


def centred(data: Any, *, buffer: bool = False) -> KeptIntegers:
    criterion = Centred(buffer=buffer)
    return integers(Watched(), criterion, data, begun=lambda model: setattr(criterion, "on", True))


def test_a_criterion_keeps_nothing_either() -> None:
    alone, missing, whole = (centred(data) for data in (picked(DATA, [0]), REST, DATA))
    assert equal(plus(alone, missing), whole)


def test_a_criterion_that_writes_a_buffer_is_refused() -> None:
    with refused("DP013") as caught:
        centred(DATA, buffer=True)
    assert 'buffer "centre"' in str(caught.value)


# ---------------------------------------------------------------------- random numbers


class Draws(nn.Module):
    """Multiplies by draws of every common stream, as many as the record says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Watched().layer

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + int(x[0, 0] > 0)):
            draws = [float(torch.rand(())), random.random(), float(np.random.rand())]
        DRAWN.append(draws)
        return self.layer(x * float(np.prod(draws)))


DRAWN: list[list[float]] = []


@pytest.fixture
def known_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has the same secret words."""
    monkeypatch.setattr(own_draws, "step_key", lambda receipt, purpose: bytes(range(32)))


def seed_all() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def draws_of(data: Any, model: nn.Module | None = None) -> list[list[float]]:
    DRAWN.clear()
    model = Draws() if model is None else model
    integers(model, LOSS, data, begun=lambda made: DRAWN.clear(), note=lambda said: None)
    return DRAWN.copy()


def test_what_a_record_draws_does_not_follow_from_a_seed_of_the_program() -> None:
    seed_all()
    first = draws_of(DATA)
    seed_all()
    second = draws_of(DATA)
    for stream in range(3):
        numbers = [draws[stream] for draws in (*first, *second)]
        assert len(set(numbers)) == 2 * ROWS


def test_the_streams_of_the_program_do_not_tell_how_many_records_drew() -> None:
    def after(data: Any) -> list[float]:
        seed_all()
        draws_of(data)
        return [float(torch.rand(())), random.random(), float(np.random.rand())]

    assert after(DATA) == after(REST)


@pytest.mark.usefixtures("known_words")
def test_a_record_that_draws_more_moves_no_draw_of_another() -> None:
    inputs, targets = (column.clone() for column in DATA.tensors)
    inputs[:, 0] = -1.0
    quiet = draws_of(TensorDataset(inputs.clone(), targets))
    inputs[0, 0] = 1.0
    loud = draws_of(TensorDataset(inputs, targets))
    assert quiet[0] != loud[0]
    assert quiet[1:] == loud[1:]


@pytest.mark.usefixtures("known_words")
def test_with_its_words_given_a_record_is_one_vector_whatever_is_dropped_and_augmented() -> None:
    class Augmented(Dataset[Any]):
        def __init__(self, rows: int) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return self.rows

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            x, y = DATA[index]
            return x + torch.randn(5) + random.random() + float(np.random.rand()), y

    def model() -> nn.Module:
        return nn.Sequential(Watched().layer, nn.Dropout(0.5))

    whole, missing = integers(model(), LOSS, Augmented(ROWS)), integers(model(), LOSS, Augmented(ROWS - 1))
    assert 0 < apart(whole, missing) <= whole.grid.bound
    again = integers(model(), LOSS, Augmented(ROWS))
    assert equal(whole, again)


# ---------------------------------------------------------------------- memory


class Windows(Dataset[Any]):
    """Windows of one series, which overlap; views of it, by a collate function that copies nothing."""

    def __init__(self, series: Tensor, first: int) -> None:
        self.series, self.first = series.clone(), first

    def __len__(self) -> int:
        return ROWS - self.first

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = 3 * (index + self.first)
        return self.series[start : start + 5], torch.tensor(index % 3)


def uncopied(items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [column[None] for column in items[0]]


def test_what_a_model_writes_into_a_record_stays_with_it() -> None:
    class Masks(Watched):
        def forward(self, x: Tensor) -> Tensor:
            x[:, 3:] = 0.0
            return self.layer(x)

    series = torch.randn(3 * ROWS + 5, generator=torch.Generator().manual_seed(0))
    data = Windows(series, 0)
    integers(Masks(), LOSS, data, collate_fn=uncopied)
    assert torch.equal(data.series, series)


def test_a_record_comes_in_memory_that_tells_nothing_of_its_place() -> None:
    places: list[tuple[Any, ...]] = []

    class Looks(Watched):
        def forward(self, x: Tensor) -> Tensor:
            if self.on:
                places.append((x.data_ptr() % 64, x.storage_offset(), x.stride()))
            return self.layer(x)

    class Columns(Dataset[Any]):  # strides that count the records
        table = torch.randn(5, ROWS)

        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return self.table[:, index], torch.tensor(0)

    data = [Windows(torch.randn(3 * ROWS + 5), 0), Columns()]
    for one in data:
        integers(Looks(), LOSS, one, collate_fn=uncopied, begun=lambda model: model.switch_on())
    assert len(places) == 2 * ROWS
    assert set(places) == {(0, 0, (5, 1))}


def test_a_record_that_cancels_almost_has_the_same_vector_wherever_it_lies() -> None:
    """Libraries may add in another order at another address; here such a change would be a whole vector.

    Inputs are huge and orthogonal to the weights, so that outputs are rounding alone. Rows have an odd number of
    float64, so that every other one lies at another place of a vector register.
    """

    class Sine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(37, 8, bias=False).double()
            with torch.no_grad():
                weights = torch.randn(8, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
                self.inner.weight.copy_(weights)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.inner(x)).sum((1, 2)).unsqueeze(1)

    span, _ = torch.linalg.qr(Sine().inner.weight.detach().T)
    rows = torch.randn(ROWS, 51, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    data = TensorDataset((rows - (rows @ span) @ span.T) * 1e18, torch.zeros(ROWS))
    rest = TensorDataset(*(column[1:].clone() for column in data.tensors))
    first = TensorDataset(*(column[:1].clone() for column in data.tensors))
    alone, missing, whole = (
        integers(Sine(), lambda out, target: out[:, 0], one, collate_fn=uncopied) for one in (first, rest, data)
    )
    assert equal(plus(alone, missing), whole)


# ---------------------------------------------------------------------- policies


def test_a_policy_is_asked_for_its_unit_before_it_sees_a_record() -> None:
    class Learns(Clipping):
        largest = 0.0

        def factors(self, squared: Any, clip_norm: float) -> dict[str, Tensor]:
            self.largest = max(self.largest, *(float(one.max()) for one in squared.values()))
            return super().factors(squared, clip_norm)

        def unit(self, clip_norm: float) -> float:
            return 1.0 + self.largest

    class Kept(KeptIntegers):
        def privatise(self, clipped: Any, receipt: Any) -> Any:
            units.append(clipped.unit)
            return super().privatise(clipped, receipt)

    units: list[float] = []
    model = Watched()
    run = make_run(1, rate=1.0, clip_norm=CLIP, noise="exact", max_parameters=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    policy = Learns()
    PrivateTrainer(model, optimizer, LOSS, DATA, run, noise=Kept(), clipping=policy).fit()
    assert policy.largest > 0.0
    assert units == [1.0]
