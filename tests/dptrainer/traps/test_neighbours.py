"""Two datasets that differ in one record: sums at most C apart, and the same events in the same order."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from benchmark_models import BENCHES, Bench
from loopkit import NoNoise, make_run, norm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from dpbudget.ledger.receipt import Receipt
from dptrainer import trainer as trainer_module
from dptrainer.noise import native
from dptrainer.noise import source as source_module
from dptrainer.noise.keys import Purpose
from dptrainer.noise.source import SecureNoise
from dptrainer.private import make_private
from dptrainer.trainer import PrivateTrainer

ROWS, WHICH = 6, 2
native.LIBRARY.get()  # else how many sums the process asked for before decides in which of two runs noise is compiled
FULL = pytest.param(True, marks=pytest.mark.slow, id="full")


def _same_key(receipt: Receipt, purpose: Purpose) -> bytes:
    receipt.use(purpose.value)
    return hashlib.sha256(f"{purpose} {receipt.step}".encode()).digest()


@pytest.fixture(autouse=True)
def _the_same_noise_and_random_stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A receipt's noise is fresh in every run; here both runs of a pair shall differ in one record alone."""
    monkeypatch.setattr(source_module, "step_key", _same_key)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# ---------------------------------------------------------------------- the pairs


def without(data: TensorDataset) -> TensorDataset:
    keep = [row for row in range(len(data)) if row != WHICH]
    return TensorDataset(*(column[keep] for column in data.tensors))


def replaced(data: TensorDataset, by: Callable[[Tensor], Tensor]) -> TensorDataset:
    inputs, targets = (column.clone() for column in data.tensors)
    inputs[WHICH] = by(inputs[WHICH])
    return TensorDataset(inputs, targets)


def otherwise(row: Tensor) -> Tensor:
    return -3.0 * row + 1.0 if row.is_floating_point() else row.flip(0) // 2


REPLACEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "another record": otherwise,
    "a zeroed record": torch.zeros_like,
    "a huge record": lambda row: row * 1e18,
    "a record that is not a number": lambda row: row * float("nan"),
    "an infinite record": lambda row: row.clone().fill_(float("inf")),
}


def pairs(data: TensorDataset) -> dict[str, TensorDataset]:
    """Neighbours with as many records; words have neither huge nor infinite values."""
    chosen = REPLACEMENTS if data.tensors[0].is_floating_point() else dict(list(REPLACEMENTS.items())[:2])
    return {name: replaced(data, by) for name, by in chosen.items()}


def clipped_sum(bench: Bench, data: TensorDataset, clip_norm: float, *, full: bool) -> dict[str, Tensor]:
    """The one clipped sum of a step over all records, through the trainer."""
    noise, model = NoNoise(), bench.model(full=full)
    run = make_run(1, rate=1.0, clip_norm=clip_norm)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    PrivateTrainer(model, optimizer, bench.loss, data, run, noise=noise).fit()
    return noise.sums[0]


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert list(first) == list(second)
    return norm({name: first[name].double() - second[name].double() for name in first})


# ---------------------------------------------------------------------- at most C


@pytest.mark.parametrize("full", [pytest.param(False, id="small"), FULL])
@pytest.mark.parametrize("name", BENCHES)
def test_one_record_moves_the_clipped_sum_by_at_most_c(name: str, full: bool) -> None:
    bench, clip_norm = BENCHES[name], 1e-3
    data = bench.data(ROWS, full=full)
    whole = clipped_sum(bench, data, clip_norm, full=full)
    missing = clipped_sum(bench, without(data), clip_norm, full=full)
    assert 0.999 * clip_norm < apart(whole, missing) <= clip_norm
    for case, neighbour in pairs(data).items():
        other = clipped_sum(bench, neighbour, clip_norm, full=full)
        assert apart(other, missing) <= clip_norm, case  # at most C beside the record that is not there
        assert apart(other, whole) <= 2 * clip_norm, case


@pytest.mark.parametrize("name", BENCHES)
def test_under_the_same_noise_one_record_moves_the_update_by_at_most_c_over_the_public_divisor(name: str) -> None:
    bench, after = BENCHES[name], []
    data = bench.data(ROWS)
    for each in (data, without(data)):
        model, run = bench.model(), make_run(1, rate=1.0, sigma=1.0, clip_norm=1e-3)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1000.0)
        PrivateTrainer(model, optimizer, bench.loss, each, run).fit()
        after.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    moved, largest = apart(*after), 1000.0 * 1e-3 / 40  # rate 1 and a nominal size of 40
    assert 0.99 * largest < moved < 1.0001 * largest  # weights of size 1 are rounded to 2^-24


@pytest.mark.parametrize("name", ["a MNIST CNN", "b WRN-16-4", "e MLP", "f LoRA"])
def test_a_record_that_is_not_finite_counts_as_one_that_is_not_there(name: str) -> None:
    bench, clip_norm = BENCHES[name], 1e-3
    data = bench.data(ROWS)
    missing = clipped_sum(bench, without(data), clip_norm, full=False)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = replaced(data, lambda row, bad=bad: row.clone().fill_(bad))
        assert apart(clipped_sum(bench, broken, clip_norm, full=False), missing) <= 1e-6 * clip_norm


