"""Sums of integer vectors: whatever floating point proposes, none is longer than the bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpbudget.grid import Grid, grid_for
from dptrainer.clipping import integers
from dptrainer.clipping.integers import LIBRARY, IntegerSums

COMPILED = LIBRARY.get()
WAYS = [
    pytest.param(None, id="plain"),
    pytest.param(COMPILED, id="compiled", marks=pytest.mark.skipif(COMPILED is None, reason="no C compiler here")),
]
every_way = pytest.mark.parametrize("kernel", WAYS)
GRID = Grid(12, 4096**2, 1.0)


def length_squared(sums: IntegerSums) -> int:
    return sum(int(v) ** 2 for v in sums.total)


def summed(values: Sequence[Tensor | None], factors: Sequence[float], kernel: object, grid: Grid = GRID) -> IntegerSums:
    sums = IntegerSums([0 if one is None else one.numel() for one in values], grid, kernel)  # type: ignore[arg-type]
    sums.add(values, factors)
    return sums


@every_way
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(1, 1 << 40),
)
def test_no_values_and_no_factor_make_a_vector_longer_than_the_bound(
    kernel: object, values: list[float], factor: float, bound: int
) -> None:
    found = summed([torch.tensor(values, dtype=torch.float32)], [factor], kernel, Grid(10, bound, 1.0))
    assert length_squared(found) <= bound


@every_way
@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-60.0, 60.0), min_size=1, max_size=40), st.floats(-60.0, 60.0))
def test_a_short_vector_is_truncated_towards_zero_and_added_as_it_is(
    kernel: object, values: list[float], factor: float
) -> None:
    found = summed([torch.tensor(values, dtype=torch.float64)], [factor], kernel, Grid(10, 1 << 40, 1.0))
    assert found.total.tolist() == [math.trunc(value * factor) for value in values]


@every_way
def test_the_bound_itself_is_allowed_and_one_more_is_not(kernel: object) -> None:
    three_four = torch.tensor([3.0, 4.0])
    sums = IntegerSums([2], Grid(10, 25, 1.0), kernel)  # type: ignore[arg-type]
    sums.add([three_four], [1.0])
    sums.add([torch.tensor([3.0, 4.0, 1.0])[1:]], [4.0])
    assert sums.total.tolist() == [3, 4]
    assert summed([three_four], [1.0], kernel, Grid(10, 24, 1.0)).total.tolist() == [0, 0]


@every_way
def test_squares_that_add_up_to_zero_in_64_bits_are_seen(kernel: object) -> None:
    # 2^20 numbers of 2^27 have the squared length 2^74, which is 0 modulo 2^64.
    grid = Grid(30, 1 << 54, 1.0)
    values = torch.full((1 << 20,), 2.0**27)
    assert not summed([values], [1.0], kernel, grid).total.any()
    # and one such number alone has exactly the largest allowed length
    assert summed([values[:1]], [1.0], kernel, grid).total.tolist() == [1 << 27]


@every_way
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1e38, -1e38])
@pytest.mark.parametrize("place", [0, 511, 512, 999])
def test_a_record_with_one_number_out_of_range_contributes_exactly_zero(
    kernel: object, broken: float, place: int
) -> None:
    values = torch.ones(1000)
    sums = summed([values, torch.ones(3)], [1.0, 1.0], kernel)
    before = sums.total.clone()
    values[place] = broken
    sums.add([values, torch.ones(3)], [1.0, 1.0])
    assert torch.equal(sums.total, before)


@every_way
def test_the_length_is_that_of_all_tensors_together(kernel: object) -> None:
    grid = Grid(10, 25, 1.0)
    assert summed([torch.tensor([3.0]), torch.tensor([4.0])], [1.0, 1.0], kernel, grid).total.tolist() == [3, 4]
    assert summed([torch.tensor([3.0]), torch.tensor([4.1])], [1.0, 1.3], kernel, grid).total.tolist() == [0, 0]


@every_way
def test_what_is_missing_counts_as_zeros_whatever_was_there_before(kernel: object) -> None:
    sums = IntegerSums([3, 2], GRID, kernel)  # type: ignore[arg-type]
    sums.add([torch.ones(3), torch.ones(2)], [5.0, 7.0])
    sums.add([None, torch.ones(2)], [5.0, 7.0])
    assert [part.tolist() for part in sums.parts] == [[5, 5, 5], [14, 14]]


@every_way
def test_norms_are_those_of_float64_and_what_is_not_finite_shows(kernel: object) -> None:
    values = torch.randn(5003, generator=torch.Generator().manual_seed(0))
    big = torch.full((7,), 3e38)
    sums = IntegerSums([5003, 7, 2, 1], GRID, kernel)  # type: ignore[arg-type]
    found = sums.squared_norms([values, big, torch.tensor([1.0, math.nan]), None])
    assert found[0] == pytest.approx(float(values.double().square().sum()), rel=1e-14)
    assert found[1] == pytest.approx(7 * (float(big[0]) ** 2), rel=1e-14)
    assert math.isnan(found[2])
    assert found[3] == 0.0


@pytest.mark.skipif(COMPILED is None, reason="no C compiler here")
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_and_plain_sums_are_the_same_integers(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (100_003, 1, 40_000, 511)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain, mine = IntegerSums(sizes, GRID, None), IntegerSums(sizes, GRID, COMPILED)
        for _ in range(5):
            values = [torch.randn(size, generator=generator) for size in sizes]
            values[1] = values[1].double()
            factor = 4000.0 / math.sqrt(sum(float(v.double().square().sum()) for v in values))
            before_it = plain.total.clone()
            plain.add(values, [factor] * 4)
            mine.add(values, [factor] * 4)
            assert torch.equal(plain.total, mine.total)
            assert not torch.equal(plain.total, before_it)
    finally:
        torch.set_num_threads(before)


@every_way
def test_the_sum_does_not_depend_on_the_order_of_the_records(kernel: object) -> None:
    rows = [torch.randn(300, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    forward, backward = (IntegerSums([300], GRID, kernel) for _ in range(2))  # type: ignore[arg-type]
    for row in rows:
        forward.add([row], [100.0])
    for row in reversed(rows):
        backward.add([row], [100.0])
    assert torch.equal(forward.total, backward.total)


@every_way
@pytest.mark.parametrize(
    "values",
    [torch.ones(4), torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.int64), torch.ones(6)[::2]],
    ids=["size", "half", "integers", "strides"],
)
def test_a_tensor_that_was_not_announced_is_refused(kernel: object, values: Tensor) -> None:
    with pytest.raises(ValueError, match="no contiguous real tensor of 3 elements"):
        IntegerSums([3], GRID, kernel).add([values], [1.0])  # type: ignore[arg-type]


def test_a_bound_beyond_the_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match="out of range"):
        IntegerSums([3], Grid(40, 1 << 55, 1.0), None)


@given(st.floats(1e-3, 1e6), st.integers(1, 1 << 40))
def test_every_grid_of_a_plan_is_within_the_arithmetic(sigma: float, parameters: int) -> None:
    assert IntegerSums([1], grid_for(sigma, parameters), None).total.tolist() == [0]


# ---------------------------------------------------------------------- a compiler that gets something wrong

FAULTS = {
    "no range check": lambda text: text.replace("fabs(x) <= limit;", "1;"),
    "rounds to nearest": lambda text: text.replace("(inside ? x : 0.0)", "rint(inside ? x : 0.0)"),
    "forgets the carry": lambda text: text.replace("high += low >> 32;", ""),
    "compares with more than the bound": lambda text: text.replace("<= bound;", "<= 2 * bound;"),
    "adds what does not fit": lambda text: text.replace("int32_t mask = -fits;", "int32_t mask = -1;"),
    "leaves the end out": lambda text: text.replace("BLOCK ? count :", "BLOCK ? begin :"),
    "norms of half of it": lambda text: text.replace("part += lanes[l];", "part += lanes[l & 3];"),
}


@pytest.mark.skipif(COMPILED is None, reason="no C compiler here")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_library_that_computes_otherwise_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change: Callable[[str], str] = FAULTS[fault]
    text = integers._text()
    assert change(text) != text
    monkeypatch.setattr(LIBRARY, "_text", lambda: change(text))
    made, said = LIBRARY.build()
    assert made is None
    assert "gives other results" in said
