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
# Where a search for a picture ends: relative to sigma, and after so many questions.
_NEAR, _NEAR_STEPS = 0.01, 12
# Part of delta left unused so that the first certified question mostly holds.
_SPARE = 3e-11

_BOTTOM, _TOP = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)

_Point = tuple[float, float]


@runtime_checkable
class QuickCurve(Protocol):
    """A privacy curve that also answers roughly, for searches that end with a certified answer."""

    def rough_epsilon(self, delta: float) -> float:
        """An estimate of epsilon, within a few percent."""

    def estimate_log_delta(self, epsilon: float, tolerance: float = 1e-11) -> tuple[float, float]:
        """Estimates of log delta(epsilon) and of its derivative, good to about ``tolerance`` where the law is kind."""

    def epsilon_between(self, smaller: float, delta: float) -> Bounds:
        """The certified lower end of epsilon at ``delta`` and the upper one at ``smaller`` <= delta."""


def quick_noise(
    curve_of: Callable[[float], PrivacyCurve], epsilon: float, delta_of: Callable[[float], float], guess: float
) -> float | None:
    """A sigma whose *certified* delta at ``epsilon`` is barely at most ``delta_of(sigma)``; None where none is found.

    Rough estimates lead to within a percent, estimates of delta to the root of log delta, and from there sigma is
    raised until the certified upper end of both directions holds. Typically 1e-11 above the smallest such sigma.
    """
    rough = rough_noise(curve_of, epsilon, delta_of, guess)
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


def rough_noise(
    curve_of: Callable[[float], PrivacyCurve], epsilon: float, delta_of: Callable[[float], float], guess: float
) -> tuple[float, float] | None:
    """(log sigma, d log epsilon / d log sigma) where the rough epsilon is within a percent of ``epsilon``."""
    x = min(max(math.log(guess), _BOTTOM), _TOP)
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


def near_noise(
    curve_of: Callable[[float], PrivacyCurve],
    epsilon: float,
    delta_of: Callable[[float], float],
    start: tuple[float, float],
    least: float,
    tolerance: float,
) -> tuple[float, float] | None:
    """(sigma, power) near the smallest sigma >= ``least``; numerical, it proves nothing.

    ``start`` is a guess of both: the answer to a neighbouring question, moved here, takes one or two questions, each
    good to about ``tolerance`` in log delta. None where the estimates lead nowhere.
    """
    bottom, power = math.log(least), start[1]
    x = min(max(math.log(start[0]), bottom), _TOP)
    if x < bottom + 0.3 and _is_enough(curve_of(least), epsilon, delta_of(least)):
        return least, power
    low: _Point | None = None
    high: _Point | None = None
    for _ in range(_NEAR_STEPS):
        curve = curve_of(_sigma(x))
        if not isinstance(curve, QuickCurve):
            return None
        log_delta, slope = curve.estimate_log_delta(epsilon, tolerance)
        if not math.isfinite(log_delta) or slope >= 0.0:
            return None
        # A weak Gaussian has delta = f(epsilon sigma) / sigma, hence d log delta / d log sigma = -1 + slope * epsilon;
        # others are steeper by a power.
        weak = 1.0 - slope * epsilon
        here = (x, (log_delta - math.log(delta_of(_sigma(x)))) / weak)
        low, high = (here, high) if here[1] > 0.0 else (low, here)
        other = high if here is low else low
        if other is not None and abs(other[0] - x) > 3e-3:
            power = min(max((other[1] - here[1]) / (here[0] - other[0]), 1.0), 50.0)
        if abs(here[1]) < _NEAR or (here[1] <= 0.0 and x <= bottom):
            return _sigma(max(x + here[1] / power, bottom)), power
        x = _between(low, high, x + min(max(here[1] / power, -1.5), 1.5))
        x = min(max(x, bottom), _TOP)
    return None


def _is_enough(curve: PrivacyCurve, epsilon: float, delta: float) -> bool:
    """Whether a rough epsilon is clearly below the target."""
    return isinstance(curve, QuickCurve) and curve.rough_epsilon(delta) < 0.9 * epsilon


def _between(low: _Point | None, high: _Point | None, x: float) -> float:
    """``x``, or the middle of a bracket that it does not fall well inside."""
    if low is None or high is None:
        return x
    width = high[0] - low[0]
    return x if low[0] + 0.02 * width < x < high[0] - 0.02 * width else 0.5 * (low[0] + high[0])


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
    return MIN_NOISE_MULTIPLIER if low is None else _sigma(narrow(excess, low, high, min(unit, 0.1)))


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


def narrow(f: Callable[[float], float], low: _Point, high: _Point, unit: float) -> float:
    """The upper end of a bracket after secant steps towards f = -unit, kept honest by bisection.

    The points are (x, f(x)) with f > 0 at the lower and f <= 0 at the upper, and x is a logarithm; f(result) <= 0.
    """
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


def least_count(fits: Callable[[int], bool], start: int, lowest: int, highest: int) -> int:
    """The smallest count in [lowest, highest] that fits, for a property that is won as the count grows; 0 if none."""
    high = min(max(start, lowest), highest)
    while not fits(high):
        if high == highest:
            return 0
        lowest, high = high + 1, min(2 * high, highest)
    low = lowest - 1  # nothing up to here fits, or is asked for
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
