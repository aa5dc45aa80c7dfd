"""Moments of a privacy loss from its tails alone, for the Renyi accountant of general pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from dpbudget.accountants._pld_law import spread
from dpbudget.accountants._pld_plan import loss_grid

if TYPE_CHECKING:
    from dpbudget.mechanisms.base import Direction, DominatingPair

# Mass at +inf that is no more than what underflow may have lost.
_LOST = 1e-280


def lattice_log_moment(pair: DominatingPair, direction: Direction) -> Callable[[float], float]:
    """Upper bound of log E exp(c L) for any real c > 0, L the privacy loss of ``pair`` in ``direction``.

    The moment of a pessimistic law on an uneven grid: c > 0 makes x -> x^-c convex and decreasing in x = e^-L, so a
    profile that is nowhere lower has no smaller moment (docs/accounting-pld.md, "Domination"). The grid's steps are
    1.6 % of a loss, which costs about 1e-5 of the moment's logarithm for a smooth law.

    Returns:
        The bound as a function of c; infinite where losses above 2e6 or infinite ones have mass above 1e-280.
    """
    law = spread(pair, direction, loss_grid())

    def bound(tilt: float) -> float:
        if law.infinite > _LOST:
            return math.inf
        return law.log_moment(tilt) + law.accuracy(tilt)

    return bound
