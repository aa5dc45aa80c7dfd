"""Composition of lattice laws by one tilted FFT, with every error bounded.

The weights are tilted to e^(c t) w / M(c) before the transform, so that what decides delta(epsilon) sits in the bulk of
the array and not 1e-30 below it; delta is then accurate relative to the Chernoff bound e^(K(c) - c epsilon).

Assumption: a transform of length N (a power of two) has an error of at most 8 u log2(N) in the 2-norm, relative to the
2-norm of its exact result (cf. Higham 2002, Theorem 24.2). It is compared with mpmath by the tests. Everything else is
proved in docs/accounting-pld.md, sections "Aliases" and "Rounding of the composition".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpbudget._numerics import ELEMENTARY, UNIT, exp_or_inf, log_kappa

if TYPE_CHECKING:
    from dpbudget.accountants._pld_law import Law
    from dpbudget.mechanisms.base import Array

#: A law and how often it is used.
Uses = Sequence[tuple["Law", int]]
# Terms beyond e^-REACH of the first are not summed but bounded.
_REACH = 60.0
_SMALLEST = 1e-300
# More than all weights of a law lost in underflow.
_UNDERFLOW = 1e-250


@dataclass(frozen=True)
class Lattice:
    """Where a composition is computed: losses k step, start <= k < start + size, tilted by ``tilt`` > 0.

    Attributes:
        step: h > 0 with few significant bits, so that k h is exact.
        start: first index of the window.
        size: length N of the transform, a power of two.
        tilt: c > 0.
        lower_tilt, higher_tilt: tilts below and above c whose moments bound the mass outside the window.
    """

    step: float
    start: int
    size: int
    tilt: float
    lower_tilt: float
    higher_tilt: float


@dataclass(frozen=True)
class Composed:
    """The tilted law of a total loss on its window, and what may be wrong with it; see :func:`compose`.

    Attributes:
        lattice: the window.
        masses: tilted masses [N] in order of the loss, scaled by e^-log_scale.
        log_scale: sum of the log moments that were divided out.
        noise: bound of the 2-norm of the rounding error of ``masses``.
        relative: the true value of every term is within e^(+-relative) of the ideal one.
        left, right: bounds of the scaled tilted mass below and above the window.
        total: bound of all scaled tilted mass.
        certain: (lower, upper) bounds of the mass at +inf.
    """

    lattice: Lattice
    masses: Array
    log_scale: float
    noise: float
    relative: float
    left: float
    right: float
    total: float
    certain: tuple[float, float]

    def upper(self, epsilon: float) -> float:
        """Upper bound of delta(epsilon) of the composed laws; 1 where nothing is known."""
        value, error, relative = self._sum(epsilon)
        # Mass below the window matters only where the window starts above epsilon.
        outside = self.right + (self.left if (self.lattice.start - 1) * self.lattice.step > epsilon else 0.0)
        error += math.exp(log_kappa(self.lattice.tilt)) * (1.0 + 1e-12) * outside
        answer = self._scaled(max(value + error, 0.0), epsilon, relative) + self.certain[1]
        return min(answer * (1.0 + 4.0 * UNIT) + _SMALLEST, 1.0) if answer == answer else 1.0

    def lower(self, epsilon: float) -> float:
        """Lower bound of delta(epsilon) of the composed laws; 0 where nothing is known."""
        value, error, relative = self._sum(epsilon)
        error += math.exp(log_kappa(self.lattice.tilt)) * (1.0 + 1e-12) * (self.left + self.right)
        if not value > error:
            return self.certain[0]
        answer = self._scaled(value - error, epsilon, -relative) + self.certain[0]
        return max(answer * (1.0 - 4.0 * UNIT) - _SMALLEST, 0.0) if math.isfinite(answer) else 0.0

    def _sum(self, epsilon: float) -> tuple[float, float, float]:
        """Sum over the window of mass times e^(-c y) (1 - e^-y), y = loss - epsilon > 0; its errors, relative last."""
        c, step, start = self.lattice.tilt, self.lattice.step, self.lattice.start
        # A term more or less at y = 0 or at the end of the reach makes no difference: the first is 0, the rest bounded.
        first = min(max(math.floor(epsilon / step) - start, 0), self.lattice.size)
        last = min(max(math.ceil((epsilon + _REACH / c) / step) - start, first), self.lattice.size)
        losses = np.arange(start + first, start + last) * step
        gaps = np.maximum(losses - epsilon, 0.0)
        terms = np.exp(-c * gaps) * -np.expm1(-gaps)
        masses = self.masses[first:last]
        summation = (len(terms) + 4.0 * _REACH + 100.0) * UNIT * float(terms @ np.abs(masses))
        noise = self.noise * math.sqrt(float(terms @ terms)) * (1.0 + len(terms) * UNIT + 1e-12)
        dropped = math.exp(-_REACH + 1.0) * self.total if last < self.lattice.size else 0.0
        relative = self.relative + 8.0 * UNIT * (abs(self.log_scale) + c * epsilon + 16.0)
        return float(terms @ masses), (summation + noise + dropped) * (1.0 + 1e-12), relative

    def _scaled(self, value: float, epsilon: float, relative: float) -> float:
        if value <= 0.0:
            return 0.0
        return exp_or_inf(math.log(value) + self.log_scale - self.lattice.tilt * epsilon + relative)


def compose(uses: Uses, lattice: Lattice) -> Composed:
    """The total loss of all ``uses``, whose losses are multiples of ``lattice.step``."""
    c, size = lattice.tilt, lattice.size
    scales = [law.log_moment(c) for law, _ in uses]
    exponent: Array = np.zeros(size // 2 + 1)
    angle, rounding = exponent.copy(), exponent + 64.0
    growth = spectral = relative = magnitude = 0.0
    for (law, count), scale in zip(uses, scales, strict=True):
        weights, error = _tilted(law, c, scale)
        index = np.rint(law.losses / lattice.step).astype(np.int64) % size
        folded = np.bincount(index, weights=weights, minlength=size)
        error += (len(weights) // size + 1) * UNIT
        # 2-norm error of the transform; no single entry is off by more.
        wrong = _transform(size) * math.sqrt(size * float(folded @ folded)) * (1.0 + 1e-9) + _UNDERFLOW
        growth += count * math.log(math.fsum(weights) * (1.0 + UNIT) + wrong)
        spectral += count * wrong
        relative += count * error
        magnitude += abs(count * scale)
        spectrum = np.fft.rfft(folded)
        logs, phase = np.log(np.maximum(np.abs(spectrum), _SMALLEST)), np.angle(spectrum)
        exponent += count * logs
        angle += count * phase
        rounding += (count * 24.0) * (1.0 + np.abs(logs) + np.abs(phase))
    rounding = (rounding + len(uses) * (np.abs(exponent) + np.abs(angle))) * UNIT
    power = np.exp(np.minimum(exponent, 600.0))
    masses = np.fft.irfft(power * np.exp(1j * angle), size)
    inflated = exp_or_inf(max(growth, 0.0))
    noise = math.sqrt(2.0) * (_norm(np.expm1(np.minimum(rounding, 600.0)) * power) + _transform(size) * _norm(power))
    noise = (noise + inflated * spectral) / math.sqrt(size) * (1.0 + 1e-6)
    log_scale = math.fsum(count * scale for (_, count), scale in zip(uses, scales, strict=True))
    start, tilts = lattice.start, (lattice.lower_tilt, lattice.higher_tilt)
    left, right = (
        _outside(uses, scales, tilt - c, tilt, edge * lattice.step)
        for tilt, edge in zip(tilts, (start - 1, start + size), strict=True)
    )
    return Composed(
        lattice, np.roll(masses, -(start % size)), log_scale, noise, relative + 4.0 * UNIT * magnitude,
        left, right, inflated, certain_mass(uses),
    )  # fmt: skip


def certain_mass(uses: Uses) -> tuple[float, float]:
    """Bounds of the mass at +inf of the composition: all mass, less that of the finite parts."""
    log_total, log_finite, error = 0.0, 0.0, 0.0
    for law, count in uses:
        finite = math.fsum(law.weights)
        total = finite + law.infinite
        if total <= 0.0:
            return 0.0, 0.0
        log_total += count * math.log(total)
        log_finite += count * (math.log1p(-law.infinite / total) if finite > 0.0 else -math.inf)
        error += count * UNIT
    value = exp_or_inf(log_total) * -math.expm1(log_finite)
    # Rounded totals and quotients move each factor by a few units, relative to the mass at +inf or to all of it.
    slack = 64.0 * (error + UNIT)
    return max(value * (1.0 - slack), 0.0), min(value * math.exp(min(2.0 * slack, 700.0)), 1.0)


def chernoff(uses: Uses, tilt: float) -> float:
    """Upper bound of the composition's log moment at any real ``tilt``."""
    return math.fsum(count * (law.log_moment(tilt) + law.accuracy(tilt)) for law, count in uses)


