"""Pairs of Gaussian values in binary64 with a proved bound of their error, and the integers that they surely round to.

One 64-byte block gives four pairs: its first four little-endian 64-bit words are the first digits k of U, the other
four are the first digits a of A (:mod:`dptrainer.noise.ziv`). Of the value s r cos(2 pi A) or s r sin(2 pi A), s the
width, it computes s z. Whatever further digits U and A have, the value differs from s z by less than

    s (2^-49 r + 2^-53)     where R_MIN <= r <= R_MAX (all but 4 pairs in a million).

docs/exact-sampler.md has the proof. It needs no more than that every sum, product, quotient and square root is rounded
once or not at all, so that a compiler may fuse multiplication and addition. Where s z is farther than *four* times the
bound from every half-integer, the integer nearest to it is the value; the others are doubtful, and reported.

**Radius.** As in :mod:`dptrainer.noise.boxmuller`, with two more powers: with k' = k + 1, U' = k' / 2^64 = m 2^e,
1/2 <= m < 1 where U' <= 1/2, and m = U', e = 0 elsewhere; z = (1 - m) / (1 + m) and -2 ln U' = 4 artanh z - 2 e ln 2.

**Angle.** 2 pi A = pi q / 2 + y, -pi / 4 <= y < pi / 4: q and n = 4 y / pi are read from a as integers, sin y / n and
(1 - cos y) / n^2 are polynomials in n^2, and q says which of the two comes first and with which signs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dptrainer.noise.chacha import BLOCK_BYTES

#: Elements and pairs of one keystream block.
BLOCK_ELEMENTS, BLOCK_PAIRS = 8, 4
# Coefficients of w^0, w^1, ...: interpolation at Chebyshev's points, rounded. sin(pi n / 4) / n, w = n^2 <= 1.
SINE = (
    0.7853981633974483,
    -0.08074551218828054,
    0.002490394570188844,
    -3.657620415891387e-05,
    3.133616225433416e-07,
    -1.7571500746983935e-09,
    6.877360573166326e-12,
)
# (1 - cos(pi n / 4)) / n^2.
VERSINE = (
    0.30842513753404244,
    -0.015854344243815488,
    0.0003259918869271996,
    -3.590860447448612e-06,
    2.4611366238309744e-08,
    -1.1500679700940496e-10,
    3.863156948832656e-13,
)
# 4 artanh(z) / z, w = z^2 <= 1/9.
ARTANH = (
    4.0,
    1.333333333333323,
    0.800000000003715,
    0.5714285709090823,
    0.4444444816149535,
    0.3636348166500961,
    0.3077322808460802,
    0.2660074806534925,
    0.24220337456138435,
    0.1664901302372164,
    0.34088327125562795,
)
MINUS_2_LN_2 = -2.0 * math.log(2.0)
#: Radii for which the bound holds: U from 2^-18 to 1 - 2^-21.
R_MIN, R_MAX = 2.0**-10, math.sqrt(36.0 * math.log(2.0))
#: Four times the bound is SLOPE * r + LEAST.
SLOPE, LEAST = 2.0**-47, 2.0**-51
#: Added to a number below 2^51, it leaves the nearest integer in the last bits.
MAGIC = 1.5 * 2.0**52
_MAGIC_BITS = 0x4338000000000000
_TOP = np.uint64(1 << 63)
_HALF_QUADRANT = np.uint64(1 << 61)
_QUADRANT = np.uint64((1 << 62) - 1)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Words = NDArray[np.uint64]


def constants() -> dict[str, float]:
    """Every constant by the name that it has in ``rounded.c``."""
    rows = zip("SVL", (SINE, VERSINE, ARTANH), strict=True)
    named = {f"{letter}{i}": c for letter, row in rows for i, c in enumerate(row)}
    named |= {"MINUS_2_LN_2": MINUS_2_LN_2, "MAGIC": MAGIC, "SLOPE": SLOPE, "LEAST": LEAST}
    return {**named, "R_MIN": R_MIN, "R_MAX": R_MAX}


class Workbench:
    """Keystream and work space for up to ``blocks`` blocks, allocated once: page faults cost more than arithmetic."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.words = bytearray(BLOCK_BYTES * blocks)
        # Pairs are worked on as [4, blocks], so that the innermost loops are long.
        self._k = np.frombuffer(self.words, dtype="<i8").reshape(blocks, 8)[:, :4].T
        self._a = np.frombuffer(self.words, dtype="<u8").reshape(blocks, 8)[:, 4:].T
        self._floats = np.empty((5, BLOCK_PAIRS, blocks))
        self._results = np.empty((3, blocks, BLOCK_PAIRS, 2))
        self._used = 0

    def room(self, blocks: int) -> memoryview:
        """Where the words of the next ``blocks`` blocks go."""
        self._used = max(self._used, blocks)
        return memoryview(self.words)[: BLOCK_BYTES * blocks]

    def add(self, out: Integers, skip: int, scale: float) -> NDArray[np.intp]:
        """Add the rounded values of the words, the first ``skip`` left out, to ``out`` modulo 2^64.

        Returns:
            The positions in ``out`` whose values are doubtful: nothing was added there.
        """
        last = skip + len(out)
        doubtful, integers = self.round(-(-last // BLOCK_ELEMENTS), scale)
        integers[doubtful] = 0
        np.add(out, integers[skip:last], out=out)
        return doubtful[(doubtful >= skip) & (doubtful < last)] - skip

    def round(self, blocks: int, scale: float) -> tuple[NDArray[np.intp], Integers]:
        """Positions of the doubtful among the [8 * blocks] values of the first blocks, and all nearest integers."""
        radius, off = self.pairs(blocks)
        rounded, whole = self._results[1:, :blocks].reshape(2, -1)
        np.multiply(off, scale, out=off)
        np.add(off, MAGIC, out=rounded)
        np.subtract(off, np.subtract(rounded, MAGIC, out=whole), out=off)
        np.abs(off, out=off)  # exact: how far from the nearest integer
        near = np.flatnonzero(off >= 0.5 - (R_MAX * SLOPE + LEAST) * scale)
        r = radius.T.reshape(-1)
        doubtful = near[off[near] + (r[near >> 1] * SLOPE + LEAST) * scale >= 0.5]
        if not (radius.min(initial=1.0) >= R_MIN and radius.max(initial=1.0) <= R_MAX):
            outside = np.flatnonzero(~((r >= R_MIN) & (r <= R_MAX)))
            doubtful = np.union1d(doubtful, np.concatenate([2 * outside, 2 * outside + 1]))
        integers = rounded.view(np.int64)
        return doubtful, np.subtract(integers, _MAGIC_BITS, out=integers)

    def pairs(self, blocks: int) -> tuple[Floats, Floats]:
        """[4, blocks] radii and the [8 * blocks] values in order, valid until the next call."""
        radius, n, w, first, second = self._floats[:, :, :blocks]
        _radii(self._k[:, :blocks], radius, n, w, first, second)
        _directions(self._a[:, :blocks], n, w, first, second)
        values = self._results[0, :blocks]
        np.multiply(radius, first, out=values[:, :, 0].T)
        np.multiply(radius, second, out=values[:, :, 1].T)
        return radius, values.reshape(-1)

    def erase(self) -> None:
        """Overwrite what the noise could be read from (best effort)."""
        np.frombuffer(self.words, dtype=np.uint8)[: BLOCK_BYTES * self._used].fill(0)
        self._floats[:, :, : self._used].fill(0.0)
        self._results[:, : self._used].fill(0.0)
        self._used = 0


def _radii(k: Integers, out: Floats, d: Floats, w: Floats, p: Floats, spare: Floats) -> None:
    """``out`` = sqrt(-2 ln U'); the others are overwritten."""
    e, signs = spare.view(np.int64), p.view(np.int64)
    np.invert(k, out=e)  # -(k + 1) where U' <= 1/2, else (1 - U') 2^64: full relative precision at both ends
    np.copyto(d, e)
    bits = d.view(np.int64)
    np.right_shift(bits, 63, out=signs)  # -1 where U' <= 1/2, else 0
    np.right_shift(bits, 52, out=e)
    np.add(e, 962, out=e)  # the sign bit counts as -2048: the exponent of |d| less 1086
    np.bitwise_and(e, signs, out=e)
    np.copyto(out, e)
    np.multiply(out, MINUS_2_LN_2, out=out)
    np.subtract(959, e, out=e)
    np.left_shift(e, 52, out=e)  # the bits of the power of two that takes |d| to m or to 1 - m
    np.multiply(d, e.view(np.float64), out=d)
    np.subtract(d, np.floor(d, out=w), out=d)  # 1 - m, from -m in the first case
    np.subtract(2.0, d, out=w)
    np.divide(d, w, out=d)
    _polynomial(ARTANH, np.multiply(d, d, out=w), out=p)
    np.multiply(p, d, out=d)
    np.add(d, out, out=out)
    np.sqrt(out, out=out)


def _directions(a: Words, n: Floats, w: Floats, cosine: Floats, sine: Floats) -> None:
    """``cosine`` and ``sine`` of 2 pi A; the others are overwritten."""
    turned = cosine.view(np.uint64)
    np.add(a, _HALF_QUADRANT, out=turned)
    integers = sine.view(np.uint64)
    np.bitwise_and(turned, _QUADRANT, out=integers)
    np.subtract(integers, _HALF_QUADRANT, out=integers)
    np.copyto(n, integers.view(np.int64))
    np.multiply(n, 2.0**-61, out=n)
    np.multiply(n, n, out=w)
    _polynomial(SINE, w, out=sine)
    np.multiply(sine, n, out=sine)
    _polynomial(VERSINE, w, out=n)
    np.multiply(n, w, out=n)
    np.subtract(1.0, n, out=n)  # the cosine
    _turn(turned, w.view(np.uint64), n.view(np.uint64), sine.view(np.uint64))
    np.copyto(cosine, n)


def _turn(turned: Words, spare: Words, cosine: Words, sine: Words) -> None:
    """Turns a direction by q quadrants, the top two bits of ``turned``; that and ``spare`` are overwritten."""
    np.left_shift(turned, np.uint64(1), out=spare)
    mask = spare.view(np.int64)
    np.right_shift(mask, 63, out=mask)  # all ones where q is odd
    difference = cosine ^ sine
    difference &= spare
    cosine ^= difference
    sine ^= difference
    np.bitwise_and(turned, _TOP, out=turned)  # q = 2, 3
    sine ^= turned
    np.bitwise_and(spare, _TOP, out=spare)
    turned ^= spare  # q = 1, 2
    cosine ^= turned


def _polynomial(coefficients: tuple[float, ...], w: Floats, out: Floats) -> None:
    """Horner's rule, highest power first."""
    np.multiply(w, coefficients[-1], out=out)
    for coefficient in coefficients[-2:0:-1]:
        np.add(out, coefficient, out=out)
        np.multiply(out, w, out=out)
    np.add(out, coefficients[0], out=out)
