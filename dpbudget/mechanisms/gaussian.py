"""The Gaussian mechanism."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dpbudget._record import HexFloat
from dpbudget.errors import NotComputable
from dpbudget.mechanisms.base import Adjacency, Mechanism, SubsampledGaussianPair

#: Range of noise multipliers that plans and ledgers accept.
MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER = 1e-3, 1e6


class Gaussian(Mechanism):
    """Adds N(0, (noise_multiplier * C)^2) to every coordinate of a sum whose records have L2 norm at most C.

    Guarantee: dominated by N(1, sigma^2) against N(0, sigma^2) under add-remove and zero-out adjacency, sigma being the
    noise multiplier (Balle and Wang 2018, Theorem 8).
    """

    kind: Literal["gaussian"] = "gaussian"
    noise_multiplier: HexFloat = Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)

    def dominating_pair(self, adjacency: Adjacency) -> SubsampledGaussianPair:
        """N(1, sigma^2) against N(0, sigma^2); raises NotComputable (DP062) for replace-one, which is not built yet."""
        if adjacency is Adjacency.REPLACE_ONE:
            raise NotComputable(
                "no dominating pair for the Gaussian mechanism under replace-one adjacency in this version",
                code="DP062",
                hint="use add-remove or zero-out adjacency",
            )
        return SubsampledGaussianPair(rate=1.0, sigma=self.noise_multiplier)
