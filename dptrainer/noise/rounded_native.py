"""``rounded.c`` compiled (:mod:`dptrainer.native`); results do not tell.

The first large request compiles. What was built is used only if its keystream is OpenSSL's, its numbers are within the
proved bound of those of :mod:`dptrainer.noise.bounded` on ordinary and extreme words at the largest width, margins
included, and whole requests give the same integers. Otherwise NumPy makes the noise, with the same values:
:func:`status` says which, and so does the log at level INFO.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dptrainer.native import Native, threads
from dptrainer.noise import bounded, ziv
from dptrainer.noise.bounded import BLOCK_ELEMENTS, LEAST, R_MAX, R_MIN, SLOPE, Floats, Integers
from dptrainer.noise.chacha import BLOCK_BYTES, ROUNDED, keystream

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("chacha.c", "lanes.c", "rounded.c"))
_FLAGS = ("-O3", "-std=gnu99", "-fno-math-errno", "-fno-trapping-math")

#: Elements that a thread takes at a time, as ``rounded.c`` has it.
SHARE = 16384
#: The widest noise: its margin is still far below 1/2.
MOST_LOG2_WIDTH = 40
#: The streams have so many elements that the address of further digits, 2^8 blocks a pair, fits 64 bits.
ELEMENTS = 1 << 57
#: A tensor, its stream, and the place of its first element there.
Piece = tuple[torch.Tensor, int, int]
#: [found, 2]: positions of pieces, and of doubtful elements in them.
Places = NDArray[np.int64]


class _Piece(ctypes.Structure):
    """``struct piece`` of ``rounded.c``."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("block", ctypes.c_uint64),
        ("skip", ctypes.c_int64),
        ("stream", ctypes.c_uint32),
    )


