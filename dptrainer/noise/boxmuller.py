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
from collections.abc import Sequence
from typing import Any

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
Scalar = NDArray[Any]

# Blocks whose words and values are read and written together.
_CHUNK = 128


def _scalar(value: float) -> Scalar:
    """As an array without dimensions: half the cost of a number in a call of NumPy."""
    made = np.array(value)
    made.flags.writeable = False
    return made


_HALF, _1, _2, _MINUS_2, _63 = map(_scalar, (0.5, 1.0, 2.0, -2.0, 63))
# As an integer, the bits of -2^63; and the bits of a number that make it the power of two below it.
_LEAST, _SIGN_AND_EXPONENT = _scalar((1086 << 52) - (1 << 63)), _scalar(-(1 << 52))
# For e 2^52 in place of e, and for n 2^31 in place of n: powers of two change no rounding.
_LEAST_AS_FLOAT, _E_TERM = _scalar(float(_LEAST)), _scalar(MINUS_2_LN_2 * 2.0**-52)
_SINE = tuple(_scalar(c * TURN ** (2 * i + 1)) for i, c in enumerate(SINE))
_ARTANH = tuple(map(_scalar, ARTANH))


def constants() -> dict[str, float]:
    """Every constant by the name that it has in ``boxmuller.c``."""
    named = {f"{letter}{i}": c for letter, row in zip("SL", (SINE, ARTANH), strict=True) for i, c in enumerate(row)}
    return {**named, "TURN": TURN, "MINUS_2_LN_2": MINUS_2_LN_2}


