"""Moments of a bounded privacy loss from its tails alone, for the Renyi accountant of general pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dpbudget._numerics import log1p_exp
from dpbudget.accountants._pld_law import spread
from dpbudget.accountants._pld_plan import loss_grid

if TYPE_CHECKING:
    from dpbudget.mechanisms.base import Direction, DominatingPair

# Logarithm of more than the mass that underflow may have lost; it is put at the largest loss.
_LOG_LOST = -600.0


def lattice_log_moment(pair: DominatingPair, direction: Direction) -> Callable[[float], float]:
    """Upper bound of log E exp(c L) for any real c > 0, L the privacy loss of ``pair`` in ``direction``.

    The moment of a pessimistic law on an uneven grid: x -> x^-c is convex and decreasing in x = e^-L, so a profile that
    is nowhere lower has no smaller moment (docs/accounting-pld.md, "Domination"). The steps of the grid are 1.6 % of a
    loss, which costs up to 1.6 % of the moment's logarithm where the largest losses decide.

    Returns:
        The bound as a function of c. It is infinite wherever the tails leave any mass, be it 1e-300, above losses of
        2e6: no moment can be bounded from tails that never reach zero.
    """
    nodes = loss_grid()
    vanished = np.flatnonzero(pair.tails(nodes, direction).first_upper <= 0.0)
    if len(vanished) == 0:
        return lambda tilt: math.inf
    law = spread(pair, direction, nodes[: max(int(vanished[0]) + 1, 2)])
    largest = max(float(law.losses[-1]), 0.0)

    def bound(tilt: float) -> float:
        moment = law.log_moment(tilt) + law.accuracy(tilt)
        lost = _LOG_LOST + tilt * largest - moment
        return math.nextafter(moment + log1p_exp(lost) * (1.0 + 1e-12), math.inf)

    return bound
