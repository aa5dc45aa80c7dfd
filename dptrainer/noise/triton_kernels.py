"""The noise of :mod:`dptrainer.noise.gaussian` as Triton kernels: cipher, Box and Muller's step and sum in one pass.

Importing this module imports Triton; :mod:`dptrainer.noise.gpu` does so when a tensor asks for it, and launches.

A lane makes one keystream block, hence ten consecutive values; a tile of BLOCKS lanes, ten times as many. Values change
lanes once, through shared memory, so that the lanes of a warp read and write sixteen columns of which ten are values:
runs of consecutive addresses (docs/adr/0007).

**Arithmetic.** In float64 it is the sequence of :mod:`dptrainer.noise.boxmuller`, operation by operation, with the same
bits. In float32 it is another one: the 64-bit integer k is rounded to 24 bits with full relative precision at both ends
of U, and logarithm, sine and cosine are polynomials. A value then differs from that of the law by less than 2^-21
radii: at most 3.3 * 2^-24 by the radius, 1.8 by sine or cosine, 2 by their products, and 3.5 together is the most that
was seen. Rounding the sum to float32 comes on top.

Nothing here branches on noise, key or sums, except that a sum that is not finite raises the flag.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dptrainer.noise import boxmuller

#: Columns of a row of the table of tensors, see :func:`add_noise`.
COLUMNS = 7
_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)
# float64: those of the CPU.
_SINE: tl.constexpr = tl.constexpr(boxmuller.SINE)
_ARTANH: tl.constexpr = tl.constexpr(boxmuller.ARTANH)
_TURN: tl.constexpr = tl.constexpr(boxmuller.TURN)
_MINUS_2_LN_2: tl.constexpr = tl.constexpr(boxmuller.MINUS_2_LN_2)
# float32, coefficients of w^0, w^1, ...: interpolation at Chebyshev's points, relative error below 2^-27.
# -2 ln(1 + f) / f, w = f, |f| <= 1/3.
_LOG32: tl.constexpr = tl.constexpr(
    (
        -2.000000007681759,
        1.0000000070639938,
        -0.6666632164137777,
        0.499996827289051,
        -0.40024595230703747,
        0.3335594732643263,
        -0.27965157745197267,
        0.2444271836200585,
        -0.2815777836310908,
        0.2545257816590454,
    )
)
# sin(pi t / 4) / t and cos(pi t / 4), w = t^2 <= 1.
_SINE32: tl.constexpr = tl.constexpr(
    (0.7853981609766183, -0.08074543470810147, 0.0024900068014923568, -3.595429072511075e-05)
)
_COSINE32: tl.constexpr = tl.constexpr(
    (1.0, -0.3084251373435548, 0.01585433814731928, -0.0003259613803468745, 3.54195272813776e-06)
)
_KEY = ("k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7")


# ---------------------------------------------------------------------------- cipher


@triton.jit
def _quarter(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, one: tl.tensor) -> tuple[tl.tensor, ...]:
    # RFC 8439, 2.1. Sums are made with a product by 1, since multipliers are idle and the units of xor and rotation are
    # what everything waits for (docs/adr/0007).
    a = a * one + b
    d = d ^ a
    d = (d << 16) | (d >> 16)
    c = c * one + d
    b = b ^ c
    b = (b << 12) | (b >> 20)
    a = a * one + b
    d = d ^ a
    d = (d << 8) | (d >> 24)
    c = c * one + d
    b = b ^ c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _cipher(
    one: tl.tensor, block: tl.tensor, stream: tl.tensor, last: tl.tensor,
    k0: tl.tensor, k1: tl.tensor, k2: tl.tensor, k3: tl.tensor,
    k4: tl.tensor, k5: tl.tensor, k6: tl.tensor, k7: tl.tensor,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    # The sixteen words of RFC 8439, 2.3, for every block index of a vector of int64: its low half is the counter, its
    # high half the second word of the nonce, so that the carry goes where chacha.py says. The compiler must not know
    # that ``one`` is 1.
    one = one.to(tl.uint32)
    none = (block * 0).to(tl.uint32)
    s4 = none + k0.to(tl.uint32, bitcast=True)
    s5 = none + k1.to(tl.uint32, bitcast=True)
    s6 = none + k2.to(tl.uint32, bitcast=True)
    s7 = none + k3.to(tl.uint32, bitcast=True)
    s8 = none + k4.to(tl.uint32, bitcast=True)
    s9 = none + k5.to(tl.uint32, bitcast=True)
    s10 = none + k6.to(tl.uint32, bitcast=True)
    s11 = none + k7.to(tl.uint32, bitcast=True)
    s12 = block.to(tl.uint32)
    s13 = none + stream.to(tl.uint32)
    s14 = (block >> 32).to(tl.uint32)
    s15 = none + last
    x0, x1, x2, x3 = none + 0x61707865, none + 0x3320646E, none + 0x79622D32, none + 0x6B206574
    x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12, one)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13, one)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14, one)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15, one)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15, one)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12, one)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13, one)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14, one)
    return (
        x0 + 0x61707865, x1 + 0x3320646E, x2 + 0x79622D32, x3 + 0x6B206574, x4 + s4, x5 + s5, x6 + s6, x7 + s7,
        x8 + s8, x9 + s9, x10 + s10, x11 + s11, x12 + s12, x13 + s13, x14 + s14, x15 + s15,
    )  # fmt: skip


# ---------------------------------------------------------------------------- Box and Muller


@triton.jit
def _horner(coefficients: tl.constexpr, w: tl.tensor, DEGREE: tl.constexpr) -> tl.tensor:
    # Each operation rounded, as on the CPU.
    p = w * coefficients[DEGREE]
    for i in tl.static_range(DEGREE - 1, 0, -1):
        p = (p + coefficients[i]) * w
    return p + coefficients[0]


@triton.jit
def _horner32(coefficients: tl.constexpr, w: tl.tensor, DEGREE: tl.constexpr) -> tl.tensor:
    p = tl.fma(w, coefficients[DEGREE], coefficients[DEGREE - 1])
    for i in tl.static_range(DEGREE - 2, -1, -1):
        p = tl.fma(p, w, coefficients[i])
    return p


@triton.jit
def _radius(k: tl.tensor) -> tl.tensor:
    # boxmuller.c, radius(), for k as int64.
    d = (~k).to(tl.float64)
    bits = d.to(tl.int64, bitcast=True)
    sign = bits >> 63
    e = ((bits >> 52) + 962) & sign
    power = ((959 - e) << 52).to(tl.float64, bitcast=True)
    h = d * power + (sign & 0x3FF0000000000000).to(tl.float64, bitcast=True)
    z = h / (2.0 - h)
    return tl.sqrt(_horner(_ARTANH, z * z, 8) * z + e.to(tl.float64) * _MINUS_2_LN_2)


@triton.jit
def _angle(a: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    # boxmuller.c, cosine and sine of the angle, for a as int32.
    n = (a.to(tl.float64) + 0.5) * _TURN
    s = _horner(_SINE, n * n, 6) * n
    cos2x = 1.0 - s * s
    sin2x = s * tl.sqrt(cos2x + 1.0)
    twice = sin2x + sin2x
    return 1.0 - twice * sin2x, twice * cos2x


@triton.jit
def _radius32(k: tl.tensor) -> tl.tensor:
    # k as int64: it is k >= 0 where U <= 1/2, and v = -U, rounded to 24 bits; else v = 1 - U, likewise, from 0 on.
    v = tl.fma(k.to(tl.float32), -5.421010862427522e-20, -5.421010862427522e-20)
    u = tl.where(v < 0.0, -v, 1.0 - v)
    # U = (1 + f) 2^e with |f| <= 1/3. Only e comes from u, which is rounded again; f comes from v without an error:
    # -v 2^-e - 1, or 2^-e - 1 - v 2^-e, which is -v itself for U > 2/3.
    e = (u.to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000
    power = (0x3F800000 - e).to(tl.float32, bitcast=True)
    f = tl.fma(-v, power, tl.where(v < 0.0, -1.0, power - 1.0))
    y = tl.fma(e.to(tl.float32), -1.6525916575885197e-07, _horner32(_LOG32, f, 9) * f)  # -2 ln 2 / 2^23
    # The square root by one step of Newton's from the reciprocal's estimate; y = 0 gives 0.
    q = tl.rsqrt(tl.maximum(y, 1e-30))
    root = y * q
    return tl.fma(tl.fma(-root, root, y), 0.5 * q, root)


@triton.jit
def _angle32(a: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    # The nearest quarter turn is taken off in integers; t in (-1, 1) is the rest in eighths of a turn.
    turn = (a + 0x20000000) & -0x40000000
    t = tl.fma((a - turn).to(tl.float32), 1.862645149230957e-09, 9.313225746154785e-10)
    s = _horner32(_SINE32, t * t, 3) * t
    c = _horner32(_COSINE32, t * t, 4)
    # After 0 to 3 quarter turns: (c, s), (-s, c), (-c, -s), (s, -c).
    odd = (turn & 0x40000000) != 0
    x = tl.where(odd, s, c).to(tl.int32, bitcast=True) ^ ((turn + 0x40000000) & -0x80000000)
    y = tl.where(odd, c, s).to(tl.int32, bitcast=True) ^ (turn & -0x80000000)
    return x.to(tl.float32, bitcast=True), y.to(tl.float32, bitcast=True)


@triton.jit
def _pair(
    low: tl.tensor, high: tl.tensor, angle: tl.tensor, std: tl.tensor, ARITHMETIC: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    k = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)).to(tl.int64, bitcast=True)
    a = angle.to(tl.int32, bitcast=True)
    if tl.float64 == ARITHMETIC:
        r = _radius(k)
        x, y = _angle(a)
        return (r * x) * std, (r * y) * std
    else:
        r = _radius32(k) * std
        x, y = _angle32(a)
        return r * x, r * y


@triton.jit
def _side_by_side(
    z0: tl.tensor, z1: tl.tensor, z2: tl.tensor, z3: tl.tensor, z4: tl.tensor,
    z5: tl.tensor, z6: tl.tensor, z7: tl.tensor, z8: tl.tensor, z9: tl.tensor,
    BLOCKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    # [BLOCKS, 16]: the ten values of a block and six zeros. Column 8a + 4b + 2c + d, joined by a first.
    none = tl.zeros_like(z0)
    a0, a1 = tl.join(z0, z8), tl.join(z1, z9)
    a2, a3, a4, a5 = tl.join(z2, none), tl.join(z3, none), tl.join(z4, none), tl.join(z5, none)
    a6, a7 = tl.join(z6, none), tl.join(z7, none)
    b0, b1, b2, b3 = tl.join(a0, a4), tl.join(a1, a5), tl.join(a2, a6), tl.join(a3, a7)
    return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), [BLOCKS, 16])


# ---------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["tensors", "one", *_KEY])
def add_noise(
    table: tl.tensor, tensors: tl.int32, flag: tl.tensor, one: tl.int32,
    k0: tl.int32, k1: tl.int32, k2: tl.int32, k3: tl.int32, k4: tl.int32, k5: tl.int32, k6: tl.int32, k7: tl.int32,
    TARGET: tl.constexpr, ARITHMETIC: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """Add noise to every tensor of a table, in place; set ``flag``, int32, where a value was not finite before.

    Row by row, ``table``, int64 [tensors, 7], says which program is the first of a tensor (ascending), its address, its
    number of elements (at least 1), the block and the place there of its first element, its stream, and the standard
    deviation as the bits of a float64. ``one`` is 1; the key is eight words as int32. ``TARGET`` is the type of all
    tensors and ``ARITHMETIC`` float64, or float32 for float32; a program does at most TILES tiles of BLOCKS lanes.
    """
    program = tl.program_id(0).to(tl.int64)
    mine, above = 0, tensors
    while above - mine > 1:
        middle = (mine + above) // 2
        if tl.load(table + middle * _COLUMNS) <= program:
            mine = middle
        else:
            above = middle
    row = table + mine * _COLUMNS
    lanes = tl.arange(0, BLOCKS)
    start = (program - tl.load(row)) * TILES
    address = tl.load(row + 1).to(tl.pointer_type(TARGET))
    count = tl.load(row + 2)
    # A load by every lane: its layout, a lane a block, is kept by all that is computed from it. Without it Triton
    # takes other ones for the joins, and values cross lanes fourteen times.
    block = tl.load(row + 3 + lanes * 0) + lanes
    skip = tl.load(row + 4)
    stream = tl.load(row + 5)
    std = tl.load(row + 6).to(tl.float64, bitcast=True).to(ARITHMETIC)
    tiles = tl.minimum(tl.cdiv(skip + count, 10 * BLOCKS) - start, TILES).to(tl.int32)
    column = tl.arange(0, 16)[None, :]
    element = lanes[:, None] * 10 + column
    inside = column < 10
    seen = tl.zeros([BLOCKS, 16], TARGET)
    for tile in range(tiles):
        # 64-bit places: a tensor may have more than 2^31 elements. From here on 32 bits are enough.
        place = (start + tile) * (10 * BLOCKS) - skip
        first = tl.maximum(-place, 0).to(tl.int32)
        end = tl.minimum(count - place, 10 * BLOCKS).to(tl.int32)
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, _ = _cipher(
            one, block + (start + tile) * BLOCKS, stream, 1, k0, k1, k2, k3, k4, k5, k6, k7
        )
        z0, z1 = _pair(w0, w1, w10, std, ARITHMETIC)
        z2, z3 = _pair(w2, w3, w11, std, ARITHMETIC)
        z4, z5 = _pair(w4, w5, w12, std, ARITHMETIC)
        z6, z7 = _pair(w6, w7, w13, std, ARITHMETIC)
        z8, z9 = _pair(w8, w9, w14, std, ARITHMETIC)
        z = _side_by_side(z0, z1, z2, z3, z4, z5, z6, z7, z8, z9, BLOCKS)
        out = address + place + element
        if (first == 0) & (end == 10 * BLOCKS):  # a whole tile needs no comparisons
            x = tl.load(out, mask=inside, other=0.0)
            tl.store(out, (x.to(ARITHMETIC) + z).to(TARGET), mask=inside)
        else:
            here = inside & ((element - first).to(tl.uint32) < (end - first).to(tl.uint32))
            x = tl.load(out, mask=here, other=0.0)
            tl.store(out, (x.to(ARITHMETIC) + z).to(TARGET), mask=here)
        seen = tl.fma(x, 0.0, seen)  # NaN from the first value that is not finite on
    tl.store(flag, 1, mask=tl.sum(seen) != 0.0)


@triton.jit(do_not_specialize=["one", "block", "stream", "last", *_KEY])
def keystream(
    out: tl.tensor, one: tl.int32, block: tl.int64, stream: tl.int64, last: tl.int64,
    k0: tl.int32, k1: tl.int32, k2: tl.int32, k3: tl.int32, k4: tl.int32, k5: tl.int32, k6: tl.int32, k7: tl.int32,
    BLOCKS: tl.constexpr,
) -> None:  # fmt: skip
    """The words of BLOCKS blocks to ``out``, int32 [BLOCKS, 16]; ``last`` is the last word of the nonce. For tests."""
    lanes = tl.arange(0, BLOCKS)
    words = _cipher(one, block.to(tl.int64) + lanes, stream, last.to(tl.uint32), k0, k1, k2, k3, k4, k5, k6, k7)
    for i in tl.static_range(16):
        tl.store(out + lanes * 16 + i, words[i].to(tl.int32, bitcast=True))


@triton.jit
def values(words: tl.tensor, out: tl.tensor, ARITHMETIC: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    """The values of given words, int32 [BLOCKS, 16], to ``out``, [BLOCKS, 10] of type ARITHMETIC. For tests."""
    lanes = tl.arange(0, BLOCKS)
    one = tl.full([], 1.0, ARITHMETIC)
    for i in tl.static_range(5):
        low = tl.load(words + lanes * 16 + 2 * i).to(tl.uint32, bitcast=True)
        high = tl.load(words + lanes * 16 + 2 * i + 1).to(tl.uint32, bitcast=True)
        x, y = _pair(low, high, tl.load(words + lanes * 16 + 10 + i), one, ARITHMETIC)
        tl.store(out + lanes * 10 + 2 * i, x)
        tl.store(out + lanes * 10 + 2 * i + 1, y)
