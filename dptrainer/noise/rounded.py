"""Rounded Gaussian noise for sums of integers: exactly the law it names, apart from the cipher.

Every value is floor(s z + 1/2), z standard Gaussian in real arithmetic and s = 2^log2_width, so that its law is

    P(k) = Phi((k + 1/2) / s) - Phi((k - 1/2) / s)      for every integer k,

independently for all values, if the keystream's words are independent and uniform: total variation 0. It is the law of
a continuous Gaussian, rounded, not the discrete Gaussian's; an integer plus this noise is the integer plus N(0, s^2),
rounded. docs/exact-sampler.md has the proof.

A value is a function of the digits of its pair. :mod:`dptrainer.noise.bounded` (NumPy) and ``rounded.c`` compute it in
floating point with a proved bound of the error, and what they cannot be sure of (fewer than 1 in 100,000 up to width
2^28) is left to :mod:`dptrainer.noise.ziv` in integers. So the values are the same on every machine, compiled or not,
with any number of threads, in whole or in shards, by construction.

**Addresses.** Pair p of a parameter is pair ``p % 4`` of block ``p // 4``; element e is the cosine (e even) or sine
(e odd) of pair ``e // 2`` (docs/adr/0003). The time that it takes depends on the noise, never on what it is added to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from dpbudget.errors import InvalidParameter
from dptrainer.native import disjoint, threads
from dptrainer.noise import bounded, rounded_native, ziv
from dptrainer.noise.bounded import BLOCK_ELEMENTS
from dptrainer.noise.chacha import ROUNDED, fill
from dptrainer.noise.rounded_native import ELEMENTS, MOST_LOG2_WIDTH

#: Blocks at a time of noise that NumPy makes, or that goes to another device: half a MiB of words and 2.5 MiB of work
#: space. Larger tiles leave the cache, smaller ones spend their time in calls.
BLOCKS = 1 << 13
#: Values of one request for each further thread.
PER_THREAD = 1 << 14


def add_rounded_(tensors: Iterable[torch.Tensor], key: bytes, log2_width: int) -> None:
    """Add rounded Gaussian noise of width 2^log2_width to every tensor in place, modulo 2^64.

    Tensor i gets the noise of parameter i, its elements in row order. Noise is made on the CPU and copied for tensors
    elsewhere.

    Args:
        tensors: of int64, any shape.
        key: the step key of purpose ``grad-noise``.
        log2_width: logarithm of the width s in units of the integers, 0 to 40.

    Raises:
        ValueError: a type or range is wrong; nothing was changed.
    """
    _add([_Piece(tensor, position, 0) for position, tensor in enumerate(tensors)], key, log2_width)


def rounded_gaussian(key: bytes, param_id: int, count: int, log2_width: int, *, offset: int = 0) -> torch.Tensor:
    """Values ``offset`` to ``offset + count - 1`` of the noise that :func:`add_rounded_` adds to tensor ``param_id``.

    Args:
        key: the step key of purpose ``grad-noise``.
        param_id: 0 <= param_id < 2^32.
        count: number of values.
        log2_width: logarithm of the width s, 0 to 40.
        offset: index of the first value in the whole parameter; the last has an index below 2^57.

    Raises:
        ValueError: a type or range is wrong.
    """
    if not 0 <= count <= ELEMENTS:
        raise ValueError(f"{count} values are out of range")
    values = torch.zeros(count, dtype=torch.int64, device="cpu")
    _add([_Piece(values, param_id, offset)], key, log2_width)
    return values


@dataclass(frozen=True)
class _Piece:
    """A tensor and the address of its noise."""

    tensor: torch.Tensor = field(repr=False)  # private until the noise is in it
    param_id: int
    offset: int

    def check(self) -> None:
        tensor = self.tensor
        if tensor.dtype != torch.int64 or tensor.layout != torch.strided:
            raise InvalidParameter(
                f"rounded noise is added to dense int64, not to {tensor.dtype}, {tensor.layout}",
                code="DP019",
                hint="sum integers on the grid of the step, as PrivateTrainer does",
            )
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError("elements of a tensor share memory, so that each would get the noise of all")
        if self.offset < 0 or self.offset + tensor.numel() > ELEMENTS or not 0 <= self.param_id < 1 << 32:
            raise InvalidParameter(
                f"{tensor.numel()} values of parameter {self.param_id} from {self.offset} on are out of range: there "
                "are 2^32 streams of 2^57 values",
                code="DP018",
                hint="divide what is too large for one stream into several parameters",
            )

    def in_place(self) -> bool:
        """Whether noise can be added where the tensor is, without a copy."""
        return self.tensor.device.type == "cpu" and self.tensor.is_contiguous()


def _add(pieces: Sequence[_Piece], key: bytes, log2_width: int) -> None:
    """Adds the noise of every piece."""
    if len(key) != 32 or not 0 <= log2_width <= MOST_LOG2_WIDTH:
        raise ValueError(f"a key of {len(key)} bytes or width 2^{log2_width} is out of range")
    for piece in pieces:
        piece.check()
    kernel = rounded_native.kernel_for(sum(piece.tensor.numel() for piece in pieces))
    work = [(piece.tensor.view(-1), piece.param_id, piece.offset) for piece in pieces if piece.in_place()]
    _add_in_place(work, key, log2_width, kernel)
    for piece in pieces:
        if not piece.in_place():
            _add_by_copies(piece, key, log2_width, kernel)


def _add_by_copies(piece: _Piece, key: bytes, log2_width: int, kernel: rounded_native.Kernel | None) -> None:
    """For a tensor elsewhere or with gaps: a tile of noise at a time."""
    flat = piece.tensor.reshape(-1)
    for start, stop in _tiles(flat.numel(), piece.offset):
        noise = torch.zeros(stop - start, dtype=torch.int64, device="cpu")
        _add_in_place([(noise, piece.param_id, piece.offset + start)], key, log2_width, kernel)
        flat[start:stop] += noise.to(flat.device)
    if flat.data_ptr() != piece.tensor.data_ptr():  # a copy, where the strides allow no view
        piece.tensor.copy_(flat.view(piece.tensor.shape))


def _add_in_place(
    work: Sequence[rounded_native.Piece], key: bytes, log2_width: int, kernel: rounded_native.Kernel | None
) -> None:
    """Adds noise to contiguous tensors on the CPU, first what floating point is sure of and then the rest."""
    if kernel is not None:
        flats = [flat for flat, _, _ in work]
        count = sum(flat.numel() for flat in flats)
        found = kernel.add(work, key, log2_width, threads(count, PER_THREAD) if disjoint(flats) else 1)
        for piece in np.unique(found[:, 0]).tolist():
            flat, stream, offset = work[piece]
            ziv.settle(flat.numpy(), found[found[:, 0] == piece, 1], key, stream, offset, log2_width)
        found.fill(0)  # where large noise is
    else:
        with _bench() as bench:
            for flat, stream, offset in work:
                for start, stop in _tiles(flat.numel(), offset):
                    _add_tile(bench, flat[start:stop], key, stream, offset + start, log2_width)


def _add_tile(
    bench: bounded.Workbench, flat: torch.Tensor, key: bytes, stream: int, offset: int, log2_width: int
) -> None:
    """NumPy's way, for at most ``BLOCKS`` blocks."""
    out = flat.numpy()
    block, skip = divmod(offset, BLOCK_ELEMENTS)
    fill(bench.room(-(-(skip + len(out)) // BLOCK_ELEMENTS)), key, stream, block, layout=ROUNDED)
    ziv.settle(out, bench.add(out, skip, 2.0**log2_width), key, stream, offset, log2_width)


def _tiles(count: int, offset: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every tile of ``count`` elements from ``offset`` on; all but the first begin with a block."""
    start = 0
    while start < count:
        stop = min(start + BLOCKS * BLOCK_ELEMENTS - (offset + start) % BLOCK_ELEMENTS, count)
        yield start, stop
        start = stop


_IDLE: list[bounded.Workbench] = []  # erased, so that nothing is kept but memory


@contextmanager
def _bench() -> Iterator[bounded.Workbench]:
    try:
        bench = _IDLE.pop()
    except IndexError:
        bench = bounded.Workbench(BLOCKS)
    try:
        yield bench
    finally:
        bench.erase()
        _IDLE.append(bench)
