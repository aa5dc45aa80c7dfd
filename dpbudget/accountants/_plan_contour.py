"""Choosing a contour: tilt, step and cut. Heuristics: the choice changes the width of an answer, not its validity.

The one proved number made here is the decay beyond the cut, from ``_decay``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dpbudget._numerics import log1p_exp, log_kappa, minimize_on_integers, truncate_mantissa
from dpbudget.accountants._contour import Contour, Line, step_accuracy
from dpbudget.accountants._decay import Decay
from dpbudget.accountants._moment_bound import COARSE, GRID_RANGE, GRID_RATIO, MomentBound, grid_tilt, log_moment_bounds
from dpbudget.accountants._phases import Phase
from dpbudget.accountants._tilted_step import TiltedStep
from dpbudget.mechanisms import Direction

#: Most nodes on the line, and most (node, output, phase) triples, that a contour may use.
MAX_LINE_NODES = 1 << 16
MAX_WORK = 1 << 22
# Tilts below and above the saddle, as indices of the grid, that may be chosen or bound the aliases.
_OFFSETS = tuple(COARSE * k for k in range(-16, 10))
_STEEP_OFFSETS = (-256, -128, -64, -40, -24, -16, -12, -8, -6, -4, -2, 0, 2, 4, 6, 8, 12, 16, 24, 40, 64)
# Nats of amplitude between neighbours of the coarse grid beyond which the fine one is used.
_STEEP = 1.0
# A tilt may lose so many nats of amplitude against the saddle for the sake of a larger step, at this price a nat.
_MAX_LOSS, _LOSS_PRICE = 7.0, 0.2


def plan_contour(
    moments: MomentBound, epsilon: float, log_delta: float, tolerance: float, start: int
) -> Contour | None:
    """A contour whose errors are about ``tolerance`` relative to delta near (epsilon, exp(log_delta)), or None.

    None where no tilt works or the nodes would be too many to be of use. ``start`` is a grid index near the saddle.
    """
    saddle, offsets = _saddle(moments, epsilon, start)
    if not GRID_RANGE[0] - offsets[0] <= saddle <= GRID_RANGE[1] - offsets[-1]:
        return None
    table = [grid_tilt(saddle + offset) for offset in offsets]
    target = math.log(tolerance) + log_delta
    tilt, period = _tilt_and_period(moments, table, epsilon, target)
    step = truncate_mantissa(2.0 * math.pi / period)
    cut = _cut(moments.phases, moments.direction, tilt, step, moments(tilt) - tilt * epsilon - target)
    if cut is None:
        return None
    count, log_decay = cut
    neighbours = tuple(other for other in table if other != tilt)
    contour = Contour(moments, Line(tilt, step, count, log_decay, neighbours))
    return contour if contour.usable else None


def guess_epsilon(moments: MomentBound, start: int, log_delta: float) -> float:
    """Estimate of epsilon by the saddle-point approximation of delta, over the tilts of the grid from ``start`` on."""
    index = start
    here = _saddle_estimate(moments, index)
    # The approximate delta falls as the tilt grows; walk to the pair of tilts that encloses the target.
    stride = -COARSE if here[0] < log_delta else COARSE
    for _ in range(60):
        there = _saddle_estimate(moments, index + stride)
        if (there[0] - log_delta) * (here[0] - log_delta) <= 0.0:
            share = (log_delta - here[0]) / (there[0] - here[0]) if there[0] != here[0] else 0.5
            return here[1] + share * (there[1] - here[1])
        index, here = index + stride, there
    return here[1]


def _saddle_estimate(moments: MomentBound, index: int) -> tuple[float, float]:
    """(approximate log delta, epsilon) whose saddle point is this tilt of the grid, by differences of K in log c."""
    c, log_ratio = grid_tilt(index), COARSE * math.log(GRID_RATIO)
    below, here, above = (moments(grid_tilt(index + k)) for k in (-COARSE, 0, COARSE))
    # K is nearly a power of c between neighbours, so differences are taken of log K.
    logs = [math.log(max(value, 1e-300)) for value in (below, here, above)]
    power = (logs[2] - logs[0]) / (2.0 * log_ratio)
    bend = (logs[2] - 2.0 * logs[1] + logs[0]) / log_ratio**2
    slope = here * power / c
    curvature = max(here * (power * (power - 1.0) + bend) / (c * c), 0.0)
    epsilon = slope - 1.0 / c - 1.0 / (1.0 + c)
    spread = curvature + c**-2 + (1.0 + c) ** -2
    log_delta = here - c * epsilon - math.log(c) - math.log1p(c) - 0.5 * math.log(2.0 * math.pi * spread)
    return log_delta, epsilon


def _saddle(moments: MomentBound, epsilon: float, start: int) -> tuple[int, tuple[int, ...]]:
    """Index of the grid tilt at which the integrand is least on the real axis, and offsets of tilts to try there."""

    def height(index: int) -> float:
        c = grid_tilt(index)
        return moments(c) - c * epsilon - math.log(c) - math.log1p(c)

    index, least = minimize_on_integers(height, start, GRID_RANGE, 4 * COARSE, COARSE)
    if min(height(index - COARSE), height(index + COARSE)) < least + _STEEP:
        return index, _OFFSETS
    return minimize_on_integers(height, index, GRID_RANGE, COARSE // 2, 1)[0], _STEEP_OFFSETS


def _tilt_and_period(
    moments: MomentBound, table: list[float], epsilon: float, log_target: float
) -> tuple[float, float]:
    """The tilt of the table with the least period B at which both alias sums are bounded by exp(log_target).

    At the saddle itself the moments may explode just above (a rare large loss begins to dominate them), which makes the
    period long; a smaller tilt then costs little amplitude.
    """
    amplitudes = [moments(c) - c * epsilon for c in table]
    excesses = [a + log_kappa(c) - log_target for c, a in zip(table, amplitudes, strict=True)]
    least = min(amplitudes)
    best = (math.inf, table[0], math.inf)
    for c, amplitude in zip(table, amplitudes, strict=True):
        if amplitude > least + _MAX_LOSS:
            continue
        below, above = log1p_exp(-log_target) / c, math.inf
        for other, excess in zip(table, excesses, strict=True):
            if other < c:
                below = min(below, log1p_exp(excess) / (c - other))
            elif other > c:
                above = min(above, log1p_exp(excess) / (other - c))
        period = max(below, above)
        best = min(best, (math.log(period) + _LOSS_PRICE * (amplitude - least), c, period))
    return best[1], best[2]


def _cut(
    phases: Sequence[Phase], direction: Direction, tilt: float, step: float, gap: float
) -> tuple[int, float] | None:
    """The last kept node and a log bound of |M / M(c)| beyond it: the earliest cut below exp(-gap), or the last."""
    candidates = np.unique(np.ceil(1.07 ** np.arange(11, int(math.log(MAX_LINE_NODES) / math.log(1.07)))))
    total = np.zeros(len(candidates))
    for phase in phases:
        pair = phase.pair
        if pair.rate >= 1.0:
            total -= phase.count * 0.5 * np.square(candidates * step / pair.sigma) * (1.0 - 1e-14)
            continue
        top = log_moment_bounds(pair, tilt, direction)[1]
        decay = Decay(pair.rate, pair.sigma, tilt, direction, top)
        total += phase.count * decay.log_rho(candidates * step)
    enough = total - np.log(math.pi * step * (candidates - 1.0)) < -gap
    best = int(np.argmax(enough)) if enough.any() else len(candidates) - 1
    while best >= 0 and _work(phases, direction, tilt, step, int(candidates[best])) > MAX_WORK:
        best -= 4
    return None if best < 0 else (int(candidates[best]) - 1, float(total[best]))


def _work(phases: Sequence[Phase], direction: Direction, tilt: float, step: float, count: int) -> float:
    total = 0.0
    for phase in phases:
        pair = phase.pair
        if pair.rate >= 1.0:
            continue
        probe = TiltedStep(pair.rate, pair.sigma, tilt, direction, step * count, step_accuracy(phase.count))
        if not probe.usable:
            return math.inf
        total += 0.7 * count * len(probe.grid.nodes)
    return total
