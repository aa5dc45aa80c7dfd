"""Per-example gradients that are sums over time of rank-one products, kept as operands until all calls are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dptrainer.clipping.per_example import Outer, PerExample, instantiate


class Products(PerExample):
    """sum_t g_it a_it^T for a weight [o, d].

    A cell that is called at every time step contributes as often. The norm of the sum has cross terms, so the calls
    are put one after another in time, which is one batched product instead of as many dense gradients.

    Args:
        grads: [B, T, o] gradients of what the weight produced.
        activations: [B, T, d] what it was applied to.
    """

    def __init__(self, grads: Tensor, activations: Tensor) -> None:
        self.grads, self.activations = grads, activations
        self.batch_size = grads.shape[0]
        self.shape = torch.Size((grads.shape[2], activations.shape[2]))

    @classmethod
    def joined(cls, parts: Sequence[Products]) -> Products:
        """Several calls as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([p.grads for p in parts], 1), torch.cat([p.activations for p in parts], 1))

    def settled(self) -> PerExample:
        """The form in which norms and sums are taken."""
        if self.grads.shape[1] == 1:
            return Outer(self.grads[:, 0], self.activations[:, 0])
        operands = self.grads.shape[1:].numel() + self.activations.shape[1:].numel()
        return instantiate(self.batch_size, self.shape, self.dense, operands)

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`."""
        return self.settled().squared_norms()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        return self.settled().weighted_sum(weights)

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        return torch.bmm(self.grads[rows].transpose(1, 2), self.activations[rows])


class Stacked(PerExample):
    """Gradients of a weight whose rows, cut into blocks, were used by different products."""

    def __init__(self, blocks: Sequence[PerExample]) -> None:
        self.blocks = blocks
        self.batch_size = blocks[0].batch_size
        self.shape = torch.Size((sum(block.shape[0] for block in blocks), *blocks[0].shape[1:]))

    def squared_norms(self) -> Tensor:
        """See :class:`PerExample`."""
        return torch.stack([block.squared_norms() for block in self.blocks]).sum(0)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`PerExample`."""
        return torch.cat([block.weighted_sum(weights) for block in self.blocks])

    def dense(self, rows: slice) -> Tensor:
        """See :class:`PerExample`."""
        return torch.cat([block.dense(rows) for block in self.blocks], 1)


def settled(parts: Sequence[PerExample]) -> list[PerExample]:
    """The contributions to one parameter, those that are products joined into one."""
    products = [part for part in parts if isinstance(part, Products)]
    if not products:
        return list(parts)
    return [Products.joined(products).settled(), *(part for part in parts if not isinstance(part, Products))]
