"""Many real moments at once: proved upper bounds of log M over a grid of tilts, and slopes for planning.

All tilts share one x-grid, so that a table of thirty moments costs little more than one. The bounds are a few parts in
1e9 above the truth, which is all that Chernoff bounds and alias bounds need; ``_tilted_step`` has full precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpbudget._numerics import UNIT, exp_or_inf
from dpbudget._pause import pause
from dpbudget.accountants._law import EXPONENT_CAP, Array, Law, Losses, law_of, losses_at
from dpbudget.accountants._phases import Phase
from dpbudget.accountants._quadrature import Grid, choose_grid, correction_tails, moment_tails, shrink_of
from dpbudget.mechanisms import Direction

_SQRT_2PI = math.sqrt(2.0 * math.pi)
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
# Most (node, tilt) pairs of a table; beyond it the bound by convexity has to do.
_MAX_WORK = 1 << 22
# Second-order terms of the rounding analysis.
_SAFETY = 1.25
#: Ratio of neighbouring tilts of the shared grid; index 0 is tilt 1. A table has whole blocks of it.
GRID_RATIO = 1.12
BLOCK = 8
#: Tilts of the grid lie between about 1e-9 and 1e9.
INDEX_RANGE = (-184, 184)


@dataclass(frozen=True)
class Rows:
    """Log moments at increasing tilts; arrays [C] but for ``steps``.

    Attributes:
        tilts: c > 0.
        upper: upper bounds of log E exp(c L).
        slope, bend: estimates of the first two derivatives.
        steps: upper bounds of one use of each law, [laws, C].
    """

    tilts: Array
    upper: Array
    slope: Array
    bend: Array
    steps: Array

    def take(self, index: npt.NDArray[np.intp]) -> Rows:
        """The chosen tilts."""
        return Rows(self.tilts[index], self.upper[index], self.slope[index], self.bend[index], self.steps[:, index])


def log_kappas(c: Array) -> Array:
    """:func:`dpbudget._numerics.log_kappa` of an array."""
    value: Array = -c * np.log1p(1.0 / c) - np.log1p(c)
    return value


def step_rows(law: Law, tilts: Array) -> tuple[Array, Array, Array]:
    """(upper bounds of one step's log moments, slopes, bends) at increasing ``tilts`` > 0."""
    pause()
    square = law.square_distance
    gaussian = 0.5 * tilts * (tilts + 1.0) * square
    if law.plain:
        return gaussian * (1.0 + 64.0 * UNIT), (tilts + 0.5) * square, np.full_like(tilts, square)
    ceiling = _ceiling(law.rate, gaussian)
    grid = _shared_grid(law, tilts)
    if grid is None:
        return ceiling, (tilts + 0.5) * square, np.full_like(tilts, square)
    upper, slope, bend = _sums(law, tilts, grid)
    return np.minimum(upper, ceiling), slope, bend


def _ceiling(rate: float, gaussian: Array) -> Array:
    """log(1 - q + q e^g): joint convexity in the two laws, no quadrature needed."""
    small = np.log1p(rate * np.expm1(np.minimum(gaussian, 1.0)))
    large = np.logaddexp(0.0, np.log(np.expm1(np.clip(gaussian, 1.0, 40.0))) + np.maximum(gaussian - 40.0, 0.0)
                         + math.log(rate))  # fmt: skip
    # Where the result is small, g <= -log(rate) <= 45, so its logarithm is off by at most 16 u * 90.
    value: Array = np.where(gaussian <= 1.0, small, large) * (1.0 + 1e-12)
    return value


def _shared_grid(law: Law, tilts: Array) -> Grid | None:
    """The grid of the largest tilt; its window holds those of the smaller ones."""
    chi = math.expm1(min(law.square_distance, 60.0))
    scale = min(float(tilts[0]), 1.0) * law.rate * min(1.0, law.rate * chi)
    grid = choose_grid(law, float(tilts[-1]), 0.0, 24.0 - math.log(scale))
    return None if grid is None or len(grid.nodes) * len(tilts) > _MAX_WORK else grid


def _sums(law: Law, tilts: Array, grid: Grid) -> tuple[Array, Array, Array]:
    x = grid.nodes
    one = losses_at(law, x)
    reach = max(float(x[-1]), -float(x[0]) if law.side == "replace" else 0.0)
    small = law.shift * (reach - 0.5 * law.shift) < EXPONENT_CAP
    largest = float(one.loss.max())
    fits = int(np.count_nonzero(tilts * largest < EXPONENT_CAP)) if small else 0
    pieces = []
    if fits:
        pieces.append(_centred(law, tilts[:fits], grid, one))
    if fits < len(tilts):  # the largest tilts are those that overflow
        pieces.append(_scaled(law, tilts[fits:], grid, one))
    upper, slope, bend = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return upper, slope, bend


def _centred(law: Law, tilts: Array, grid: Grid, one: Losses) -> tuple[Array, Array, Array]:
    """M - 1 = c E L + E[e^{cL} - 1 - cL]: integrands >= 0, every error added."""
    x, loss, c = grid.nodes, one.loss, tilts
    square = x * x
    density = np.exp(-0.5 * square) * (grid.step / _SQRT_2PI)
    weights = density * one.weight
    exponents = np.multiply.outer(c, loss)
    excess = np.expm1(exponents)
    excess -= exponents
    slanted, bent = weights * loss, weights * loss * loss
    roundoff = (320.0 + len(x) + square) * UNIT + one.weight_error
    columns = np.stack([weights, weights * one.loss_error, weights * roundoff, slanted, bent], axis=1)
    value, drift, rounded, first, second = (excess @ columns).T
    size = np.abs(loss)
    mean = float(density @ one.deviation)
    mean_error = float(density @ (one.deviation_error + (square + len(x) + 22.0) * UNIT * np.abs(one.deviation)))
    linear = 40.0 * UNIT * float(weights @ size) + mean_error + 8.0 * UNIT * abs(mean)
    # |e^y - 1| <= (e^y - 1 - y) + |y|
    error = c * (drift + c * float((weights * size) @ one.loss_error)) + 20.0 * UNIT * value + rounded + c * linear
    value = value + c * mean
    value += _SAFETY * error
    upper = np.log1p(value + _quadrature_error(law, c, grid, one, 1.0 + value, np.zeros_like(c)))
    moment = 1.0 + value
    curvature = float(bent.sum())
    slope = (mean + first + c * curvature) / moment
    bend = (curvature + second + c * float(bent @ loss)) / moment - slope * slope
    return upper * (1.0 + 64.0 * UNIT), slope, bend


def _scaled(law: Law, tilts: Array, grid: Grid, one: Losses) -> tuple[Array, Array, Array]:
    """M itself as a sum of positive terms, scaled by its largest one."""
    x, c = grid.nodes, tilts
    exponents = np.multiply.outer(c, one.loss)
    exponents += -0.5 * x * x - _LOG_SQRT_2PI + one.log_weight
    top = exponents.max(axis=1)
    terms = np.exp(exponents - top[:, None])
    terms *= grid.step
    size = np.abs(one.loss)
    rounding = one.weight_error + (x * x + 24.0 * np.abs(one.log_weight) + len(x) + 120.0) * UNIT
    columns = np.stack([np.ones_like(x), rounding, one.loss_error + 4.0 * UNIT * size, one.loss, one.loss**2], axis=1)
    total, rounded, drift, first, second = (terms @ columns).T
    moment = total + _SAFETY * (rounded + c * drift + 8.0 * UNIT * np.abs(top) * total)
    moment = moment + _quadrature_error(law, c, grid, one, moment, top)
    slope = first / total
    upper = top + np.log(moment)
    return upper + 64.0 * UNIT * (np.abs(top) + np.abs(upper)), slope, second / total - slope * slope


def _quadrature_error(law: Law, c: Array, grid: Grid, one: Losses, moment: Array, scale: Array) -> Array:
    """Strip and tails, relative to exp(scale); ``moment`` bounds the computed sum. Infinite where there is no bound."""
    x = grid.nodes
    log_edges = [
        -0.5 * float(x[k]) ** 2 - _LOG_SQRT_2PI + float(one.log_weight[k]) + c * float(one.loss[k]) - scale
        for k in (0, -1)
    ]
    rest = moment_tails(law, (float(x[0]), float(x[-1])), c, (log_edges[0], log_edges[1]))
    strip = exp_or_inf(max(grid.log_strip_factor(), -700.0))
    of_one, of_ratio = correction_tails(law, grid)
    correction = strip + of_one + (1.0 + c) * (2.0 * law.rate * strip + of_ratio)
    rest = rest + correction * np.exp(-np.minimum(scale, 700.0))
    factor = np.exp(np.minimum(grid.log_strip_factor() + shrink_of(law, c, grid.angle), 0.0))
    usable = factor < 0.3
    safe = np.where(usable, factor, 0.0)
    answer: Array = np.where(usable, rest + safe * (moment + rest) / (1.0 - safe), np.inf)
    return answer


class MomentTable:
    """Upper bounds K(c) >= log E exp(c L) of a composition in one direction, on the shared grid, remembered.

    Args:
        phases: the composition.
        direction: which divergence.
        laws: one law a phase, with a cut if wanted; made from the phases if not given.
    """

    def __init__(self, phases: Sequence[Phase], direction: Direction, laws: Sequence[Law] | None = None) -> None:
        self.phases, self.direction = tuple(phases), direction
        self.laws = tuple(laws or (law_of(phase.pair, direction) for phase in self.phases))
        self._counts = np.array([float(phase.count) for phase in self.phases])
        self._known: dict[tuple[int, int], Rows] = {}

    def rows(self, tilts: Array) -> Rows:
        """The composition at any increasing tilts."""
        uppers, slopes, bends = (
            np.stack(part) for part in zip(*(step_rows(law, tilts) for law in self.laws), strict=True)
        )
        upper = (self._counts @ uppers) * (1.0 + (64.0 + len(self.laws)) * UNIT)
        return Rows(tilts, upper, self._counts @ slopes, self._counts @ bends, uppers)

    def around(self, start: float, objective: Callable[[Rows], Array], enough: float = -math.inf) -> Rows:
        """At least three blocks about the tilt at which ``objective`` is least, searched from ``start``.

        The search ends early where the objective falls below ``enough``.
        """
        middle = math.floor(math.log(start) / math.log(GRID_RATIO) / BLOCK)
        first, last = middle - 1, middle + 1
        rows = self._blocks(first, last)
        while True:
            heights = objective(rows)
            best = int(np.argmin(heights))
            if heights[best] < enough:
                return rows
            if best < BLOCK and first * BLOCK > INDEX_RANGE[0]:
                first -= 1
                rows = join([self._blocks(first, first), rows])
            elif best >= len(rows.tilts) - BLOCK and last * BLOCK < INDEX_RANGE[1]:
                last += 1
                rows = join([rows, self._blocks(last, last)])
            else:
                return rows

    def _blocks(self, first: int, last: int) -> Rows:
        """Blocks first .. last of the grid from one table. Always the same ones together: they share an x-grid."""
        if (first, last) not in self._known:
            index = np.arange(first * BLOCK, (last + 1) * BLOCK, dtype=np.float64)
            self._known[first, last] = self.rows(GRID_RATIO**index)
        return self._known[first, last]

    def start(self, log_delta: float) -> float:
        """The best tilt if the composition were Gaussian with its variance at tilt 0, within sane limits."""
        variance = math.fsum(
            phase.count * law.rate**2 * math.expm1(min(law.square_distance, 3.0))
            for phase, law in zip(self.phases, self.laws, strict=True)
        )
        return min(max(math.sqrt(-2.0 * log_delta / max(variance, 1e-300)), 1e-4), 30.0)


def join(parts: Sequence[Rows]) -> Rows:
    """Rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    tilts, upper, slope, bend = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("tilts", "upper", "slope", "bend")
    )
    return Rows(tilts, upper, slope, bend, np.concatenate([part.steps for part in parts], axis=1))
