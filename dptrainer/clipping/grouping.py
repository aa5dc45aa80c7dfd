"""Several rows of a batch that count as one: the views of an example, or the examples of a user.

The gradients of the rows of one unit are added *before* the norm is taken, so that clipping bounds the unit and not the
row. Norm and sum come from the same added numbers, or the norm is taken so large that rows which cancel each other
cannot be larger in the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dpbudget.errors import InvalidParameter
from dptrainer.clipping.ghost import sizes_of
from dptrainer.clipping.per_example import Dense, Lazy, Outer, PerExample, TableRows, finite, instantiate

#: Rows of a unit up to which norms come from Gram matrices, see :class:`SumOfOuters`.
MOST_TERMS = 32


@dataclass(frozen=True)
class Grouping:
    """Which rows of a batch belong together: ``counts[u]`` consecutive rows are unit u's.

    The gradient of a unit is the sum of its rows' gradients divided by ``divisor``, a public number.

    Attributes:
        counts: rows of each unit, in order. Private for users: never log it.
        divisor: at least 1; the mean over K views has divisor K.
        padding: so many of the last units are rows that no record stands behind: they count as nothing. Private.

    Raises:
        InvalidParameter: a count is negative, the divisor below 1 or more units are padding than there are (DP009); no
            count is named.
    """

    counts: Sequence[int]
    divisor: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        if self.divisor < 1 or any(count < 0 for count in self.counts) or not 0 <= self.padding <= len(self.counts):
            raise InvalidParameter(
                "rows of a unit are counted from 0, their divisor from 1, and padding is among the units", code="DP009"
            )

    @classmethod
    def views(cls, examples: int, multiplicity: int) -> Grouping:
        """K rows for each of so many examples, and the mean over them."""
        return cls((multiplicity,) * examples, multiplicity)

    @property
    def units(self) -> int:
        """Number of units: what is clipped, sampled and counted."""
        return len(self.counts)

    @property
    def rows(self) -> int:
        """Number of rows: what the model sees."""
        return sum(self.counts)

    @property
    def even(self) -> int | None:
        """Rows of every unit, if all have equally many and at least one."""
        return self.counts[0] if self.units and self.counts[0] and len(set(self.counts)) == 1 else None

    def ranges(self) -> list[slice]:
        """The rows of each unit."""
        ends = list(accumulate(self.counts))
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]

    def owners(self, device: torch.device) -> Tensor:
        """[rows] the unit of each row."""
        counts = torch.tensor(list(self.counts), device=device)
        return torch.arange(self.units, device=device).repeat_interleave(counts, output_size=self.rows)


def grouped(part: PerExample, grouping: Grouping | None) -> PerExample:
    """The per-unit gradients that follow from per-row ones: sums over each unit's rows.

    Args:
        part: gradients of ``grouping.rows`` rows.
        grouping: None leaves them as they are.
    """
    if grouping is None or all(count == 1 for count in grouping.counts):
        return part
    if isinstance(part, TableRows):
        return part.owned_by(grouping.owners(part.device), grouping.units)
    if isinstance(part, Outer):
        return _from_outer(part, grouping)
    if isinstance(part, Dense):
        return Dense(_added(part.dense(slice(0, part.batch_size)), grouping), owned=True)
    ranges = grouping.ranges()

    def rows(chunk: slice) -> Tensor:
        # Unit by unit: at most one unit's rows are instantiated at a time.
        return torch.stack([part.dense(unit).sum(0) for unit in ranges[chunk]])

    return Lazy(grouping.units, part.shape, rows)


def _added(values: Tensor, grouping: Grouping) -> Tensor:
    """[units, ...]: sums over each unit's rows of [rows, ...], always in the same order."""
    if grouping.even is not None:
        return values.reshape(grouping.units, grouping.even, *values.shape[1:]).sum(1)
    return torch.stack([values[unit].sum(0) for unit in grouping.ranges()])


def _from_outer(part: Outer, grouping: Grouping) -> PerExample:
    """sum_k g_k a_k^T for each unit; the product of norms holds for one row only.

    By Gram matrices where these are much smaller than the parameter, else by one batched product.
    """
    grads, activations = _padded(part.grads, grouping), _padded(part.activations, grouping)
    # The public bound: how many rows the largest unit of this batch has is private, and must choose nothing.
    terms = grouping.divisor
    if terms <= MOST_TERMS and 4 * terms * sum(part.shape) <= part.shape.numel():
        return SumOfOuters(grads, activations, torch.tensor(grouping.counts, dtype=torch.float64, device=grads.device))

    def rows(chunk: slice) -> Tensor:
        return torch.bmm(grads[chunk].transpose(1, 2), activations[chunk])

    return instantiate(grouping.units, part.shape, rows, terms * sum(part.shape))


class SumOfOuters(PerExample):
    """sum_k g_k a_k^T over a few k, never instantiated. Norms by Gram matrices in float64; Bu et al. (2022).

    The sum is one product over all rows, in which the K terms of a unit round by at most (K + 2) 2^-24 S, with S =
    sum_k |g_k| |a_k| and K the unit's own number of rows: that of another unit must not move this one's norm. Where
    they cancel to less than S (K + 2) / 256, the norm is taken as that: the unit is clipped
    further than it need be, and rounding stays within 2^-16 C, which SHRINK leaves free. Orthogonal rows cancel to
    S / sqrt(K) at most, which is above that for K <= 32. A unit with a row that is
    :func:`~dptrainer.clipping.per_example.too_large` counts as not finite.

    Args:
        grads: [units, most rows, out], zeros behind the rows of smaller units.
        activations: [units, most rows, in], likewise.
        counts: [units] float64, K of each unit.
    """

    def __init__(self, grads: Tensor, activations: Tensor, counts: Tensor) -> None:
        self.grads, self.activations, self.counts = grads, activations, counts
        self.batch_size, self.shape = len(grads), torch.Size((grads.shape[2], activations.shape[2]))

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`; never too small."""
        grads, activations = self.grads.double(), self.activations.double()
        outputs, inputs = grads @ grads.transpose(1, 2), activations @ activations.transpose(1, 2)
        sizes = sizes_of(inputs.diagonal(dim1=1, dim2=2), outputs.diagonal(dim1=1, dim2=2), self.grads.dtype).sum(1)
        # maximum and not clamp: NaN stays NaN, so that a broken unit is seen.
        least = sizes * (self.counts + 2) / 256
        return torch.maximum((outputs * inputs).sum((1, 2)), least.square())

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        scaled = finite(self.grads) * weights.to(self.grads.dtype).view(-1, 1, 1)
        return scaled.flatten(0, 1).t() @ finite(self.activations).flatten(0, 1)

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        return torch.bmm(self.grads[rows].transpose(1, 2), self.activations[rows])


def _padded(values: Tensor, grouping: Grouping) -> Tensor:
    """[units, most rows, d] from [rows, d], with zeros behind the rows of smaller units."""
    if grouping.even is not None:
        return values.reshape(grouping.units, grouping.even, -1)
    places = torch.cat([torch.arange(count, device=values.device) for count in grouping.counts])
    out = values.new_zeros(grouping.units, max(grouping.counts), values.shape[1])
    out[grouping.owners(values.device), places] = values
    return out


def real_units(squared: Tensor, grouping: Grouping | None) -> Tensor:
    """The squared norms of the units that records stand behind."""
    return squared if grouping is None else squared[: grouping.units - grouping.padding]
