"""Per-example gradients of one parameter, in the cheapest form that its layer allows.

Each form answers three questions: the squared norm per example, the weighted sum over examples, and the dense rows (for
parameters that are used several times, whose contributions must be added *before* the norm is taken). A form takes
its norm and its sum from the same numbers, so that cancellation in one cannot make the other larger than the clip.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dptrainer.clipping.native import kernels

#: Rows are instantiated in pieces of at most this many elements (4 MiB of float32): the cache holds them for the norm,
#: and the allocator recycles them, where each larger piece would be fetched from the system anew at a multiple of the
#: cost.
CHUNK_ELEMENTS = 1 << 20
#: Squares are summed in float32 over blocks of this many elements, and over blocks in float64.
_BLOCK = 4096
#: Rows up to this long are joined with those of other parameters, so that one operation serves them all.
_SHORT = 256
#: Rank-one gradients up to this large are instantiated to join them: starting an operation costs more than its work.
_TINY = 256
#: In float32 a product of weight and gradient that underflows is off by 2^-150, and an activation of more than this
#: would make of it more than SHRINK leaves free of a small clipping norm. In float64 no number is so large.
LARGEST_OPERAND = 2.0**89


def too_large(squares: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether vectors with these squared norms are above :data:`LARGEST_OPERAND`, for sums that are taken in a type."""
    return squares > (LARGEST_OPERAND**2 if dtype != torch.float64 else torch.inf)


def row_squares(rows: Tensor) -> Tensor:
    """[B] float64: the squared Euclidean norm of each of the B leading slices, with relative error below 2^-18."""
    flat = rows.reshape(rows.shape[0], -1) if rows.numel() else rows.new_zeros(rows.shape[0], 1)
    compiled = kernels(flat)
    if compiled is not None:
        return compiled.row_squares(flat)  # in float64
    whole = flat.shape[1] // _BLOCK * _BLOCK
    if whole == 0 or flat.shape[1] == _BLOCK:
        return _norms(flat, 1).square()
    blocks = flat[:, :whole].view(flat.shape[0], -1, _BLOCK)
    squares = _norms(blocks, 2).square().sum(1)
    if whole < flat.shape[1]:
        squares += _norms(flat[:, whole:], 1).square()
    return squares


def over_positions(grad: Tensor) -> Tensor:
    """[B, C]: the sums of [B, C, ...] over the rest."""
    rows = grad.flatten(2)
    compiled = kernels(rows)
    if compiled is None or not rows.numel():
        return rows.sum(2)
    return compiled.row_sums(rows.flatten(0, 1)).view(rows.shape[:2])


def _norms(values: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=dim)
    return norms.double()


