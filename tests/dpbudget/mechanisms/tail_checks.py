"""What every pair's tails are held to, against numbers of mpmath."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np

from dpbudget.mechanisms import Direction, DominatingPair, Tails

#: The oracle's own rounding, at 60 digits or more.
ROUND = mpmath.mpf(10) ** -45
Truth = Callable[[Any, Direction], tuple[Any, Any]]  # threshold -> (F(L > t), S(L > t))


def check_enclosure(
    pair: DominatingPair, truth: Truth, losses: Sequence[float], relative: float | None = 1e-10, floor: float = 1e-299
) -> None:
    """lower <= truth <= upper for both laws and directions, and tight to ``relative`` where the truth exceeds floor."""
    for direction in ("remove", "add"):
        tails = pair.tails(np.array(losses), direction)
        for index, loss in enumerate(losses):
            first, second = truth(mpmath.mpf(float(loss)), direction)
            for name, exact, low, high in (
                ("F", first, tails.first_lower[index], tails.first_upper[index]),
                ("S", second, tails.second_lower[index], tails.second_upper[index]),
            ):
                where = f"{name} {direction} at {loss!r}: {low!r} {mpmath.nstr(exact, 20)} {high!r}"
                assert 0.0 <= low <= exact * (1 + ROUND), where
                assert exact * (1 - ROUND) <= high <= 1.0, where
                if relative is not None and exact > floor:
                    assert high - low <= relative * exact, where


def check_shape(tails: Tails, losses: Sequence[float], slack: float = 1e-12) -> None:
    """Tails fall with t; delta = F - e^t S falls with t and is convex in e^t."""
    for values in (tails.first_lower, tails.first_upper, tails.second_lower, tails.second_upper):
        assert np.all(np.diff(values) <= slack)
    powers = np.exp(np.array(losses))
    delta = 0.5 * (tails.first_lower + tails.first_upper) - powers * 0.5 * (tails.second_lower + tails.second_upper)
    assert np.all(np.diff(delta) <= slack)
    slopes = np.diff(delta) / np.diff(powers)
    assert np.all(np.diff(slopes) >= -slack / np.min(np.diff(powers)))


def normal_tail(z: Any) -> Any:
    return mpmath.erfc(z / mpmath.sqrt(2)) / 2
