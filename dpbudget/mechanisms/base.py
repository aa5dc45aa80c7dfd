"""What an accountant may know of a mechanism: its dominating pair.

A mechanism is a frozen value object. It answers ``dominating_pair(adjacency)`` with a pair of distributions (P, Q)
whose hockey-stick divergences in both directions bound those of the mechanism on every pair of neighbours (Zhu, Dong
and Wang 2022, Definition 7). Accountants dispatch on the pair, never on the mechanism, so that a new mechanism is one
file: the pair's :meth:`DominatingPair.tails` is all that the ``pld`` and ``rdp`` accountants ask for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from dpbudget._record import Record
from dpbudget.errors import NotComputable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

#: "remove" is the divergence of P from Q, "add" that of Q from P.
Direction = Literal["remove", "add"]


class Adjacency(StrEnum):
    """Which datasets count as neighbours.

    ``add-remove``: one record more or less; the dataset size is private. ``zero-out``: one record's contribution is
    replaced by zero; the size is public. ``replace-one``: one record is replaced by another; the size is public.
    """

    ADD_REMOVE = "add-remove"
    ZERO_OUT = "zero-out"
    REPLACE_ONE = "replace-one"


@dataclass(frozen=True)
class Tails:
    """Certified bounds of the two laws of a privacy loss L = log dF/dS at thresholds t; all arrays have t's shape [N].

    F is the first distribution of the direction and S the second: (P, Q) for "remove", (Q, P) for "add".

    Attributes:
        first_lower, first_upper: bounds of F(L > t), atoms at L = +inf included.
        second_lower, second_upper: bounds of S(L > t), which has no atom at +inf.
    """

    first_lower: Array
    first_upper: Array
    second_lower: Array
    second_upper: Array


class DominatingPair(ABC):
    """Two distributions (P, Q), a hashable value; equal pairs compose by adding counts."""

    @property
    def symmetric(self) -> bool:
        """Whether both directions have the same privacy profile, so that one of them is enough."""
        return False

    @abstractmethod
    def tails(self, losses: Array, direction: Direction) -> Tails:
        """Bounds of F(L > t) and S(L > t) for every finite t in ``losses``; t of any sign, increasing, shape [N].

        Tight bounds make tight answers; loose ones still make valid answers. delta(t) = F(L > t) - e^t S(L > t).
        """


class Mechanism(Record, ABC):
    """A randomised computation as a value; subclasses carry ``kind`` and their parameters."""

    kind: str

    @abstractmethod
    def dominating_pair(self, adjacency: Adjacency) -> DominatingPair:
        """The pair of distributions that dominates this mechanism under ``adjacency``.

        Raises:
            NotComputable: no proved pair is known for this adjacency (DP062).
        """


def unproved(mechanism: Mechanism, adjacency: Adjacency, hint: str) -> NotComputable:
    """The error for an adjacency under which no pair is proved (DP062); ``hint`` says the way out."""
    return NotComputable(
        f"{type(mechanism).__name__} has no proved dominating pair under {adjacency} adjacency", hint=hint, code="DP062"
    )


@dataclass(frozen=True)
class Charge:
    """``count`` uses of one mechanism, count >= 0; a composition is a sequence of charges."""

    mechanism: Mechanism
    count: int