# ---------------------------------------------------------------------- the same events


class Kernels(TorchDispatchMode):
    """Notes the name of every operation that torch runs, in forward, backward, clipping, noise and update."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._events.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def noted(events: list[Any], capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Notes operations, module calls, warnings, log records, prints and exceptions of the block."""

    class Log(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            events.append(("log", record.getMessage()))

    handler = Log(level=0)
    logging.getLogger().addHandler(handler)
    hook = nn.modules.module.register_module_forward_hook(lambda module, a, o: events.append(type(module).__name__))
    capfd.readouterr()
    try:
        with warnings.catch_warnings(record=True) as caught, Kernels(events):
            warnings.simplefilter("always")
            yield
        events.extend(("warning", str(warning.message)) for warning in caught)
    except Exception as error:  # an exception is an event too
        events.append(("exception", str(error)))
    finally:
        hook.remove()
        logging.getLogger().removeHandler(handler)
        events.append(("printed", *capfd.readouterr()))


class FixedDraws:
    """The same batches for both datasets: all but one record, all records, none, the record in question alone."""

    def __init__(self) -> None:
        self._draws = iter([[0, 1, 3], list(range(ROWS)), [], [WHICH]])

    def draw(self, receipt: Any, population: int) -> Any:
        receipt.use("sampling")
        return torch.tensor(next(self._draws), dtype=torch.int64).numpy()


def events_of_a_trainer(bench: Bench, data: TensorDataset, capfd: Any, **options: Any) -> list[Any]:
    events: list[Any] = []
    model, run = bench.model(), make_run(4, rate=0.5, clip_norm=1e-3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tell = [lambda steps, epsilon: events.append(("callback", steps, epsilon))]
    trainer = PrivateTrainer(model, optimizer, bench.loss, data, run, callbacks=tell, noise=SecureNoise(), **options)
    trainer._sampler = FixedDraws()  # type: ignore[assignment]
    with noted(events, capfd):
        result = trainer.fit()
        events.append((result.steps, result.charged, result.planned, result.stopped, result.claim))
    return events


def events_of_a_loop(bench: Bench, data: TensorDataset, capfd: Any) -> list[Any]:
    events: list[Any] = []
    model, run = bench.model(), make_run(4, rate=0.5, clip_norm=1e-3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer, loader = make_private(model, optimizer, data, run=run)
    loader._sampler = FixedDraws()  # type: ignore[assignment]
    with noted(events, capfd):
        for x, y in loader:
            bench.loss(model(x), y).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            events.append(("step", loader.step_complete))
    loader.detach()
    return events


LONG = {"b WRN-16-4", "d decoder"}
#: Every model with the trainer, and with a loop those of which a step is short; the others in the slow suite.
WAYS = [
    pytest.param(name, loop, marks=[pytest.mark.slow] if name in LONG and loop is events_of_a_loop else [])
    for name in BENCHES
    for loop in (events_of_a_trainer, events_of_a_loop)
]


@pytest.mark.parametrize(("name", "loop"), WAYS)
def test_neighbours_of_equal_size_cause_the_same_events(
    name: str, loop: Callable[..., list[Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    bench = BENCHES[name]
    data = bench.data(ROWS)
    loop(bench, data, capfd)  # whatever is chosen once for a shape is chosen now
    expected = loop(bench, data, capfd)
    assert sum(event in (("step", True), *((("callback", n, None)) for n in range(1, 5))) for event in expected) == 4
    assert any("aten.addmm" in str(event) or "aten.mm" in str(event) for event in expected), "operations are seen"
    assert ("printed", "", "") in expected
    for case, neighbour in pairs(data).items():
        events = loop(bench, neighbour, capfd)
        differing = [(i, a, b) for i, (a, b) in enumerate(zip(expected, events, strict=False)) if a != b]
        assert not differing, f"{case}: {differing[:3]}"
        assert len(events) == len(expected), case


def test_an_empty_draw_and_a_full_one_end_alike(capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """How much runs within a step follows the size of its batch, and nothing that a caller sees does."""
    bench, seen = BENCHES["e MLP"], []
    for draws in ([], [0], list(range(ROWS))):
        chosen = torch.tensor(draws, dtype=torch.int64).numpy()
        monkeypatch.setattr(trainer_module.PoissonSampler, "draw", lambda self, receipt, n, chosen=chosen: chosen)
        events: list[Any] = []
        model, run = bench.model(), make_run(2, rate=0.5)
        tell = [lambda steps, epsilon, events=events: events.append((steps, epsilon))]
        with noted([], capfd):
            result = PrivateTrainer(
                model, torch.optim.Adam(model.parameters()), bench.loss, bench.data(ROWS), run, callbacks=tell
            ).fit()
        capfd.readouterr()
        events.append(
            (
                result.steps,
                result.charged,
                [(n, p.shape, bool(p.isfinite().all())) for n, p in model.named_parameters()],
            )
        )
        seen.append(events)
    assert seen[0] == seen[1] == seen[2]
