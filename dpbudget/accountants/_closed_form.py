"""Compositions with a closed form: unsampled Gaussians, and a single sampled Gaussian step.

delta(epsilon) of N(mu, 1) against N(0, 1) is Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) (Balle and
Wang 2018, Theorem 8), and Gaussians compose to mu = sqrt(sum 1 / sigma_i^2) (Dong, Roth and Su 2022, Corollary 3.3).
One step of the sampled Gaussian is a Gaussian profile at another epsilon (docs/accounting.md, "Closed forms").

The sums are taken with 60 digits, so that what cancels (at most 30 digits are allowed to) cannot matter, down to
delta = 1e-300 and beyond. Assumes that mpmath's exp, log and erfc are right to 35 of those digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mpmath

from dpbudget.accountants._phases import GaussianPair, Phase
from dpbudget.mechanisms import Direction, ReplaceOneGaussianPair

_DIGITS = 60
# Share of the terms that the difference may be wrong by, and the conversion to floats.
_ERROR = mpmath.mpf(10) ** -35
_ROUND = 2.0**-52


def gaussian_delta(phases: Sequence[Phase], epsilon: float) -> tuple[float, float]:
    """Certified (lower, upper) bounds of delta(epsilon) of the composition with every rate replaced by 1.

    Exact where all rates are 1. Otherwise the upper end still holds: sampling post-processes the Gaussian pair.
    """
    with mpmath.workdps(_DIGITS):
        mu = mpmath.sqrt(sum(phase.count * _distance(phase.pair) ** 2 for phase in phases))
        return _profile(mu, mpmath.mpf(epsilon), mpmath.mpf(1))


def gaussian_guess(phases: Sequence[Phase], delta: float) -> float:
    """Root of delta(epsilon) = delta without sampling, in double precision; a guess, 0 where there is none."""
    mu = math.sqrt(math.fsum(phase.count * float(_distance(phase.pair)) ** 2 for phase in phases))
    if mu == 0.0 or not math.isfinite(mu):
        return 0.0

    def value(epsilon: float) -> float:
        second = _log_tail(epsilon / mu + 0.5 * mu) + epsilon
        first = _log_tail(epsilon / mu - 0.5 * mu)
        return first + math.log1p(-math.exp(second - first)) if second < first else -math.inf

    target, low, high = math.log(delta), 0.0, mu * (0.5 * mu + 40.0)
    for _ in range(200):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if value(middle) > target else (low, middle)
    return high


def _log_tail(z: float) -> float:
    """Log P(N(0, 1) > z), good to a few digits far out."""
    if z < 25.0:
        return math.log(0.5 * math.erfc(z / math.sqrt(2.0)))
    return -0.5 * z * z - math.log(z * math.sqrt(2.0 * math.pi)) + math.log1p(-1.0 / (z * z))


def one_step_delta(pair: GaussianPair, epsilon: float, direction: Direction) -> tuple[float, float]:
    """Certified (lower, upper) bounds of delta(epsilon) of one use of ``pair`` in one direction."""
    with mpmath.workdps(_DIGITS):
        if isinstance(pair, ReplaceOneGaussianPair):
            return _one_replacement(pair, mpmath.mpf(epsilon))
        q, mu, power = mpmath.mpf(pair.rate), 1 / mpmath.mpf(pair.sigma), mpmath.mpf(epsilon)
        if direction == "remove":
            return _profile(mu, mpmath.log1p(mpmath.expm1(power) / q), q)
        ratio = 1 + mpmath.expm1(-power) / q
        if ratio <= 0:  # adding a record has losses below -log(1 - q) only
            return 0.0, 5e-324
        return _profile(mu, -mpmath.log(ratio), -mpmath.expm1(power + mpmath.log1p(-q)) if q < 1 else mpmath.mpf(1))


def _distance(pair: GaussianPair) -> Any:
    """Distance of the two means without sampling, in units of the noise."""
    return (2 if isinstance(pair, ReplaceOneGaussianPair) else 1) / mpmath.mpf(pair.sigma)


def _one_replacement(pair: ReplaceOneGaussianPair, epsilon: Any) -> tuple[float, float]:
    """P(x > z) - e^eps Q(x > z), z = log(y) / m, where y solves q k y^2 - (1 - q)(e^eps - 1) y - e^eps q k = 0."""
    q, m, growth = mpmath.mpf(pair.rate), 1 / mpmath.mpf(pair.sigma), mpmath.expm1(epsilon)
    scaled = q * mpmath.exp(-m * m / 2)
    half = (1 - q) * growth / 2
    z = mpmath.log((half + mpmath.sqrt(half * half + scaled * scaled * (1 + growth))) / scaled) / m
    first = q * _tail(z - m)
    second = (1 - q) * growth * _tail(z) + (1 + growth) * q * _tail(z + m)
    value, error = first - second, (first + second) * _ERROR
    return _down(value - error), _up(value + error)


def _profile(mu: Any, epsilon: Any, scale: Any) -> tuple[float, float]:
    first = _tail(epsilon / mu - mu / 2)
    second = mpmath.exp(epsilon) * _tail(epsilon / mu + mu / 2)
    value, error = scale * (first - second), scale * (first + second) * _ERROR
    return _down(value - error), _up(value + error)


def _tail(z: Any) -> Any:
    return mpmath.erfc(z / mpmath.sqrt(2)) / 2


def _down(value: Any) -> float:
    return max(float(value) * (1.0 - _ROUND) - 5e-324, 0.0)


def _up(value: Any) -> float:
    return min(max(float(value), 0.0) * (1.0 + _ROUND) + 5e-324, 1.0)