def _double_squares(rows: Tensor) -> Tensor:
    """[B] float64 squared norms of the rows of [B, d], every square in float64."""
    compiled = kernels(rows)
    if compiled is not None:
        return compiled.row_squares(rows)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square()


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
    #: Whether the layer's input is still read when the sum is taken.
    holds_operands: bool = True

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
    """Instantiated gradients [B, *shape], in one piece or in several of consecutive examples.

    Args:
        grads: the rows.
        owned: whether nobody else holds them.
        arrange: a view of rows [b, ...] of another layout as [b, *shape].
        squares: [B] float64 squared norms, where they are known.
    """

    holds_operands = False

    def __init__(
        self,
        grads: Tensor | Sequence[Tensor],
        *,
        owned: bool = False,
        arrange: Callable[[Tensor], Tensor] | None = None,
        squares: Tensor | None = None,
    ) -> None:
        self.pieces = [grads] if isinstance(grads, Tensor) else list(grads)
        self._owned, self._arrange = owned, arrange
        self.batch_size, self.shape = sum(len(piece) for piece in self.pieces), self._arranged(self.pieces[0]).shape[1:]
        self._squares = squares

    @property
    def plain(self) -> bool:
        """Whether it is one tensor [B, *shape] as it stands."""
        return len(self.pieces) == 1 and self._arrange is None

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`."""
        if self._squares is None:
            self._squares = joined([row_squares(piece) for piece in self.pieces])
        return self._squares

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        total = self.pieces[0].new_empty(self.pieces[0].shape[1:].numel())
        factors = torch.split(weights.to(total.dtype), [len(piece) for piece in self.pieces])
        for at, (factor, piece) in enumerate(zip(factors, self.pieces, strict=True)):
            rows = piece.reshape(len(piece), -1)
            compiled = kernels(rows)
            if compiled is not None:
                compiled.weighted_sum(rows, factor, total, add=at > 0)
            else:
                total.addmv_(finite(rows, owned=self._owned).t(), factor, beta=float(at > 0))
        return self._arranged(total.view(1, *self.pieces[0].shape[1:]))[0].contiguous()

    def _arranged(self, rows: Tensor) -> Tensor:
        return rows if self._arrange is None else self._arrange(rows)

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        start, stop, _ = rows.indices(self.batch_size)
        found, first = [], 0
        for piece in self.pieces:
            inside = piece[max(start - first, 0) : max(stop - first, 0)]
            if len(inside):
                found.append(inside)
            first += len(piece)
        return self._arranged(joined(found) if found else self.pieces[0][:0])


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """The pieces one after another; no copy of a single one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


class Outer(PerExample):
    """Rank-one gradients g_i a_i^T, never instantiated: the norm is a product of norms. Goodfellow (2015).

    One whose activation is :func:`too_large` counts as not finite.
    """

    def __init__(self, grads: Tensor, activations: Tensor) -> None:
        self.grads, self.activations = grads, activations
        self.batch_size = grads.shape[0]
        self.shape = torch.Size((grads.shape[1], activations.shape[1]))

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`."""
        # In float64: a float32 square of the one may underflow where the other is huge, and the product is not small.
        activations = _double_squares(self.activations)
        squares = _double_squares(self.grads) * activations
        return squares.masked_fill_(too_large(activations, self.activations.dtype), torch.inf)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        factors = weights.to(self.grads.dtype)
        compiled = kernels(self.grads, self.activations)
        if compiled is not None:
            return compiled.scaled(self.grads, factors).t() @ compiled.scaled(self.activations, None)
        return finite(self.grads).mul_(factors.unsqueeze(1)).t() @ finite(self.activations)

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        return self.grads[rows].unsqueeze(2) * self.activations[rows].unsqueeze(1)


class Lazy(PerExample):
    """Gradients that are instantiated a few examples at a time, once for the norm and once for the sum."""

    def __init__(self, batch_size: int, shape: torch.Size, rows: Callable[[slice], Tensor]) -> None:
        self.batch_size, self.shape = batch_size, shape
        self._rows = rows

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`."""
        return torch.cat([row_squares(self._rows(rows)) for rows in chunks(self.batch_size, self.shape)])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        parts = (
            Dense(self._rows(rows), owned=True).weighted_sum(weights[rows])
            for rows in chunks(self.batch_size, self.shape)
        )
        total = next(parts)
        for part in parts:
            total += part
        return total

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        return self._rows(rows)


