"""Certified arithmetic that the pairs share: normal tails at an uncertain point, sums of bounds, the threshold array.

Assumed: elementary functions of NumPy within 8 ulp, and ``scipy.special.ndtr`` within (32 + 4 z^2) units of rounding
relative to its value for z >= -37.5 (its algorithm rounds z^2 / 2 before exponentiating it); tests compare both with
mpmath. NumPy and SciPy load on first use, so that importing a mechanism costs nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dpbudget._numerics import UNIT
from dpbudget.errors import InvalidParameter
from dpbudget.mechanisms.base import Tails

if TYPE_CHECKING:
    from dpbudget.mechanisms.base import Array

    Interval = tuple[Array, Array]

#: Where the normal tail is 4.6e-308, hence still a normal float; farther out the upper bound stays and the lower is 0.
_FARTHEST = 37.5


def thresholds(losses: Array) -> Array:
    """``losses`` as a finite one-dimensional float64 array, else InvalidParameter."""
    import numpy as np

    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1 or not np.all(np.isfinite(values)):
        raise InvalidParameter("losses must be a one-dimensional array of finite numbers")
    return values


def normal_tail(z: Array, error: Array | float) -> Interval:
    """Bounds of P(N(0, 1) > z') for every z' within ``error`` of z; z of any sign, infinite ones exact."""
    import numpy as np
    from scipy.special import ndtr

    # One more rounding for the sum.
    low, high = np.nextafter(z - error, -np.inf), np.nextafter(z + error, np.inf)
    below, above = np.clip(high, -1e3, _FARTHEST), np.clip(low, -1e3, _FARTHEST)
    lower = ndtr(-below) * (1.0 - _relative(below))
    upper = np.minimum(ndtr(-above) * (1.0 + _relative(above)), 1.0)
    lower = np.where(high > _FARTHEST, 0.0, np.where(np.isneginf(z), 1.0, lower))
    return lower, np.where(np.isposinf(z), 0.0, upper)


def _relative(z: Array) -> Array:
    import numpy as np

    return (34.0 + 4.0 * np.square(np.maximum(z, 0.0))) * UNIT


def mix(weight: float, first: Interval, second: Interval) -> Interval:
    """Bounds of (1 - weight) first + weight second for bounds of two probabilities."""
    import numpy as np

    lower = ((1.0 - weight) * first[0] + weight * second[0]) * (1.0 - 4.0 * UNIT)
    # The smallest float covers products that underflow.
    upper = ((1.0 - weight) * first[1] + weight * second[1]) * (1.0 + 4.0 * UNIT) + 5e-324
    return np.maximum(lower - 5e-324, 0.0), np.minimum(upper, 1.0)


def tails_of(first: Interval, second: Interval) -> Tails:
    """The two intervals as :class:`Tails`."""
    return Tails(first[0], first[1], second[0], second[1])


def two_floats(value: Any) -> tuple[float, float]:
    """``value`` (an mpmath number or a Fraction) as the float nearest to it and the rest, itself rounded."""
    high = float(value)
    # Fraction - float would round, so the subtraction is done in the exact type.
    return high, float(value - type(value)(high)) if math.isfinite(high) else 0.0
