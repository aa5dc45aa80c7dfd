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
shards. On CUDA devices :mod:`dptrainer.noise.gpu` makes the noise from the same words: float64 tensors get the same
bits, float32 tensors values within 2^-21 radii of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dpbudget.errors import InvalidParameter
from dptrainer.native import disjoint, threads
from dptrainer.noise import boxmuller, gpu, native
from dptrainer.noise.boxmuller import BLOCK_ELEMENTS
from dptrainer.noise.chacha import fill

#: Blocks at a time of noise that NumPy makes: a MiB of words and 4 MiB of work space. Smaller tiles spend their time in
#: calls, and two threads in handing the interpreter's lock to each other.
BLOCKS = 1 << 14
#: Values of one request for each further thread, compiled and in NumPy. NumPy has two at most, and only for what takes
#: longer than the milliseconds in which PyTorch's threads wait actively for more work and would compete with them.
PER_THREAD, PER_NUMPY_THREAD = 1 << 14, 1 << 20


def add_gaussian_(
    tensor: torch.Tensor, key: bytes, param_id: int, std: float, *, offset: int = 0, generate_on_cpu: bool = False
) -> torch.Tensor:
    """Add ``std`` times standard Gaussian noise to ``tensor`` in place and return it.

    Element i of the flattened tensor receives element ``offset + i`` of the parameter's noise, so that a shard gets the
    same values as the whole. Product and sum are float64, each rounded once, and then rounded to the tensor's type (for
    float32 tensors on CUDA devices all of it is float32).

    Args:
        tensor: float32 or float64, any shape.
        key: the step key of purpose ``grad-noise``.
        param_id: 0 <= param_id < 2^32, different for every parameter under one key.
        std: standard deviation, finite and >= 0.
        offset: index of the tensor's first element in the whole parameter.
        generate_on_cpu: make the noise of a tensor elsewhere on the CPU and copy it.

    Raises:
        InvalidParameter: a type (DP019), an address (DP018) or the deviation (DP005) is out of range; a ValueError.
        PrivacyViolation: the tensor's device cannot make noise (DP016).
    """
    _add([_Piece(tensor, param_id, offset)], key, std, generate_on_cpu)
    return tensor


def add_gaussians_(tensors: Iterable[torch.Tensor], key: bytes, std: float, *, generate_on_cpu: bool = False) -> bool:
    """:func:`add_gaussian_` for every tensor, its position being its ``param_id``.

    Threads share all of them, and a GPU is asked once for each type.

    Returns:
        Whether all values were finite before; if not, nothing of this may be released.

    Raises:
        InvalidParameter: as :func:`add_gaussian_`; nothing was changed.
        PrivacyViolation: a device cannot make noise (DP016); nothing was changed.
    """
    pieces = [_Piece(tensor, position, 0) for position, tensor in enumerate(tensors)]
    return _add(pieces, key, std, generate_on_cpu)


def standard_gaussian(key: bytes, param_id: int, count: int, *, offset: int = 0) -> torch.Tensor:
    """``count`` standard Gaussian values as float64, the same that :func:`add_gaussian_` adds."""
    return add_gaussian_(torch.zeros(count, dtype=torch.float64, device="cpu"), key, param_id, 1.0, offset=offset)


