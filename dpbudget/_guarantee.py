"""Epsilon and delta: their ranges, their codes and the way out, below everything that takes them."""

from __future__ import annotations

import math
from numbers import Real

from dpbudget.errors import InvalidParameter

#: Largest epsilon that a budget may grant; beyond it the guarantee says nothing.
MAX_EPSILON = 1e6


def as_epsilon(value: object) -> float:
    """A finite epsilon in (0, 1e6]; raises InvalidParameter (DP001)."""
    number = as_real(value)
    if number is None or not 0.0 < number <= MAX_EPSILON:
        hint = "pass epsilon as a number; 1 is strong, 3 common, 8 weak"
        if number == 0.0:
            hint = "pass epsilon > 0; epsilon 0 means that the model may not depend on the data at all"
        raise InvalidParameter(
            f"epsilon must be a finite number in (0, {MAX_EPSILON:g}], got {value!r}", code="DP001", hint=hint
        )
    return number


def as_delta(value: object) -> float:
    """A delta in (0, 1); raises InvalidParameter (DP002)."""
    number = as_real(value)
    if number is None or not 0.0 < number < 1.0:
        raise InvalidParameter(
            f"delta must lie strictly between 0 and 1, got {value!r}",
            code="DP002",
            hint="pass a delta well below 1 / dataset size, such as 1e-5 for 60000 records",
        )
    return number


def as_real(value: object) -> float | None:
    """The float of a real number; None for NaN, booleans, text and everything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number
