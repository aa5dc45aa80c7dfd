"""Rounded Gaussian noise: values against an exact judge, their law against exact probabilities, broken ones too."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special

from dptrainer.noise import bounded, rounded, rounded_native, ziv
from dptrainer.noise.gaussian import standard_gaussian
from dptrainer.noise.rounded import add_rounded_, rounded_gaussian
from tests.dptrainer.noise import exact, normality
from tests.dptrainer.noise.normality import ALPHA

Integers = NDArray[np.int64]
KEY = bytes(range(32))
END = 1 << 57


@pytest.mark.parametrize("log2_width", [0, 1, 5, 20, 30, 40])
def test_every_value_is_the_one_that_its_digits_say(log2_width: int) -> None:
    found = rounded_gaussian(KEY, 7, 500, log2_width, offset=3)
    assert found.dtype == torch.int64
    assert found.tolist() == [exact.element(KEY, 7, 3 + i, log2_width) for i in range(500)]


def test_values_that_64_digits_leave_open_are_right_too() -> None:
    for index in (890167, 1448047, 1780680):  # test_ziv.py has how they were found
        found = rounded_gaussian(KEY, 0, 9, 40, offset=index - 4)
        assert found.tolist() == [exact.element(KEY, 0, i, 40) for i in range(index - 4, index + 5)]


@pytest.mark.parametrize("log2_width", [0, 20, 40])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 2_001, 70_000])
@pytest.mark.parametrize("offset", [0, 1, 5, 8, 65_535, 65_536, 65_537])  # 65,536 values end a tile
def test_a_shard_gets_the_values_of_the_whole(log2_width: int, count: int, offset: int) -> None:
    if log2_width == 40:
        count = min(count, 2_001)
    whole = rounded_gaussian(KEY, 2, min(offset, 300) + count, log2_width, offset=max(0, offset - 300))
    assert torch.equal(rounded_gaussian(KEY, 2, count, log2_width, offset=offset), whole[min(offset, 300) :])


def test_the_last_element_of_a_stream_has_a_value_and_the_next_has_none() -> None:
    found = rounded_gaussian(KEY, 0, 3, 20, offset=END - 3)
    assert found.tolist() == [exact.element(KEY, 0, END - i, 20) for i in (3, 2, 1)]
    with pytest.raises(ValueError, match="out of range"):
        rounded_gaussian(KEY, 0, 4, 20, offset=END - 3)


def test_tensors_get_the_streams_of_their_positions() -> None:
    tensors = [torch.full(shape, 5) for shape in ((), (3,), (0,), (4, 5), (2, 3, 7))]
    add_rounded_(iter(tensors), KEY, 21)
    for position, tensor in enumerate(tensors):
        assert torch.equal(tensor.reshape(-1) - 5, rounded_gaussian(KEY, position, tensor.numel(), 21))


def test_sums_are_taken_modulo_2_to_the_64() -> None:
    start = torch.tensor([(1 << 63) - 1, -(1 << 63)] * 50)
    noise = rounded_gaussian(KEY, 0, 100, 40)
    add_rounded_([start], KEY, 40)
    wrapped = [
        (before + z + (1 << 63)) % (1 << 64) - (1 << 63)
        for before, z in zip([(1 << 63) - 1, -(1 << 63)] * 50, noise.tolist(), strict=True)
    ]
    assert start.tolist() == wrapped
    assert (start < 0).any()
    assert (start > 0).any()


@pytest.mark.parametrize("log2_width", [20, 40])
def test_tensors_with_gaps_get_the_same_noise_in_place(log2_width: int) -> None:
    base, row = torch.zeros(60, 41, dtype=torch.int64), torch.zeros(300, dtype=torch.int64)
    add_rounded_([base.t()[::2], row[::3]], KEY, log2_width)
    assert torch.equal(base.t()[::2].reshape(-1), rounded_gaussian(KEY, 0, 21 * 60, log2_width))
    assert not base.t()[1::2].any()
    assert torch.equal(row[::3], rounded_gaussian(KEY, 1, 100, log2_width))
    assert not row[1::3].any()


def test_tensors_that_share_memory_get_the_noise_of_all() -> None:
    base = torch.zeros(200, dtype=torch.int64)
    add_rounded_([base, base[50:], base[::2]], KEY, 20)
    expected = rounded_gaussian(KEY, 0, 200, 20)
    expected[50:] += rounded_gaussian(KEY, 1, 150, 20)
    expected[::2] += rounded_gaussian(KEY, 2, 100, 20)
    assert torch.equal(base, expected)


@pytest.mark.gpu
def test_a_tensor_on_another_device_gets_the_values_of_the_cpu() -> None:
    tensor = torch.full((100_003,), (1 << 63) - 1, device="cuda")
    add_rounded_([tensor, tensor[::2]], KEY, 30)
    expected = torch.full((100_003,), (1 << 63) - 1) + rounded_gaussian(KEY, 0, 100_003, 30)
    expected[::2] += rounded_gaussian(KEY, 1, 50_002, 30)
    assert torch.equal(tensor.cpu(), expected)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"tensors": [torch.zeros(2)]}, "int64, not to torch.float32"),
        ({"tensors": [torch.zeros(2, dtype=torch.int32)]}, "int64, not to torch.int32"),
        ({"tensors": [torch.zeros(2, dtype=torch.int64).to_sparse()]}, "sparse"),
        ({"tensors": [torch.zeros(1, dtype=torch.int64).expand(3)]}, "share memory"),
        ({"log2_width": -1}, "out of range"),
        ({"log2_width": 41}, "out of range"),
        ({"key": KEY[1:]}, "key of 31 bytes"),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_drawn(bad: dict[str, Any], match: str) -> None:
    good = torch.zeros(2, dtype=torch.int64)
    arguments = {"tensors": [], "key": KEY, "log2_width": 20, **bad}
    with pytest.raises(ValueError, match=match):
        add_rounded_([good, *arguments["tensors"]], arguments["key"], arguments["log2_width"])
    assert not good.any()


@pytest.mark.parametrize(
    "bad", [{"param_id": -1}, {"param_id": 1 << 32}, {"offset": -1}, {"count": -1}, {"count": END + 1}]
)
def test_an_address_that_no_stream_has_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        rounded_gaussian(KEY, **{"param_id": 0, "count": 2, "log2_width": 20, **bad})


def test_the_noise_of_floats_under_the_same_key_is_another() -> None:
    n = 100_000
    values = rounded_gaussian(KEY, 0, n, 20).double() / 2**20
    assert abs(float(values @ standard_gaussian(KEY, 0, n))) < 6 * math.sqrt(n)
    assert not np.isin(
        np.frombuffer(rounded.ziv.keystream(KEY, 0, 0, 99, layout=2), dtype="<u8"),
        np.frombuffer(rounded.ziv.keystream(KEY, 0, 0, 99), dtype="<u8"),
    ).any()


def test_what_is_done_does_not_depend_on_what_noise_is_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[int] = []
    plain = ziv.element

    def watched(key: bytes, stream: int, index: int, log2_width: int) -> int:
        settled.append(index)
        return plain(key, stream, index, log2_width)

    monkeypatch.setattr(ziv, "element", watched)
    found = []
    for start in (torch.zeros(2_000, dtype=torch.int64), torch.arange(2_000) << 52):
        settled.clear()
        add_rounded_([start], KEY, 40)
        found.append(list(settled))
    assert found[0] == found[1] != []


def test_buffers_that_are_kept_are_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded, "_IDLE", [])
    monkeypatch.setattr(rounded_native, "kernel_for", lambda values: None)
    rounded_gaussian(KEY, 0, 3_000, 20)
    bench = rounded._IDLE[-1]
    assert not any(bench.words)
    assert not bench._floats[:, :, :375].any()
    assert not bench._results[:, :375].any()


def cells(log2_width: int, reach: int) -> NDArray[np.float64]:
    """Probabilities of -reach, ..., reach and then of all others, each to full relative precision."""
    scale = 2.0**-log2_width
    k = np.arange(reach + 1)
    right = special.ndtr((0.5 - k) * scale) - special.ndtr((-0.5 - k) * scale)  # p(k) = p(-k), from the lower tail
    return np.concatenate([right[:0:-1], right, [2 * special.ndtr((-0.5 - reach) * scale)]])


def p_law(values: Integers, log2_width: int) -> float:
    """p-value of chi-squared over all cells that expect at least ten values, and one of the rest."""
    reach = int(3.5 * 2**log2_width)
    expected = cells(log2_width, reach) * len(values)
    assert expected.min() > 10
    inside = values[np.abs(values) <= reach]
    counts = np.append(np.bincount(inside + reach, minlength=2 * reach + 1), len(values) - len(inside))
    return float(special.chdtrc(len(counts) - 1, ((counts - expected) ** 2 / expected).sum()))


Generator = Callable[[int, int], Integers]  # (values, log2_width)


def shipped(count: int, log2_width: int) -> Integers:
    values: Integers = rounded_gaussian(KEY, 100 + log2_width, count, log2_width).numpy()
    return values


def reals(count: int, scale: float) -> NDArray[np.float64]:
    values: NDArray[np.float64] = scale * standard_gaussian(KEY, 0, count).numpy()
    return values


def truncated_toward_zero(count: int, log2_width: int) -> Integers:
    return reals(count, 2.0**log2_width).astype(np.int64)


def rounded_down(count: int, log2_width: int) -> Integers:
    return np.floor(reals(count, 2.0**log2_width)).astype(np.int64)


def one_percent_wide(count: int, log2_width: int) -> Integers:
    return np.rint(reals(count, 1.01 * 2.0**log2_width)).astype(np.int64)


def discrete(count: int, log2_width: int) -> Integers:
    """The discrete Gaussian of the same parameter: proportional to exp(-k^2 / 2 s^2), another law."""
    k = np.arange(-12 << log2_width, (12 << log2_width) + 1)
    weights = np.exp(-(k**2) / 2 / 4.0**log2_width)
    return np.random.default_rng(1).choice(k, count, p=weights / weights.sum())


@pytest.mark.parametrize("log2_width", [0, 1, 2, 3])
def test_a_million_values_have_the_exact_probabilities(log2_width: int) -> None:
    assert p_law(shipped(1_000_000, log2_width), log2_width) > ALPHA


@pytest.mark.parametrize(
    ("broken", "log2_width"),
    [
        (truncated_toward_zero, 0),
        (truncated_toward_zero, 3),
        (rounded_down, 3),
        (one_percent_wide, 0),
        (one_percent_wide, 3),
        (discrete, 0),
    ],
)
def test_another_law_does_not(broken: Generator, log2_width: int) -> None:
    assert p_law(broken(1_000_000, log2_width), log2_width) < 1e-9


def test_a_million_wide_values_pass_every_test_of_normality() -> None:
    assert normality.failed(normality.p_values(shipped(1_000_000, 20) / 2.0**20)) == []


def test_a_width_off_by_one_percent_does_not() -> None:
    assert "variance" in normality.failed(normality.p_values(one_percent_wide(1_000_000, 20) / 2.0**20))


@pytest.mark.parametrize("zero_digits", [10, 24, 40, 64, 100])
def test_the_tail_goes_on_without_an_end(zero_digits: int) -> None:
    # Given that U begins with so many zeros, r^2 - 2 b ln 2 is exponential with mean 2; 64 digits alone end at 9.42.
    squares, draw = [], np.random.default_rng(zero_digits)
    for _ in range(1_500):
        digits = int.from_bytes(draw.bytes(40), "little") >> zero_digits
        block = (digits & (1 << 256) - 1).to_bytes(32, "little") + draw.bytes(32)
        k, a = digits >> 256, int.from_bytes(draw.bytes(8), "little")
        squares.append(sum((ziv.decide(k, a, lambda i, b=block: b, part, 20) / 2**20) ** 2 for part in (0, 1)))
    ordered = np.sort(-np.expm1(-(np.array(squares) / 2 - zero_digits * math.log(2))))
    grid = np.arange(1_500) / 1_500
    distance = max((ordered - grid).max(), (grid + 1 / 1_500 - ordered).max())
    assert special.kolmogorov(math.sqrt(1_500) * distance) > ALPHA


def test_parameters_and_keys_get_independent_noise() -> None:
    first, second = (rounded_gaussian(KEY, stream, 100_000, 20).double() / 2**20 for stream in (0, 1))
    other = rounded_gaussian(os.urandom(32), 0, 100_000, 20).double() / 2**20
    for noise in (second, other):
        assert abs(float((first * noise).mean())) * math.sqrt(100_000) < 6


def test_widths_of_one_stream_are_roundings_of_the_same_reals() -> None:
    # Why the step key must differ where noise must: the address does not hold the width.
    narrow, broad = (rounded_gaussian(KEY, 0, 1_000, width).double() for width in (3, 30))
    assert torch.equal(narrow, torch.floor(broad / 2**27 + 0.5))


@pytest.mark.slow
def test_a_hundred_million_values_pass_down_to_the_tail() -> None:  # by the compiled path where there is one
    pieces, sample = 100, normality.Sample()
    small = np.zeros(2 * 33 + 2)
    for piece in range(pieces):
        sample.feed(rounded_gaussian(KEY, 1000 + piece, 1_000_000, 20).numpy() / 2.0**20)
        few = rounded_gaussian(KEY, 5000 + piece, 1_000_000, 3).numpy()
        small += np.bincount(np.where(np.abs(few) <= 33, few + 33, 67), minlength=68)
    assert normality.failed(sample.p_values()) == []
    cell = cells(3, 33) * pieces * 1_000_000
    assert special.chdtrc(67, ((small - cell) ** 2 / cell).sum()) > ALPHA


def test_the_arithmetic_of_numpy_is_that_of_its_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    # A wrong width in the fast path would not be seen by the slow one: the two are compared on whole requests.
    monkeypatch.setattr(rounded_native, "kernel_for", lambda values: None)
    monkeypatch.setattr(bounded, "ARTANH", (4.0 + 1e-9, *bounded.ARTANH[1:]))
    found = rounded_gaussian(KEY, 7, 500, 40)
    assert found.tolist() != [ziv.element(KEY, 7, i, 40) for i in range(500)]
