"""The moment generating function of one step's privacy loss, with an error bound for every value.

With L the privacy loss of a side (``_law``) and W the density of the step's own output law,

    M(t) = E exp(t L) = 1 + t E L + E[exp(t L) - 1 - t L],

where E L is the integral of something >= 0 and the last bracket is computed without cancellation. At real t every term
is >= 0, so log M has small *relative* error even where M - 1 is 1e-18, and a billion steps may be taken. Error
analysis: docs/accounting.md, "Rounding".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpbudget._numerics import ELEMENTARY, UNIT, exp_or_inf
from dpbudget.accountants._fourier import PAIRWISE, turn_along
from dpbudget.accountants._law import EXPONENT_CAP, Array, Law, losses_at
from dpbudget.accountants._quadrature import choose_grid, correction_tails, moment_tails, shrink_of

Complex = npt.NDArray[np.complex128]

_SQRT_2PI = math.sqrt(2.0 * math.pi)
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
# Second-order terms of the rounding analysis and the rounding of the bounds themselves.
_SAFETY = 1.25
# Below this log of the largest tilted weight, M - 1 is summed; above it, M itself, scaled.
_PLAIN_ABOVE = 20.0
# Outputs are summed in pieces of so many, which stay in the cache.
_PIECE = 512


@dataclass(frozen=True)
class Moments:
    """``log_moment`` is log M(c + iu) for each u, and ``error`` with M_true = exp(log_moment) (1 + x), |x| <= error."""

    log_moment: Complex
    error: Array


class TiltedStep:
    """One step at tilt c: M(c + iu) for |u| <= u_max on a grid made for that range.

    Args:
        law: the step; it must sample.
        tilt: c > 0.
        u_max: largest |u| that will be asked for.
        nats: -log of the quadrature error aimed at, relative to M(c).
        sharp: whether the grid may use a bound that is relative to M(c) only.

    Attributes:
        usable: False where the grid would be too large or the weights leave double precision; then nothing is answered.
        grid, losses: the nodes and what is lost there.
        tilted: weights W e^{cL} of the nodes over e^{log_scale}, and ``relative`` bounds their relative errors.
        log_edges: log of the tilted density at both ends, less log_scale.
    """

    def __init__(self, law: Law, tilt: float, u_max: float, nats: float, sharp: bool = True) -> None:
        self.law, self.tilt = law, tilt
        grid = choose_grid(law, tilt, u_max, nats, sharp)
        self.usable = grid is not None
        if grid is None:
            return
        self.grid = grid
        x = grid.nodes
        self.losses = losses_at(law, x)
        self._log_weight = -0.5 * x * x - _LOG_SQRT_2PI + self.losses.log_weight + tilt * self.losses.loss
        top = float(self._log_weight.max())
        highest = max(float(x[-1]), -float(x[0]) if law.side == "replace" else 0.0)
        largest = max(tilt * float(self.losses.loss.max()), law.shift * (highest - 0.5 * law.shift))
        self.plain = top > _PLAIN_ABOVE or largest >= EXPONENT_CAP
        self.log_scale = top if self.plain else 0.0
        if self.plain:
            self._prepare_plain()
        else:
            self._prepare_centred()

    def moments(self, u: Array) -> Moments:
        """Logarithm of M(c + iu); u of shape [N], finite, |u| <= u_max. Costs N times the nodes of the grid."""
        moment = self._base + self._oscillation(u)
        return self._logarithm(moment, self._moment_error(u, self._turning_error(u)))

    def moments_along(self, step: float, count: int) -> Moments:
        """Logarithm of M(c + i k step) for k = 0 .. count, count * step <= u_max, by fast Fourier transforms."""
        one = self.losses
        transform = turn_along(one.loss, self.tilted, self.relative, step, count)
        u = np.arange(count + 1, dtype=np.float64) * step
        drift = u * float(self.tilted @ (one.loss_error + 4.0 * UNIT * np.abs(one.loss)))
        error = _SAFETY * (drift + 1.5 * transform.linear * u + transform.constant)
        return self._logarithm(self._base + transform.value, self._moment_error(u, error))

    def log_moment(self) -> tuple[float, float]:
        """(log M(c), error) at real tilt; M_true = exp(value) (1 + x), |x| <= error."""
        answer = self._logarithm(np.array([complex(self._base)]), self._moment_error(np.zeros(1), np.zeros(1)))
        return float(answer.log_moment[0].real), float(answer.error[0])

    # -- M - 1, free of cancellation ------------------------------------------------------------------------------

    def _prepare_centred(self) -> None:
        one, x, c = self.losses, self.grid.nodes, self.tilt
        square = x * x
        density = np.exp(-0.5 * square) * (self.grid.step / _SQRT_2PI)
        alpha = c * one.loss
        growth = np.expm1(alpha)
        weights = density * one.weight
        bulge = np.where(growth < -0.5, np.exp(alpha), growth + 1.0)
        self.tilted = weights * bulge
        mean = float((density * one.deviation).sum())
        self._base = c * mean + float((weights * _expm1_minus(alpha, growth)).sum())
        lost, lost_error = 0.0, 0.0
        if one.lost is not None and one.lost_error is not None:
            lost = float((density * one.lost).sum())
            lost_error = float((density * one.lost * (one.lost_error + (square + PAIRWISE + 22.0) * UNIT)).sum())
        self._base -= lost
        rounding = square * UNIT + one.weight_error
        roundoff = rounding + (320.0 + PAIRWISE) * UNIT
        size = np.abs(one.loss)
        # M(c) itself: either term bounds the error of e^{cL} - 1 - cL; the second is small where the loss is.
        flat = weights * (roundoff * (2.0 + growth) + c * one.loss_error * (2.0 + growth) + c * roundoff * size)
        steep = weights * np.maximum(bulge, 1.0) * (c * c) * size * (one.loss_error + roundoff * size)
        error = float(np.minimum(flat, steep).sum())
        mean_error = float(density @ (one.deviation_error + (square + PAIRWISE + 22.0) * UNIT * np.abs(one.deviation)))
        self._base_error = (error + c * (mean_error + 8.0 * UNIT * abs(mean))) * _SAFETY + 2.0 * lost_error
        self._set_turning_errors(rounding + c * one.loss_error)
        self._set_quadrature(self._base + 1.0 + self._base_error + 4.0 * UNIT * (self._base + 1.0))

    # -- M itself, scaled ------------------------------------------------------------------------------------------

    def _prepare_plain(self) -> None:
        x, one, c = self.grid.nodes, self.losses, self.tilt
        self.tilted = np.exp(self._log_weight - self.log_scale) * self.grid.step
        self._base = float(self.tilted.sum())
        exponent_error = (
            c * one.loss_error
            + one.weight_error
            + (x * x + 24.0 * np.abs(one.log_weight) + 4.0 * np.abs(c * one.loss) + 4.0 * abs(self.log_scale)) * UNIT
        )
        self._base_error = float(self.tilted @ (exponent_error + (PAIRWISE + 120.0) * UNIT)) * _SAFETY
        self._set_turning_errors(exponent_error)
        self._set_quadrature(self._base + self._base_error)

    # -- common ----------------------------------------------------------------------------------------------------

    def _oscillation(self, u: Array) -> Complex:
        """M(c + iu) - M(c), scaled, without the error of subtracting nearly equal numbers."""
        answer = np.zeros(len(u), dtype=np.complex128)
        for first in range(0, len(self.tilted), _PIECE):
            part = slice(first, first + _PIECE)
            tilted = self.tilted[part]
            half = np.multiply.outer(0.5 * u, self.losses.loss[part])
            sine = np.sin(half)
            cosine = np.cos(half, out=half)
            cosine *= sine
            sine *= sine
            sine *= tilted
            cosine *= tilted
            answer.real -= 2.0 * sine.sum(axis=1)
            answer.imag += 2.0 * cosine.sum(axis=1)
        return answer

    def _set_turning_errors(self, roundoff: Array) -> None:
        """Sums that bound the error of M(c + iu) - M(c): linear in |u| and, for large |u|, constant.

        ``roundoff`` bounds the relative error of the tilted weights, sums excluded.
        """
        self.relative = roundoff
        sums = PAIRWISE + len(self.tilted) / _PIECE
        rounded = self.tilted * (roundoff + (100.0 + sums) * UNIT)
        self._loss_error = float(self.tilted @ self.losses.loss_error)
        self._linear, self._constant = float(rounded @ np.abs(self.losses.loss)), float(rounded.sum())

    def _turning_error(self, u: Array) -> Array:
        # |e^{iuL} - 1| <= min(2, |u L|); a relative error of L turns the phase by |u| times its absolute error.
        size = np.abs(u)
        value: Array = size * self._loss_error + 1.5 * np.minimum(size * self._linear, 2.0 * self._constant)
        return value * _SAFETY

    def _set_quadrature(self, moment: float) -> None:
        """Sets the parts of the quadrature error; ``moment`` bounds the computed M(c), scaled, from above."""
        grid, law, c = self.grid, self.law, self.tilt
        ends = (float(grid.nodes[0]), float(grid.nodes[-1]))
        edges = (float(self._log_weight[0]) - self.log_scale, float(self._log_weight[-1]) - self.log_scale)
        self.log_edges = edges
        self._flat, self._per_power = float(moment_tails(law, ends, c, edges)), 0.0
        self._log_shrink = float(shrink_of(law, c, grid.angle))
        if not self.plain:
            of_one, of_ratio = correction_tails(law, grid)
            strip = exp_or_inf(max(grid.log_strip_factor(), -700.0))
            self._flat += strip + of_one
            self._per_power = 2.0 * law.rate * strip + of_ratio
        rest = self._flat + (1.0 + c) * self._per_power
        at_zero = grid.log_strip_factor() + self._log_shrink
        if not math.isfinite(rest) or at_zero > -1.0:
            self.usable = False
            return
        self._log_bound = math.log((moment + rest) / (1.0 - math.exp(at_zero))) + 1e-9 + self.log_scale

    def _moment_error(self, u: Array, turning: Array) -> Array:
        """Bound of |computed M - true M|, scaled: rounding, quadrature on the strip, and the dropped tails."""
        log_strip = self.grid.log_strip(self.law, u, self._log_bound) + (self._log_shrink - self.log_scale)
        strip = np.exp(np.minimum(log_strip, 700.0))
        power = np.hypot(1.0 + self.tilt, u)
        total: Array = self._base_error + turning + strip + self._flat + power * self._per_power
        return total * (1.0 + 1e-9)

    def _logarithm(self, moment: Complex, error: Array) -> Moments:
        """Logarithm of M from M - 1 or from M / exp(scale), its own rounding added to the error."""
        real, imag = moment.real, moment.imag
        if self.plain:
            size = np.hypot(real, imag)
            log_size = np.log(np.maximum(size, 1e-300)) + self.log_scale
            rounding = np.full_like(real, 4.0 * UNIT * abs(self.log_scale))
            angle = np.arctan2(imag, real)
        else:
            excess = 2.0 * real + (real * real + imag * imag)
            square = np.square(1.0 + real) + imag * imag
            near = excess > -0.75
            log_size = 0.5 * np.where(near, np.log1p(np.maximum(excess, -0.75)), np.log(np.maximum(square, 1e-300)))
            size = np.sqrt(square)
            spread = 2.0 * np.abs(real) + real * real + imag * imag
            rounding = UNIT * np.where(near, 3.0 * spread / np.maximum(square, 0.25), np.full_like(spread, 6.0))
            angle = np.arctan2(imag, 1.0 + real)
        rounding = rounding + (2.0 * ELEMENTARY) * (np.abs(log_size) + np.abs(angle))
        with np.errstate(divide="ignore"):
            relative = np.where(size > 1e-150, error / np.maximum(size, 1e-150), np.inf) + rounding * _SAFETY
        return Moments(log_size + 1j * angle, relative)


def _expm1_minus(alpha: Array, growth: Array) -> Array:
    """exp(alpha) - 1 - alpha >= 0, given growth = expm1(alpha); its series where |alpha| <= 1/2."""
    small = np.clip(alpha, -0.5, 0.5)
    series = np.ones_like(small)
    for k in range(17, 2, -1):
        series *= small
        series *= 1.0 / k
        series += 1.0
    value: Array = np.where(np.abs(alpha) <= 0.5, 0.5 * series * small * small, growth - alpha)
    return value
