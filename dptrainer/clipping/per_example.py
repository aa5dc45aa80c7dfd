"""Per-example gradients of one parameter, in the cheapest form that its layer allows.

Each form answers three questions: the squared norm per example, the weighted sum over examples, and the dense rows (for
parameters that are used several times, whose contributions must be added *before* the norm is taken). A form takes
its norm and its sum from the same numbers, so that cancellation in one cannot make the other larger than the clip.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

#: Rows that are instantiated at a time when the whole would be larger than the operands (elements, 16 MiB of float32).
CHUNK_ELEMENTS = 1 << 22
#: Squares are summed in float32 over blocks of this many elements, and over blocks in float64.
_BLOCK = 4096


def _norms(values: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=dim)
    return norms.double()


def row_squares(rows: Tensor) -> Tensor:
    """[B] float64: the squared Euclidean norm of each of the B leading slices, with relative error below 2^-18."""
    flat = rows.reshape(rows.shape[0], -1) if rows.numel() else rows.new_zeros(rows.shape[0], 1)
    whole = flat.shape[1] // _BLOCK * _BLOCK
    if whole == 0 or flat.shape[1] == _BLOCK:
        return _norms(flat, 1).square()
    blocks = flat[:, :whole].view(flat.shape[0], -1, _BLOCK)
    squares = _norms(blocks, 2).square().sum(1)
    if whole < flat.shape[1]:
        squares += _norms(flat[:, whole:], 1).square()
    return squares


def finite(values: Tensor, *, owned: bool = False) -> Tensor:
    """``values`` with zeros in place of NaN and inf.

    Only an example of weight 0 has any: its norm is not finite. With zeros its contribution is 0 * finite = 0, where
    0 * inf would be NaN for everybody. No branch, no count: how many such examples there are is private.

    Args:
        values: rows of examples.
        owned: whether they may be overwritten, which saves a copy.
    """
    return values.nan_to_num_(0.0, 0.0, 0.0) if owned else values.nan_to_num(0.0, 0.0, 0.0)


class PerExample(ABC):
    """Per-example gradients of one parameter: B rows, each of the parameter's ``shape``."""

    batch_size: int
    shape: torch.Size

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """[B] float64 squared norms; not finite where the gradient of that example is not."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_i weights[i] * grad_i, of the parameter's shape; an example of weight 0 contributes exactly 0."""

    @abstractmethod
    def dense(self, rows: slice) -> Tensor:
        """[b, *shape]: the gradients of some examples, instantiated."""


class Dense(PerExample):
    """Instantiated gradients [B, *shape]; ``owned`` if nobody else holds them."""

    def __init__(self, grads: Tensor, *, owned: bool = False) -> None:
        self.grads, self._owned = grads, owned
        self.batch_size, self.shape = grads.shape[0], grads.shape[1:]

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`."""
        return row_squares(self.grads)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        flat = finite(self.grads, owned=self._owned).reshape(self.batch_size, -1)
        return (weights.to(flat.dtype) @ flat).view(self.shape)

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        return self.grads[rows]


class Outer(PerExample):
    """Rank-one gradients g_i a_i^T, never instantiated: the norm is a product of norms. Goodfellow (2015)."""

    def __init__(self, grads: Tensor, activations: Tensor) -> None:
        self.grads, self.activations = grads, activations
        self.batch_size = grads.shape[0]
        self.shape = torch.Size((grads.shape[1], activations.shape[1]))

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`."""
        return row_squares(self.grads) * row_squares(self.activations)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        scaled = finite(self.grads) * weights.to(self.grads.dtype).unsqueeze(1)
        return scaled.t() @ finite(self.activations)

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        return self.grads[rows].unsqueeze(2) * self.activations[rows].unsqueeze(1)


class Lazy(PerExample):
    """Gradients that are instantiated a few examples at a time, once for the norm and once for the sum."""

    def __init__(self, batch_size: int, shape: torch.Size, rows: Callable[[slice], Tensor]) -> None:
        self.batch_size, self.shape = batch_size, shape
        self._rows = rows

    def _chunks(self) -> Iterator[slice]:
        step = max(1, CHUNK_ELEMENTS // max(1, self.shape.numel()))
        for start in range(0, self.batch_size, step):
            yield slice(start, min(start + step, self.batch_size))

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`."""
        return torch.cat([row_squares(self._rows(rows)) for rows in self._chunks()])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        parts = (Dense(self._rows(rows), owned=True).weighted_sum(weights[rows]) for rows in self._chunks())
        total = next(parts)
        for part in parts:
            total += part
        return total

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        return self._rows(rows)


class TableRows(PerExample):
    """Gradients of a table [V, d] that touch few rows: one entry per (example, index), repeats already added."""

    def __init__(self, batch_size: int, shape: torch.Size, entries: tuple[Tensor, Tensor, Tensor]) -> None:
        self.batch_size, self.shape = batch_size, shape
        self._example, self._index, self._values = entries

    @classmethod
    def accumulate(cls, batch_size: int, shape: torch.Size, lookups: tuple[Tensor, Tensor], grads: Tensor) -> TableRows:
        """Adds up the gradients of equal indices within each example, by sorting; never builds [B, V, d].

        Args:
            batch_size: B.
            shape: (V, d) of the table.
            lookups: ([N] example that looked up, [N] row number that it looked up).
            grads: [N, d] gradients of the looked-up rows.
        """
        example, index = lookups
        unique, inverse = torch.unique(example * shape[0] + index, return_inverse=True)
        values = grads.new_zeros(unique.shape[0], shape[1]).index_add_(0, inverse, grads)
        return cls(batch_size, shape, (unique // shape[0], unique % shape[0], values))

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self._values.device

    def owned_by(self, owners: Tensor, units: int) -> TableRows:
        """The same gradients added up over the examples that belong together; ``owners`` [B] gives each one's unit."""
        return TableRows.accumulate(units, self.shape, (owners[self._example], self._index), self._values)

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`."""
        squares = torch.zeros(self.batch_size, dtype=torch.float64, device=self._values.device)
        return squares.index_add_(0, self._example, row_squares(self._values))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        per_entry = weights.to(self._values.dtype)[self._example]
        scaled = finite(self._values, owned=True) * per_entry.unsqueeze(1)
        return scaled.new_zeros(self.shape).index_add_(0, self._index, scaled)

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        start, stop, _ = rows.indices(self.batch_size)
        inside = (self._example >= start) & (self._example < stop)
        table = self._values.new_zeros(stop - start, *self.shape)
        table[self._example[inside] - start, self._index[inside]] = self._values[inside]
        return table


def summed(contributions: Sequence[PerExample]) -> PerExample:
    """The gradients of a parameter that was used once or several times (tied, or a module called again).

    Several contributions are instantiated and added before any norm is taken: the norm of a sum has cross terms.
    """
    if len(contributions) == 1:
        return contributions[0]
    first = contributions[0]

    def rows(chunk: slice) -> Tensor:
        total = first.dense(chunk).clone()
        for other in contributions[1:]:
            total += other.dense(chunk)
        return total

    return Lazy(first.batch_size, first.shape, rows)


def instantiate(
    batch_size: int, shape: torch.Size, rows: Callable[[slice], Tensor], operand_elements: int
) -> PerExample:
    """Dense gradients where they take little memory or at most twice that of their operands, else a chunk at a time."""
    if batch_size * shape.numel() <= max(2 * operand_elements, CHUNK_ELEMENTS):
        return Dense(rows(slice(0, batch_size)), owned=True)
    return Lazy(batch_size, shape, rows)
