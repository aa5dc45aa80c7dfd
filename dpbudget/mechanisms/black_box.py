"""A mechanism of which nothing is known but an (epsilon, delta) guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from dpbudget._record import HexFloat
from dpbudget.mechanisms._atoms import AtomicPair
from dpbudget.mechanisms.base import Adjacency, Mechanism, unproved


@dataclass(frozen=True)
class ApproximatePair(AtomicPair):
    """Four points: losses inf (mass delta), epsilon, -epsilon and -inf (Kairouz, Oh, Viswanath 2015, Theorem 3.2)."""

    epsilon: float
    delta_mass: float

    @property
    def symmetric(self) -> bool:
        """Always: reversing the four points exchanges P and Q."""
        return True

    def outcomes(self) -> Sequence[tuple[Any, Any]]:
        """(delta, 0), (1 - delta) (e^epsilon, 1) / (1 + e^epsilon) and their mirror images."""
        import mpmath

        delta = mpmath.mpf(self.delta_mass)
        small = (1 - delta) / (1 + mpmath.exp(mpmath.mpf(self.epsilon)))
        large = (1 - delta) - small
        return (delta, mpmath.mpf(0)), (large, small), (small, large), (mpmath.mpf(0), delta)

    def losses(self) -> Sequence[Any]:
        """Exactly epsilon and -epsilon; the ends are infinite."""
        import mpmath

        epsilon = mpmath.mpf(self.epsilon)
        return mpmath.inf, epsilon, -epsilon, -mpmath.inf


class BlackBox(Mechanism):
    """Any mechanism that somebody proved to be (epsilon, delta)-DP for ``adjacency``.

    Guarantee: dominated by the four-point pair (Kairouz, Oh and Viswanath 2015, Theorem 3.2: every such mechanism is a
    post-processing of it). A guarantee for add-remove or zero-out gives one for replace-one by two steps through the
    dataset without the record: (2 epsilon, (1 + e^epsilon) delta) (Dwork and Roth 2014, Theorem 2.2). Other changes of
    adjacency are refused.
    """

    kind: Literal["black-box"] = "black-box"
    epsilon: HexFloat = Field(ge=0.0, le=700.0)
    delta: HexFloat = Field(ge=0.0, le=1.0)
    adjacency: Adjacency = Adjacency.ADD_REMOVE

    def dominating_pair(self, adjacency: Adjacency) -> ApproximatePair:
        """The four points of the guarantee, or of the one that it implies when a record is replaced."""
        if adjacency is self.adjacency:
            return ApproximatePair(self.epsilon, self.delta)
        if adjacency is Adjacency.REPLACE_ONE:
            # Rounded up: 8 ulp for exp and one for each operation.
            doubled = (1.0 + math.exp(self.epsilon)) * self.delta * (1.0 + 1e-14) + (5e-324 if self.delta else 0.0)
            return ApproximatePair(2.0 * self.epsilon, min(doubled, 1.0))
        raise unproved(self, adjacency, f"the guarantee was given for {self.adjacency}; prove and give it for this one")
