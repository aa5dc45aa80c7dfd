"""From bounds of delta(epsilon) to a bracket of epsilon(delta)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpbudget.accountants._contour import Contour

DeltaBounds = Callable[[float], tuple[float, float]]

_MAX_STEPS = 200
_MAX_NEWTON = 30
_MAX_WIDENINGS = 60


def bracket_epsilon(bounds: DeltaBounds, delta: float, ceiling: float, guess: float = 0.0) -> tuple[float, float]:
    """(lower, upper) with certified delta(lower) >= ``delta`` (or lower = 0) and delta(upper) <= ``delta``.

    Both ends are re-evaluated with ``bounds``, nothing is linearised; delta is decreasing in epsilon.

    Args:
        bounds: certified (lower, upper) bounds of delta(epsilon), for epsilon >= 0.
        delta: the target in (0, 1).
        ceiling: a proved upper bound of epsilon(delta), returned where no smaller one is found.
        guess: where the root may be, to a few digits; 0 where nothing is known.
    """
    if ceiling <= 0.0 or bounds(0.0)[1] <= delta:
        return 0.0, 0.0
    root, slope = _secant_root(bounds, delta, guess, ceiling) if guess > 0.0 else (0.0, 0.0)
    if slope <= 0.0:
        root, slope = _root(bounds, delta, ceiling)
    low, high = bounds(root)
    scale = max(math.log(max(high, 1e-323)) - math.log(max(low, 1e-323)), 1e-15)
    width = min(scale / max(slope, 1e-300), ceiling) + 4.0 * math.ulp(root)
    upper = _widen(root, width, ceiling, lambda e: bounds(e)[1] <= delta)
    lower = _widen(root, -width, 0.0, lambda e: bounds(e)[0] >= delta)
    return lower, upper


def _secant_root(bounds: DeltaBounds, delta: float, guess: float, ceiling: float) -> tuple[float, float]:
    """A root near ``guess`` and minus the slope of log delta there; slope 0 where the secant method does not settle."""
    target, before = math.log(delta), None
    point = min(guess, ceiling)
    for _ in range(8):
        low, high = bounds(point)
        here = (point, math.log(max(0.5 * (low + high), 1e-323)) - target)
        slope = 0.0
        if before is not None and here[0] != before[0]:
            slope = (before[1] - here[1]) / (here[0] - before[0])
            if slope <= 0.0 or abs(here[1]) < 1e-14:
                return point, slope
        step = here[1] / slope if slope > 0.0 else 1e-6 * point
        following = min(max(point + step, 0.5 * point), ceiling)
        if slope > 0.0 and abs(following - point) <= 2.0 * math.ulp(point):
            return following, slope
        before, point = here, following
    return point, 0.0


def _root(bounds: DeltaBounds, delta: float, ceiling: float) -> tuple[float, float]:
    """A root of log delta(epsilon) = log delta, by regula falsi (Illinois) on midpoints, and minus the slope there."""
    target = math.log(delta)

    def excess(epsilon: float) -> float:
        low, high = bounds(epsilon)
        return math.log(max(0.5 * (low + high), 1e-323)) - target

    left, right = 0.0, ceiling
    at_left, at_right = excess(left), excess(right)
    if at_right >= 0.0:
        return ceiling, 1.0 / ceiling
    if at_left <= 0.0:
        return 0.0, 1.0 / ceiling
    slope, side = (at_left - at_right) / (right - left), 0
    for _ in range(_MAX_STEPS):
        point = right - at_right * (right - left) / (at_right - at_left)
        if not left < point < right:
            point = 0.5 * (left + right)
        value = excess(point)
        near = right if abs(right - point) < abs(point - left) else left
        near_value = at_right if near == right else at_left
        if side == 0 and point != near:
            slope = abs((near_value - value) / (near - point)) or slope
        if abs(value) < 1e-14 or right - left <= 4.0 * math.ulp(right):
            break
        if value > 0.0:
            at_right = 0.5 * at_right if side == 1 else at_right
            left, at_left, side = point, value, 1
        else:
            at_left = 0.5 * at_left if side == -1 else at_left
            right, at_right, side = point, value, -1
    return point, max(slope, 1e-300)


def _widen(root: float, width: float, limit: float, holds: Callable[[float], bool], beyond: bool = False) -> float:
    """The first of root, root + width, root + 2 width, ... (doubling) at which ``holds``; ``limit`` if none does.

    ``beyond`` leaves out the root itself.
    """
    point = root + width if beyond else root
    width = 2.0 * width if beyond else width
    for _ in range(_MAX_WIDENINGS):
        if (width > 0.0 and point >= limit) or (width < 0.0 and point <= limit):
            return limit
        if holds(point):
            return point
        point = root + width
        width *= 2.0
    return limit


def bracket_near(contour: Contour, delta: float, guess: float, ceiling: float) -> tuple[float, float]:
    """:func:`bracket_epsilon` for a smooth curve known to be planned near ``guess``: Newton's method, then widening.

    Falls back to :func:`bracket_epsilon` where Newton does not settle.
    """
    target = math.log(delta)
    epsilon, slope = guess, 0.0
    for _ in range(_MAX_NEWTON):
        value, slope = contour.log_delta(epsilon)
        if not math.isfinite(value) or slope >= 0.0:
            return bracket_epsilon(contour.delta, delta, ceiling)
        # log delta is nearly concave in epsilon; steps beyond the range are cut.
        step = (value - target) / -slope
        following = min(max(epsilon + step, 0.25 * epsilon), ceiling)
        moved, epsilon = abs(following - epsilon), following
        if moved <= 1e-13 * epsilon:
            break
    else:
        return bracket_epsilon(contour.delta, delta, ceiling)
    low, high = contour.delta(epsilon)
    if not 0.0 < low <= high:
        return bracket_epsilon(contour.delta, delta, ceiling)
    # A little wider than the linearised interval, so that the first evaluation at either end holds.
    spare = 1.05 / -slope
    rise = math.log(high) - target
    fall = target - math.log(low)
    floor = 4.0 * math.ulp(epsilon)
    upper = _widen(epsilon, max(spare * rise, 0.0) + floor, ceiling, lambda e: contour.delta(e)[1] <= delta, True)
    lower = _widen(epsilon, -max(spare * fall, 0.0) - floor, 0.0, lambda e: contour.delta(e)[0] >= delta, True)
    return lower, upper
