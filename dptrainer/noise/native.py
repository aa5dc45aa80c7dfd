"""``chacha.c`` and ``boxmuller.c`` compiled (:mod:`dptrainer.native`); results do not tell.

The first large request compiles. What was built is used only if its keystream is OpenSSL's, also where the counter
wraps, and its values have the bits of :mod:`dptrainer.noise.boxmuller` on ordinary and extreme words. Otherwise noise
is made by OpenSSL and NumPy, with the same values: :func:`status` says which, and so does the log at level INFO.

A library's cipher would be dearer here: its words would pass through memory, and threads of Python's compete with those
of PyTorch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dptrainer.native import Native, threads
from dptrainer.noise import boxmuller
from dptrainer.noise.boxmuller import BLOCK_ELEMENTS
from dptrainer.noise.chacha import BLOCK_BYTES, keystream

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("chacha.c", "lanes.c", "boxmuller.c"))
#: No fused multiply-add and no fast-math: the bits are those of the text. ``sqrt`` need not set errno.
_FLAGS = ("-O3", "-std=gnu99", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")

#: Elements that a thread takes at a time, as ``boxmuller.c`` has it.
SHARE = 16384
#: A tensor, its stream, and the place of its first element there.
Piece = tuple[torch.Tensor, int, int]


class _Piece(ctypes.Structure):
    """``struct piece`` of ``boxmuller.c``."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("block", ctypes.c_uint64),
        ("skip", ctypes.c_int64),
        ("stream", ctypes.c_uint32),
        ("doubles", ctypes.c_uint32),
    )


