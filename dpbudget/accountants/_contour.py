"""delta(epsilon) of a composition as a certified sum over a vertical line: the inversion formula, made finite.

For any c > 0, with M(t) = prod M_i(t)^n_i and t_k = c + i k h,

    (h / pi) [ f_0 / 2 + sum_{k >= 1} Re f_k ] = sum_{m in Z} e^(-m B c) delta(epsilon - m B),   B = 2 pi / h,
    f_k = M(t_k) e^(-epsilon t_k) / (t_k (t_k + 1)).

The term m = 0 is the answer, the others are >= 0 and bounded by moments; the sum's cut is bounded by ``_decay``, its
values by ``_tilted_step``. Every choice below (tilt, step, cut) changes the width of an answer, never its validity.
Proofs: docs/accounting.md, "Inversion" to "Rounding".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpbudget._numerics import ELEMENTARY, UNIT, exp_up, log_expm1
from dpbudget.accountants._fourier import PAIRWISE
from dpbudget.accountants._law import Array, Law
from dpbudget.accountants._tilted_step import Complex, Moments, TiltedStep

# Pairs of node and output up to which moments are summed directly.
_DIRECT = 1 << 17
_FIRST = 32


@dataclass(frozen=True)
class Line:
    """Where to sum: nodes tilt + i k step, k = 0 .. count; ``step`` has at most 20 significant bits.

    Attributes:
        tilt: c > 0.
        step: h.
        count: last kept node, >= 1.
        log_top: upper bound of K(c), the scale of all values.
        log_decay: proved bound of log |M(c + iu) / M(c)| for all u >= (count + 1) step.
        below: (c', K(c') + log kappa(c')) for tilts c' < c that bound the aliases m >= 1; may be empty.
        above: the same for tilts c' > c, which bound m <= -1.
        lost: upper bound of what the cuts of the laws drop; added to delta's upper end.
        log_mass: upper bound of log M(0), 0 for probabilities; no delta exceeds it.
    """

    tilt: float
    step: float
    count: int
    log_top: float
    log_decay: float
    below: tuple[tuple[float, float], ...]
    above: tuple[tuple[float, float], ...]
    lost: float = 0.0
    log_mass: float = 0.0


class Contour:
    """The sum at one tilt, reusable for every epsilon (best near the epsilon it was planned for).

    Attributes:
        tilt: c.
        usable: False where some step's moments could not be computed; then nothing is answered.
    """

    def __init__(self, uses: Sequence[tuple[Law, int]], line: Line) -> None:
        self.tilt, self._line = line.tilt, line
        self._u = np.arange(line.count + 1, dtype=np.float64) * line.step
        self._period = 2.0 * math.pi / line.step * (1.0 - 1e-15)
        # sum over the dropped nodes of h / |t (t + 1)| <= 1 / (last kept u)
        self._cut = exp_up(min(line.log_decay - math.log(math.pi * line.step * line.count), 700.0))
        self.usable = self._evaluate(uses)

    @property
    def nodes(self) -> int:
        """How many nodes the sum has."""
        return len(self._u)

    def log_delta(self, epsilon: float) -> tuple[float, float]:
        """(estimate of log delta, of its derivative) at ``epsilon``; -inf where the sum is not positive."""
        angle = epsilon * self._u
        cosine, sine = np.cos(angle), np.sin(angle)
        value = float((self._real * cosine + self._imag * sine).sum())
        if value <= 0.0:
            return -math.inf, -self.tilt
        turn = float((self._turning_imag * cosine - self._turning_real * sine).sum())
        return self._line.log_top - self.tilt * epsilon + math.log(value), turn / value - self.tilt

    def delta(self, epsilon: float) -> tuple[float, float]:
        """Certified (lower, upper) bounds of one direction's delta at ``epsilon`` >= 0."""
        angle = epsilon * self._u
        # Relative to exp(K(c) - c epsilon); the weights hold h / pi and the half weight of node 0.
        value = float((self._real * np.cos(angle) + self._imag * np.sin(angle)).sum())
        log_top = self._line.log_top
        log_scale = log_top - self.tilt * epsilon
        error = self._error + self._error_per_epsilon * epsilon
        error += abs(value) * 4.0 * UNIT * (abs(log_top) + self.tilt * epsilon + 64.0)
        error = 1.01 * error + self._cut
        alias = exp_up(min(self.log_alias(epsilon) - log_scale, 700.0))
        upper, lower = value + error, (value - error - alias) * (1.0 - 1e-15)
        high = 1.0 if upper <= 0.0 else exp_up(min(log_scale + math.log(upper), 0.0))
        high = min((high + self._line.lost) * (1.0 + 2.0 * UNIT), 1.0)
        low = 0.0 if lower <= 0.0 else math.exp(min(log_scale + math.log(lower), 0.0)) * (1.0 - 4.0 * ELEMENTARY)
        return max(low - 5e-324, 0.0), high

    def log_alias(self, epsilon: float) -> float:
        """Log of an upper bound of the sum of all terms m != 0."""
        line, period = self._line, self._period
        below, above = line.log_mass - log_expm1(period * self.tilt), math.inf
        for other, bound in line.below:
            below = min(below, bound - other * epsilon - log_expm1(period * (self.tilt - other)))
        for other, bound in line.above:
            above = min(above, bound - other * epsilon - log_expm1(period * (other - self.tilt)))
        slack = 64.0 * UNIT * (abs(line.log_top) + self.tilt * epsilon + 100.0)
        return max(below, above) + math.log1p(math.exp(-abs(below - above))) + slack

    def _evaluate(self, uses: Sequence[tuple[Law, int]]) -> bool:
        """Sets the weighted values of the nodes and their error bounds."""
        u = self._u
        log_value = np.zeros(len(u), dtype=np.complex128)
        growth, size = np.zeros(len(u)), np.zeros(len(u))
        for law, count in uses:
            answer = step_moments(law, count, self.tilt, u)
            if answer is None:
                return False
            term = count * answer.log_moment
            log_value += term
            growth += count * np.log1p(answer.error)
            size += np.abs(term.real) + np.abs(term.imag)
        self._weigh(log_value, growth, size * (len(uses) + 4.0) * UNIT)
        return bool(math.isfinite(self._error) and math.isfinite(self._error_per_epsilon))

    def _weigh(self, log_value: Complex, growth: Array, rounding: Array) -> None:
        u, c, log_top = self._u, self.tilt, self._line.log_top
        t = c + 1j * u
        weight = np.full(len(u), self._line.step / math.pi)
        weight[0] *= 0.5
        real = np.minimum(log_value.real - log_top, 700.0)
        factor = weight / (t * (t + 1.0))
        values = np.exp(real + 1j * log_value.imag) * factor
        self._keep(values)
        size = np.abs(factor)
        relative = rounding + (PAIRWISE + 100.0 + 4.0 * abs(log_top)) * UNIT
        # (|m| + e)^n - |m|^n, in logarithms
        swell = growth + relative
        wide = np.exp(np.minimum(real + swell, 700.0))
        error = np.where(swell < 1.0, np.exp(real) * np.expm1(np.minimum(swell, 1.0)), wide)
        self._error = float(error @ size) * 1.001
        self._error_per_epsilon = float((wide * size) @ u) * 4.0 * UNIT

    def _keep(self, values: Complex) -> None:
        self._real, self._imag = np.ascontiguousarray(values.real), np.ascontiguousarray(values.imag)
        self._turning_real, self._turning_imag = self._u * self._real, self._u * self._imag


def step_moments(law: Law, count: int, tilt: float, u: Array) -> Moments | None:
    """Moments M(tilt + iu) of one step, accurate enough for their ``count``-th power; None where none can be had."""
    if law.plain:
        t = tilt + 1j * u
        exact = np.asarray(0.5 * t * (t + 1.0) * law.square_distance, dtype=np.complex128)
        return Moments(exact, 16.0 * UNIT * np.abs(t) * np.abs(t + 1.0) * law.square_distance)
    accuracy = step_accuracy(count)
    whole = TiltedStep(law, tilt, float(u[-1]), accuracy)
    if not whole.usable:
        return None
    if len(u) <= _FIRST or len(u) * len(whole.grid.nodes) <= _DIRECT:
        return whole.moments(u)
    # Near the real axis direct sums have the smaller errors, and a coarser grid serves them.
    first = TiltedStep(law, tilt, float(u[_FIRST - 1]), accuracy)
    if not first.usable:
        return None
    near, far = first.moments(u[:_FIRST]), whole.moments_along(float(u[1]), len(u) - 1)
    return Moments(
        np.concatenate([near.log_moment, far.log_moment[_FIRST:]]), np.concatenate([near.error, far.error[_FIRST:]])
    )


def step_accuracy(count: int) -> float:
    """Nats of quadrature accuracy at which ``count`` steps lose nothing that double precision could hold."""
    return 40.0 + math.log(count)
