"""Where to compute: windows of single losses, tilt, step and length of the transform.

Nothing here is part of a proof except :meth:`Outline.ceiling` and :meth:`Outline.log_delta`, which are moment bounds of
a pessimistic law on a coarse, uneven grid; everything else only decides how wide an answer is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpbudget._numerics import log_kappa, truncate_mantissa
from dpbudget.accountants._pld_fft import Lattice, certain_mass, chernoff
from dpbudget.accountants._pld_law import Law, spread, upper_profile

if TYPE_CHECKING:
    from dpbudget.mechanisms.base import Array, Direction, DominatingPair

# The uneven grid: SCALE sinh(u), |u| <= REACH in steps of 1/RESOLUTION, hence losses up to 5e6 in steps of 1.6 %.
_SCALE, _REACH, _RESOLUTION = 1e-6, 29, 64
# Tilts of the table: a factor 1.2 apart.
_TILTS = 1.2 ** np.arange(-76.0, 77.0)
_ALL_TILTS = np.concatenate((-_TILTS[::-1], [0.0], _TILTS))
# Nats of the mass outside the window, and the share of it that a single loss may cut off.
_OUTSIDE, _CUT = 26.0, 1e-7
# A transform of this length costs little.
_CHEAP = 1 << 18
# Share of the mass near the window's end that makes an atom.
_ATOM = 1e-3
# No step is longer.
_LONGEST = 1e9
# Significant bits of a step: products with an index below 2^26 are exact.
_BITS, _LARGEST_INDEX = 27, 1 << 26


@dataclass(frozen=True)
class Outline:
    """Coarse pessimistic laws of every pair within its window, and their log moments.

    Attributes:
        uses: (law, count) by pair.
        moments: log moments of the composition at ``_ALL_TILTS``, without the mass at +inf.
        certain: upper bound of the mass at +inf.
        count: number of uses in all.
        atom: the largest finite loss of a pair, if it has mass of its own; 0 for none.
    """

    uses: tuple[tuple[Law, int], ...]
    moments: Array
    certain: float
    count: int
    atom: float

    def log_delta(self, epsilon: float) -> float:
        """Upper bound of log of the finite part of delta(epsilon): kappa(c) M(c) e^(-c epsilon), c from the table."""
        best = int(np.argmin(self._positive() - _TILTS * epsilon + _KAPPA))
        c = float(_TILTS[best])
        return (chernoff(self.uses, c) - c * epsilon + log_kappa(c)) * (1.0 - 1e-14) + 1e-12 * (1.0 + c * epsilon)

    def ceiling(self, log_delta: float) -> float:
        """Upper bound of the epsilon at which the finite part of delta is e^log_delta."""
        best = int(np.argmin((self._positive() + _KAPPA - log_delta) / _TILTS))
        c = float(_TILTS[best])
        moment = chernoff(self.uses, c)
        return (moment + log_kappa(c) - log_delta + 1e-12 * (1.0 + abs(moment) + abs(log_delta))) / c

    def _positive(self) -> Array:
        return self.moments[len(_TILTS) + 1 :]


_KAPPA = np.array([log_kappa(float(c)) for c in _TILTS])


def loss_grid() -> Array:
    """Losses of both signs, in steps that grow with their size; shape [N]."""
    return np.asarray(_SCALE * np.sinh(np.arange(-_REACH * _RESOLUTION, _REACH * _RESOLUTION + 1) / _RESOLUTION))


def outline(pairs: Sequence[tuple[DominatingPair, int]], direction: Direction, log_delta: float) -> Outline:
    """Windows that cut off a mass far below e^log_delta, and the moments of what is left."""
    count = sum(n for _, n in pairs)
    grid = loss_grid()
    windows = [_window(pair, direction, grid, count, log_delta) for pair, _ in pairs]
    uses = tuple((spread(pair, direction, window), n) for (pair, n), window in zip(pairs, windows, strict=True))
    moments = np.zeros(len(_ALL_TILTS))
    for law, n in uses:
        moments += n * np.array([law.log_moment(float(c)) for c in _ALL_TILTS])
    atoms = (_last_atom(pair, direction, window) for (pair, _), window in zip(pairs, windows, strict=True))
    return Outline(uses, moments, certain_mass(uses)[1], count, max(atoms))


def _last_atom(pair: DominatingPair, direction: Direction, window: Array) -> float:
    """The largest loss up to the window's end that has mass of its own, found by bisection; 0 if it has none.

    A lattice without that point would have to lower all of its mass to the next one below.
    """
    low, high = float(window[0] if len(window) < 3 else window[-3]), float(window[-1])

    def above(loss: float) -> float:
        return float(pair.tails(np.array([loss]), direction).first_upper[0])

    rest, mass = above(high), above(low)
    if mass - rest <= _ATOM * mass:
        return 0.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if above(middle) - rest > 0.5 * (mass - rest) else (low, middle)
    return low if low > 0.0 and above(low * (1.0 - 1e-9)) - above(high * (1.0 + 1e-9)) > _ATOM * mass else 0.0


def _window(pair: DominatingPair, direction: Direction, grid: Array, count: int, log_delta: float) -> Array:
    """The part of ``grid`` on which the pair's losses matter."""
    profile = upper_profile(pair, direction, grid)
    cut = _CUT * math.exp(max(log_delta, -690.0)) / count
    last = int(np.argmax(profile - profile[-1] <= cut))
    tails = pair.tails(grid, direction)
    missing = (1.0 - tails.first_lower) + np.exp(np.minimum(grid, 0.0)) * (1.0 - tails.second_lower)
    small = np.flatnonzero(missing - missing[0] <= max(_CUT / count, 1e-12))
    first = min(int(small[-1]) if len(small) else 0, last)
    return grid[max(first - 1, 0) : last + 2]


