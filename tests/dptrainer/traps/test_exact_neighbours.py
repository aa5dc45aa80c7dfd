"""Exact plans: two datasets that differ in one record differ by that record's integer vector, and by nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_models import BENCHES, Bench
from exactkit import CLIP, KeptIntegers, apart, equal, picked, plus
from exactkit import integers as sum_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dptrainer import (
    NormalisedClipping,
    PerLayerClipping,
    QuantileClipping,
    ScheduledClipping,
    UserDataset,
)

ROWS, WHICH = 6, 2
FULL = pytest.param(True, marks=pytest.mark.slow, id="full")
POLICIES: dict[str, Callable[[nn.Module], Any]] = {
    "flat": lambda model: None,
    "normalised": lambda model: NormalisedClipping(),
    "per layer": lambda model: PerLayerClipping.equal(model, CLIP),
    "quantile": lambda model: QuantileClipping(quantile=0.5, initial=0.1),
    "scheduled": lambda model: ScheduledClipping({0: 0.05}),
}


def integers(bench: Bench, data: Any, *, full: bool = False, clipping: Any = None, **options: Any) -> KeptIntegers:
    """The integer sum of a step of a benchmark's model over all records."""
    model = bench.model(full=full)
    return sum_of(model, bench.loss, data, clipping=None if clipping is None else clipping(model), **options)


@pytest.mark.parametrize("full", [pytest.param(False, id="small"), FULL])
@pytest.mark.parametrize("name", BENCHES)
def test_the_sum_over_records_is_the_sum_of_what_each_gives_alone_to_the_bit(name: str, full: bool) -> None:
    bench = BENCHES[name]
    data = bench.data(ROWS, full=full)
    rest = [row for row in range(ROWS) if row != WHICH]
    whole = integers(bench, data, full=full)
    alone, missing = integers(bench, picked(data, [WHICH]), full=full), integers(bench, picked(data, rest), full=full)
    assert equal(plus(alone, missing), whole)
    assert 0 < apart(whole, missing) <= whole.grid.bound
    # truncation takes at most a 64th of the length
    assert apart(whole, missing) >= whole.grid.bound * (1 - 1 / 30)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["a MNIST CNN", "d decoder"])
def test_every_policy_keeps_one_record_within_the_bound(name: str, policy: str) -> None:
    bench = BENCHES[name]
    data = bench.data(ROWS)
    rest = [row for row in range(ROWS) if row != WHICH]
    whole, missing = (integers(bench, each, clipping=POLICIES[policy]) for each in (data, picked(data, rest)))
    assert 0 < apart(whole, missing) <= whole.grid.bound


@pytest.mark.parametrize("name", BENCHES)
def test_neither_order_nor_place_changes_a_bit(name: str) -> None:
    bench = BENCHES[name]
    data = bench.data(ROWS)
    assert equal(integers(bench, data), integers(bench, picked(data, [3, 5, 1, 0, 4, 2])))


@pytest.mark.parametrize("name", ["a MNIST CNN", "b WRN-16-4", "e MLP", "f LoRA"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_record_that_is_not_finite_counts_as_one_that_is_not_there(name: str, bad: float) -> None:
    bench = BENCHES[name]
    data = bench.data(ROWS)
    inputs, targets = (column.clone() for column in data.tensors)
    inputs[WHICH] = bad
    found = integers(bench, TensorDataset(inputs, targets))
    missing = integers(bench, picked(data, [row for row in range(ROWS) if row != WHICH]))
    if not math.isfinite(bad):
        assert equal(found, missing)
    assert apart(found, missing) <= found.grid.bound


def test_a_user_is_one_vector_whatever_rows_the_user_has() -> None:
    bench = BENCHES["e MLP"]
    data = bench.data(ROWS)
    users = [0, 0, 1, 2, 2, 2]
    whole = integers(bench, UserDataset(data, users, max_examples=3), unit="user")
    others = [row for row in range(ROWS) if users[row] != 2]
    missing = integers(
        bench, UserDataset(picked(data, others), [users[row] for row in others], max_examples=3), unit="user"
    )
    assert 0 < apart(whole, missing) <= whole.grid.bound


def test_views_of_a_record_are_one_vector() -> None:
    bench = BENCHES["e MLP"]
    data = bench.data(ROWS)
    # without augmentation the mean of the views is the record's own gradient, up to the rounding of the mean
    once, thrice = integers(bench, data), integers(bench, data, views=3)
    largest = max(float((once.sums[n] - thrice.sums[n]).abs().max()) for n in once.sums)
    assert largest <= 2 * ROWS


def test_the_integers_are_the_clipped_gradients_of_single_records() -> None:
    bench = BENCHES["a MNIST CNN"]
    data, model = bench.data(ROWS), bench.model()
    found = integers(bench, data)
    total: dict[str, Tensor] = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for row in range(ROWS):
        model.zero_grad()
        x, y = (column[row : row + 1] for column in data.tensors)
        bench.loss(model(x), y).sum().backward()
        length = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] += parameter.grad.double() * min(1.0, CLIP / length)
    unit = found.grid.unit(CLIP)
    for name, expected in total.items():
        # each record loses less than a unit a coordinate, and the margin of clipping
        np.testing.assert_allclose(found.sums[name].double() * unit, expected, atol=ROWS * unit, rtol=0, err_msg=name)
