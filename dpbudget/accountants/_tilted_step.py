"""The moment generating function of one step's privacy loss, with an error bound for every value.

With L the privacy loss of a direction (l = log(1 + r) under P for "remove", -l under Q for "add"),

    M(t) = E exp(t L) = 1 + t E L + E[exp(t L) - 1 - t L],

where E L is the integral of (1 + r) l - r >= 0 or r - l >= 0 under Q and the last bracket is computed without
cancellation. At real t every term is >= 0, so log M has small *relative* error even where M - 1 is 1e-18, and a billion
steps may be taken. Error analysis: docs/accounting.md, "Rounding".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpbudget._numerics import ELEMENTARY, UNIT, exp_or_inf
from dpbudget.accountants._quadrature import (
    Array,
    Grid,
    choose_grid,
    correction_tails,
    moment_tails,
)
from dpbudget.mechanisms import Direction

Complex = npt.NDArray[np.complex128]

_SQRT_2PI = math.sqrt(2.0 * math.pi)
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
# Second-order terms of the rounding analysis and the rounding of the bounds themselves.
_SAFETY = 1.25
# Below this log of the largest tilted weight, M - 1 is summed; above it, M itself, scaled.
_PLAIN_ABOVE = 20.0
_EXPONENT_CAP = 600.0


@dataclass(frozen=True)
class Losses:
    """Privacy losses of one step on a grid, with bounds of their errors; all arrays have one entry a node."""

    grid: Grid
    ratio: Array  # r
    weight: Array  # density of the step's own output law against Q: 1 + r (remove) or 1 (add)
    log_ratio: Array  # l = log(1 + r)
    loss: Array  # L = l (remove) or -l (add)
    deviation: Array  # (1 + r) l - r (remove) or r - l (add), whose mean under Q is E L
    loss_error: Array
    weight_error: Array  # relative
    deviation_error: Array


def losses_on(rate: float, grid: Grid, direction: Direction) -> Losses:
    """Losses at the grid's nodes."""
    x, m = grid.nodes, grid.shift
    exponent = m * x - 0.5 * m * m
    exponent_error = 5.0 * UNIT * (np.abs(m * x) + 0.5 * m * m)
    capped = np.minimum(exponent, _EXPONENT_CAP)
    ratio = rate * np.expm1(capped)
    jump = rate * np.exp(capped)
    one_plus = np.where(ratio < -0.5, (1.0 - rate) + jump, 1.0 + ratio)
    log_ratio = np.where(ratio < -0.5, np.log(one_plus), np.log1p(np.maximum(ratio, -0.5)))
    # Beyond the cap 1 - q is below the roundoff of q exp(a); such nodes are used through their logarithm only.
    log_ratio += exponent - capped
    slope_error = jump / one_plus * exponent_error  # error of l that comes from the exponent's
    size = np.abs(log_ratio)
    if direction == "remove":
        weight, loss = one_plus, log_ratio
        weight_error = slope_error + 45.0 * UNIT
    else:
        weight, loss = np.ones_like(one_plus), -log_ratio
        weight_error = np.zeros_like(one_plus)
    deviation, deviation_error = _deviation(ratio, one_plus, log_ratio, direction)
    sensitivity = size if direction == "remove" else np.abs(ratio) / one_plus
    deviation_error = deviation_error + sensitivity * jump * exponent_error
    return Losses(
        grid, ratio, weight, log_ratio, loss, deviation,
        slope_error + 61.0 * UNIT * size, weight_error, deviation_error,
    )  # fmt: skip


def _deviation(ratio: Array, one_plus: Array, log_ratio: Array, direction: Direction) -> tuple[Array, Array]:
    """(1 + r) l - r or r - l with its rounding error; a series in r / (2 + r) where the difference would cancel."""
    s = np.where(np.abs(ratio) <= 0.25, ratio / (2.0 + ratio), 0.0)
    square = s * s
    series = np.zeros_like(s)
    for k in range(19, 1, -2):
        series = (series + 1.0 / k) * square
    series *= 2.0 * s  # log(1 + r) - 2 s
    near = np.abs(ratio) <= 0.25
    if direction == "remove":
        small = (2.0 * square + (1.0 + s) * series) / (1.0 - s)
        large = one_plus * log_ratio - ratio
        scale = one_plus * np.abs(log_ratio) + np.abs(ratio)
    else:
        small = (2.0 * square - (1.0 - s) * series) / (1.0 - s)
        large = ratio - log_ratio
        scale = np.abs(log_ratio) + np.abs(ratio)
    value = np.maximum(np.where(near, small, large), 0.0)
    return value, UNIT * np.where(near, 100.0 * value, 110.0 * scale)