class TableRows(PerExample):
    """Gradients of a table [V, d] that touch few rows: one entry per (example, index), repeats already added.

    Args:
        batch_size: B.
        shape: (V, d) of the table.
        entries: ([N] example, [N] index, [N, d] values) without repeats; values are owned. With [N, 1] values the index
            counts elements of the table instead of rows.
    """

    holds_operands = False

    def __init__(self, batch_size: int, shape: torch.Size, entries: tuple[Tensor, Tensor, Tensor]) -> None:
        self.batch_size, self.shape = batch_size, shape
        self._example, self._index, self._values = entries
        self._rows = shape.numel() // self._values.shape[1]

    @classmethod
    def accumulate(cls, batch_size: int, shape: torch.Size, lookups: tuple[Tensor, Tensor], grads: Tensor) -> TableRows:
        """Adds up the gradients of equal indices within each example; never builds [B, V, d].

        Args:
            batch_size: B.
            shape: (V, d) of the table.
            lookups: ([N] example that looked up, [N] row number that it looked up).
            grads: [N, d] gradients of the looked-up rows.
        """
        example, index = lookups
        compiled = kernels(grads)
        if compiled is not None and grads.shape[1]:
            return cls(batch_size, shape, compiled.add_equal(example.contiguous(), index.contiguous().long(), grads))
        unique, inverse = torch.unique(example * shape[0] + index, return_inverse=True)
        values = grads.new_zeros(unique.shape[0], shape[1]).index_add_(0, inverse, grads)
        example = torch.div(unique, shape[0], rounding_mode="floor")
        return cls(batch_size, shape, (example, unique - example * shape[0], values))

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self._values.device

    def owned_by(self, owners: Tensor, units: int) -> TableRows:
        """The same gradients added up over the examples that belong together; ``owners`` [B] gives each one's unit."""
        table = torch.Size((self._rows, self._values.shape[1]))  # of rows, or of single elements
        added = TableRows.accumulate(units, table, (owners[self._example], self._index), self._values)
        return TableRows(units, self.shape, (added._example, added._index, added._values))

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`."""
        squares = torch.zeros(self.batch_size, dtype=torch.float64, device=self._values.device)
        compiled = kernels(self._values)
        if compiled is not None:
            compiled.add_squares(self._example.contiguous(), self._values, squares)
            return squares
        return squares.index_add_(0, self._example, row_squares(self._values))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        compiled = kernels(self._values)
        if compiled is not None:
            table = self._values.new_zeros(self._rows, self._values.shape[1])
            entries = (self._example.contiguous(), self._index.contiguous(), self._values)
            compiled.add_rows(entries, weights.to(table.dtype), table)
            return table.view(self.shape)
        per_entry = weights.to(self._values.dtype).index_select(0, self._example)
        scaled = finite(self._values, owned=True).mul_(per_entry.unsqueeze(1))
        if scaled.device.type == "cpu":  # up to four times as fast, and in the same order every time
            return scaled.new_zeros(self._rows, scaled.shape[1]).index_add_(0, self._index, scaled).view(self.shape)
        found: Tensor = torch.ops.aten.embedding_dense_backward(scaled, self._index, self._rows, -1, False)
        return found.view(self.shape)

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        start, stop, _ = rows.indices(self.batch_size)
        inside = (self._example >= start) & (self._example < stop)
        table = self._values.new_zeros(stop - start, self._rows, self._values.shape[1])
        table[self._example[inside] - start, self._index[inside]] = self._values[inside]
        return table.view(-1, *self.shape)


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


def chunks(batch_size: int, shape: torch.Size, elements: int | None = None) -> Iterator[slice]:
    """Consecutive examples with at most ``elements`` (by default :data:`CHUNK_ELEMENTS`) numbers, or single ones."""
    step = max(1, (elements or CHUNK_ELEMENTS) // max(1, shape.numel()))
    for start in range(0, batch_size, step):
        yield slice(start, min(start + step, batch_size))


def fits(shape: torch.Size, operand_elements: int) -> bool:
    """Whether rows may be kept: they are short, or not much larger than the operands that they replace.

    Args:
        shape: of the parameter.
        operand_elements: numbers of *one* example that the rows are computed from. The batch size is not asked for: it
            is private, and what it decided would show in the time that a step takes.
    """
    return shape.numel() <= max(4 * operand_elements, 1 << 14)


def instantiate(
    batch_size: int, shape: torch.Size, rows: Callable[[slice], Tensor], operand_elements: int
) -> PerExample:
    """Dense gradients where they :func:`fit <fits>`, else a chunk at a time, twice.

    Args:
        batch_size: B.
        shape: of the parameter.
        rows: some examples -> their gradients, freshly computed.
        operand_elements: numbers of one example that they are computed from.
    """
    if not fits(shape, operand_elements):
        return Lazy(batch_size, shape, rows)
    if shape.numel() <= _SHORT:
        return Dense(rows(slice(0, batch_size)), owned=True)  # whose norms wait for those of other parameters
    return kept(rows(part) for part in chunks(batch_size, shape))


def kept(pieces: Iterable[Tensor], arrange: Callable[[Tensor], Tensor] | None = None) -> Dense:
    """Rows that are just computed, with the norms of each piece taken at once, while it is in the cache."""
    found: list[Tensor] = []
    squares: list[Tensor] = []
    for piece in pieces:
        found.append(piece)
        squares.append(row_squares(piece))
    return Dense(found, owned=True, arrange=arrange, squares=joined(squares))


#: Parameters that share a form, with their shapes, in the order of its elements.
Members = list[tuple[str, torch.Size]]


def packed(per_example: Mapping[str, PerExample]) -> list[tuple[PerExample, Members]]:
    """The forms, short rows of many parameters joined into one: biases and scales cost one operation, not one each."""
    forms: list[tuple[PerExample, Members]] = []
    short: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], Members]] = {}
    for name, form in per_example.items():
        piece = None
        if isinstance(form, Dense) and form.plain and form.shape.numel() <= _SHORT:
            (piece,) = form.pieces
        elif isinstance(form, Outer) and form.shape.numel() <= _TINY:
            piece = form.dense(slice(0, form.batch_size))
        if piece is not None:
            rows, members = short.setdefault((piece.dtype, piece.device), ([], []))
            rows.append(piece.reshape(form.batch_size, -1))
            members.append((name, form.shape))
        else:
            forms.append((form, [(name, form.shape)]))
    for rows, members in short.values():
        forms.append((Dense(rows[0] if len(rows) == 1 else torch.cat(rows, 1), owned=len(rows) > 1), members))
    return forms


def unpacked(total: Tensor, members: Members) -> Iterator[tuple[str, Tensor]]:
    """The sums of the parameters that share a form; each has its own memory."""
    if len(members) == 1:
        ((name, shape),) = members
        yield name, total.view(shape)
        return
    for (name, shape), part in zip(members, torch.split(total, [s.numel() for _, s in members]), strict=True):
        yield name, part.clone().view(shape)
