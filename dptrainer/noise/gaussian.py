"""Gaussian noise from the keystream: Box and Muller (1958) with 64 bits of radius and 32 bits of angle.

Pair p of a parameter is pair ``p % 5`` of block ``p // 5``; element e is the cosine (e even) or sine (e odd) of pair
``e // 2``. :mod:`dptrainer.noise.boxmuller` says what a pair is made of.

**Tail.** The largest radius is sqrt(2 * 64 * ln 2) = 9.42; plans charge what lies beyond it to delta
(docs/adr/0002). A 24-bit uniform, as in usual float32 generators, would end at 5.77.

**Rounding.** All arithmetic is float64, rounded once to the tensor's type; a value differs from that of the law by less
than 2^-48 radii, against 2^-24 for one float32 rounding. The angle takes 2^32 equally spaced values, symmetric about
both axes: given its radius, a pair lies on a circular grid of spacing below 1.5e-9 radii. That grid and the rounding of
sums are the floating-point effects that ``secure`` mode does not cover.

**Reproducible.** A key gives the same bits on every CPU, compiled or not, with any number of threads, in whole or in
shards. (On other devices the last sum is rounded as the device does it.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dptrainer.native import disjoint, threads
from dptrainer.noise import boxmuller, native
from dptrainer.noise.boxmuller import BLOCK_ELEMENTS
from dptrainer.noise.chacha import fill

#: Blocks at a time of noise that NumPy makes, or that goes to another device: a MiB of words and 4 MiB of work space.
#: Smaller tiles spend their time in calls, and two threads in handing the interpreter's lock to each other.
BLOCKS = 1 << 14
#: Values of one request for each further thread, compiled and in NumPy. NumPy has two at most, and only for what takes
#: longer than the milliseconds in which PyTorch's threads wait actively for more work and would compete with them.
PER_THREAD, PER_NUMPY_THREAD = 1 << 14, 1 << 20


def add_gaussian_(tensor: torch.Tensor, key: bytes, param_id: int, std: float, *, offset: int = 0) -> torch.Tensor:
    """Add ``std`` times standard Gaussian noise to ``tensor`` in place and return it.

    Element i of the flattened tensor receives element ``offset + i`` of the parameter's noise, so that a shard gets the
    same values as the whole. Product and sum are float64, each rounded once, and then rounded to the tensor's type.
    Noise is generated on the CPU and copied for tensors elsewhere.

    Args:
        tensor: float32 or float64, any shape.
        key: the step key of purpose ``grad-noise``.
        param_id: 0 <= param_id < 2^32, different for every parameter under one key.
        std: standard deviation, finite and >= 0.
        offset: index of the tensor's first element in the whole parameter.

    Raises:
        ValueError: a type or range is wrong.
    """
    _add([_Piece(tensor, param_id, offset)], key, std)
    return tensor


def add_gaussians_(tensors: Iterable[torch.Tensor], key: bytes, std: float) -> bool:
    """:func:`add_gaussian_` for every tensor, its position being its ``param_id``; the threads share all of them.

    Returns:
        Whether all values were finite before; if not, nothing of this may be released.

    Raises:
        ValueError: a type or range is wrong; nothing was changed.
    """
    return _add([_Piece(tensor, position, 0) for position, tensor in enumerate(tensors)], key, std)


def standard_gaussian(key: bytes, param_id: int, count: int, *, offset: int = 0) -> torch.Tensor:
    """``count`` standard Gaussian values as float64, the same that :func:`add_gaussian_` adds."""
    return add_gaussian_(torch.zeros(count, dtype=torch.float64, device="cpu"), key, param_id, 1.0, offset=offset)


@dataclass(frozen=True)
class _Piece:
    """A tensor and the address of its noise."""

    tensor: torch.Tensor
    param_id: int
    offset: int

    def check(self) -> None:
        if self.tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"noise is added in float32 or float64, not in {self.tensor.dtype}")
        if self.offset < 0 or not 0 <= self.param_id < 1 << 32:
            raise ValueError(f"parameter {self.param_id} or offset {self.offset} is out of range")

    def flat(self) -> torch.Tensor:
        """One row without gaps: a view where the memory allows, else a copy that must be written back."""
        return self.tensor.detach().reshape(-1).contiguous()


def _add(pieces: Sequence[_Piece], key: bytes, std: float) -> bool:
    """Adds the noise of every piece; whether all values were finite before."""
    if not 0.0 <= std < math.inf:
        raise ValueError(f"standard deviation {std!r} is out of range")
    for piece in pieces:
        piece.check()
    flats = [piece.flat() for piece in pieces]
    count = sum(flat.numel() for flat in flats)
    kernel = native.kernel_for(count)
    work = [(flat, piece.param_id, piece.offset) for piece, flat in zip(pieces, flats, strict=True)]
    if kernel is not None and all(flat.device.type == "cpu" for flat in flats):
        finite = kernel.add(work, key, std, threads(count, PER_THREAD) if disjoint(flats) else 1)
    else:
        alone = kernel is not None or any(flat.device.type != "cpu" for flat in flats) or not disjoint(flats)
        finite = _add_by_tiles(work, key, std, kernel, 1 if alone else numpy_threads(count))
    for piece, flat in zip(pieces, flats, strict=True):
        if flat.data_ptr() != piece.tensor.data_ptr():
            piece.tensor.detach().copy_(flat.view(piece.tensor.shape))
    return finite


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: both reach the extremes, and no tensor is allocated."""
    return values.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))


