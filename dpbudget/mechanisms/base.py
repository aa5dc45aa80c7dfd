"""What an accountant may know of a mechanism: its dominating pair.

A mechanism is a frozen value object. It answers ``dominating_pair(adjacency)`` with a pair of distributions (P, Q)
whose hockey-stick divergences in both directions bound those of the mechanism on every pair of neighbours (Zhu, Dong
and Wang 2022, Definition 7). Accountants dispatch on the pair, never on the mechanism, so that a new mechanism is one
file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

from dpbudget._record import Record


class Adjacency(StrEnum):
    """Which datasets count as neighbours.

    ``add-remove``: one record more or less; the dataset size is private. ``zero-out``: one record's contribution is
    replaced by zero; the size is public. ``replace-one``: one record is replaced by another; the size is public.
    """

    ADD_REMOVE = "add-remove"
    ZERO_OUT = "zero-out"
    REPLACE_ONE = "replace-one"


@dataclass(frozen=True)
class SubsampledGaussianPair:
    """P = (1 - rate) N(0, sigma^2) + rate N(1, sigma^2) against Q = N(0, sigma^2).

    Both directions are meant: (P, Q) bounds removing a record, (Q, P) adding one.

    Attributes:
        rate: inclusion probability in (0, 1]; 1 is the plain Gaussian mechanism.
        sigma: noise standard deviation / sensitivity (the noise multiplier).
    """

    rate: float
    sigma: float


#: Every kind of pair an accountant may meet. A new kind is added here and to the accountants that support it.
DominatingPair = SubsampledGaussianPair


class Mechanism(Record, ABC):
    """A randomised computation as a value; subclasses carry ``kind`` and their parameters."""

    kind: str

    @abstractmethod
    def dominating_pair(self, adjacency: Adjacency) -> DominatingPair:
        """The pair of distributions that dominates this mechanism under ``adjacency``.

        Raises:
            NotComputable: no proved pair is known for this adjacency (DP062).
        """


@dataclass(frozen=True)
class Charge:
    """``count`` uses of one mechanism, count >= 0; a composition is a sequence of charges."""

    mechanism: Mechanism
    count: int