class Workbench:
    """Keystream and work space for up to ``blocks`` blocks, allocated once: page faults cost more than arithmetic.

    The rows are five for each chunk of blocks, one for each pair of a block: [chunks, 5, _CHUNK]. All arithmetic is on
    long rows then, and what is read and written with gaps stays in the first-level cache for the five that share it.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks, chunks = blocks, -(-blocks // _CHUNK)
        held = bytearray(BLOCK_BYTES * _CHUNK * chunks)
        self.words = memoryview(held)[: BLOCK_BYTES * blocks]
        self._bytes = np.frombuffer(held, dtype=np.uint8)
        self._k = np.frombuffer(held, dtype="<i8").reshape(chunks, _CHUNK, 8)[:, :, :5].transpose(0, 2, 1)
        self._a = np.frombuffer(held, dtype="<i4").reshape(chunks, _CHUNK, 16)[:, :, 10:15].transpose(0, 2, 1)
        self._rows = _aligned(4, chunks, BLOCK_PAIRS, _CHUNK)
        self._values = _aligned(chunks, _CHUNK, BLOCK_PAIRS, 2)
        self._used = 0

    def room(self, blocks: int) -> memoryview:
        """Where the words of the next ``blocks`` blocks go."""
        self._used = max(self._used, -(-blocks // _CHUNK))
        return self.words[: BLOCK_BYTES * blocks]

    def add(self, out: torch.Tensor, skip: int, std: float) -> bool:
        """Add ``std`` times the values of the words, the first ``skip`` left out, to a contiguous CPU tensor.

        Returns:
            Whether all that it was added to was finite.
        """
        noise = self.box_muller(-(-(skip + out.numel()) // BLOCK_ELEMENTS))[skip : skip + out.numel()]
        np.multiply(noise, std, out=noise)
        whole, (room, spare) = out.numpy(), self._rows[:2].reshape(2, -1)
        finite = True
        for start in range(0, len(whole), len(room)):  # float64, rounded once to the tensor's type
            target = whole[start : start + len(room)]
            sums = room[: len(target)]
            np.copyto(sums, target)
            finite &= bool(np.isfinite(sums, out=spare.view(np.bool_)[: len(sums)]).all())
            np.add(sums, noise[start : start + len(room)], out=sums)
            np.copyto(target, sums, casting="same_kind")
        return finite

    def box_muller(self, blocks: int) -> Floats:
        """[10 * blocks] values of the first ``blocks`` blocks, valid until the next call."""
        chunks = -(-blocks // _CHUNK)
        self._used = max(self._used, chunks)
        rows = self._rows[:, :chunks]
        shape, flat = rows.shape[1:], rows.reshape(4, -1)
        radius = _radii(self._k[:chunks], flat)
        cosine, half_sine = _directions(self._a[:chunks], flat)
        values = self._values[:chunks].transpose(3, 0, 2, 1)
        np.multiply(radius.reshape(shape), cosine.reshape(shape), out=values[0])
        np.add(radius, radius, out=radius)
        np.multiply(radius.reshape(shape), half_sine.reshape(shape), out=values[1])
        return self._values.reshape(-1)[: BLOCK_ELEMENTS * blocks]

    def erase(self) -> None:
        """Overwrite what the noise could be read from (best effort)."""
        self._bytes[: BLOCK_BYTES * _CHUNK * self._used].fill(0)
        self._rows[:, : self._used].fill(0.0)
        self._values[: self._used].fill(0.0)
        self._used = 0


def _aligned(*shape: int) -> Floats:
    """An array that begins with a cache line, as vectors do then: a tenth of the time."""
    size = math.prod(shape)
    held = np.empty(size + 7)
    start = -held.ctypes.data // 8 % 8
    return held[start : start + size].reshape(shape)


def _radii(k: NDArray[np.int64], rows: Floats) -> Floats:
    """sqrt(-2 ln U), in the second of four rows; the others are overwritten."""
    d, s, h, e = rows
    bits, power, mask = d.view(np.int64), s.view(np.int64), h.view(np.int64)
    np.invert(k, out=mask.reshape(k.shape))
    np.copyto(d, mask)
    np.minimum(bits, _LEAST, out=power)  # numbers above 0 have larger bits than any below it
    np.bitwise_and(power, _SIGN_AND_EXPONENT, out=power)  # -2^(63 + e) as a number
    np.copyto(e, power)
    np.subtract(e, _LEAST_AS_FLOAT, out=e)
    np.multiply(e, _E_TERM, out=e)
    np.multiply(s, _MINUS_2, out=s)
    np.right_shift(bits, _63, out=mask)  # -1 where U <= 1/2, else 0
    np.bitwise_and(mask, power, out=mask)
    np.add(d, h, out=h)  # (1 - m) 2^(64 + e), exactly
    np.multiply(s, _2, out=s)
    np.subtract(s, h, out=s)
    np.divide(h, s, out=h)
    np.multiply(h, h, out=d)
    _polynomial(_ARTANH, d, out=s)
    np.multiply(s, h, out=s)
    np.add(s, e, out=s)
    radius: Floats = np.sqrt(s, out=s)
    return radius


def _directions(a: NDArray[np.int32], rows: Floats) -> tuple[Floats, Floats]:
    """Cosine and half the sine of 2 pi (a + 1/2) / 2^32, in the last two of four rows; the second is left alone."""
    s, _, n, w = rows
    np.copyto(n.reshape(a.shape), a)
    np.add(n, _HALF, out=n)
    np.multiply(n, n, out=w)
    _polynomial(_SINE, w, out=s)
    np.multiply(s, n, out=s)  # sqrt 2 sin x
    np.multiply(s, s, out=w)
    np.subtract(_1, w, out=w)  # cos 2x
    np.add(w, _1, out=n)
    np.sqrt(n, out=n)  # sqrt 2 cos x
    np.multiply(n, s, out=n)  # sin 2x
    np.multiply(w, n, out=w)  # half of sin 4x
    np.multiply(n, n, out=n)
    np.multiply(n, _MINUS_2, out=n)
    np.add(n, _1, out=n)
    return n, w


def _polynomial(coefficients: Sequence[Scalar], w: Floats, out: Floats) -> None:
    """Horner's rule, highest power first."""
    np.multiply(w, coefficients[-1], out=out)
    for coefficient in coefficients[-2:0:-1]:
        np.add(out, coefficient, out=out)
        np.multiply(out, w, out=out)
    np.add(out, coefficients[0], out=out)
