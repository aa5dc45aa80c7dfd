"""The two values that travel from the clipping engine to the update: clipped sums and noisy sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dpbudget.grid import Grid


@dataclass(frozen=True, repr=False)
class ClippedSum:
    """The sum over a batch of per-example gradients, each of norm at most ``sensitivity``. Private: never log it.

    Guarantee: adding or removing one example changes the concatenation of all ``grads`` and ``statistics`` by at most
    ``sensitivity`` in the Euclidean norm (up to the rounding of the sum itself). It is a sum, never a mean: the divisor
    is the plan's declared expected batch size and is applied after the noise.

    Attributes:
        grads: parameter name -> sum, in the order of ``model.named_parameters()``, tied parameters once under their
            first name. float32, or float64 for a float64 parameter. Every trainable parameter is present.
        sensitivity: the clipping norm C.
        statistics: further sums over the same examples (quantile bits), which the same noise covers.
        unit: public factor by which the noisy sum is multiplied after the noise.
        grid: of an integer sum: all tensors are then int64, in units of the grid, and one example changes them by a
            vector of squared length at most ``grid.bound``, without any rounding.
    """

    grads: Mapping[str, Tensor] = field(repr=False)
    sensitivity: float
    statistics: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    unit: float = 1.0
    grid: Grid | None = None

    def __repr__(self) -> str:
        return f"<ClippedSum of {len(self.grads)} parameters, sensitivity {self.sensitivity!r}: hidden>"


@dataclass(frozen=True)
class NoisySum:
    """A clipped sum to which the noise of one receipt was added: safe to release, and anything may be computed from it.

    Attributes:
        grads: parameter name -> noisy sum, with the names, order, shapes and types of the clipped sum; float64 where
            that was one of integers.
        statistics: the further sums, likewise.
    """

    grads: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
