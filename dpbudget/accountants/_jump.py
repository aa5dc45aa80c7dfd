"""A contour for what at least one rare large loss contributes, free of the bulk's rounding.

Where delta needs one rare large loss, the ordinary losses cancel in the contour sum to one part in 10^10 and more, and
their rounding drowns delta. Split a step's measure smoothly at an output: M = N + J, J the jumps. Then

    M^n - N^n = M^n (1 - (1 - J / M)^n)

belongs to the measure of all outputs with at least one jump, and is computed with an error relative to J. What has no
jump, N^n, is bounded by a moment at a tilt of its own. For one phase. docs/accounting.md, "Rare large losses".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpbudget._numerics import UNIT, truncate_mantissa
from dpbudget.accountants._contour import Contour, Line, step_accuracy
from dpbudget.accountants._cutting import dropped_mass
from dpbudget.accountants._decay import Decay
from dpbudget.accountants._fourier import PAIRWISE, turn_along
from dpbudget.accountants._law import Array, Cut, Law, losses_at
from dpbudget.accountants._moment_table import Rows, log_kappas, step_rows
from dpbudget.accountants._plan_contour import earliest_cut, tilt_and_period, witnesses
from dpbudget.accountants._quadrature import choose_grid, moment_tails, normal_tail, shrink_of
from dpbudget.accountants._tilted_step import Complex, TiltedStep

_SAFETY = 1.25
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
# Cells of the bound of the bulk, their left end, and the tilt at which the mean loss is bounded.
_CELLS, _LEFT, _SMALL_TILT = 3000, 9.5, 1e-3
# The split part must be so small a share of a step that M - J stays near M.
_LARGEST_SHARE = 1e-3


@dataclass(frozen=True)
class Jumps:
    """J(c + iu) / e^scale with absolute errors; ``top`` bounds J(c) / e^scale."""

    value: Complex
    error: Array
    top: float


def jumps_of(step: TiltedStep, split: Cut, h: float, count: int) -> Jumps:
    """Moments of the part of ``step`` beyond ``split`` at c + i k h, k = 0 .. count (count 0: at c alone)."""
    law, grid, x = step.law, step.grid, step.grid.nodes
    beyond = split.kept(x)[1]
    weights = step.tilted * beyond
    exponent_error = 6.0 * UNIT * (np.abs(x) + abs(split.at)) / split.width
    relative = step.relative + exponent_error + (100.0 + PAIRWISE) * UNIT
    top = float(weights.sum())
    u = np.arange(count + 1, dtype=np.float64) * h
    value = np.full(count + 1, top, dtype=np.complex128)
    error = np.full(count + 1, float(weights @ relative) * _SAFETY)
    if count:
        turned = turn_along(step.losses.loss, weights, relative, h, count)
        drift = u * float(weights @ (step.losses.loss_error + 4.0 * UNIT * np.abs(step.losses.loss)))
        error += _SAFETY * (drift + 1.5 * turned.linear * u + turned.constant)
        value += turned.value
    # The split function obeys the same bound in the strip as the cut: 1 / cos(v / 2) of its value on the real line.
    v = grid.angle / (law.shift * split.width)
    shrink = float(shrink_of(law, step.tilt, grid.angle)) - math.log(math.cos(0.5 * v)) if v < 3.1 else math.inf
    strip = grid.log_strip_factor() + shrink
    left = step.log_edges[0] + (float(x[0]) - split.at) / split.width
    tails = float(moment_tails(law, (float(x[0]), float(x[-1])), step.tilt, (left, step.log_edges[1])))
    bound = (top + float(error[0]) + tails) / max(1.0 - math.exp(min(strip, 0.0)), 1e-3)
    error += np.exp(np.minimum(strip + u * grid.angle, 700.0)) * bound + tails
    return Jumps(value, error, bound if strip < -1.0 else math.inf)


class JumpContour(Contour):
    """delta of one phase's composition: the jumps' contour plus a bound of what has no jump.

    Args:
        law: the step, cut above.
        count: n.
        split: where jumps begin.
        line: its moments bound those of M^n - N^n.
        rest: upper bound of the delta of N^n and of what the cut drops, at the epsilon of the plan and beyond.
        epsilon: the least epsilon at which ``rest`` holds.
    """

    def __init__(self, law: Law, count: int, split: Cut, line: Line, rest: float, epsilon: float) -> None:
        self._split, self._count = split, count
        self._rest, self._from = rest, epsilon
        super().__init__([(law, count)], line)

    def delta(self, epsilon: float) -> tuple[float, float]:
        """Certified (lower, upper) bounds; (0, 1) below the epsilon from which the bound of the rest holds."""
        low, high = super().delta(epsilon)
        return (low, min((high + self._rest) * (1.0 + 4.0 * UNIT), 1.0)) if epsilon >= self._from else (low, 1.0)

    def _evaluate(self, uses: Sequence[tuple[Law, int]]) -> bool:
        ((law, n),) = uses
        u, log_top = self._u, self._line.log_top
        step = TiltedStep(law, self.tilt, float(u[-1]), step_accuracy(n) + 40.0, sharp=False)
        if not step.usable:
            return False
        moments = step.moments_along(float(u[1]), len(u) - 1)
        jumps = jumps_of(step, self._split, float(u[1]), len(u) - 1)
        size = np.exp(moments.log_moment.real - step.log_scale)
        if not math.isfinite(jumps.top) or float((jumps.top / size).max()) > 0.5:
            return False
        ratio = jumps.value / np.exp(moments.log_moment - step.log_scale)
        ratio_error = (jumps.error + np.abs(jumps.value) * (moments.error + 40.0 * UNIT)) / size * 1.01
        if float(moments.error.max()) > 0.009 or float(ratio_error.max()) > 0.009:
            return False
        # w = n log(1 - J / M), 1 - (1 - J/M)^n = -expm1(w)
        square = -2.0 * ratio.real + np.abs(ratio) ** 2
        w = n * (0.5 * np.log1p(square) - 1j * np.arctan2(ratio.imag, 1.0 - ratio.real))
        w_error = n * (ratio_error / (0.99 - np.abs(ratio)) + 40.0 * UNIT * np.abs(ratio))
        swollen = np.exp(np.maximum(w.real, 0.0) + w_error)
        power = n * moments.log_moment
        real = np.minimum(power.real - log_top, 700.0)
        growth = n * np.log1p(moments.error) + (np.abs(power.real) + np.abs(power.imag)) * 5.0 * UNIT
        growth += (PAIRWISE + 100.0 + 4.0 * abs(log_top)) * UNIT
        jumped = -np.expm1(w)
        jumped_error = (w_error + 64.0 * UNIT * np.abs(w)) * swollen
        self._set_values(np.exp(real + 1j * power.imag) * jumped, np.exp(real), np.abs(jumped), jumped_error, growth)
        return bool(math.isfinite(self._error) and math.isfinite(self._error_per_epsilon))

    def _set_values(self, value: Complex, scale: Array, size: Array, size_error: Array, growth: Array) -> None:
        u, c = self._u, self.tilt
        t = c + 1j * u
        weight = np.full(len(u), self._line.step / math.pi)
        weight[0] *= 0.5
        factor = weight / (t * (t + 1.0))
        self._keep(value * factor)
        swell = np.exp(np.minimum(growth, 50.0))
        error = scale * (size * np.expm1(np.minimum(growth, 50.0)) + size_error * swell)
        self._error = float(error @ np.abs(factor)) * 1.001
        self._error_per_epsilon = float((scale * (size + size_error) * swell * np.abs(factor)) @ u) * 4.0 * UNIT


@dataclass(frozen=True)
class JumpRows:
    """Bounds of log (M^n - N^n) at real tilts, shaped like the rows that planning knows, and at tilt 0."""

    rows: Rows
    log_mass: float


def plan_jumps(
    law: Law, count: int, split: Cut, moments: Rows, epsilon: float, log_target: float, rest: float
) -> JumpContour | None:
    """A contour of the jumps with errors of about exp(log_target) near ``epsilon``, or None.

    ``moments`` are the rows of the cut law; ``rest`` bounds what :class:`JumpContour` is told.
    """
    jumps = _jump_rows(law, count, split, moments)
    if jumps is None:
        return None
    rows = jumps.rows
    choice = tilt_and_period(rows, epsilon, log_target, jumps.log_mass)
    if choice is None:
        return None
    best, period = choice
    tilt, log_top = float(rows.tilts[best]), float(rows.upper[best])
    h = truncate_mantissa(2.0 * math.pi / period)
    share = float(np.exp(rows.steps[0, best]))
    # log J(c) - log(J(c) / M(c)) of the step, upper bounds both.
    top = float(step_rows(law, np.array([tilt]))[0][0])
    decay = Decay(law, tilt, top)

    def fall(candidates: Array) -> Array:
        # |M^n - N^n| <= n J (|M| + J)^(n-1), relative to the scale e^log_top = n J(c) M(c)^n
        with np.errstate(divide="ignore"):
            value: Array = (count - 1) * np.log(np.exp(decay.log_rho(candidates * h)) + share) + 1e-9
        return value

    gap = log_top - tilt * epsilon - log_target
    kept, log_decay = earliest_cut(fall, h, gap, float(rows.bend[best]))
    below, above = witnesses(rows, best, epsilon, period)
    line = Line(tilt, h, kept, log_top, log_decay, below, above, 0.0, jumps.log_mass)
    contour = JumpContour(law, count, split, line, rest, epsilon)
    return contour if contour.usable else None


def _jump_rows(law: Law, count: int, split: Cut, moments: Rows) -> JumpRows | None:
    """Logs of n J M^n (1 + 1e-6) >= M^n - N^n over the tilts of ``moments``; M(c) >= 1 - 1e-6 by Jensen."""
    if dropped_mass(law) > 1e-9 / float(moments.tilts[-1]):
        return None
    log_zero, *others = _log_jumps(law, split, np.concatenate([[0.0], moments.tilts]))
    log_jumps = np.array(others)
    if not np.isfinite(log_jumps).any() or log_zero > math.log(_LARGEST_SHARE):
        return None
    c = moments.tilts
    upper = log_jumps + math.log(count) + np.maximum(moments.upper, 0.0) + 2e-6
    upper = np.where(log_jumps - moments.steps[0] < math.log(_LARGEST_SHARE), upper, np.inf)
    finite = np.isfinite(upper)
    if np.count_nonzero(finite) < 4:
        return None
    log_c = np.log(c[finite])
    slope = np.gradient(upper[finite], c[finite])
    bend = np.maximum(np.gradient(slope, c[finite]), 0.0)
    rows = Rows(c[finite], upper[finite], slope, bend, (log_jumps - moments.steps[0])[None, finite])
    return JumpRows(rows, log_zero + math.log(count)) if log_c.size else None


def _log_jumps(law: Law, split: Cut, tilts: Array) -> list[float]:
    """Upper bounds of log J(c) at increasing real ``tilts`` >= 0; infinite where there is none."""
    grid = choose_grid(law, float(tilts[-1]), 0.0, 60.0, sharp=False)
    v = math.inf if grid is None else grid.angle / (law.shift * split.width)
    if grid is None or v >= 3.1:
        return [math.inf] * len(tilts)
    x = grid.nodes
    losses = losses_at(law, x)
    log_density = -0.5 * x * x - _LOG_SQRT_2PI + losses.log_weight
    beyond = split.kept(x)[1]
    answer = []
    for c in tilts:
        exponent = log_density + c * losses.loss
        top = float(exponent.max())
        # The sum's rounding is far below what is added to its logarithm.
        total = float((np.exp(exponent - top) * beyond).sum()) * grid.step
        edges = (float(exponent[0]) - top + (float(x[0]) - split.at) / split.width, float(exponent[-1]) - top)
        tails = float(moment_tails(law, (float(x[0]), float(x[-1])), float(c), edges))
        strip = grid.log_strip_factor() + float(shrink_of(law, float(c), grid.angle)) - math.log(math.cos(0.5 * v))
        bound = (total + tails) / (1.0 - math.exp(strip)) if strip < -1.0 else math.inf
        spare = 1e-9 + 1e-13 * float(c) * float(np.abs(losses.loss).max())
        answer.append(math.log(bound) + top + spare if 0.0 < bound < math.inf else math.inf)
    return answer


def split_at(law: Law, loss: float) -> Cut:
    """A split where one step loses ``loss``."""
    exponent = math.log1p(math.expm1(loss) / law.rate) if loss < 600.0 else loss - math.log(law.rate)
    x = exponent / law.shift + 0.5 * law.shift
    least = 0.0 if law.cut is None else law.cut.width  # the grid is made for the cut
    return Cut(x, max(min(0.01, 0.01 / law.shift), least))


def log_delta_without_jumps(law: Law, count: int, split: Cut, epsilon: float) -> float:
    """Upper bound of log delta(epsilon) of the part N of every step that no split sends away.

    N lets outputs up to x_1 = split + 35 widths through and at most e^-35 of those beyond, which are charged. Up to x_1

        M(c) - 1 <= c E L + int phi W (e^{cL} - 1 - cL),

    since L > 0 beyond; upper Riemann sums over cells bound the integral (L is monotone, e^y - 1 - y has its maximum
    over a cell at an end), the mean loss is at most (M_0(a) - 1) / a for any a > 0, M_0 the whole step's moment.
    """
    whole = replace(law, cut=None)
    top = split.at + 35.0 * split.width
    edges = np.linspace(-_LEFT, top, _CELLS + 1)
    width = float(edges[1] - edges[0])
    losses = losses_at(whole, edges)
    log_mass = -0.5 * edges * edges - _LOG_SQRT_2PI + losses.log_weight
    slope = np.maximum(np.abs(edges[1:]), np.abs(edges[:-1])) + law.shift
    log_cell = np.maximum(log_mass[1:], log_mass[:-1]) + 0.5 * width * slope
    if float(log_cell.max()) > 600.0:
        return 0.0  # delta <= 1
    mass = np.exp(log_cell) * width
    mean = float(np.expm1(step_rows(whole, np.array([_SMALL_TILT]))[0][0])) / _SMALL_TILT
    left = normal_tail(_LEFT)
    least = -math.log1p(-law.rate)
    tilts = np.geomspace(0.3, 3e3, 64) / max(epsilon, 1e-6)
    tilts = tilts[tilts * float(losses.loss[-1]) < 600.0]
    growth = np.multiply.outer(tilts, losses.loss)
    growth = np.expm1(growth) - growth
    excess = np.maximum(growth[:, 1:], growth[:, :-1]) @ mass
    excess += tilts * (mean + least * left) + 0.5 * np.square(tilts * least) * left
    log_moments = count * np.log1p(excess * (1.0 + 1e-9))
    best = float(np.min(log_moments - tilts * epsilon + log_kappas(tilts))) if tilts.size else 0.0
    beyond = count * math.exp(-35.0) * ((1.0 - law.rate) * normal_tail(top) + law.rate * normal_tail(top - law.shift))
    return float(np.logaddexp(best, math.log(beyond) if beyond > 0.0 else -745.0)) + 1e-9
