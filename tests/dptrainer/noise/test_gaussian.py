"""Single values against arbitrary precision, addresses, shapes and refusals. The law: test_normality.py."""

from __future__ import annotations

import math
import os
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dpbudget._truncation import CAP
from dptrainer.noise import boxmuller, gaussian
from dptrainer.noise.chacha import keystream
from dptrainer.noise.gaussian import add_gaussian_, standard_gaussian
from tests.dptrainer.noise.normality import suspicions

Floats = NDArray[np.float64]
KEY = bytes(range(32))


def shipped(words: bytearray) -> Floats:
    bench = boxmuller.Workbench(len(words) // 64)
    bench.words[:] = words
    return bench.box_muller(bench.blocks).copy()


def test_a_million_values_pass_every_test_of_normality() -> None:
    assert suspicions(shipped) == []


def words_for(k: int, a: int) -> bytearray:
    block = bytearray(64)
    for pair in range(5):
        block[8 * pair : 8 * pair + 8] = k.to_bytes(8, "little")
        block[40 + 4 * pair : 44 + 4 * pair] = a.to_bytes(4, "little")
    return block


EDGE_K = [0, 1, 2, 1000, 2**32 - 1, 2**32, 2**40 + 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**63 + 1]
EDGE_K += [2**64 - 2**44, 2**64 - 2**44 - 1, 2**64 - 2**43, 2**64 - 2**20, 2**64 - 3, 2**64 - 2, 2**64 - 1]


@pytest.mark.parametrize("k", EDGE_K)
@pytest.mark.parametrize("a", [0, 1, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 1, 123456789])
def test_single_pairs_agree_with_arbitrary_precision(k: int, a: int) -> None:
    with mpmath.workdps(60):
        radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(k + 1) / 2**64))
        angle = 2 * mpmath.pi * (a + mpmath.mpf(1) / 2) / 2**32
        expected = float(radius * mpmath.cos(angle)), float(radius * mpmath.sin(angle))
        size = float(radius)
    values = shipped(words_for(k, a))
    assert np.allclose(values.reshape(5, 2), expected, rtol=0, atol=size * 2.0**-48)
    assert (np.abs(values) <= CAP * (1 + 1e-15)).all()
    assert (size == 0) == (k == 2**64 - 1)


def test_angles_cover_the_circle_symmetrically() -> None:
    quarters = [np.sign(shipped(words_for(2**63, a))[:2]).tolist() for a in (0, 2**30, 2**31, 3 * 2**30)]
    assert quarters == [[1, 1], [-1, 1], [-1, -1], [1, -1]]
    ends = [shipped(words_for(2**63, a))[1] for a in (0, 2**32 - 1)]
    assert ends[0] == pytest.approx(-ends[1], rel=1e-6)
    assert ends[0] > 0  # no value is exactly zero but at radius 0


def reference_element(key: bytes, param: int, element: int) -> float:
    pair, part = divmod(element, 2)
    block, slot = divmod(pair, 5)
    words = keystream(key, param, block, 1)
    k = int.from_bytes(words[8 * slot : 8 * slot + 8], "little")
    a = int.from_bytes(words[40 + 4 * slot : 44 + 4 * slot], "little")
    angle = 2 * math.pi * (a + 0.5) / 2**32
    return math.sqrt(-2 * math.log((k + 1) / 2**64)) * (math.sin(angle) if part else math.cos(angle))


def test_every_element_stands_where_the_layout_says() -> None:
    values = standard_gaussian(KEY, 7, 53)
    expected = [reference_element(KEY, 7, e) for e in range(53)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 4_000, 50_000])
@pytest.mark.parametrize("offset", [0, 1, 5, 10, 40_959, 40_960, 40_961])
def test_a_shard_gets_the_values_of_the_whole(count: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "BLOCKS", 4096)  # tiles of 40,960 values
    monkeypatch.setattr(gaussian, "_IDLE", [])
    whole = standard_gaussian(KEY, 2, offset + count)
    assert torch.equal(standard_gaussian(KEY, 2, count, offset=offset), whole[offset:])


def test_an_offset_beyond_the_32_bit_counter_is_reached_directly() -> None:
    offset = 10 * 2**32 - 7
    values = standard_gaussian(KEY, 1, 20, offset=offset)
    expected = [reference_element(KEY, 1, offset + e) for e in range(20)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_noise_is_added_in_float64_and_rounded_once() -> None:
    start = torch.linspace(-3, 3, 30_001)
    noisy = start.clone()
    assert add_gaussian_(noisy, KEY, 0, 0.7) is noisy
    z = standard_gaussian(KEY, 0, 30_001)
    assert torch.equal(noisy, (start.double() + 0.7 * z).float())


@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 3, 7)])
def test_every_shape_gets_noise_in_row_order(shape: tuple[int, ...]) -> None:
    tensor = add_gaussian_(torch.zeros(shape, dtype=torch.float64), KEY, 0, 1.0)
    assert torch.equal(tensor.reshape(-1), standard_gaussian(KEY, 0, tensor.numel()))


def test_a_strided_tensor_gets_the_same_noise_in_place() -> None:
    base = torch.zeros(6, 8, dtype=torch.float64)
    view = base.t()[::2]
    add_gaussian_(view, KEY, 0, 1.0)
    assert torch.equal(view.reshape(-1), standard_gaussian(KEY, 0, view.numel()))
    assert int((base != 0).sum()) == view.numel()


def test_parameters_and_keys_get_independent_noise() -> None:
    first, second = standard_gaussian(KEY, 0, 100_000), standard_gaussian(KEY, 1, 100_000)
    other = standard_gaussian(os.urandom(32), 0, 100_000)
    for noise in (second, other):
        assert abs(float((first * noise).mean())) * math.sqrt(100_000) < 6


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.int64)])
def test_a_type_that_cannot_hold_the_noise_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        add_gaussian_(tensor, KEY, 0, 1.0)


@pytest.mark.parametrize("bad", [{"std": -1.0}, {"std": math.inf}, {"std": math.nan}, {"offset": -1}])
def test_a_scale_or_offset_out_of_range_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        add_gaussian_(torch.zeros(2), KEY, 0, **{"std": 1.0, **bad})
