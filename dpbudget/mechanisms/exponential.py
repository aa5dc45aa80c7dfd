"""The exponential mechanism, through its bounded range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpbudget._numerics import UNIT
from dpbudget._record import HexFloat
from dpbudget.mechanisms._tail_bounds import tails_of, thresholds
from dpbudget.mechanisms.base import Adjacency, Direction, DominatingPair, Mechanism, Tails

if TYPE_CHECKING:
    from dpbudget.mechanisms.base import Array


@dataclass(frozen=True)
class BoundedRangePair(DominatingPair):
    """The pair whose profile is the largest of all mechanisms with losses in some interval of length ``width``.

    Its profile is delta(s) = (1 - exp((s - width)/2))^2 / (1 - exp(-width)) for |s| <= width (docs/mechanisms.md,
    "Bounded range"; Dong, Durfee and Rogers 2020, Lemma 3.4 for the two-point pairs it is the envelope of).
    """

    width: float

    @property
    def symmetric(self) -> bool:
        """Always: the profile equals that of the exchanged pair."""
        return True

    def tails(self, losses: Array, direction: Direction) -> Tails:
        """F = (1 - e^((t - width)/2)) / (1 - e^-width) and S = e^(-(t + width)/2) F; both directions alike."""
        import numpy as np

        values = thresholds(losses)
        inner = np.clip(values, -self.width, self.width)
        first = np.expm1((inner - self.width) / 2.0) / np.expm1(-self.width)
        second = np.exp(-(inner + self.width) / 2.0) * first
        # expm1 twice and exp by 16 units each, divisions and products by one, exp's argument by one of itself.
        slack_first, slack_second = 40.0 * UNIT, (60.0 + inner + self.width) * UNIT
        everything, nothing = values <= -self.width, values >= self.width

        def ends(middle: Array, slack: Array | float) -> tuple[Array, Array]:
            lower = np.maximum(middle * (1.0 - slack) - 5e-324, 0.0)
            upper = np.minimum(middle * (1.0 + slack) + 5e-324, 1.0)
            cut = [np.where(everything, 1.0, np.where(nothing, 0.0, end)) for end in (lower, upper)]
            return cut[0], cut[1]

        return tails_of(ends(first, slack_first), ends(second, slack_second))


class Exponential(Mechanism):
    """Samples an outcome with probability proportional to exp(utility * c), for any utility and c.

    ``bounded_range`` is the largest length of the interval of its losses when one record is added or removed:
    epsilon for exp(epsilon u / (2 D)), u of sensitivity D (McSherry and Talwar 2007); also epsilon for
    exp(epsilon u / D) where adding a record moves all utilities in one direction (Dong, Durfee and Rogers 2020,
    Section 2).

    Guarantee: dominated by the envelope pair of its bounded range under add-remove and zero-out adjacency. Replacing a
    record is two such steps, and lengths of loss intervals add up.
    """

    kind: Literal["exponential"] = "exponential"
    bounded_range: HexFloat = Field(gt=1e-12, le=700.0)

    def dominating_pair(self, adjacency: Adjacency) -> BoundedRangePair:
        """The envelope of the bounded range, doubled where a record is replaced."""
        return BoundedRangePair(self.bounded_range * (2.0 if adjacency is Adjacency.REPLACE_ONE else 1.0))
