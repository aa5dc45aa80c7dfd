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
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from dptrainer.noise import boxmuller, native
from dptrainer.noise.boxmuller import BLOCK_ELEMENTS
from dptrainer.noise.chacha import fill

#: Keystream blocks at a time. Compiled, 41 thousand values (0.1 ms): what threads take from each other's work. Eager, a
#: quarter of a MiB of words and 1.3 MiB of work space: larger tiles leave the cache, smaller ones spend time in calls.
BLOCKS = 1 << 12
#: Values of one request from which compiling (a third of a second) pays within a few hundred requests.
COMPILE_FROM = 1 << 16
#: Values for each thread, a fifth of a millisecond, and the most threads.
THREAD_FROM, MOST_THREADS = 1 << 16, 16


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


def add_gaussians_(tensors: Iterable[torch.Tensor], key: bytes, std: float) -> None:
    """:func:`add_gaussian_` for every tensor, its position being its ``param_id``; the threads share all of them.

    Raises:
        ValueError: a type or range is wrong; nothing was changed.
    """
    _add([_Piece(tensor, position, 0) for position, tensor in enumerate(tensors)], key, std)


def standard_gaussian(key: bytes, param_id: int, count: int, *, offset: int = 0) -> torch.Tensor:
    """``count`` standard Gaussian values as float64, the same that :func:`add_gaussian_` adds."""
    return add_gaussian_(torch.zeros(count, dtype=torch.float64), key, param_id, 1.0, offset=offset)


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
        """One row: a view where the memory allows, else a copy that must be written back."""
        return self.tensor.detach().reshape(-1)


Tile = tuple[torch.Tensor, int, int, int]  # where noise is added, stream, first block, elements to leave out of it


def _add(pieces: Sequence[_Piece], key: bytes, std: float) -> None:
    if not 0.0 <= std < math.inf:
        raise ValueError(f"standard deviation {std!r} is out of range")
    for piece in pieces:
        piece.check()
    flats = [piece.flat() for piece in pieces]
    count = sum(flat.numel() for flat in flats)
    kernel = native.kernel(compile_now=count >= COMPILE_FROM)
    tiles = [tile for piece, flat in zip(pieces, flats, strict=True) for tile in _tiles(piece, flat, BLOCKS)]
    # NumPy's many short operations would spend their time in handing the interpreter's lock over.
    threads = min(torch.get_num_threads(), MOST_THREADS, count // THREAD_FROM) if kernel and _disjoint(flats) else 1
    _work(tiles, key, std, kernel, max(threads, 1))
    for piece, flat in zip(pieces, flats, strict=True):
        if flat.data_ptr() != piece.tensor.data_ptr():
            piece.tensor.detach().copy_(flat.view(piece.tensor.shape))


def _tiles(piece: _Piece, flat: torch.Tensor, blocks: int) -> Iterator[Tile]:
    block, skip = divmod(piece.offset, BLOCK_ELEMENTS)
    start = 0
    while start < flat.numel():
        stop = min(start + blocks * BLOCK_ELEMENTS - skip, flat.numel())
        yield flat[start:stop], piece.param_id, block, skip
        start, block, skip = stop, block + blocks, 0


def _disjoint(flats: Sequence[torch.Tensor]) -> bool:
    """Whether no two tensors share memory, so that threads may write to them."""
    ends = sorted((f.data_ptr(), f.data_ptr() + f.numel() * f.element_size()) for f in flats if f.numel())
    return all(first[1] <= second[0] for first, second in pairwise(ends))


def _work(tiles: Sequence[Tile], key: bytes, std: float, kernel: native.Kernel | None, threads: int) -> None:
    """Every tile once, by whichever thread comes first: what is added depends on addresses alone."""
    if threads == 1:
        _finish(tiles, key, std, kernel)
        return
    shared = iter(tiles)  # a list's iterator hands every item to one thread only
    others = [_helpers(os.getpid()).submit(_finish, shared, key, std, kernel) for _ in range(threads - 1)]
    try:
        _finish(shared, key, std, kernel)
    finally:
        for other in others:
            if not other.cancel():  # one that another caller's work kept from beginning has nothing left to do
                other.result()  # a failure in any thread is a failure


@cache
def _helpers(pid: int) -> ThreadPoolExecutor:
    """Threads that are kept: starting one costs as much as 20,000 values. A forked child has none of its parent's."""
    return ThreadPoolExecutor(MOST_THREADS - 1, thread_name_prefix="dptrainer-noise")


def _finish(tiles: Iterable[Tile], key: bytes, std: float, kernel: native.Kernel | None) -> None:
    with _adder(kernel) as add:
        for out, stream, block, skip in tiles:
            if out.device.type == "cpu":
                add(out, key, stream, block, skip, std)
            else:
                noise = torch.zeros(out.numel(), dtype=torch.float64)
                add(noise, key, stream, block, skip, 1.0)
                out.add_(noise.to(out.device), alpha=std)


_IDLE: list[boxmuller.Workbench] = []  # erased, so that nothing is kept but memory


@contextmanager
def _adder(kernel: native.Kernel | None) -> Iterator[Callable[[torch.Tensor, bytes, int, int, int, float], None]]:
    if kernel is not None:
        yield kernel.add
        return
    try:
        bench = _IDLE.pop()
    except IndexError:
        bench = boxmuller.Workbench(BLOCKS)

    def add(out: torch.Tensor, key: bytes, stream: int, block: int, skip: int, std: float) -> None:
        fill(bench.room(-(-(skip + out.numel()) // BLOCK_ELEMENTS)), key, stream, block)
        bench.add(out, skip, std)

    try:
        yield add
    finally:
        bench.erase()
        _IDLE.append(bench)
