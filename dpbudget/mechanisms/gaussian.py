"""The Gaussian mechanism."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dpbudget._record import HexFloat
from dpbudget.mechanisms.base import Adjacency, Mechanism
from dpbudget.mechanisms.gaussian_pairs import SubsampledGaussianPair

#: Range of noise multipliers that plans and ledgers accept.
MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER = 1e-3, 1e6


class Gaussian(Mechanism):
    """Adds N(0, (noise_multiplier * C)^2) to every coordinate of a sum whose records have L2 norm at most C.

    Guarantee: dominated by N(1, sigma^2) against N(0, sigma^2) under add-remove and zero-out adjacency, sigma being the
    noise multiplier (Balle and Wang 2018, Theorem 8). Replacing a record moves the sum by up to 2 C, hence sigma / 2.
    """

    kind: Literal["gaussian"] = "gaussian"
    noise_multiplier: HexFloat = Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)

    def dominating_pair(self, adjacency: Adjacency) -> SubsampledGaussianPair:
        """N(1, s^2) against N(0, s^2), with s = sigma, or sigma / 2 where a record is replaced."""
        halved = adjacency is Adjacency.REPLACE_ONE
        return SubsampledGaussianPair(rate=1.0, sigma=self.noise_multiplier / (2.0 if halved else 1.0))