@dataclass(frozen=True)
class Moments:
    """``log_moment`` is log M(c + iu) for each u, and ``error`` with M_true = exp(log_moment) (1 + x), |x| <= error."""

    log_moment: Complex
    error: Array


class TiltedStep:
    """One step at tilt c: M(c + iu) for |u| <= u_max on a grid made for that range.

    Args:
        rate: inclusion probability q in (0, 1).
        sigma: noise multiplier.
        tilt: c > 0.
        direction: "remove" or "add".
        u_max: largest |u| that will be asked for.
        nats: -log of the quadrature error aimed at, relative to M(c).

    Attributes:
        usable: False where the grid would be too large or the weights leave double precision; then nothing is answered.
    """

    def __init__(self, rate: float, sigma: float, tilt: float, direction: Direction, u_max: float, nats: float) -> None:
        self.rate, self.tilt, self.direction = rate, tilt, direction
        self.shift = 1.0 / sigma
        grid = choose_grid(rate, self.shift, tilt, direction, u_max, nats)
        self.usable = grid is not None
        if grid is None:
            return
        self.grid = grid
        self._losses = losses_on(rate, grid, direction)
        power = 1.0 + tilt if direction == "remove" else -tilt
        x = grid.nodes
        self._log_weight = -0.5 * x * x - _LOG_SQRT_2PI + power * self._losses.log_ratio
        top = float(self._log_weight.max())
        largest = max(tilt * float(self._losses.loss.max()), self.shift * float(x[-1] - 0.5 * self.shift))
        self.plain = top > _PLAIN_ABOVE or largest >= _EXPONENT_CAP
        self._log_scale = top if self.plain else 0.0
        if self.plain:
            self._prepare_plain(power)
        else:
            self._prepare_centred()

    def moments(self, u: Array) -> Moments:
        """Logarithm of M(c + iu); u of shape [N], finite, |u| <= u_max."""
        moment = self._base + self._oscillation(u)
        error = self._moment_error(u)
        return self._logarithm(moment, error)

    def log_moment(self) -> tuple[float, float]:
        """(log M(c), error) at real tilt; M_true = exp(value) (1 + x), |x| <= error."""
        answer = self.moments(np.zeros(1))
        return float(answer.log_moment[0].real), float(answer.error[0])

    # -- M - 1, free of cancellation ------------------------------------------------------------------------------

    def _prepare_centred(self) -> None:
        one, x, c = self._losses, self.grid.nodes, self.tilt
        density = np.exp(-0.5 * x * x) * (self.grid.step / _SQRT_2PI)
        alpha = c * one.loss
        growth = np.expm1(alpha)
        weights = density * one.weight
        self._weights, self._cosine, self._sine = weights, weights * (growth + 1.0), weights * growth
        self._mean_loss = float(density @ one.deviation)
        self._base = complex(c * self._mean_loss + float(weights @ _expm1_minus(alpha, growth)))
        count = len(x)
        roundoff = (320.0 + count + x * x) * UNIT + one.weight_error
        size, bulge = np.abs(one.loss), np.maximum(growth, 0.0) + 1.0
        self._error_flat = weights * roundoff * (2.0 + growth)
        self._error_linear = weights * (one.loss_error * (2.0 + growth) + roundoff * size)
        self._error_square = weights * bulge * size * (one.loss_error + roundoff * size)
        self._mean_error = float(density @ (one.deviation_error + (x * x + count + 22.0) * UNIT * one.deviation))
        base = self._base.real + 1.0
        rounding = self._rounding_centred(np.zeros(1))[0] + 4.0 * UNIT * base
        self._quadrature(base + rounding)

    def _rounding_centred(self, u: Array) -> Array:
        size = np.hypot(self.tilt, u)
        pointwise = np.minimum(
            self._error_flat + np.multiply.outer(size, self._error_linear),
            np.multiply.outer(size * size, self._error_square),
        )
        total: Array = pointwise.sum(axis=1) + size * (self._mean_error + 8.0 * UNIT * self._mean_loss)
        return total * _SAFETY

    # -- M itself, scaled ------------------------------------------------------------------------------------------

    def _prepare_plain(self, power: float) -> None:
        x, one = self.grid.nodes, self._losses
        self._cosine = np.exp(self._log_weight - self._log_scale) * self.grid.step
        self._sine = self._cosine
        self._mean_loss = 0.0
        self._base = complex(float(self._cosine.sum()))
        exponent_error = (
            abs(power) * one.loss_error
            + (x * x + 4.0 * np.abs(power * one.log_ratio) + 4.0 * abs(self._log_scale)) * UNIT
        )
        self._error_flat = self._cosine * (exponent_error + (len(x) + 120.0) * UNIT)
        self._error_linear = self._cosine * one.loss_error
        base = self._base.real
        self._quadrature(base + float(self._error_flat.sum()) * _SAFETY)

    def _rounding_plain(self, u: Array) -> Array:
        total: Array = float(self._error_flat.sum()) + np.abs(u) * float(self._error_linear.sum())
        return total * _SAFETY

    # -- common ----------------------------------------------------------------------------------------------------

    def _oscillation(self, u: Array) -> Complex:
        """M(c + iu) - M(c), scaled, without the error of subtracting nearly equal numbers."""
        if not u.any():
            return np.zeros(len(u), dtype=np.complex128)
        half = np.multiply.outer(0.5 * u, self._losses.loss)
        sine, cosine = np.sin(half), np.cos(half)
        double = 2.0 * sine * cosine
        real = -2.0 * ((sine * sine) @ self._cosine)
        imag = double @ self._sine
        if not self.plain:
            imag = imag + _sine_minus(2.0 * half, double) @ self._weights + u * self._mean_loss
        return np.asarray(real + 1j * imag, dtype=np.complex128)

    def _quadrature(self, moment: float) -> None:
        """Sets the parts of the quadrature error; ``moment`` bounds the computed M(c), scaled, from above."""
        grid, c = self.grid, self.tilt
        edges = (float(self._log_weight[0]), float(self._log_weight[-1]))
        self._tails = moment_tails(self.rate, grid, c, self.direction, edges, self._log_scale)
        # On the shifted line |1 + r|^z is at most (1 + r)^z, times cos(angle / 2)^-c for the negative powers of "add".
        shrink = -c * math.log(math.cos(0.5 * grid.angle)) if self.direction == "add" else 0.0
        self._log_strip = grid.log_strip_factor() + shrink
        self._flat, self._per_power = self._tails, 0.0
        if not self.plain:
            of_one, of_ratio = correction_tails(self.rate, grid)
            strip = exp_or_inf(max(grid.log_strip_factor(), -700.0))
            self._flat += strip + of_one
            self._per_power = 2.0 * self.rate * strip + of_ratio
        rest = self._flat + (1.0 + c) * self._per_power
        if not math.isfinite(rest) or self._log_strip > -1.0:
            self.usable = False
            return
        bound = (moment + rest) / (1.0 - math.exp(self._log_strip))
        self._log_moment_bound = math.log(bound) + 1e-9

    def _moment_error(self, u: Array) -> Array:
        """Bound of |computed M - true M|, scaled: rounding, quadrature on the strip, and the dropped tails."""
        rounding = self._rounding_plain(u) if self.plain else self._rounding_centred(u)
        power = np.hypot(1.0 + self.tilt, u)
        log_strip = self._log_strip + self._log_moment_bound + np.abs(u) * self.grid.angle
        strip = np.exp(np.minimum(log_strip, 700.0))
        total: Array = (rounding + strip + self._flat + power * self._per_power) * (1.0 + 1e-9)
        return total

    def _logarithm(self, moment: Complex, error: Array) -> Moments:
        """Logarithm of M from M - 1 or from M / exp(scale), its own rounding added to the error."""
        real, imag = moment.real, moment.imag
        if self.plain:
            log_size = np.log(np.hypot(real, imag)) + self._log_scale
            size, rounding = np.hypot(real, imag), np.full_like(real, 4.0 * UNIT * abs(self._log_scale))
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
        relative = error / np.maximum(size, 1e-150) + rounding * _SAFETY
        return Moments(log_size + 1j * angle, relative)


def _expm1_minus(alpha: Array, growth: Array) -> Array:
    """exp(alpha) - 1 - alpha >= 0, given growth = expm1(alpha); its series where |alpha| <= 1/2."""
    small = np.clip(alpha, -0.5, 0.5)
    series = np.ones_like(small)
    for k in range(17, 2, -1):
        series = 1.0 + series * small / k
    value: Array = np.where(np.abs(alpha) <= 0.5, 0.5 * series * small * small, growth - alpha)
    return value


def _sine_minus(beta: Array, sine: Array) -> Array:
    """sin(beta) - beta, given sin(beta); its series where |beta| <= 1."""
    square = np.minimum(beta * beta, 1.0)
    series = np.ones_like(square)
    for k in range(18, 3, -2):
        series = 1.0 - square * series / (k * (k + 1.0))
    value: Array = np.where(np.abs(beta) <= 1.0, beta * square * series * (-1.0 / 6.0), sine - beta)
    return value
