"""Sums of A_j (exp(i k h L_j) - 1), k = 0 .. K, over scattered L_j, by transforms of binned Taylor terms.

Each L_j is a multiple of a bin width plus a remainder d with |k h d| <= nu <= 1, so exp(i k h d) is its Taylor
polynomial with an error below nu^p / p!, and what is left is one fast Fourier transform a power. Bin 0 needs none and
loses nothing to the subtraction of 1: there the terms start with i k h L. docs/accounting.md, "Many nodes".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpbudget._numerics import UNIT
from dpbudget.accountants._law import Array

Complex = npt.NDArray[np.complex128]

_REMAINDER = 2e-17
#: numpy.add.reduce and reduceat add blocks of 128 with eight accumulators and the blocks pairwise: fewer roundings.
PAIRWISE = 40.0


@dataclass(frozen=True)
class Turned:
    """``value`` [K + 1] with an error of at most linear * u + constant, u = k h, but for errors of L itself."""

    value: Complex
    linear: float
    constant: float


def turn_along(losses: Array, weights: Array, relative: Array, step: float, count: int) -> Turned:
    """Sum_j weights_j (exp(i k step losses_j) - 1) for k = 0 .. count.

    Args:
        losses: L_j, shape [X], monotone.
        weights: A_j >= 0, shape [X].
        relative: bound of the relative error of each weight, shape [X].
        step: h > 0.
        count: K.

    The transform is taken to be a sum in which every term meets log2(n) stages of one complex multiplication by a
    rounded root of unity and one addition, at most 8 roundoffs a stage.
    """
    size = 1 << max(math.ceil(math.log2(3.2 * count)), 4)
    width = 2.0 * math.pi / (step * size)
    bins = np.rint(losses / width)
    rest = losses - bins * width
    inside = bins == 0.0
    nu = math.pi * count / size * (1.0 + 1e-12)
    terms = _terms(nu)
    u = np.arange(count + 1, dtype=np.float64) * step
    value = _inside(losses[inside], weights[inside], u, terms)
    near = float((weights[inside] * (relative[inside] + (100.0 + PAIRWISE) * UNIT)) @ np.abs(losses[inside]))
    near += float(weights[inside] @ np.abs(losses[inside])) * _REMAINDER
    if inside.all():
        return Turned(value, near, 0.0)
    outside = np.flatnonzero(~inside)
    far = weights[outside]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(bins[outside]) != 0.0]))
    where = bins[outside][starts].astype(np.intp) % size
    value += _outside(rest[outside] * (2.0 / width), far, (starts, where), (size, count, terms))
    # A slot is met once for every turn of the circle, on either side of bin 0.
    turns = 2.0 * float(np.abs(bins).max()) / size + 2.0
    rounding = 8.0 * math.log2(size) + PAIRWISE + turns + 4.0 * terms + 40.0
    # e^nu bounds the sum of nu^n / n!; both the turning term and the constant -1 carry the weights' own errors.
    total = float(far.sum())
    constant = total * (math.exp(nu) * rounding * UNIT + _REMAINDER) + 2.0 * float(far @ relative[outside])
    return Turned(value, near, constant)


def _terms(nu: float) -> int:
    """How many Taylor terms leave a remainder nu^p / p! below the tolerated one."""
    terms, remainder = 1, nu
    while remainder > _REMAINDER:
        terms += 1
        remainder *= nu / terms
    return terms


def _inside(losses: Array, weights: Array, u: Array, terms: int) -> Complex:
    """Bin 0: sum_n (iu)^n / n! sum_j A_j L_j^n, n >= 1, with powers scaled by the largest |L|."""
    scale = float(np.abs(losses).max()) if losses.size else 0.0
    if scale == 0.0:
        return np.zeros(len(u), dtype=np.complex128)
    unit, power, sums = losses / scale, weights.copy(), []
    for _ in range(terms):
        power *= unit
        sums.append(float(power.sum()))
    turned = u * scale
    real, imag = np.zeros(len(u)), np.zeros(len(u))
    for n in range(terms, 0, -1):
        # value <- (iu / n) (S_n + value)
        factor = turned / n
        real, imag = -factor * imag, factor * (sums[n - 1] + real)
    return np.asarray(real + 1j * imag, dtype=np.complex128)


def _outside(
    unit: Array, weights: Array, bins: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]], shape: tuple[int, int, int]
) -> Complex:
    """The other bins: sum_n (i nu_k)^n / n! conj(rfft(a_n))_k - sum A, a_n the bin sums of A d^n, |d| <= 1."""
    (starts, where), (size, count, terms) = bins, shape
    nu = np.arange(count + 1, dtype=np.float64) * (math.pi / size)
    power = weights.copy()
    coefficient = np.ones(count + 1, dtype=np.complex128)
    value = np.full(count + 1, -float(weights.sum()), dtype=np.complex128)
    for n in range(terms):
        line = np.bincount(where, weights=np.add.reduceat(power, starts), minlength=size)
        spectrum = np.fft.rfft(line)[: count + 1]
        value += coefficient * np.conj(spectrum)
        power *= unit
        coefficient *= 1j * nu / (n + 1)
    return value
