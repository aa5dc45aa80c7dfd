"""Box and Muller's transform as a fixed sequence of IEEE 754 operations, so that every machine gives the same bits.

One 64-byte block gives five pairs: its first ten 32-bit words are five little-endian 64-bit integers k (radii), the
next five words are the integers a (angles), and the last word is unused. Of a pair the law asks for

    radius = sqrt(-2 ln U),  U = (k + 1) / 2^64 in (0, 1],      angle = 2 pi (a + 1/2) / 2^32.

Only additions, products, quotients and square roots of binary64 are used, each rounded once, and integer operations: no
library's logarithm or sine, whose last bits differ between machines. ``boxmuller.c`` states the same operations for a
compiler; the two agree bit for bit, and a test compares them.

**Radius.** ~k read with a sign is -(k + 1) where U <= 1/2 and (1 - U) 2^64 where U > 1/2, so one conversion keeps full
relative precision at both ends. With U = m 2^e, 1/2 <= m < 1, in the first case and m = U, e = 0 in the second, and
z = (1 - m) / (1 + m) <= 1/3, -2 ln U = 4 artanh(z) - 2 e ln 2, where artanh(z) / z is a polynomial in z^2 of relative
error 2^-48.9.

**Angle.** With a read with a sign, x = pi n / 4, n = (a + 1/2) / 2^31 in (-1, 1), is a quarter of the angle. sin x / x
is a polynomial in n^2 of relative error 2^-54, cos 2x = 1 - 2 sin^2 x, cos x = sqrt((1 + cos 2x) / 2) > 0.7, and the
angle is doubled twice.

**Error.** A value differs from that of the law by less than 2^-48 radii: 1/400,000 of the spacing of the angles.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from dptrainer.noise.chacha import BLOCK_BYTES

#: Elements and pairs of one keystream block.
BLOCK_ELEMENTS, BLOCK_PAIRS = 10, 5
# Coefficients of w^0, w^1, ...: interpolation at Chebyshev's points, rounded. sqrt 2 sin(pi n / 4) / n, w = n^2.
SINE = (
    1.1107207345395915,
    -0.11419139843742838,
    0.003521949776821378,
    -5.172656398166321e-05,
    4.4316025652803233e-07,
    -2.484985466763365e-09,
    9.726056595901821e-12,
)
# 4 artanh(z) / z, w = z^2 <= 1/9.
ARTANH = (
    4.000000000000006,
    1.3333333333236514,
    0.8000000023162904,
    0.571428358695101,
    0.44445419509438344,
    0.36338667983787615,
    0.3114141440296288,
    0.23489955639118948,
    0.37516039202095375,
)
TURN, MINUS_2_LN_2 = 2.0**-31, -2.0 * math.log(2.0)

Floats = NDArray[np.float64]


def constants() -> dict[str, float]:
    """Every constant by the name that it has in ``boxmuller.c``."""
    named = {f"{letter}{i}": c for letter, row in zip("SL", (SINE, ARTANH), strict=True) for i, c in enumerate(row)}
    return {**named, "TURN": TURN, "MINUS_2_LN_2": MINUS_2_LN_2}


class Workbench:
    """Keystream and work space for up to ``blocks`` blocks, allocated once: page faults cost more than arithmetic."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.words = bytearray(BLOCK_BYTES * blocks)
        # Pairs are worked on as [5, blocks], so that the innermost loops are long.
        self._k = np.frombuffer(self.words, dtype="<i8").reshape(blocks, 8)[:, :5].T
        self._a = np.frombuffer(self.words, dtype="<i4").reshape(blocks, 16)[:, 10:15].T
        self._floats = np.empty((5, BLOCK_PAIRS, blocks))
        self._integers = np.empty((2, BLOCK_PAIRS, blocks), dtype=np.int64)
        self._values = np.empty((blocks, BLOCK_PAIRS, 2))
        self._used = 0

    def room(self, blocks: int) -> memoryview:
        """Where the words of the next ``blocks`` blocks go."""
        self._used = max(self._used, blocks)
        return memoryview(self.words)[: BLOCK_BYTES * blocks]

    def add(self, out: torch.Tensor, skip: int, std: float) -> None:
        """Add ``std`` times the values of the words, the first ``skip`` left out, to a contiguous CPU tensor."""
        used = -(-(skip + out.numel()) // BLOCK_ELEMENTS)
        noise = self.box_muller(used)[skip : skip + out.numel()]
        target = out.numpy()
        np.multiply(noise, std, out=noise)
        np.add(target, noise, out=target, casting="same_kind")  # float64, rounded once to the tensor's type

    def box_muller(self, blocks: int) -> Floats:
        """[10 * blocks] values of the first ``blocks`` blocks, valid until the next call."""
        radius, n, w, sine, cosine = self._floats[:, :, :blocks]
        self._radii(blocks, radius, n, w, sine)
        _angles(n, w, sine, cosine, self._a[:, :blocks])
        values = self._values[:blocks]
        np.multiply(radius, cosine, out=values[:, :, 0].T)
        np.multiply(radius, sine, out=values[:, :, 1].T)
        return values.reshape(-1)

    def _radii(self, blocks: int, out: Floats, d: Floats, w: Floats, p: Floats) -> None:
        """``out`` = sqrt(-2 ln U); the others are overwritten."""
        e, signs = self._integers[:, :, :blocks]
        np.invert(self._k[:, :blocks], out=e)
        np.copyto(d, e)
        bits = d.view(np.int64)
        np.right_shift(bits, 63, out=signs)  # -1 where U <= 1/2, else 0
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

    def erase(self) -> None:
        """Overwrite what the noise could be read from (best effort)."""
        np.frombuffer(self.words, dtype=np.uint8)[: BLOCK_BYTES * self._used].fill(0)
        self._floats[:, :, : self._used].fill(0.0)
        self._integers[:, :, : self._used].fill(0)
        self._values[: self._used].fill(0.0)
        self._used = 0


def _angles(n: Floats, w: Floats, sine: Floats, cosine: Floats, a: NDArray[np.int32]) -> None:
    """``sine`` and ``cosine`` of 2 pi (a + 1/2) / 2^32; ``n`` and ``w`` are overwritten."""
    np.copyto(n, a)
    np.add(n, 0.5, out=n)
    np.multiply(n, TURN, out=n)
    np.multiply(n, n, out=w)
    _polynomial(SINE, w, out=sine)
    np.multiply(sine, n, out=sine)  # sqrt 2 sin x
    np.multiply(sine, sine, out=w)
    np.subtract(1.0, w, out=w)  # cos 2x
    np.add(w, 1.0, out=cosine)
    np.sqrt(cosine, out=cosine)  # sqrt 2 cos x
    np.multiply(sine, cosine, out=n)  # sin 2x
    np.add(n, n, out=sine)
    np.multiply(sine, n, out=cosine)
    np.subtract(1.0, cosine, out=cosine)
    np.multiply(sine, w, out=sine)


def _polynomial(coefficients: tuple[float, ...], w: Floats, out: Floats) -> None:
    """Horner's rule, highest power first."""
    np.multiply(w, coefficients[-1], out=out)
    for coefficient in coefficients[-2:0:-1]:
        np.add(out, coefficient, out=out)
        np.multiply(out, w, out=out)
    np.add(out, coefficients[0], out=out)
