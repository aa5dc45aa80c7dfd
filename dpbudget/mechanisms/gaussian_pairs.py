"""Dominating pairs of sampled Gaussian mechanisms.

In units of sigma, with m = 1 / sigma: the loss of the sampled pair is l(z) = log(1 - q + q exp(m z - m^2 / 2)), which
increases, so that a tail of the loss is a normal tail at the point where l reaches the threshold. Both points below
are closed forms, computed with a bounded error, and the tails enclose it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from dpbudget._numerics import UNIT
from dpbudget.mechanisms._tail_bounds import mix, normal_tail, tails_of, thresholds, two_floats
from dpbudget.mechanisms.base import Direction, DominatingPair, Tails

if TYPE_CHECKING:
    from dpbudget.mechanisms._tail_bounds import Interval
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
        """Normal tails at the output where the loss reaches the threshold, relative accuracy 1e-10 down to 1e-300."""
        values = thresholds(losses)
        if direction == "remove":
            power, error = unsampled_loss(values, self.rate)
            near, far = _at(power, error, self.sigma, 0.5), _at(power, error, self.sigma, -0.5)
            return tails_of(mix(self.rate, near, far), near)
        # -l > t where z is below the point at which l = -t; by symmetry of the noise those are upper tails at -z.
        power, error = unsampled_loss(-values, self.rate)
        near, far = _at(-power, error, self.sigma, -0.5), _at(-power, error, self.sigma, 0.5)
        return tails_of(near, mix(self.rate, near, far))


def unsampled_loss(values: Array, rate: float) -> Interval:
    """The plain loss b where the sampled one is t, exp(b) = 1 + (exp(t) - 1) / rate, and a bound of its error.

    -inf where the sampled loss exceeds t everywhere, t <= log(1 - rate).
    """
    import numpy as np

    if rate >= 1.0:
        return values, np.zeros_like(values)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        change = np.expm1(values) / rate
        # exp, a division and log1p, whose condition number is below 1.45 here: 16, 1 and 16 units, and one in reserve.
        plain = np.log1p(np.maximum(change, -0.5))
        plain_error = 48.0 * UNIT * np.abs(plain)
        # Beyond the largest float the 1 vanishes; expm1 overflows at 709 where it is exp up to 1e-300.
        large = np.where(values < 700.0, np.log(np.expm1(np.clip(values, 1e-323, 700.0))), values) - math.log(rate)
        large_error = 24.0 * UNIT * (np.abs(values) + abs(math.log(rate)) + 2.0)
        edge, edge_error = _near_the_edge(values, rate)
    power = np.where(change < -0.5, edge, np.where(change > 1e300, large, plain))
    error = np.where(change < -0.5, edge_error, np.where(change > 1e300, large_error, plain_error))
    return power, error


def _near_the_edge(values: Array, rate: float) -> Interval:
    """The same b without cancellation: exp(b) = (1 - rate) expm1(d) / rate, d the distance of t to log(1 - rate)."""
    import numpy as np

    high, low = _log_of_absence(rate)
    # t - high is exact where they are within a factor 2 of each other; d is then right to 3 units.
    distance = (values - high) - low
    certain = distance <= 0.0
    distance = np.where(certain, 1.0, distance)
    power = np.log(np.expm1(distance)) + (math.log1p(-rate) - math.log(rate))
    # Each log by 16 units of itself, expm1 by 16, the error of d by its condition number, at most 1 + d.
    error = UNIT * (
        20.0
        + 18.0 * np.abs(np.log(np.expm1(distance)))
        + 18.0 * (abs(math.log1p(-rate)) + abs(math.log(rate)))
        + 4.0 * (1.0 + distance)
        + np.abs(power)
    )
    return np.where(certain, -np.inf, power), np.where(certain, 0.0, error)


@lru_cache(maxsize=64)
def _log_of_absence(rate: float) -> tuple[float, float]:
    """log(1 - rate) as the nearest float and the rest."""
    import mpmath

    with mpmath.workdps(60):
        return two_floats(mpmath.log(1 - mpmath.mpf(rate)))


@dataclass(frozen=True)
class ReplaceOneGaussianPair(DominatingPair):
    """P = (1 - rate) N(0, sigma^2) + rate N(1, sigma^2) against Q = (1 - rate) N(0, sigma^2) + rate N(-1, sigma^2).

    Dominates the Poisson-sampled Gaussian mechanism in any dimension when one record is replaced by another, both of
    norm at most 1 (docs/mechanisms.md, "Replacing a record").

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
        """Normal tails at the output where the loss, an odd increasing function, reaches the threshold.

        1 - q + q k y = e^t (1 - q + q k / y) with y = exp(m z), k = exp(-m^2 / 2) is a quadratic equation, and
        log y = t/2 + asinh(A), A = (1 - q) sinh(t/2) / (q k). Both directions have the same tails.
        """
        import numpy as np

        values = thresholds(losses)
        shift, shift_error = self._asinh(np.abs(values))
        power = values / 2.0 + np.copysign(shift, values)
        error = shift_error + 2.0 * UNIT * np.abs(power)
        # P and Q are mixtures of normal laws around 0 and around 1 or -1: points z, z - m and z + m.
        middle, near, far = (_at(power, error, self.sigma, offset) for offset in (0.0, -1.0, 1.0))
        return tails_of(mix(self.rate, middle, near), mix(self.rate, middle, far))

    def _asinh(self, size: Array) -> Interval:
        """asinh(A) at t = ``size`` >= 0 and a bound of its error."""
        import numpy as np

        if self.rate >= 1.0:
            return np.zeros_like(size), np.zeros_like(size)
        odds = math.log1p(-self.rate) - math.log(self.rate)
        parts = abs(math.log1p(-self.rate)) + abs(math.log(self.rate)) + 0.5 / self.sigma**2
        with np.errstate(divide="ignore", over="ignore", under="ignore"):
            small = np.log(-np.expm1(-size))  # log(2 sinh(t/2)) - t/2
            log_twice = odds + 0.5 / self.sigma**2 + size / 2.0 + small
            # Each log and product by at most 20 units of itself, exp by 16.
            relative = 20.0 * UNIT * (6.0 + parts + size + np.where(size > 0.0, np.abs(small), 0.0))
            ratio = 0.5 * np.exp(np.minimum(log_twice, 100.0))
            shift = np.where(log_twice > 100.0, log_twice, np.arcsinh(ratio))
        # asinh has slope at most min(1, 1 / A), so its relative change is at most that of A.
        return shift, np.minimum(ratio, 1.0) * relative * 1.01 + 17.0 * UNIT * shift


def _at(power: Array, error: Array, sigma: float, offset: float) -> Interval:
    """Bounds of P(N > power sigma + offset / sigma); power = -inf is a certain event."""
    import numpy as np

    point = power * sigma + offset / sigma
    with np.errstate(invalid="ignore"):
        slack = error * sigma * (1.0 + 1e-9) + 4.0 * UNIT * (np.abs(power) * sigma + abs(offset) / sigma) + 1e-300
    # An infinite point is certain or impossible whatever the error.
    return normal_tail(point, np.where(np.isfinite(point), slack, 0.0))
