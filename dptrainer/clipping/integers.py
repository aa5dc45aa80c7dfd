"""Sums of integer vectors of bounded length: the clipped sum of ``exact`` noise, in which no rounding happens.

A record's gradient, scaled by its clip factor to units of the grid, is truncated towards zero, checked by integer
arithmetic (docs/exact.md) and added in int64. Factor, product and truncation only propose a vector. If it is longer
than the bound, or one of its numbers is not finite, the record counts as zero. Sums do not depend on the order of the
records, on how they are divided, nor on the device.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpbudget.grid import Grid
from dptrainer.native import Native, threads

#: Every operation is rounded by itself: a compiled sum has the integers of the plain one.
_FLAGS = ("-O3", "-std=gnu99", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
#: Numbers for each thread, and numbers that plain code looks at in one piece.
_PER_THREAD, _CHUNK = 1 << 15, 1 << 20
_LOW = 0xFFFFFFFF
#: A length that is neither a block of the code nor whole lanes.
_ODD = 1234


class _Piece(ctypes.Structure):
    """``struct piece`` of ``integers.c``."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("doubles", ctypes.c_int64),
    )


class _Kernel:
    """The functions of the compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pieces = ctypes.POINTER(_Piece)
        library.add_vector.argtypes = (
            pieces, ctypes.c_int64, ctypes.c_uint64, ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_int64, ctypes.c_int,
        )  # fmt: skip
        library.add_vector.restype = ctypes.c_int
        library.squared_norms.argtypes = (pieces, ctypes.c_int64, ctypes.c_void_p)
        library.squared_norms.restype = None
        self.add_vector: Any = library.add_vector
        self.squared_norms: Any = library.squared_norms


def _text() -> str:
    return Path(__file__).with_name("integers.c").read_text(encoding="utf-8")


def _agrees(made: _Kernel) -> bool:
    """Whether compiled and plain code add the same vectors, refuse the same ones, and see what is not finite."""
    return _same_sums(made) and _same_norms(made) and _keeps_the_bound(made)


def _same_sums(made: _Kernel) -> bool:
    grid, sizes = Grid(12, 4096**2, 1.0), (70_001, 1, 600)
    generator = torch.Generator().manual_seed(1)
    parts: list[Tensor | None] = [torch.randn(size, generator=generator) for size in sizes]
    parts[2] = torch.randn(600, generator=generator, dtype=torch.float64)
    length = math.sqrt(sum(IntegerSums(sizes, grid, None).squared_norms(parts)))
    plain, mine = IntegerSums(sizes, grid, None), IntegerSums(sizes, grid, made)
    for share in (0.999, 1.2, 0.5):  # the second is too long
        factors = [4096 * share / length] * 3
        plain.add(parts, factors)
        mine.add(parts, factors)
        if not torch.equal(plain.total, mine.total):
            return False
    for sums in (plain, mine):
        sums.add([None, parts[1], None], [0.0, 2.0, 0.0])
    return torch.equal(plain.total, mine.total) and bool(mine.total.any())


def _same_norms(made: _Kernel) -> bool:
    values = torch.arange(1.0, _ODD + 1.0, dtype=torch.float64)  # whose squares add up exactly
    for row in (values, values.float()):
        found = IntegerSums((_ODD, 3), Grid(12, 4096**2, 1.0), made).squared_norms([row, None])
        if found != [_ODD * (_ODD + 1) * (2 * _ODD + 1) / 6, 0.0]:
            return False
    return True


def _keeps_the_bound(made: _Kernel) -> bool:
    """On vectors at the bound and beyond it, long ones whose squares add up to 2^64, and such as are not finite."""
    for scale in (1.0, 2.0**25, 2.0**26):
        row, bound = torch.tensor([3.0, 4.0]) * scale, int(25 * scale * scale)
        for allowed, fits in ((bound, bound < 1 << 55), (bound - 1, False)):
            if 0 < allowed < 1 << 55:
                sums = IntegerSums((2,), Grid(12, allowed, 1.0), made)
                sums.add([row], [1.0])
                if bool(sums.total.any()) != fits:
                    return False
    apart = torch.zeros(600)
    apart[0] = apart[-1] = 60_000.0  # two blocks, whose lower halves have a carry
    not_finite = ([1.0, math.nan], [1.0, math.inf], [1e30, 1.0], [1e30] * 4, [-(2.0**32), 0.0])
    long = [(apart, 5 * 10**9), *((torch.tensor(values), 1 << 54) for values in ([2.0**27] * 1024, *not_finite))]
    for values, bound in long:
        sums = IntegerSums((len(values),), Grid(12, bound, 1.0), made)
        sums.add([values], [1.0])
        if bool(sums.total.any()):
            return False
    return True


LIBRARY = Native("exact clipping", _text, _FLAGS, _Kernel, _agrees)


class IntegerSums:
    """The sums of one step, of vectors that consist of several tensors.

    Guarantee: :attr:`total` is the sum of one integer vector for each call of :meth:`add`, each of squared length at
    most ``grid.bound`` over all tensors together, whatever the calls were given, modulo 2^64.

    Args:
        sizes: number of elements of each tensor.
        grid: of the step.
        kernel: compiled code, or None for PyTorch's operations.
        device: where the sums are.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        grid: Grid,
        kernel: _Kernel | None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < grid.bound < 1 << 55:
            raise ValueError(f"a bound of {grid.bound} is out of range")
        self._sizes, self._bound = tuple(sizes), grid.bound
        self._limit = float(math.isqrt(grid.bound))
        ends = list(accumulate(self._sizes))
        self._starts, self._size = [0, *ends[:-1]], ends[-1] if ends else 0
        self._kernel = kernel if torch.device(device).type == "cpu" else None
        self.total = torch.zeros(self._size, dtype=torch.int64, device=device)
        self._room = torch.zeros(self._size, dtype=torch.int32, device=device)
        self._pieces = (_Piece * len(self._sizes))()
        for piece, start in zip(self._pieces, self._starts, strict=True):
            piece.start = start
        self._squares = np.zeros(len(self._sizes))

    @property
    def parts(self) -> list[Tensor]:
        """The sum of each tensor, as a row: views of :attr:`total`."""
        return list(torch.split(self.total, list(self._sizes)))

    def squared_norms(self, values: Sequence[Tensor | None]) -> list[float]:
        """Squared Euclidean norm of each tensor in float64; None counts as zeros, and what is not finite shows.

        Args:
            values: contiguous, float32 or float64, of the sizes that were announced.
        """
        if self._kernel is None:
            nothing = torch.zeros((), dtype=torch.float64, device=self.total.device)
            found = [nothing if one is None else one.double().square().sum() for one in values]
            squares: list[float] = torch.stack(found).tolist()
            return squares
        self._describe(values, (0.0,) * len(values))
        self._kernel.squared_norms(self._pieces, len(values), self._squares.ctypes.data)
        squares = self._squares.tolist()
        return squares

    def add(self, values: Sequence[Tensor | None], factors: Sequence[float]) -> None:
        """Add the vector trunc(factor * values); zeros in its place where it is longer than the bound.

        Args:
            values: contiguous, float32 or float64, of the sizes that were announced; None stands for zeros.
            factors: of each tensor, from its numbers to units of the grid.
        """
        if self._kernel is None:
            self._add_plainly(values, factors)
            return
        self._describe(values, factors)
        vector = (self._bound, self._limit, self._room.data_ptr(), self.total.data_ptr(), self._size)
        self._kernel.add_vector(self._pieces, len(values), *vector, threads(self._size, _PER_THREAD))

    def _describe(self, values: Sequence[Tensor | None], factors: Sequence[float]) -> None:
        described = zip(self._pieces, self._sizes, self._starts, values, factors, strict=True)
        for piece, size, start, one, factor in described:
            if one is None:
                self._room[start : start + size].zero_()
                piece.count = 0
                continue
            _check(one, size)
            piece.values, piece.count, piece.scale = one.data_ptr(), size, factor
            piece.doubles = one.dtype == torch.float64

    def _add_plainly(self, values: Sequence[Tensor | None], factors: Sequence[float]) -> None:
        """As the compiled code, with no number of a record leaving its device."""
        inside = torch.ones((), dtype=torch.bool, device=self.total.device)
        low, high = (torch.zeros((), dtype=torch.int64, device=self.total.device) for _ in range(2))
        for size, start, one, factor in zip(self._sizes, self._starts, values, factors, strict=True):
            if one is None:
                self._room[start : start + size].zero_()
                continue
            _check(one, size)
            row, room = one.reshape(-1), self._room[start : start + size]
            for begin in range(0, size, _CHUNK):
                proposed = row[begin : begin + _CHUNK].double() * factor
                fine = proposed.abs() <= self._limit  # false for NaN
                vector = torch.where(fine, proposed, torch.zeros_like(proposed)).to(torch.int32)  # towards zero
                room[begin : begin + _CHUNK] = vector
                squared = vector.long().square()
                # In halves, so that no sum leaves 63 bits.
                low += (squared & _LOW).sum()
                high += (squared >> 32).sum() + (low >> 32)
                low &= _LOW
                inside &= fine.all()
        fits = inside & (high >> 31 == 0) & ((high << 32) + low <= self._bound)
        self.total += self._room * fits


def _check(values: Tensor, size: int) -> None:
    """What the compiled code believes of a tensor; raises ValueError where it is not so."""
    known = values.dtype in (torch.float32, torch.float64) and values.layout == torch.strided
    if not known or values.numel() != size or not values.is_contiguous():
        raise ValueError(f"no contiguous real tensor of {size} elements: {values.dtype}, {tuple(values.shape)}")


def sums_for(shapes: Mapping[str, torch.Size], grid: Grid, device: torch.device) -> IntegerSums:
    """Sums for tensors of these shapes, compiled where there is a compiler."""
    kernel = LIBRARY.get() if device.type == "cpu" else None
    return IntegerSums([shape.numel() for shape in shapes.values()], grid, kernel, device)
