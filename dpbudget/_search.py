"""Searches that end on the safe side: what they return was itself seen to fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER
from dpbudget.plan import MAX_STEPS

#: Relative width at which the search for a noise multiplier stops, and the one after so many questions. Only a claim
#: with a jump takes more: where the bounded tail becomes affordable, or a hard composition falls back to wide bounds.
_TOLERANCE, _PATIENCE, _COARSE = 5e-10, 16, 1e-6

# Questions that the quick search may ask in each of its parts, and where the first two end.
_ROUGH_STEPS, _NEWTON_STEPS, _RAISES, _ROUGH, _CLOSE = 14, 8, 6, 0.02, 1e-6
# Part of delta left unused so that the first certified question mostly holds.
_SPARE = 3e-11

_BOTTOM, _TOP = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)

_Point = tuple[float, float]


@runtime_checkable
class QuickCurve(Protocol):
    """A privacy curve that also answers roughly, for searches that end with a certified answer."""

    def rough_epsilon(self, delta: float) -> float:
        """An estimate of epsilon, within a few percent."""

    def estimate_log_delta(self, epsilon: float) -> tuple[float, float]:
        """Estimates of log delta(epsilon) and of its derivative."""

    def epsilon_between(self, smaller: float, delta: float) -> Bounds:
        """The certified lower end of epsilon at ``delta`` and the upper one at ``smaller`` <= delta."""


def quick_noise(
    curve_of: Callable[[float], PrivacyCurve], epsilon: float, delta_of: Callable[[float], float], guess: float
) -> float | None:
    """A sigma whose *certified* delta at ``epsilon`` is barely at most ``delta_of(sigma)``; None where none is found.

    Rough estimates lead to within a percent, estimates of delta to the root of log delta, and from there sigma is
    raised until the certified upper end of both directions holds. Typically 1e-11 above the smallest such sigma.
    """
    rough = _rough_root(curve_of, epsilon, delta_of, min(max(math.log(guess), _BOTTOM), _TOP))
    if rough is None:
        return None
    point = _newton_root(curve_of, epsilon, delta_of, rough)
    if point is None:
        return None
    steepness = point[1]
    sigma = math.exp(point[0]) * (1.0 + _SPARE / steepness)
    for attempt in range(_RAISES):
        if not MIN_NOISE_MULTIPLIER <= sigma <= MAX_NOISE_MULTIPLIER:
            return None
        upper, delta = curve_of(sigma).delta(epsilon).upper, delta_of(sigma)
        if upper <= delta:
            return sigma
        # d log delta / d log sigma = -steepness
        sigma *= 1.0 + max(1.1 * math.log(upper / delta) / steepness, 1e-14) * 2.0**attempt
    return None


def _rough_root(
    curve_of: Callable[[float], PrivacyCurve], epsilon: float, delta_of: Callable[[float], float], x: float
) -> tuple[float, float] | None:
    """(log sigma, d log epsilon / d log sigma) where the rough epsilon is within a percent of ``epsilon``."""
    before: _Point | None = None
    for _ in range(_ROUGH_STEPS):
        sigma = _sigma(x)
        curve = curve_of(sigma)
        if not isinstance(curve, QuickCurve):
            return None
        value = curve.rough_epsilon(delta_of(sigma))
        if value <= 0.0:
            return None
        here = (x, math.log(value / epsilon))
        # Epsilon is close to a power of sigma, between -1 and -2 where it matters.
        slope = -1.2 if before is None or before[0] == x else (here[1] - before[1]) / (here[0] - before[0])
        slope = min(max(slope, -20.0), -0.3)
        if abs(here[1]) < _ROUGH and before is not None:
            return x - here[1] / slope, slope
        step = min(max(-here[1] / slope, -1.5), 1.5)
        x, before = min(max(x + (step or 1e-2), _BOTTOM), _TOP), here
    return None


def _newton_root(
    curve_of: Callable[[float], PrivacyCurve],
    epsilon: float,
    delta_of: Callable[[float], float],
    start: tuple[float, float],
) -> tuple[float, float] | None:
    """(log sigma, -d log delta / d log sigma) where the estimate of delta at ``epsilon`` equals ``delta_of``."""
    (x, power), before = start, None
    for _ in range(_NEWTON_STEPS):
        sigma = _sigma(x)
        curve = curve_of(sigma)
        if not isinstance(curve, QuickCurve):
            return None
        log_delta, slope = curve.estimate_log_delta(epsilon)
        if not math.isfinite(log_delta) or slope >= 0.0:
            return None
        here = (x, log_delta - math.log(delta_of(sigma)))
        # epsilon moves by epsilon * power per unit of log sigma, and log delta follows along the profile.
        steepness = -slope * epsilon * -power
        if before is not None and here[0] != before[0]:
            secant = -(here[1] - before[1]) / (here[0] - before[0])
            steepness = secant if 0.2 * steepness < secant < 5.0 * steepness else steepness
        if steepness <= 0.0:
            return None
        following = x + here[1] / steepness
        if abs(here[1]) < _CLOSE:
            return following, steepness
        x, before = following, here
    return None


def smallest_noise(claim: Callable[[float], float], target: float, guess: float) -> float | None:
    """The smallest sigma with claim(sigma) <= target, on the safe side; None where none was found up to the largest.

    The search ends where the claim is within three units of its rounding, 1e-9 max(1, target), below the target, or
    where sigma is known to :data:`_TOLERANCE` relative, :data:`_COARSE` where the claim jumps. Whatever the shape of
    ``claim``, the returned sigma itself was seen to fit.
    """
    unit = 1e-9 * max(1.0, target) / target

    def excess(log_sigma: float) -> float:
        epsilon = claim(_sigma(log_sigma))
        return math.log(epsilon / target) if epsilon > 0 else -math.inf

    low, high = _bracket(excess, min(max(math.log(guess), _BOTTOM), _TOP))
    if high is None:
        return None
    return MIN_NOISE_MULTIPLIER if low is None else _sigma(_narrow(excess, low, high, min(unit, 0.1)))


def _sigma(log_sigma: float) -> float:
    """exp, which is exact at both ends of the range."""
    if not _BOTTOM < log_sigma < _TOP:
        return MIN_NOISE_MULTIPLIER if log_sigma <= _BOTTOM else MAX_NOISE_MULTIPLIER
    return min(max(math.exp(log_sigma), MIN_NOISE_MULTIPLIER), MAX_NOISE_MULTIPLIER)


def _bracket(f: Callable[[float], float], x: float) -> tuple[_Point | None, _Point | None]:
    """Neighbouring points with f > 0 at the lower and f <= 0 at the upper; None for the one that does not exist."""
    here, stride = (x, f(x)), 0.25
    if here[1] > 0.0:
        low = here
        while here[1] > 0.0:
            if here[0] >= _TOP:
                return here, None
            low = here
            x = min(x + stride, _TOP)
            here, stride = (x, f(x)), 2.0 * stride
        return low, here
    high = here
    while here[1] <= 0.0 and here[0] > _BOTTOM:
        high = here
        x = max(x - stride, _BOTTOM)
        here, stride = (x, f(x)), 2.0 * stride
    return (here, high) if here[1] > 0.0 else (None, here)


def _narrow(f: Callable[[float], float], low: _Point, high: _Point, unit: float) -> float:
    """The upper end of a bracket after secant steps towards f = -unit, kept honest by bisection."""
    before, last = low, high
    slow = asked = 0
    while high[0] - low[0] > (_TOLERANCE if asked < _PATIENCE else _COARSE) and high[1] < -3.0 * unit:
        width = high[0] - low[0]
        x = _secant(before, last, -unit)
        if slow >= 2 or x is None or not low[0] < x < high[0]:
            x, slow = low[0] + 0.5 * width, 0
        before, last, asked = last, (x, f(x)), asked + 1
        low, high = (last, high) if last[1] > 0.0 else (low, last)
        slow = slow + 1 if high[0] - low[0] > 0.5 * width else 0
    return high[0]


def _secant(one: _Point, other: _Point, level: float) -> float | None:
    """Where the line through two points has the height ``level``; None where there is no such line."""
    rise = other[1] - one[1]
    if rise == 0.0 or not math.isfinite(rise):
        return None
    return other[0] + (level - other[1]) * (other[0] - one[0]) / rise


def most_steps(fits: Callable[[int], bool], start: int) -> int:
    """The largest count in [0, MAX_STEPS] that fits, for a property that is lost as the count grows."""
    if fits(start):
        low, high = start, start
        while low == high:
            if low == MAX_STEPS:
                return MAX_STEPS
            high = min(2 * low, MAX_STEPS)
            if fits(high):
                low = high
    else:
        low, high = start, start
        while low == high:
            if high == 1:
                return 0
            low = high // 2
            if not fits(low):
                high = low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
