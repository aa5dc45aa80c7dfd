"""Scalar numerics shared by the accountants: unit roundoff, log-space functions, one-dimensional search.

Pure Python, so that importing it costs nothing. Arrays live in the accountants.
"""

from __future__ import annotations

import math
from collections.abc import Callable

#: Unit roundoff of IEEE double precision: a basic operation is exact up to a factor 1 + d, |d| <= UNIT.
UNIT = 2.0**-53
#: Assumed relative error of an elementary function (exp, expm1, log, log1p, sin, cos, atan2): 8 ulp = 16 UNIT.
#: Vectorised NumPy functions are not correctly rounded; tests compare them with mpmath.
ELEMENTARY = 16.0 * UNIT

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def exp_or_inf(x: float) -> float:
    """exp(x), infinite instead of an OverflowError."""
    return math.exp(x) if x < 709.0 else math.inf


def exp_up(x: float) -> float:
    """Upper bound of exp(x) for x <= 709, positive even where exp underflows."""
    return math.exp(x) * (1.0 + 4.0 * ELEMENTARY) + 5e-324


def log1p_exp(x: float) -> float:
    """log(1 + exp(x)) without overflow."""
    return x + math.log1p(math.exp(-x)) if x > 0.0 else math.log1p(math.exp(x))


def log_expm1(x: float) -> float:
    """log(exp(x) - 1) for x > 0, without overflow."""
    return x + math.log(-math.expm1(-x)) if x > 1.0 else math.log(math.expm1(x))


def log_kappa(a: float) -> float:
    """Logarithm of the smallest kappa with (1 - exp(-y))_+ <= kappa exp(a y) for all y.

    kappa(a) = (a / (1 + a))^a / (1 + a), a > 0. It turns a moment into delta:
    delta(epsilon) <= kappa(a) E exp(a (L - epsilon)) (Canonne, Kamath and Steinke 2020, Proposition 12, with order
    a + 1). Accurate to a few ulp of a * log((1 + a) / a) + log(1 + a).
    """
    return -a * math.log1p(1.0 / a) - math.log1p(a)


def truncate_mantissa(x: float, bits: int = 20) -> float:
    """The largest multiple of a power of two with at most ``bits`` significant bits below or at x > 0.

    Steps of grids are rounded so, hence the product of an integer below 2^(53 - bits) and the step is exact.
    """
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.floor(math.ldexp(mantissa, bits)), exponent - bits)


def minimize_unimodal(
    function: Callable[[float], float], start: float, low: float, high: float, tolerance: float
) -> tuple[float, float]:
    """Minimise a quasi-convex function on [low, high]: march from ``start`` by doubling steps, then golden section.

    Infinite values are allowed (they count as large). Returns (argument, value) of the best point evaluated, which for
    an upper bound is valid whatever the search did.
    """
    best = (function(start), start)
    left = right = start
    for sign in (1.0, -1.0):
        step, point, value = sign * 0.7, start, best[0]
        while low < point < high:
            following = min(max(point + step, low), high)
            new = function(following)
            left, right = min(left, following), max(right, following)
            if new > value or (math.isinf(new) and math.isinf(value) and abs(step) > 64.0):
                break
            # Everything behind the point before this one is now known to be no better.
            if sign > 0:
                left = point
            else:
                right = point
            point, value, step = following, new, step * 1.6
            best = min(best, (new, following))
        if best[1] != start:
            break
    return _golden_section(function, left, right, best, tolerance)


def _golden_section(
    function: Callable[[float], float], left: float, right: float, best: tuple[float, float], tolerance: float
) -> tuple[float, float]:
    first, second = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    at_first, at_second = function(first), function(second)
    while right - left > tolerance:
        best = min(best, (at_first, first), (at_second, second))
        if at_first <= at_second:
            right, second, at_second = second, first, at_first
            first = right - _GOLDEN * (right - left)
            at_first = function(first)
        else:
            left, first, at_first = first, second, at_second
            second = left + _GOLDEN * (right - left)
            at_second = function(second)
    best = min(best, (at_first, first), (at_second, second))
    return best[1], best[0]
