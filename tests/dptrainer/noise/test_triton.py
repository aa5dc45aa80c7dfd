"""The kernels for GPUs, run by Triton's interpreter: words of RFC 8439 bit for bit, values of the CPU, one flag."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from dptrainer.noise import gpu
from dptrainer.noise.chacha import FORMAT, keystream
from dptrainer.noise.gaussian import add_gaussian_
from tests.dptrainer.noise import interpreted
from tests.dptrainer.noise.interpreted import PROGRAM, TILE, Array
from tests.dptrainer.noise.normality import suspicions
from tests.dptrainer.noise.test_chacha import VECTORS
from tests.dptrainer.noise.test_gaussian import EDGE_K, shipped, words_for

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
KEY = bytes(range(32))
#: What the places of every size leave out by default: the type and the offset meet in different code.
MORE_PLACES = [("float64", 0), ("float32", 3), ("float64", 10 * 2**32 - 19)]


@pytest.fixture(scope="module")
def triton() -> Iterator[Callable[..., Any]]:
    """Calls a function of ``interpreted`` in the process whose Triton interprets."""
    with interpreted.start() as process:
        assert process.submit(interpreted.triton_is_loaded_and_interprets).result()
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def on_cpu(start: Array, std: float, stream: int = 0, offset: int = 0) -> Array:
    """What the CPU makes of ``start``."""
    tensor = torch.from_numpy(start.copy())
    return add_gaussian_(tensor, KEY, stream, std, offset=offset).numpy()


def assert_noisy(found: Array, start: Array, std: float, stream: int = 0, offset: int = 0) -> None:
    """float64 to the bit; float32 to the bound that is documented for the values, and one rounding of the sum."""
    assert found.dtype == start.dtype
    assert gpu.close(torch.from_numpy(found), torch.from_numpy(start), stream, offset, KEY, std)
    if start.dtype == np.float64:
        assert np.array_equal(found, on_cpu(start, std, stream, offset))


def start_of(count: int, dtype: str) -> Array:
    return np.linspace(-2.0, 2.0, count, dtype=dtype)


# ---------------------------------------------------------------------------- words


@pytest.mark.parametrize(("key", "counter", "nonce", "block"), VECTORS)
def test_the_kernel_makes_the_blocks_of_rfc_8439(
    triton: Callable[..., Any], key: str, counter: int, nonce: str, block: str
) -> None:
    stream, high, last = struct.unpack("<III", bytes.fromhex(nonce))
    found = triton(interpreted.words, bytes.fromhex(key), stream, high << 32 | counter, 1, last)
    assert found.hex() == block


@pytest.mark.parametrize("first", [0, 1, 2**31 - 5, 2**31, 2**32 - 9, 2**32 - 1, 2**32, 2**63 - 3, 2**64 - 16])
@pytest.mark.parametrize("stream", [0, 1, 2**31, 2**32 - 1])
def test_the_words_are_those_of_openssl_where_counters_change_sign_or_wrap(
    triton: Callable[..., Any], first: int, stream: int
) -> None:
    assert triton(interpreted.words, KEY, stream, first, 16, FORMAT) == bytes(keystream(KEY, stream, first, 16))


def test_words_of_the_key_may_have_any_sign(triton: Callable[..., Any]) -> None:
    for key in (b"\xff" * 32, bytes(range(255, 223, -1)), bytes(range(112, 144))):
        assert triton(interpreted.words, key, 3, 5, 1, FORMAT) == bytes(keystream(key, 3, 5, 1))


# ---------------------------------------------------------------------------- values


def test_values_in_float64_have_the_bits_of_the_cpu_on_ordinary_and_extreme_words(triton: Callable[..., Any]) -> None:
    blocks = 20_000
    words = np.frombuffer(keystream(KEY, 9, 0, blocks), dtype="<u8").reshape(blocks, 8).copy()
    for row in range(0, blocks, 2):
        words[row, :5] >>= np.uint64(row // 2 % 64)
        if row % 4:
            words[row, :5] ^= np.uint64(2**64 - 1)
    found = triton(interpreted.values, words.tobytes(), "float64")
    assert np.array_equal(found, shipped(bytearray(words.tobytes())))


def test_values_in_float32_differ_from_float64_by_four_roundings_of_the_radius(triton: Callable[..., Any]) -> None:
    blocks = 100_000
    words = np.frombuffer(keystream(KEY, 9, 0, blocks), dtype="<u8").reshape(blocks, 8).copy()
    for row in range(0, blocks, 4):  # a quarter each: small k, large k
        words[row, :5] >>= np.uint64(row // 4 % 64)
        words[row + 1, :5] = ~(words[row + 1, :5] >> np.uint64(row // 4 % 64))
    found = triton(interpreted.values, words.tobytes(), "float32").astype(np.float64)
    exact = shipped(bytearray(words.tobytes()))
    radius = np.repeat(np.hypot(exact[::2], exact[1::2]), 2)
    assert (np.abs(found - exact) <= 4 * 2.0**-24 * radius).all()
    assert abs(float(((found - exact) / np.maximum(radius, 1e-30)).mean())) < 2.0**-28  # and leans to no side


@pytest.mark.parametrize("k", EDGE_K)
def test_single_pairs_in_float32_agree_with_arbitrary_precision(triton: Callable[..., Any], k: int) -> None:
    angles = [0, 1, 2**29 - 1, 2**29, 2**30 - 1, 2**30, 3 * 2**29, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 1, 123456789]
    words = b"".join(bytes(words_for(k, a)) for a in angles)
    found = triton(interpreted.values, words, "float32").astype(np.float64).reshape(-1, 5, 2)
    for a, pairs in zip(angles, found, strict=True):
        with mpmath.workdps(60):
            radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(k + 1) / 2**64))
            angle = 2 * mpmath.pi * (a + mpmath.mpf(1) / 2) / 2**32
            expected = float(radius * mpmath.cos(angle)), float(radius * mpmath.sin(angle))
        assert np.allclose(pairs, expected, rtol=0, atol=float(radius) * 2.0**-21)
        # Small sines and cosines keep their own relative precision, not only that of the radius.
        assert np.allclose(pairs, expected, rtol=2.0**-20, atol=0)


def test_values_in_float32_pass_every_test_of_normality_down_to_the_tail(triton: Callable[..., Any]) -> None:
    assert suspicions(lambda words: triton(interpreted.values, bytes(words), "float32").astype(np.float64)) == []


# ---------------------------------------------------------------------------- sums


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        ("float32", 0),
        ("float64", 3),
        ("float32", 10 * 2**32 - 19),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_PLACES),
    ],
)
def test_noise_is_added_in_place_at_every_size_and_odd_offset(
    triton: Callable[..., Any], dtype: str, offset: int
) -> None:
    sizes = [1, 7, 9, 11, TILE - 3, TILE, PROGRAM - 2, PROGRAM + 1]
    starts = [start_of(size, dtype) for size in sizes]
    sums = triton(interpreted.add, starts, KEY, 0.37, [(3 + i, offset) for i in range(len(sizes))])
    assert sums.finite
    for i, (found, start) in enumerate(zip(sums.tensors, starts, strict=True)):
        assert_noisy(found, start, 0.37, 3 + i, offset)


@pytest.mark.parametrize("edge", [10 * 2**31, 10 * 2**32, 10 * 2**63, 10 * 2**64 - 400])
def test_places_beyond_32_bits_are_reached_directly(triton: Callable[..., Any], edge: int) -> None:
    start = start_of(397, "float64")
    found = triton(interpreted.add, [start], KEY, 1.0, [(1, edge - 193)]).tensors[0]
    assert_noisy(found, start, 1.0, 1, edge - 193)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shards_get_the_values_of_the_whole(triton: Callable[..., Any], dtype: str) -> None:
    start = start_of(3 * TILE + 77, dtype)
    whole = triton(interpreted.add, [start], KEY, 1.5, [(2, 40)]).tensors[0]
    cuts = [0, 1, 8, TILE - 3, 2 * TILE + 5, len(start)]
    places = [(2, 40 + cut) for cut in cuts[:-1]]
    shards = triton(interpreted.add, [start[a:b] for a, b in pairwise(cuts)], KEY, 1.5, places)
    assert np.array_equal(np.concatenate(shards.tensors), whole)


def test_many_tensors_of_two_types_take_two_launches_and_get_their_own_noise(triton: Callable[..., Any]) -> None:
    sizes = [1, 17, 0, PROGRAM + 5, 2, *range(1, 9), 0, TILE]
    starts = [start_of(size, "float64" if i % 5 == 1 else "float32") for i, size in enumerate(sizes)]
    sums = triton(interpreted.add, starts, KEY, 0.8, [(i, 0) for i in range(len(sizes))])
    assert sums.finite
    assert sums.launches == 2
    for i, (found, start) in enumerate(zip(sums.tensors, starts, strict=True)):
        assert_noisy(found, start, 0.8, i)


def test_an_element_beyond_the_range_of_32_bits_gets_its_own_value(triton: Callable[..., Any]) -> None:
    element = -(-(2**31 + 5) // PROGRAM) * PROGRAM
    for dtype in ("float32", "float64"):
        start = start_of(TILE + 9, dtype)
        assert_noisy(triton(interpreted.add_beyond, start, element, KEY), start, 1.0, 0, element)


def test_the_scale_is_that_of_the_plan_or_rounded_up(triton: Callable[..., Any]) -> None:
    zero = np.zeros(500, dtype=np.float32)
    for std in (0.0, 1e-3, 1.0, 1 / 3, 123.456):
        found = triton(interpreted.add, [zero], KEY, std, [(0, 0)]).tensors[0]
        assert_noisy(found, zero, std)
        assert bool(found.any()) == (std > 0)
        assert float(np.float32(gpu._at_least_in_float32(std))) == gpu._at_least_in_float32(std) >= std


@pytest.mark.parametrize("std", [1e-35, 2.0**-101, 2.0**101, 1e34])
def test_a_scale_that_float32_cannot_carry_is_applied_in_float64(triton: Callable[..., Any], std: float) -> None:
    start = start_of(400, "float32")
    found = triton(interpreted.add, [start], KEY, std, [(0, 0)]).tensors[0]
    assert np.array_equal(found, on_cpu(start, std))


# ---------------------------------------------------------------------------- the flag


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_number_that_is_not_finite_is_seen(triton: Callable[..., Any], dtype: str) -> None:
    largest = float(np.finfo(dtype).max) / 2
    starts = [np.full(3, -1e38, dtype=dtype), np.full(TILE + 3, largest, dtype=dtype)]
    places = [(i, 7) for i in range(2)]
    assert triton(interpreted.add, starts, KEY, 1.0, places).finite
    for tensor, element, bad in (
        (0, 0, math.nan),
        (1, TILE - 8, math.inf),
        (1, TILE - 7, math.nan),
        (1, -1, -math.inf),
    ):
        kept, starts[tensor][element] = starts[tensor][element], bad
        assert not triton(interpreted.add, starts, KEY, 1.0, places).finite
        starts[tensor][element] = kept


def test_nothing_beside_a_tensor_is_read_or_written(triton: Callable[..., Any]) -> None:
    whole = np.full(2 * TILE + 50, math.nan)
    whole[17 : TILE + 30] = 1.0
    sums = triton(interpreted.add_to_middle, whole, 17, TILE + 30, KEY)
    assert sums.finite
    assert np.isnan(sums.tensors[0][:17]).all()
    assert np.isnan(sums.tensors[0][TILE + 30 :]).all()
    assert_noisy(sums.tensors[0][17 : TILE + 30], whole[17 : TILE + 30], 1.0, 0, 3)


# ---------------------------------------------------------------------------- trust


def test_the_shipped_kernels_pass_the_test_that_precedes_their_use(triton: Callable[..., Any], tmp_path: Path) -> None:
    assert triton(interpreted.agrees, None, str(tmp_path))


#: Beside one each of the words, the values, the places, the flag and the table.
MORE_CHANGES = [
    "(b << 7) | (b >> 25) -> (b << 8) | (b >> 24)",
    "stream, 1, k0 -> stream, 2, k0",
    "(959 - e) << 52 -> (960 - e) << 52",
    "0.3335594732643263 -> 0.3345594732643263",
    "odd, s, c) -> odd, c, s)",
    "tl.minimum(count - place, 10 * BLOCKS) -> tl.minimum(count - place - 1, 10 * BLOCKS)",
    "tl.rsqrt(tl.maximum(y, 1e-30)) -> tl.rsqrt(tl.maximum(y, 1e-30)) * 1.001",
]


@pytest.mark.parametrize(
    "change",
    [
        "range(10) -> range(9)",
        "s14 = (block >> 32) -> s14 = (block >> 33)",
        "twice * cos2x -> sin2x * cos2x",
        "(start + tile) * BLOCKS -> tile * BLOCKS",
        "tl.fma(x, 0.0, seen) -> seen",
        "<= program -> < program",
        *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_CHANGES),
    ],
)
def test_kernels_with_other_results_are_not_used(triton: Callable[..., Any], change: str, tmp_path: Path) -> None:
    before, after = change.split(" -> ")
    assert not triton(interpreted.agrees, (before, after), str(tmp_path))