class Kernel:
    """The functions of the compiled library. Other threads run while it works; it overwrites its own buffers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library  # keeps the code mapped
        library.keystream.restype = library.values_of.restype = None
        library.add_noise.argtypes = (
            ctypes.c_char_p, ctypes.POINTER(_Piece), ctypes.c_int64, ctypes.c_double, ctypes.c_int,
        )  # fmt: skip
        library.add_noise.restype = ctypes.c_int
        library.keystream.argtypes = (
            ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_char_p,
        )  # fmt: skip
        library.values_of.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p)

    def add(self, pieces: Sequence[Piece], key: bytes, std: float, threads: int = 1) -> bool:
        """Add ``std`` times the values of a stream to contiguous CPU tensors, which share no memory if threads do.

        Args:
            pieces: (tensor of float32 or float64, stream, place of its first element in the stream).
            key: 32 bytes.
            std: factor of the values.
            threads: how many work.

        Returns:
            Whether all that it was added to was finite. If not, what there is now must not be released.

        Raises:
            ValueError: a tensor is not contiguous on the CPU, or the key or a place is none that a stream has.
        """
        described = (_Piece * len(pieces))(*[_described(piece) for piece in pieces])
        if len(key) != 32:
            raise ValueError(f"a key of {len(key)} bytes")
        return bool(self._library.add_noise(key, described, len(pieces), std, threads))

    def keystream(self, key: bytes, stream: int, block: int, blocks: int) -> bytes:
        """What :func:`dptrainer.noise.chacha.keystream` gives."""
        room = ctypes.create_string_buffer(BLOCK_BYTES * (blocks + 16))
        self._library.keystream(key, stream, block, blocks, room)
        return room.raw[: BLOCK_BYTES * blocks]

    def values(self, words: bytes) -> NDArray[np.float64]:
        """The values of whole blocks of words."""
        blocks = len(words) // BLOCK_BYTES
        out = np.empty(BLOCK_ELEMENTS * blocks)
        self._library.values_of(words, blocks, out.ctypes.data)
        return out


def _described(piece: Piece) -> _Piece:
    out, stream, offset = piece
    block, skip = divmod(offset, BLOCK_ELEMENTS)
    there = 0 <= stream < 1 << 32 and offset >= 0 and offset + out.numel() <= BLOCK_ELEMENTS << 64
    if not (there and out.is_contiguous() and out.device.type == "cpu"):
        raise ValueError(f"no such noise: stream {stream}, {out.numel()} values from {offset}")
    return _Piece(out.data_ptr(), out.numel(), block, skip, stream, int(out.dtype == torch.float64))


def _text() -> str:
    constants = "".join(f"#define {name} {value.hex()}\n" for name, value in boxmuller.constants().items())
    return constants + "".join(path.read_text(encoding="utf-8") for path in _SOURCES)


def _agrees(made: Kernel) -> bool:
    """Whether the cipher is OpenSSL's and the values are NumPy's, in both types, at odd edges and on extreme words."""
    key, blocks = bytes(range(32)), 101  # public: a test pattern
    for stream, first, count in ((0, 0, 1), (7, (1 << 32) - 21, 53), ((1 << 32) - 1, (1 << 64) - 9, 9)):
        if made.keystream(key, stream, first, count) != bytes(keystream(key, stream, first, count)):
            return False
    plain = boxmuller.Workbench(blocks)
    plain.words[:] = _extreme_words(blocks)
    if made.values(bytes(plain.words)).tobytes() != plain.box_muller(blocks).tobytes():
        return False
    plain.words[:] = keystream(key, 3, 5, blocks)
    for dtype in (torch.float32, torch.float64):
        for skip, count in ((0, 10 * blocks), (3, 10 * blocks - 7), (9, 1), (1, 321)):
            mine = torch.linspace(-1.0, 1.0, count, dtype=dtype)
            other = mine.clone()
            seen = made.add([(mine, 3, 5 * BLOCK_ELEMENTS + skip)], key, 1.1)
            plain.add(other, skip, 1.1)
            if not (seen and torch.equal(mine, other)):
                return False
            other[count // 2] = math.nan if skip else math.inf
            if made.add([(mine, 0, 0), (other, 1, 0)], key, 1.1):
                return False
    return _shares_agree(made, key)


def _shares_agree(made: Kernel, key: bytes) -> bool:
    """Whether a tensor of several shares, divided among threads, gets every value once and is looked at to its end."""
    count, share = 3 * SHARE - 5, threads(3 * SHARE, 1)
    plain = boxmuller.Workbench(-(-(count + 7) // BLOCK_ELEMENTS))
    plain.words[:] = keystream(key, 1, 0, plain.blocks)
    mine, other, small = torch.zeros(count), torch.zeros(count), torch.zeros(3)
    seen = made.add([(small, 0, 0), (mine, 1, 7)], key, 1.1, share)
    plain.add(other, 7, 1.1)
    if not (seen and torch.equal(mine, other)):
        return False
    mine[-1] = math.inf
    return not made.add([(small, 0, 0), (mine, 1, 7)], key, 1.1, share)


def _extreme_words(blocks: int) -> bytes:
    words = np.random.default_rng(1).integers(0, 2**64, (blocks, 8), dtype=np.uint64)
    for row in range(40):
        words[row, :5] >>= np.uint64(row + 20)
        words[row, 2:5] ^= np.uint64(2**64 - 1)
    words[40:44, :] = np.array([[0], [2**64 - 1], [2**63], [2**63 - 1]], dtype=np.uint64)
    return words.tobytes()


LIBRARY = Native("noise", _text, _FLAGS, Kernel, _agrees)
#: Compiling takes a third of a second. It begins once so many values were asked for, every request counting at least
#: the second number: with the fourth request of a large model, the 64th of a small one.
COMPILE_AFTER, LEAST = 1 << 18, 1 << 12
_asked = 0


def kernel_for(values: int) -> Kernel | None:
    """The compiled kernel for a request of so many values, or None where there is none (yet)."""
    global _asked
    _asked += max(values, LEAST)
    return LIBRARY.get(compile_now=_asked >= COMPILE_AFTER)


def status() -> str:
    """How noise is made in this process, in words: compiled and by what, or why by NumPy."""
    return LIBRARY.status
