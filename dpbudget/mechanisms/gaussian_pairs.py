"""Dominating pairs of sampled Gaussian mechanisms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpbudget.errors import NotComputable
from dpbudget.mechanisms.base import Direction, DominatingPair, Tails

if TYPE_CHECKING:
    from dpbudget.mechanisms.base import Array


@dataclass(frozen=True)
class SubsampledGaussianPair(DominatingPair):
    """P = (1 - rate) N(0, sigma^2) + rate N(1, sigma^2) against Q = N(0, sigma^2).

    Both directions are meant: (P, Q) bounds removing a record, (Q, P) adding one.

    Attributes:
        rate: inclusion probability in (0, 1]; 1 is the plain Gaussian mechanism.
        sigma: noise standard deviation / sensitivity (the noise multiplier).
    """

    rate: float
    sigma: float

    @property
    def symmetric(self) -> bool:
        """True without sampling: the reflection x -> 1 - x exchanges P and Q."""
        return self.rate >= 1.0

    def tails(self, losses: Array, direction: Direction) -> Tails:
        """Normal tails at the output where the loss reaches the threshold."""
        raise NotComputable("no tails yet", code="DP062")


@dataclass(frozen=True)
class ReplaceOneGaussianPair(DominatingPair):
    """P = (1 - rate) N(0, sigma^2) + rate N(1, sigma^2) against Q = (1 - rate) N(0, sigma^2) + rate N(-1, sigma^2).

    Dominates the Poisson-sampled Gaussian mechanism in any dimension when one record is replaced by another, both of
    norm at most 1 (docs/accounting.md, "Replacing a record").

    Attributes:
        rate: inclusion probability in (0, 1); without sampling the pair is a plain Gaussian one with sigma / 2.
        sigma: noise standard deviation / clipping norm.
    """

    rate: float
    sigma: float

    @property
    def symmetric(self) -> bool:
        """Always: the reflection x -> -x exchanges P and Q."""
        return True

    def tails(self, losses: Array, direction: Direction) -> Tails:
        """Normal tails at the output where the loss, an odd increasing function, reaches the threshold."""
        raise NotComputable("no tails yet", code="DP062")
