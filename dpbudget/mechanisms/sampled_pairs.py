"""Pairs of sampled mechanisms, made from the tails of the pair without sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpbudget.mechanisms._tail_bounds import mix, tails_of, thresholds
from dpbudget.mechanisms.base import Direction, DominatingPair, Tails
from dpbudget.mechanisms.gaussian_pairs import unsampled_loss

if TYPE_CHECKING:
    from dpbudget.mechanisms._tail_bounds import Interval
    from dpbudget.mechanisms.base import Array

_FAR = 1e300


def _inner_tails(inner: DominatingPair, power: Array, error: Array, direction: Direction) -> tuple[Interval, Interval]:
    """Bounds of both inner laws above ``power`` known to within ``error``; power -inf is certain, inf impossible."""
    import numpy as np

    # One more rounding of each end; infinities stay beyond every finite threshold.
    low = np.clip(np.nextafter(power - error, -np.inf), -_FAR, _FAR)
    high = np.clip(np.nextafter(power + error, np.inf), -_FAR, _FAR)
    # Errors vary from one formula to the next, but tails may be asked at increasing points only.
    least, most = np.minimum.accumulate(low[::-1])[::-1], np.maximum.accumulate(high)
    wide, narrow = inner.tails(least, direction), inner.tails(most, direction)
    certain, never = np.isneginf(power), np.isposinf(power)

    def ends(lower: Array, upper: Array) -> Interval:
        cut = [np.where(certain, 1.0, np.where(never, 0.0, end)) for end in (lower, upper)]
        return cut[0], cut[1]

    return ends(narrow.first_lower, wide.first_upper), ends(narrow.second_lower, wide.second_upper)


@dataclass(frozen=True)
class PoissonSampledPair(DominatingPair):
    """P' = (1 - rate) Q + rate P against Q, for the pair (P, Q) of the mechanism without sampling, in both directions.

    Removing a record is bounded by (P', Q), adding one by (Q, P') (Zhu, Dong and Wang 2022, Theorem 11).

    Attributes:
        inner: a pair that has tails.
        rate: inclusion probability in (0, 1).
    """

    inner: DominatingPair
    rate: float

    def tails(self, losses: Array, direction: Direction) -> Tails:
        """The loss log(1 - q + q e^L) exceeds t where the inner loss L exceeds log(1 + (e^t - 1) / q)."""
        values = thresholds(losses)
        if direction == "remove":
            power, error = unsampled_loss(values, self.rate)
            first, second = _inner_tails(self.inner, power, error, "remove")
            return tails_of(mix(self.rate, second, first), second)
        # -log(1 - q + q e^L) > t where -L > -b(-t); -L is the inner loss of the direction "add".
        power, error = unsampled_loss(-values, self.rate)
        first, second = _inner_tails(self.inner, -power, error, "add")
        return tails_of(first, mix(self.rate, first, second))


@dataclass(frozen=True)
class SubsetSampledPair(DominatingPair):
    """One pair with delta(t) = that of ((1 - rate) Q + rate P, Q) for t >= 0, continued to t < 0 as a symmetric pair.

    Dominates sampling a fixed number of records when one is replaced (docs/mechanisms.md, "Fixed size"). The two
    one-sided pairs may not be composed separately (Lebeda et al. 2024); this one bounds both orders at once.

    Attributes:
        inner: a symmetric pair that has tails, dominating the inner mechanism when one record is replaced.
        rate: at least sample size / population size, in (0, 1).
    """

    inner: DominatingPair
    rate: float

    @property
    def symmetric(self) -> bool:
        """By construction."""
        return True

    def tails(self, losses: Array, direction: Direction) -> Tails:
        """For t < 0, F(L > t) = 1 - S(L >= -t) and S(L > t) = 1 - F(L >= -t); both directions alike."""
        import numpy as np

        values = thresholds(losses)
        upper_half = self._above(np.maximum(values, 0.0))
        mirrored = np.abs(np.minimum(values, -5e-324))[::-1]
        # L >= s is implied by L > s and implies L > the float before s.
        strict, loose = self._above(mirrored), self._above(np.nextafter(mirrored, -np.inf))
        positive = values >= 0.0

        def join(end: Array, complement: Array, pad: float) -> Array:
            return np.where(positive, end, np.clip(1.0 - complement[::-1] + pad, 0.0, 1.0))

        unit = 2.0**-52
        return Tails(
            join(upper_half.first_lower, loose.second_upper, -unit),
            join(upper_half.first_upper, strict.second_lower, unit),
            join(upper_half.second_lower, loose.first_upper, -unit),
            join(upper_half.second_upper, strict.first_lower, unit),
        )

    def _above(self, values: Array) -> Tails:
        power, error = unsampled_loss(values, self.rate)
        first, second = _inner_tails(self.inner, power, error, "remove")
        return tails_of(mix(self.rate, second, first), second)