def _outside(uses: Uses, scales: Sequence[float], slope: float, tilt: float, edge: float) -> float:
    """Chernoff bound of the scaled tilted mass beyond ``edge``, above it for a positive slope, below for a negative."""
    terms = [
        count * (law.log_moment(tilt) + law.accuracy(tilt) - scale)
        for (law, count), scale in zip(uses, scales, strict=True)
    ]
    magnitude = math.fsum(abs(term) for term in terms) + abs(slope * edge)
    return exp_or_inf(math.fsum(terms) - slope * edge + 8.0 * UNIT * magnitude)


def _tilted(law: Law, tilt: float, scale: float) -> tuple[Array, float]:
    """The tilted weights and a bound of their relative error."""
    exponents = tilt * law.losses - scale
    reach = abs(tilt) * max(abs(float(law.losses[0])), abs(float(law.losses[-1])))
    # In two halves, because a tiny weight times a huge exponential is an ordinary number.
    half = np.exp(0.5 * exponents)
    return law.weights * half * half, (3.0 * reach + 2.0 * abs(scale) + 8.0) * UNIT + 3.0 * ELEMENTARY


def _transform(size: int) -> float:
    return 8.0 * UNIT * math.log2(size)


def _norm(values: Array) -> float:
    return math.sqrt(float(values @ values)) * (1.0 + len(values) * UNIT)
