"""Searches that end on the safe side: what they return was itself seen to fit."""

from __future__ import annotations

import math
from collections.abc import Callable

from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER
from dpbudget.plan import MAX_STEPS

#: Relative width at which the search for a noise multiplier stops. Claims are rounded to 1e-9, so finer is idle.
_TOLERANCE = 5e-10

_BOTTOM, _TOP = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)

_Point = tuple[float, float]


def smallest_noise(claim: Callable[[float], float], target: float, guess: float) -> float:
    """The smallest sigma with claim(sigma) <= target, up to :data:`_TOLERANCE` relative and on the safe side.

    Assumes claim(MAX_NOISE_MULTIPLIER) <= target. Whatever the shape of ``claim``, the returned sigma itself was seen
    to fit.
    """

    def excess(log_sigma: float) -> float:
        if log_sigma >= _TOP:
            return -math.inf
        epsilon = claim(_sigma(log_sigma))
        return math.log(epsilon / target) if epsilon > 0 else -math.inf

    low, high = _bracket(excess, min(max(math.log(guess), _BOTTOM), _TOP))
    return MIN_NOISE_MULTIPLIER if low is None else _sigma(_narrow(excess, low, high))


def _sigma(log_sigma: float) -> float:
    """exp, which is exact at both ends of the range."""
    if not _BOTTOM < log_sigma < _TOP:
        return MIN_NOISE_MULTIPLIER if log_sigma <= _BOTTOM else MAX_NOISE_MULTIPLIER
    return min(max(math.exp(log_sigma), MIN_NOISE_MULTIPLIER), MAX_NOISE_MULTIPLIER)


def _bracket(f: Callable[[float], float], x: float) -> tuple[_Point | None, _Point]:
    """Neighbouring points with f > 0 at the lower and f <= 0 at the upper; None where even the least noise fits."""
    here, stride = (x, f(x)), 0.25
    if here[1] > 0.0:
        low = here
        while here[1] > 0.0:
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


def _narrow(f: Callable[[float], float], low: _Point, high: _Point) -> float:
    """The upper end of a bracket narrowed to the tolerance: inverse secant steps, kept honest by bisection."""
    for turn in range(200):
        width = high[0] - low[0]
        if width <= _TOLERANCE:
            break
        middle = low[0] + 0.5 * width
        if math.isfinite(low[1]) and math.isfinite(high[1]) and turn % 4 != 3:
            root = low[0] + width * low[1] / (low[1] - high[1])
            # Overshoot by a little: the claim is a staircase of width 1e-9, and both sides should close in.
            nudge = max(0.4 * _TOLERANCE, 0.01 * width)
            middle = root + nudge if turn % 2 == 0 else root - nudge
            middle = min(max(middle, low[0] + 0.2 * _TOLERANCE), high[0] - 0.2 * _TOLERANCE)
        point = (middle, f(middle))
        low, high = (point, high) if point[1] > 0.0 else (low, point)
    return high[0]


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
