"""Mechanisms that are given by their pair: two finite distributions, or a pair object of the user's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from dpbudget._record import HexFloat
from dpbudget.mechanisms._atoms import AtomicPair
from dpbudget.mechanisms.base import Adjacency, DominatingPair, Mechanism, unproved

_MOST = 4096
_HINT = "state the adjacency for which the pair was proved"


@dataclass(frozen=True)
class FinitePair(AtomicPair):
    """P and Q on the outcomes 0, 1, ...; the floats are exact weights, divided by their exact sum."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    def outcomes(self) -> Sequence[tuple[Any, Any]]:
        """The normalised weights."""
        import mpmath

        p, q = [mpmath.mpf(x) for x in self.first], [mpmath.mpf(x) for x in self.second]
        total_p, total_q = mpmath.fsum(p), mpmath.fsum(q)
        return [(a / total_p, b / total_q) for a, b in zip(p, q, strict=True)]


class FinitePairOf(Mechanism):
    """A mechanism that the user proved to be dominated by two distributions on a finite set.

    Guarantee: that of the user's proof, for the adjacencies named and no others. Sums must be 1 to 1e-9; weights are
    divided by them exactly, so that rounded probabilities are no mistake.
    """

    kind: Literal["finite-pair"] = "finite-pair"
    first: tuple[HexFloat, ...] = Field(min_length=1, max_length=_MOST)
    second: tuple[HexFloat, ...] = Field(min_length=1, max_length=_MOST)
    adjacencies: tuple[Adjacency, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _are_distributions(self) -> FinitePairOf:
        if len(self.first) != len(self.second):
            raise ValueError(f"first has {len(self.first)} outcomes, second {len(self.second)}")
        for name, weights in (("first", self.first), ("second", self.second)):
            if min(weights) < 0.0 or abs(math.fsum(weights) - 1.0) > 1e-9:
                raise ValueError(f"{name} must be probabilities >= 0 with sum 1, got the sum {math.fsum(weights)!r}")
        return self

    def dominating_pair(self, adjacency: Adjacency) -> FinitePair:
        """The given distributions; an adjacency that was not named is refused (DP062)."""
        if adjacency not in self.adjacencies:
            raise unproved(self, adjacency, _HINT)
        return FinitePair(self.first, self.second)


class PairOf(Mechanism):
    """A mechanism that the user proved to be dominated by ``pair``, a hashable :class:`DominatingPair` of any class.

    Guarantee: that of the user's proof, for the adjacencies named and no others. It has no canonical bytes, so it can
    be counted but not written into a ledger.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: Literal["pair"] = "pair"
    pair: DominatingPair
    adjacencies: tuple[Adjacency, ...] = Field(min_length=1)

    def encode(self) -> bytes:
        """Refused: a pair of the user's own has no canonical bytes."""
        raise TypeError(f"{type(self.pair).__name__} has no canonical bytes; use FinitePairOf for what is written down")

    def dominating_pair(self, adjacency: Adjacency) -> DominatingPair:
        """The given pair; an adjacency that was not named is refused (DP062)."""
        if adjacency not in self.adjacencies:
            raise unproved(self, adjacency, _HINT)
        return self.pair
