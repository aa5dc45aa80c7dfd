"""NumPy's path: tiles, threads and buffers. Its values are tested beside the law and beside compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dptrainer.noise import gaussian, native
from dptrainer.noise.gaussian import add_gaussians_

KEY = bytes(range(32))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small requests do what large ones would, on benches that nobody used."""
    monkeypatch.setattr(gaussian, "BLOCKS", 4096)
    monkeypatch.setattr(gaussian, "_IDLE", [])


@pytest.mark.parametrize("share", [1, 2, 3])
def test_threads_share_tiles_and_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, share: int) -> None:
    start = [torch.linspace(-1.0, 1.0, n) for n in (200_003, 3, 40_960, 0, 81_921)]
    whole, shared = ([(tensor.clone(), i, 7 * i) for i, tensor in enumerate(start)] for _ in range(2))
    gaussian._add_by_tiles(whole, KEY, 1.3)
    monkeypatch.setattr(gaussian, "BLOCKS", 4096)
    monkeypatch.setattr(gaussian, "_IDLE", [])
    gaussian._add_by_tiles(shared, KEY, 1.3, share)
    assert all(torch.equal(mine[0], other[0]) for mine, other in zip(shared, whole, strict=True))
    assert 1 <= len(gaussian._IDLE) <= share
    assert not any(bench._bytes.any() for bench in gaussian._IDLE)


@pytest.mark.parametrize("share", [1, 2, 3])
@pytest.mark.parametrize("offset", [0, 7, 40_959])
@pytest.mark.parametrize("count", [0, 1, 40_960, 40_961, 500_000])
def test_tiles_cover_a_tensor_once_and_are_equal_shares(small_tiles: None, share: int, offset: int, count: int) -> None:
    elements = torch.arange(offset, offset + count)
    tiles = list(gaussian._tiles(elements, 3, offset, share))
    for part, stream, block, skip in tiles:
        assert stream == 3
        assert int(part[0]) == 10 * block + skip  # every part begins where its address says
        assert skip + len(part) <= 40_960
    assert torch.equal(torch.cat([elements[:0], *(tile.part for tile in tiles)]), elements)
    if len(tiles) > 1:
        assert len(tiles) % share == 0
        assert max(len(tile.part) for tile in tiles) <= count / len(tiles) + 20


def test_an_error_in_one_thread_stops_the_others_and_is_raised(
    small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def failing(out: Any, key: bytes, stream: int, block: int) -> None:
        made.append(block)
        if block:
            raise MemoryError

    monkeypatch.setattr(gaussian, "fill", failing)
    with pytest.raises(MemoryError):
        gaussian._add_by_tiles([(torch.zeros(1_000_000), 0, 0)], KEY, 1.0, 2)
    assert len(made) <= 4  # of 26 tiles


@pytest.mark.parametrize(("overlap", "expected"), [(False, 2), (True, 1)])
def test_large_requests_are_shared_by_two_threads_where_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, overlap: bool, expected: int
) -> None:
    used: list[int] = []
    monkeypatch.setattr(gaussian, "_add_by_tiles", lambda *given: used.append(given[3]) or True)
    monkeypatch.setattr(native, "kernel_for", lambda values: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    tensor = torch.zeros(gaussian.PER_NUMPY_THREAD)
    add_gaussians_([tensor, tensor if overlap else torch.zeros_like(tensor)], KEY, 1.0)
    add_gaussians_([torch.zeros(5)], KEY, 1.0)
    assert used == [expected, 1]


def test_nothing_of_the_noise_is_left_in_buffers_that_are_kept(small_tiles: None) -> None:
    gaussian._add_by_tiles([(torch.zeros(5000), 0, 0), (torch.zeros(50), 1, 0)], KEY, 1.0)
    bench = gaussian._IDLE[-1]
    assert not bench._bytes[: 64 * 512].any()  # of the rest nothing was ever written
    assert not bench._rows[:, :4].any()
    assert not bench._values[:4].any()
    assert bench._used == 0