class Kernel:
    """The functions of the compiled library. Other threads run while it works; it overwrites its own buffers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library  # keeps the code mapped
        library.keystream.restype = library.rounded_of.restype = None
        library.add_rounded.argtypes = (
            ctypes.c_char_p, ctypes.POINTER(_Piece), ctypes.c_int64, ctypes.c_double, ctypes.c_int,
            ctypes.c_void_p, ctypes.c_int64,
        )  # fmt: skip
        library.add_rounded.restype = ctypes.c_int64
        library.keystream.argtypes = (
            ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_char_p,
        )  # fmt: skip
        library.rounded_of.argtypes = (
            ctypes.c_char_p, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip

    def add(self, pieces: Sequence[Piece], key: bytes, log2_width: int, threads: int = 1) -> Places:
        """Add rounded values modulo 2^64 to contiguous CPU tensors of int64, but for the doubtful ones.

        Args:
            pieces: (tensor, stream, place of its first element); no memory is shared by two if several threads work.
            key: 32 bytes.
            log2_width: logarithm of the width, 0 to 40.
            threads: how many work.

        Returns:
            The doubtful elements, to which nothing was added, in no particular order.

        Raises:
            ValueError: a tensor is not contiguous int64 on the CPU, or the key, width or a place is none that there is.
        """
        described = (_Piece * len(pieces))(*[_described(piece) for piece in pieces])
        if len(key) != 32 or not 0 <= log2_width <= MOST_LOG2_WIDTH:
            raise ValueError(f"a key of {len(key)} bytes, or width 2^{log2_width}")
        room = expected_doubts(sum(piece.count for piece in described), log2_width)
        found = self._add(described, key, log2_width, threads, room)
        if len(found) > room:  # look again, adding nothing
            for piece in described:
                piece.out = None
            found = self._add(described, key, log2_width, threads, len(found))
        return found

    def _add(self, pieces: ctypes.Array[_Piece], key: bytes, log2_width: int, threads: int, room: int) -> Places:
        """What there was room to list; as many rows as there are doubtful elements even so."""
        places = np.zeros((room, 2), dtype=np.int64)
        scale = 2.0**log2_width
        found = self._library.add_rounded(key, pieces, len(pieces), scale, threads, places.ctypes.data, room)
        return places[:found] if found <= room else np.zeros((found, 2), dtype=np.int64)

    def keystream(self, key: bytes, stream: int, block: int, blocks: int) -> bytes:
        """What :func:`dptrainer.noise.chacha.keystream` gives for pairs of rounded values."""
        room = ctypes.create_string_buffer(BLOCK_BYTES * (blocks + 16))
        self._library.keystream(key, stream, block, blocks, room)
        return room.raw[: BLOCK_BYTES * blocks]

    def rounded(self, words: bytes, log2_width: int) -> tuple[Integers, Floats]:
        """Of every value of whole blocks of words the nearest integer, and its distance from that plus the margin."""
        blocks = len(words) // BLOCK_BYTES
        nearest, off = np.empty(BLOCK_ELEMENTS * blocks, dtype=np.int64), np.empty(BLOCK_ELEMENTS * blocks)
        self._library.rounded_of(words, blocks, 2.0**log2_width, nearest.ctypes.data, off.ctypes.data)
        return nearest, off


def expected_doubts(count: int, log2_width: int) -> int:
    """Twice the number of doubtful elements among ``count`` that is to be expected, and some more."""
    return int(count * (2.0 ** (log2_width - 44) + 2.0**-16)) + 64


def _described(piece: Piece) -> _Piece:
    out, stream, offset = piece
    block, skip = divmod(offset, BLOCK_ELEMENTS)
    there = 0 <= stream < 1 << 32 and offset >= 0 and offset + out.numel() <= ELEMENTS
    if not (there and out.is_contiguous() and out.device.type == "cpu" and out.dtype == torch.int64):
        raise ValueError(f"no such noise: stream {stream}, {out.numel()} values from {offset}")
    return _Piece(out.data_ptr(), out.numel(), block, skip, stream)


def _text() -> str:
    constants = "".join(f"#define {name} {value.hex()}\n" for name, value in bounded.constants().items())
    format_word = f"#define FORMAT {ROUNDED}u\n"
    return format_word + constants + "".join(path.read_text(encoding="utf-8") for path in _SOURCES)


def _agrees(made: Kernel) -> bool:
    """Whether cipher, numbers, margins, addresses and shares are those of the plain code."""
    key = bytes(range(32))  # public: a test pattern
    for stream, first, count in ((0, 0, 1), (7, (1 << 32) - 21, 53), ((1 << 32) - 1, (1 << 54) - 9, 9)):
        if made.keystream(key, stream, first, count) != bytes(keystream(key, stream, first, count, layout=ROUNDED)):
            return False
    words = bytes(keystream(key, 3, 5, 1000, layout=ROUNDED))
    if not all(_numbers_agree(made, some, width) for some in (words, _extreme_words(words)) for width in (0, 20, 40)):
        return False
    start = torch.randint(-(1 << 63), (1 << 63) - 1, (3 * SHARE - 5,), generator=torch.Generator().manual_seed(1))
    requests: list[tuple[list[Piece], int]] = [
        ([(start[:1_000], 3, 0)], 40),
        ([(start[:793], 3, 43)], 40),
        ([(start[:1], 3, 47)], 20),
        ([(start[:300], (1 << 32) - 1, ELEMENTS - 300)], 30),
        ([(start[:3], 0, 0), (start, 1, 5)], 30),
    ]
    return all(_requests_agree(made, pieces, key, width) for pieces, width in requests)


def _numbers_agree(made: Kernel, words: bytes, width: int) -> bool:
    """Whether distances from integers, with margins, are the plain ones to twice the bound, and sure integers equal."""
    plain, scale = bounded.Workbench(len(words) // BLOCK_BYTES), 2.0**width
    plain.words[:] = words
    radii, values = plain.pairs(plain.blocks)
    r = np.repeat(radii.T.reshape(-1), 2)
    bound = (r * SLOPE + LEAST) * scale / 4
    inside = (r >= R_MIN) & (r <= R_MAX)
    expected = np.abs(values * scale - np.rint(values * scale)) + np.where(inside, 4 * bound, 1.0)
    nearest, off = made.rounded(words, width)
    close = np.abs(off - expected) <= 2 * bound + 2.0**-52
    sure = (off < 0.5) & (expected < 0.5)
    return bool(close.all() and np.array_equal(nearest[sure], np.rint(values * scale)[sure].astype(np.int64)))


def _requests_agree(made: Kernel, pieces: Sequence[Piece], key: bytes, width: int) -> bool:
    """Whether every element of copies of the pieces gets its value once, from as many threads as there are."""
    mine = [(out.clone(), stream, offset) for out, stream, offset in pieces]
    found = made.add(mine, key, width, threads(3 * SHARE, 1))
    for position, (out, stream, offset) in enumerate(mine):
        ziv.settle(out.numpy(), found[found[:, 0] == position, 1], key, stream, offset, width)
        other = pieces[position][0].numpy().copy()
        block, skip = divmod(offset, BLOCK_ELEMENTS)
        plain = bounded.Workbench(-(-(skip + len(other)) // BLOCK_ELEMENTS))
        plain.words[:] = keystream(key, stream, block, plain.blocks, layout=ROUNDED)
        ziv.settle(other, plain.add(other, skip, 2.0**width), key, stream, offset, width)
        if not np.array_equal(out.numpy(), other):
            return False
    return True


def _extreme_words(words: bytes) -> bytes:
    """Radii near both ends of what the bound holds for and beyond, angles near the ends of octants."""
    rows = np.frombuffer(words, dtype="<u8").reshape(-1, 8).copy()
    shifts = np.arange(len(rows), dtype=np.uint64)[:, None]
    rows[:, :4] >>= shifts % np.uint64(64)
    rows[:, 2:4] ^= np.uint64(2**64 - 1)
    rows[:, 4:] >>= shifts % np.uint64(62)
    rows[:, 5:7] ^= np.uint64(2**64 - 1)
    rows[:, 4:] += shifts % np.uint64(8) << np.uint64(61)
    rows[:4] = np.array([[0], [2**64 - 1], [2**63], [2**63 - 1]], dtype=np.uint64)
    return rows.tobytes()


LIBRARY = Native("rounded noise", _text, _FLAGS, Kernel, _agrees)
#: Compiling takes a third of a second. It begins once so many values were asked for, every request counting at least
#: the second number: with the fourth request of a large model, the 64th of a small one.
COMPILE_AFTER, LEAST_REQUEST = 1 << 18, 1 << 12
_asked = 0


def kernel_for(values: int) -> Kernel | None:
    """The compiled kernel for a request of so many values, or None where there is none (yet)."""
    global _asked
    _asked += max(values, LEAST_REQUEST)
    return LIBRARY.get(compile_now=_asked >= COMPILE_AFTER)


def status() -> str:
    """How rounded noise is made in this process, in words: compiled and by what, or why by NumPy."""
    return LIBRARY.status