def numpy_threads(count: int) -> int:
    """How many threads make so many values without the kernel."""
    return min(2, threads(count, PER_NUMPY_THREAD))


class _Tile(NamedTuple):
    """As many elements of a tensor as there is room for at a time, and the address of their noise."""

    part: torch.Tensor
    stream: int
    block: int
    skip: int  # elements of the first block that are not theirs


def _add_by_tiles(
    pieces: Sequence[native.Piece], key: bytes, std: float, kernel: native.Kernel | None, share: int = 1
) -> bool:
    """Without the kernel, or for tensors elsewhere: a tile at a time, for ``share`` threads as they come.

    Returns:
        Whether all that noise was added to was finite.
    """
    tiles = deque(tile for piece in pieces for tile in _tiles(*piece, share))
    if share == 1:
        return _work_off(tiles, key, std, kernel)
    with ThreadPoolExecutor(share - 1) as others:
        try:
            helping = [others.submit(_work_off, tiles, key, std, kernel) for _ in range(share - 1)]
            return all([_work_off(tiles, key, std, kernel), *(each.result() for each in helping)])
        finally:
            tiles.clear()  # after an error, nothing more for the others


def _work_off(tiles: deque[_Tile], key: bytes, std: float, kernel: native.Kernel | None) -> bool:
    finite = True
    with _bench() as bench:
        while tiles:
            try:
                tile = tiles.popleft()
            except IndexError:  # another thread took the last one
                break
            finite &= _add_tile(bench, tile, key, std, kernel)
    return finite


def _add_tile(bench: boxmuller.Workbench, tile: _Tile, key: bytes, std: float, kernel: native.Kernel | None) -> bool:
    part, stream, block, skip = tile
    if part.device.type != "cpu":
        noise = torch.zeros(len(part), dtype=torch.float64, device="cpu")
        _add_tile(bench, _Tile(noise, stream, block, skip), key, 1.0, kernel)
        finite = all_finite(part)
        part.add_(noise.to(part.device), alpha=std)
        return finite
    if kernel is not None:
        return kernel.add([(part, stream, BLOCK_ELEMENTS * block + skip)], key, std)
    fill(bench.room(-(-(skip + len(part)) // BLOCK_ELEMENTS)), key, stream, block)
    return bench.add(part, skip, std)


def _tiles(flat: torch.Tensor, stream: int, offset: int, share: int = 1) -> Iterator[_Tile]:
    """Equal tiles of a tensor whose first element is ``offset`` in its stream: one, or as many for each thread."""
    block, skip = divmod(offset, BLOCK_ELEMENTS)
    blocks = -(-(skip + len(flat)) // BLOCK_ELEMENTS)
    number = -(-blocks // (BLOCKS * share)) * share if blocks > BLOCKS else 1
    most = -(-blocks // number)
    start = 0
    while start < len(flat):
        stop = min(start + most * BLOCK_ELEMENTS - skip, len(flat))
        yield _Tile(flat[start:stop], stream, block, skip)
        start, block, skip = stop, block + most, 0


_IDLE: list[boxmuller.Workbench] = []  # erased, so that nothing is kept but memory


@contextmanager
def _bench() -> Iterator[boxmuller.Workbench]:
    try:
        bench = _IDLE.pop()
    except IndexError:
        bench = boxmuller.Workbench(BLOCKS)
    try:
        yield bench
    finally:
        bench.erase()
        _IDLE.append(bench)
