"""The Laplace mechanism."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpbudget._numerics import UNIT
from dpbudget._record import HexFloat
from dpbudget.mechanisms._tail_bounds import tails_of, thresholds, two_floats
from dpbudget.mechanisms.base import Adjacency, Direction, DominatingPair, Mechanism, Tails
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER

if TYPE_CHECKING:
    from dpbudget.mechanisms.base import Array


@dataclass(frozen=True)
class LaplacePair(DominatingPair):
    """P = Laplace around 1 against Q = Laplace around 0, both of the given scale > 0.

    The loss (|x| - |x - 1|) / scale lies in [-1/scale, 1/scale], with atoms at both ends.
    """

    scale: float

    @property
    def symmetric(self) -> bool:
        """Always: the reflection x -> 1 - x exchanges P and Q."""
        return True

    def tails(self, losses: Array, direction: Direction) -> Tails:
        """1 - exp(-(1/scale - t)/2)/2 and exp(-(1/scale + t)/2)/2 between the atoms; both directions alike."""
        import numpy as np

        values = thresholds(losses)
        high, low = two_floats(1 / Fraction(self.scale))  # the largest loss, in two floats
        # Exact comparisons: the atoms are no floats in general.
        everything = (values < -high) | ((values == -high) & (low < 0.0))
        nothing = ~((values < high) | ((values == high) & (low > 0.0)))
        above = np.maximum(((high - values) + low) / 2.0, 0.0)
        below = np.maximum(((high + values) + low) / 2.0, 0.0)
        first = 0.5 - 0.5 * np.expm1(-above)
        second = 0.5 * np.exp(-below)
        # expm1 and exp by 16 units, the distances by 3 units of themselves.
        slack_first, slack_second = 32.0 * UNIT, (24.0 + 4.0 * below) * UNIT
        bounds = [
            (first * (1.0 - slack_first), np.minimum(first * (1.0 + slack_first), 1.0)),
            (np.maximum(second * (1.0 - slack_second) - 5e-324, 0.0), second * (1.0 + slack_second) + 5e-324),
        ]
        exact = [tuple(np.where(everything, 1.0, np.where(nothing, 0.0, end)) for end in pair) for pair in bounds]
        return tails_of((exact[0][0], exact[0][1]), (exact[1][0], exact[1][1]))


class Laplace(Mechanism):
    """Adds Laplace noise of scale noise_multiplier * C to a scalar sum of records in [-C, C].

    Guarantee: dominated by Laplace(1, b) against Laplace(0, b) under add-remove and zero-out adjacency, b being the
    noise multiplier = scale / sensitivity (Zhu, Dong and Wang 2022, Section 3; pure epsilon 1 / b, Dwork et al. 2006).
    A smaller shift is dominated because the optimal events are half-lines. Replacing a record moves the sum by up to
    2 C, hence b / 2. Vectors are not covered.
    """

    kind: Literal["laplace"] = "laplace"
    noise_multiplier: HexFloat = Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)

    def dominating_pair(self, adjacency: Adjacency) -> LaplacePair:
        """Laplace laws one sensitivity apart, or two where a record is replaced."""
        return LaplacePair(self.noise_multiplier / (2.0 if adjacency is Adjacency.REPLACE_ONE else 1.0))
