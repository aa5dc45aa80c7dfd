"""Integer noise: the discrete Gaussian and the discrete Laplace mechanism."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpbudget._numerics import UNIT
from dpbudget._record import HexFloat
from dpbudget.mechanisms._tail_bounds import tails_of, thresholds
from dpbudget.mechanisms.base import Adjacency, Direction, DominatingPair, Mechanism, Tails

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dpbudget.mechanisms._tail_bounds import Interval
    from dpbudget.mechanisms.base import Array

    Integers = npt.NDArray[np.int64]


def _first_above(values: Array, scale: Fraction, shift: int, limits: tuple[int, int]) -> Integers:
    """The smallest integer k > t scale + shift / 2, within ``limits``; exact, rationals decide near an integer."""
    import numpy as np

    low, high = limits
    point = np.clip(values * float(scale) + shift / 2.0, low - 0.5, high + 0.5)
    first = np.floor(point).astype(np.int64) + 1
    doubt = np.abs(point - np.rint(point)) <= 8.0 * UNIT * (np.abs(point) + abs(shift) + 1.0)
    for index in np.flatnonzero(doubt):
        exact = math.floor(Fraction(float(values[index])) * scale + Fraction(shift, 2)) + 1
        first[index] = min(max(exact, low), high)
    return np.clip(first, low, high)


@dataclass(frozen=True)
class DiscreteGaussianPair(DominatingPair):
    """P = N_Z(shift, sigma^2) against Q = N_Z(0, sigma^2), with masses proportional to exp(-k^2 / (2 sigma^2)).

    Attributes:
        sigma: scale in units of the integers; the standard deviation is slightly below it.
        shift: integer sensitivity >= 1.
    """

    sigma: float
    shift: int

    @property
    def symmetric(self) -> bool:
        """Always: the reflection k -> shift - k exchanges P and Q."""
        return True

    def tails(self, losses: Array, direction: Direction) -> Tails:
        """Tails of the lattice law at the first k with loss (2 k shift - shift^2) / (2 sigma^2) > t, found exactly."""
        values = thresholds(losses)
        reach = _reach(self.sigma) + self.shift + 1
        first = _first_above(values, Fraction(self.sigma) ** 2 / self.shift, self.shift, (-reach, reach))
        return tails_of(_lattice_tail(self.sigma, first - self.shift), _lattice_tail(self.sigma, first))


def _reach(sigma: float) -> int:
    """Integers up to here are summed; beyond, masses are below e^-700 of the central one."""
    return math.ceil(38.0 * sigma) + 1


@lru_cache(maxsize=8)
def _lattice_sums(sigma: float) -> tuple[Array, Array]:
    """Bounds of sum_{k >= n} exp(-k^2 / (2 sigma^2)) for n = 0 .. reach + 1."""
    import numpy as np

    size = np.arange(_reach(sigma) + 1, dtype=np.float64)
    terms = np.exp(-0.5 * np.square(size / sigma))
    sums = np.append(np.cumsum(terms[::-1])[::-1], 0.0)
    # Terms: exp by 16 units, its argument (at most 760) by 4 of itself; a sum of N positive terms by N.
    slack = (3100.0 + len(size)) * UNIT
    last = float(terms[-1])
    # Beyond the last k the terms fall faster than a geometric series of ratio exp(-k / sigma^2).
    rest = (last * 1.01 + 1e-317) / -math.expm1(-float(size[-1]) / sigma**2)
    return np.maximum(sums * (1.0 - slack) - 1e-317, 0.0), sums * (1.0 + slack) + rest


def _lattice_tail(sigma: float, first: Integers) -> Interval:
    """Bounds of P(K >= first) for the discrete Gaussian K."""
    import numpy as np

    lower, upper = _lattice_sums(sigma)
    whole = (1.0 + 2.0 * lower[1]) * (1.0 - 4.0 * UNIT), (1.0 + 2.0 * upper[1]) * (1.0 + 4.0 * UNIT)
    # To the left of 0 the complement is summed: P(K <= k - 1) = P(K >= 1 - k).
    right = np.where(first > 0, first, 1 - first)
    index = np.minimum(right, len(lower) - 1)
    low, high = lower[index] / whole[1] * (1.0 - 4.0 * UNIT), upper[index] / whole[0] * (1.0 + 4.0 * UNIT)
    pad = 2.0 * UNIT
    return (
        np.clip(np.where(first > 0, low, 1.0 - high - pad), 0.0, 1.0),
        np.clip(np.where(first > 0, high, 1.0 - low + pad), 0.0, 1.0),
    )


class DiscreteGaussian(Mechanism):
    """Adds discrete Gaussian noise to an integer-valued scalar query.

    Guarantee: dominated by N_Z(sensitivity, sigma^2) against N_Z(0, sigma^2) under add-remove and zero-out adjacency
    (Canonne, Kamath and Steinke 2020, Theorem 7 gives this pair's profile; smaller integer shifts are dominated because
    the optimal events are half-lines). Replacing a record doubles the sensitivity. Vectors are not covered: in several
    dimensions the lattice is not rotation invariant.

    Attributes:
        sigma: scale of the noise in units of the integers.
        sensitivity: largest change of the query by one record, an integer.
    """

    kind: Literal["discrete-gaussian"] = "discrete-gaussian"
    sigma: HexFloat = Field(ge=0.05, le=1e4)
    sensitivity: int = Field(default=1, ge=1, le=10**6)

    def dominating_pair(self, adjacency: Adjacency) -> DiscreteGaussianPair:
        """Lattice Gaussians one sensitivity apart, or two where a record is replaced."""
        return DiscreteGaussianPair(self.sigma, self.sensitivity * (2 if adjacency is Adjacency.REPLACE_ONE else 1))


@dataclass(frozen=True)
class DiscreteLaplacePair(DominatingPair):
    """Masses proportional to exp(-|k - shift| / scale) against exp(-|k| / scale) on the integers; shift >= 1."""

    scale: float
    shift: int

    @property
    def symmetric(self) -> bool:
        """Always: the reflection k -> shift - k exchanges P and Q."""
        return True

    def tails(self, losses: Array, direction: Direction) -> Tails:
        """Geometric sums from the first k with loss (2 k - shift) / scale > t, 0 <= k <= shift, found exactly."""
        import numpy as np

        values = thresholds(losses)
        # Every k <= 0 has the smallest loss -shift / scale, every k >= shift the largest one.
        first = _first_above(values, Fraction(self.scale) / 2, self.shift, (0, self.shift + 1))
        decay = -1.0 / self.scale
        reference = np.exp(first * decay) / (1.0 + math.exp(decay))  # P(K >= n), n >= 1
        shifted = np.exp((self.shift + 1 - first) * decay) / (
            1.0 + math.exp(decay)
        )  # 1 - P(K >= n - shift), n <= shift
        slack = 40.0 * UNIT + 4.0 * UNIT * self.shift / self.scale
        everything, nothing = first <= 0, first > self.shift

        def ends(lower: Array, upper: Array) -> Interval:
            cut = [np.where(everything, 1.0, np.where(nothing, 0.0, np.clip(end, 0.0, 1.0))) for end in (lower, upper)]
            return cut[0], cut[1]

        second = ends(reference * (1.0 - slack) - 5e-324, reference * (1.0 + slack) + 5e-324)
        return tails_of(
            ends(1.0 - shifted * (1.0 + slack) - 2.0 * UNIT, 1.0 - shifted * (1.0 - slack) + 2.0 * UNIT), second
        )


class DiscreteLaplace(Mechanism):
    """Adds discrete Laplace (two-sided geometric) noise to an integer-valued scalar query.

    Guarantee: dominated by the lattice Laplace laws ``sensitivity`` apart under add-remove and zero-out adjacency, the
    optimal events being half-lines (Ghosh, Roughgarden and Sundararajan 2012); pure epsilon sensitivity / scale.
    Replacing a record doubles the sensitivity.

    Attributes:
        scale: scale of the noise in units of the integers.
        sensitivity: largest change of the query by one record, an integer.
    """

    kind: Literal["discrete-laplace"] = "discrete-laplace"
    scale: HexFloat = Field(ge=1e-3, le=1e9)
    sensitivity: int = Field(default=1, ge=1, le=10**6)

    def dominating_pair(self, adjacency: Adjacency) -> DiscreteLaplacePair:
        """Lattice Laplace laws one sensitivity apart, or two where a record is replaced."""
        return DiscreteLaplacePair(self.scale, self.sensitivity * (2 if adjacency is Adjacency.REPLACE_ONE else 1))
