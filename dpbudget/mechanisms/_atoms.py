"""Pairs with finitely many outcomes: their losses are atoms, and their tails finite sums taken with 60 digits.

A threshold is compared with an atom exactly: a loss is held as the nearest float and the sign of the rest, so "L > t"
is strict at the atom itself and one float around it. Assumes that mpmath's exp and log are right to 50 digits.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dpbudget.mechanisms._tail_bounds import thresholds, two_floats
from dpbudget.mechanisms.base import Direction, DominatingPair, Tails

if TYPE_CHECKING:
    from dpbudget.mechanisms.base import Array

DIGITS = 60


class AtomicPair(DominatingPair):
    """A pair given by the probabilities of its outcomes; subclasses are hashable values."""

    @abstractmethod
    def outcomes(self) -> Sequence[tuple[Any, Any]]:
        """(P, Q) of every outcome as mpmath numbers; called with enough digits set."""

    def losses(self) -> Sequence[Any] | None:
        """log(P / Q) of every outcome where it is known exactly (it is not used where a probability is 0)."""
        return None

    def tails(self, losses: Array, direction: Direction) -> Tails:
        """Sums over the atoms above each threshold, right to one unit in the last place."""
        import numpy as np

        values = thresholds(losses)
        keys, columns = _table(self, direction)
        # keys ascend; an atom is above t where t < key.
        index = np.searchsorted(np.array(keys), values, side="right")
        return Tails(*(np.array(column)[index] for column in columns))


@lru_cache(maxsize=64)
def _table(pair: AtomicPair, direction: Direction) -> tuple[list[float], list[list[float]]]:
    """Ascending keys of the atoms and, for every index, bounds of F and S of the atoms from there on."""
    import mpmath

    with mpmath.workdps(DIGITS):
        known = pair.losses()
        atoms = []
        for position, (p, q) in enumerate(pair.outcomes()):
            first, second = (p, q) if direction == "remove" else (q, p)
            loss = None if known is None or p == 0 or q == 0 else known[position]
            if first:
                atoms.append((_key(first, second, loss, direction), first, second))
            elif second:
                atoms.append((-math.inf, first, second))
        atoms.sort(key=lambda atom: atom[0])
        keys = [key for key, _, _ in atoms]
        columns: list[list[float]] = []
        for part in (1, 2):
            total, lower, upper = mpmath.mpf(0), [0.0], [0.0]
            for atom in reversed(atoms):
                total += atom[part]
                lower.append(outward(total, -math.inf))
                upper.append(outward(total, math.inf))
            columns += [lower[::-1], upper[::-1]]
    return keys, columns


def _key(first: Any, second: Any, loss: Any, direction: Direction) -> float:
    """The float k for which the atom's loss is above t exactly where t < k."""
    import mpmath

    if second == 0:
        return math.inf
    if loss is None:
        high, rest = two_floats(mpmath.log(first / second))
    else:
        high, rest = two_floats(loss if direction == "remove" else -loss)
    return math.nextafter(high, math.inf) if rest > 0 else high


def outward(value: Any, towards: float) -> float:
    """A probability as a float, one unit in the last place towards -inf or inf; 0 stays 0."""
    return min(max(math.nextafter(float(value), towards), 0.0), 1.0) if value else 0.0
