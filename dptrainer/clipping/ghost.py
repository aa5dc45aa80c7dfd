"""Norms without instantiated gradients, from inner products of activations and of output gradients.

Where a weight is much larger than the operands of its gradient, [B, *weight] costs more memory and time than the
Gram matrices of the T positions of each example. Goodfellow (2015); Li et al. (2022), "ghost clipping".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dptrainer.clipping.per_example import Dense, PerExample, chunks, row_squares, too_large

#: Where rounding could move the square of a norm by more than this, the gradient is instantiated.
_DOUBTFUL = 1.01


def sizes_of(activations: Tensor, grads: Tensor, dtype: torch.dtype) -> Tensor:
    """|a_t| |g_t| from their squares in float64; infinite where the activation is :func:`too_large`."""
    return (activations * grads).sqrt().masked_fill_(too_large(activations, dtype), torch.inf)


class Ghost(PerExample):
    """Gradients sum_t g_t a_t^T that are not instantiated; the norm is a bound above what the sum then holds.

    The terms of a norm may cancel, in the Gram sum and in the weighted sum. With S = sum_t |a_t| |g_t|, n the norm, u
    the rounding unit of the sum and u' that of float64, the Gram sum is within depth u' S^2 of n^2, and an example's
    part of the weighted sum within (T + 4) u S of its exact value (Higham, 2002, 3.1). Both are added to the norm.
    A norm that comes from a gradient summed in the same precision is itself off by as much, which is added again.
    T counts the positions whose term is not zero: zeros are added without rounding, and a bound that counted padding
    would follow the longest record of the batch.
    Where that makes the square more than 1.01 times as large, or an |a_t| is :func:`too_large` to be multiplied by a
    weighted gradient that may have underflowed, the gradient of that example is instantiated and its norm and its part
    of the sum come from the same numbers; nothing is ever clamped at zero.

    Args:
        batch_size: B.
        shape: of the parameter.
        norms: -> ([B] squared norms, [B, T] :func:`sizes_of`), float64, from float64 products unless ``direct``.
        total: weights [B] -> weighted sum, with finite numbers in place of those that are not.
        rows: indices of examples -> their gradients [b, *shape].
        dtype: in which the weighted sum is taken.
        depth: length of the longest inner product in the Gram matrices.
        direct: whether the norms are those of gradients that were summed in ``dtype``, like the weighted sum.
    """

    def __init__(
        self,
        batch_size: int,
        shape: torch.Size,
        norms: Callable[[], tuple[Tensor, Tensor]],
        total: Callable[[Tensor], Tensor],
        rows: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype,
        depth: int,
        direct: bool = False,
    ) -> None:
        self.batch_size, self.shape = batch_size, shape
        self._norms, self._total, self._rows = norms, total, rows
        self._dtype, self._depth, self._roundings = dtype, depth, 2 if direct else 1
        self._squares: Tensor | None = None
        self._instantiated = torch.zeros(0, dtype=torch.long)

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`; never below the square of the norm of what :meth:`weighted_sum` adds."""
        if self._squares is None:
            squares, each = self._norms()
            sizes, terms = each.sum(1), (each > 0).sum(1)
            gram = (self._depth + terms + 4) * 2.0**-53 * sizes.square()
            part = self._roundings * (terms + 4) * torch.finfo(self._dtype).eps / 2 * sizes
            bounds = ((squares + gram).sqrt() + part).square()
            # False for NaN, whose examples have weight 0 in any case.
            self._instantiated = (bounds > _DOUBTFUL * squares).nonzero().flatten()
            for chosen in self._pieces():
                bounds[chosen] = row_squares(self._rows(chosen))
            self._squares = bounds
        return self._squares

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        self.squared_norms()
        total = self._total(weights.index_fill(0, self._instantiated, 0.0))
        for chosen in self._pieces():
            total += Dense(self._rows(chosen), owned=True).weighted_sum(weights[chosen])
        return total

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        return self._rows(torch.arange(self.batch_size)[rows])

    def _pieces(self) -> list[Tensor]:
        return [self._instantiated[part] for part in chunks(len(self._instantiated), self.shape)]