@dataclass(frozen=True)
class _Piece:
    """A tensor and the address of its noise."""

    tensor: torch.Tensor = field(repr=False)  # private until the noise is in it
    param_id: int
    offset: int

    def check(self) -> None:
        if self.tensor.dtype not in (torch.float32, torch.float64):
            raise InvalidParameter(
                f"noise is added to float32 or float64, not to {self.tensor.dtype}",
                code="DP019",
                hint="add it to the sum in float32, and change the type afterwards",
            )
        end = self.offset + self.tensor.numel()
        if self.offset < 0 or end > BLOCK_ELEMENTS << 64 or not 0 <= self.param_id < 1 << 32:
            raise InvalidParameter(
                f"values {self.offset} to {end} of parameter {self.param_id} are out of range: there are 2^32 streams "
                f"of {BLOCK_ELEMENTS} * 2^64 values",
                code="DP018",
                hint="divide what is too large for one stream into several parameters",
            )

    def flat(self, *, on_cpu: bool) -> torch.Tensor:
        """One row without gaps: a view where the memory allows, else a copy that must be written back."""
        flat = self.tensor.detach().reshape(-1).contiguous()
        return flat.cpu() if on_cpu else flat

    def write_back(self, flat: torch.Tensor) -> None:
        """What was done to a copy."""
        if flat.device != self.tensor.device or flat.data_ptr() != self.tensor.data_ptr():
            self.tensor.detach().copy_(flat.view(self.tensor.shape))


def _add(pieces: Sequence[_Piece], key: bytes, std: float, generate_on_cpu: bool = False) -> bool:
    """Adds the noise of every piece; whether all values were finite before."""
    if not 0.0 <= std < math.inf:
        raise InvalidParameter(
            f"standard deviation {std!r} is out of range",
            code="DP005",
            hint="pass noise multiplier times clipping norm, finite and at least 0",
        )
    for piece in pieces:
        piece.check()
    if not generate_on_cpu:
        gpu.check(piece.tensor.device for piece in pieces)
    flats = [piece.flat(on_cpu=generate_on_cpu) for piece in pieces]
    work = [(flat, piece.param_id, piece.offset) for piece, flat in zip(pieces, flats, strict=True)]
    finite = True
    for device in dict.fromkeys(flat.device for flat in flats):
        there = [piece for piece in work if piece[0].device == device]
        finite = (_add_on_cpu if device.type == "cpu" else _add_on_gpu)(there, key, std) and finite
    for piece, flat in zip(pieces, flats, strict=True):
        piece.write_back(flat)
    return finite


def _add_on_cpu(work: Sequence[native.Piece], key: bytes, std: float) -> bool:
    flats = [flat for flat, _, _ in work]
    count = sum(flat.numel() for flat in flats)
    kernel = native.kernel_for(count)
    if kernel is not None:
        return kernel.add(work, key, std, threads(count, PER_THREAD) if disjoint(flats) else 1)
    return _add_by_tiles(work, key, std, numpy_threads(count) if disjoint(flats) else 1)


def _add_on_gpu(work: Sequence[native.Piece], key: bytes, std: float) -> bool:
    if disjoint([flat for flat, _, _ in work]):
        return gpu.add(work, key, std)
    # Programs of one launch would overwrite each other's sums where tensors share memory.
    finite = [gpu.add([piece], key, std) for piece in work]  # of every one, also after the first that is not finite
    return all(finite)


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


def _add_by_tiles(pieces: Sequence[native.Piece], key: bytes, std: float, share: int = 1) -> bool:
    """Without the compiled kernel: a tile at a time, for ``share`` threads as they come.

    Returns:
        Whether all that noise was added to was finite.
    """
    tiles = deque(tile for piece in pieces for tile in _tiles(*piece, share))
    if share == 1:
        return _work_off(tiles, key, std)
    with ThreadPoolExecutor(share - 1) as others:
        try:
            helping = [others.submit(_work_off, tiles, key, std) for _ in range(share - 1)]
            return all([_work_off(tiles, key, std), *(each.result() for each in helping)])
        finally:
            tiles.clear()  # after an error, nothing more for the others


def _work_off(tiles: deque[_Tile], key: bytes, std: float) -> bool:
    finite = True
    with _bench() as bench:
        while tiles:
            try:
                part, stream, block, skip = tiles.popleft()
            except IndexError:  # another thread took the last one
                break
            fill(bench.room(-(-(skip + len(part)) // BLOCK_ELEMENTS)), key, stream, block)
            finite &= bench.add(part, skip, std)
    return finite


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