def lattice(plan: Outline, epsilon: float, width: float, largest: int) -> Lattice | None:
    """A lattice for delta near ``epsilon``, whose bracket should be ``width`` wide in epsilon.

    Args:
        plan: the moments.
        epsilon: where the answer is expected.
        width: wanted width of the bracket of epsilon.
        largest: largest length of a transform, a power of two.

    Returns:
        None where no transform of the allowed length has a useful window.
    """
    span = max(float(law.losses[-1] - law.losses[0]) for law, _ in plan.uses)
    bulk, step = min(_middle_half(law) for law, _ in plan.uses), 0.0
    for _ in range(60):
        moments = plan.moments + plan.count * _inflation(step)
        index = _best_tilt(moments, epsilon)
        c = float(_ALL_TILTS[index])
        low, high, edges = _edges(moments, index)
        # Steps longer than the bulk of a loss are not second-order yet; shorter ones are cheap up to some length.
        cheap = max(high - low, span) / min(largest, _CHEAP)
        wanted = min(math.sqrt(4.0 * width / ((c + 14.0 / (high - low)) * plan.count)), max(0.25 * bulk, cheap))
        finest = max((high - low) / (largest - 4), 2.0 * span / largest)
        if step == 0.0:
            step = max(wanted, finest)
            continue
        size = 1 << max(math.ceil(math.log2((high - low) / step + 4.0)), 12)
        if size <= largest:
            # What the power of two leaves over makes the step finer.
            step = _round(max((high - low) / (size - 4), 2.0 * span / largest) * (1.0 + 1e-7), plan.atom)
            start = math.floor(low / step)
            if max(abs(start), abs(start + size)) >= _LARGEST_INDEX or start + size < high / step:
                return None
            return Lattice(step, start, size, c, float(_ALL_TILTS[edges[0]]), float(_ALL_TILTS[edges[1]]))
        step = max(1.1 * step, finest)
        if step > _LONGEST:
            break
    return None


def _inflation(step: float) -> Array:
    """What a lattice may add to the log moment of one loss, at every tilt: variance, and a drift of up to a step."""
    return np.asarray((_ALL_TILTS * step) ** 2 / 8.0 + _ALL_TILTS * min(step * step / 8.0, step))


def _middle_half(law: Law) -> float:
    """The distance of the quartiles of a loss."""
    parts = np.cumsum(law.weights)
    first, last = np.searchsorted(parts, (0.25 * parts[-1], 0.75 * parts[-1]))
    return float(law.losses[last] - law.losses[first])


def _round(step: float, aligned: float) -> float:
    """A step of few bits, no finer than ``step`` but for them; a multiple of it is just below ``aligned``."""
    if aligned > step:
        # Tails are sharpest beside an atom: at it, rounding may leave open on which side it lies.
        step = aligned * (1.0 - 1e-9) / math.floor(aligned / step)
    return truncate_mantissa(step, _BITS)


def _best_tilt(moments: Array, epsilon: float) -> int:
    offset = len(_TILTS) + 1
    exponents = moments[offset:] - _TILTS * epsilon + _KAPPA
    # The outermost tilt has none beyond it to bound what is outside.
    return offset + min(int(np.argmin(exponents)), len(_TILTS) - 2)


def _edges(moments: Array, index: int) -> tuple[float, float, tuple[int, int]]:
    """Window edges (low, high) beyond which little tilted mass lies, and the table's tilts that prove it."""
    above = np.arange(index + 1, len(_ALL_TILTS))
    highs = (moments[above] - moments[index] + _OUTSIDE) / (_ALL_TILTS[above] - _ALL_TILTS[index])
    below = np.arange(index)
    lows = (moments[below] - moments[index] + _OUTSIDE) / (_ALL_TILTS[below] - _ALL_TILTS[index])
    low, high = int(np.argmax(lows)), int(np.argmin(highs))
    return float(lows[low]), float(highs[high]), (int(below[low]), int(above[high]))
