"""``chacha.c`` and ``boxmuller.c`` compiled on the machine that runs them, or a reason why not; results do not tell.

The first large request compiles once a process (under half a second) with the C compiler named by ``CC``, else ``cc``,
``gcc`` or ``clang``, in a private directory that is removed at once. What was built is used only if its keystream is
OpenSSL's, also where the counter wraps, and its values have the bits of :mod:`dptrainer.noise.boxmuller` on ordinary
and extreme words. Otherwise noise is made by OpenSSL and NumPy, with the same values: :func:`status` says which, and
so does the log at level INFO.

A library's cipher would be dearer here: ``cryptography`` holds the interpreter's lock, so that threads would wait for
each other, and its words would pass through memory. The threads are OpenMP's, which are PyTorch's own where it is
built with the library of that name that the compiler links: others would compete with them while they wait for work.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dptrainer.noise import boxmuller
from dptrainer.noise.boxmuller import BLOCK_ELEMENTS
from dptrainer.noise.chacha import BLOCK_BYTES, keystream

_LOG = logging.getLogger(__name__)
_SOURCES = (Path(__file__).with_name("chacha.c"), Path(__file__).with_name("boxmuller.c"))
#: No fused multiply-add and no fast-math: the bits are those of the text. ``sqrt`` need not set errno.
_FLAGS = ("-O3", "-std=c99", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_SECONDS = 60.0

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
        self._process = os.getpid()
        library.add_noise.restype = library.keystream.restype = library.values_of.restype = None
        library.add_noise.argtypes = (
            ctypes.c_char_p, ctypes.POINTER(_Piece), ctypes.c_int64, ctypes.c_double, ctypes.c_int,
        )  # fmt: skip
        library.keystream.argtypes = (
            ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_char_p,
        )  # fmt: skip
        library.values_of.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p)

    def add(self, pieces: Sequence[Piece], key: bytes, std: float, threads: int = 1) -> None:
        """Add ``std`` times the values of a stream to contiguous CPU tensors, which share no memory if threads do.

        Args:
            pieces: (tensor of float32 or float64, stream, place of its first element in the stream).
            key: 32 bytes.
            std: factor of the values.
            threads: how many work; one in a forked child, as OpenMP's threads do not outlive a fork.

        Raises:
            ValueError: a tensor is not contiguous on the CPU, or the key or a place is none that a stream has.
        """
        described = (_Piece * len(pieces))(*[_described(piece) for piece in pieces])
        if len(key) != 32:
            raise ValueError(f"a key of {len(key)} bytes")
        if os.getpid() != self._process:
            threads = 1
        self._library.add_noise(key, described, len(pieces), std, threads)

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


class _Once:
    """What this process found out; forked children inherit it, since code needs no secrets."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kernel: Kernel | None = None
        self.status = "not compiled yet"
        self.tried = False


_ONCE = _Once()


def kernel(*, compile_now: bool) -> Kernel | None:
    """The compiled kernel, or None where there is none (yet): compiled by the first call that says so."""
    if compile_now and not _ONCE.tried:
        with _ONCE.lock:
            if not _ONCE.tried:
                _ONCE.kernel, _ONCE.status = build()
                _ONCE.tried = True
                _LOG.info("noise is made by %s", _ONCE.status)
    return _ONCE.kernel


def status() -> str:
    """How noise is made in this process, in words: compiled and by what, or why not."""
    return _ONCE.status


def build() -> tuple[Kernel | None, str]:
    """Compile, load and check; never raises for a compiler that fails."""
    if sys.byteorder != "little":
        return None, "NumPy (the kernel reads little-endian words)"
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError:
        return None, "NumPy (CC is not a command)"
    found = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    compiler = named or ([found] if found else [])
    if not compiler:
        return None, "NumPy (no C compiler found)"
    reason = ""
    for tuning in (["-fopenmp", "-march=native"], ["-march=native"], ["-fopenmp"], []):
        try:
            made = _compile([*compiler, *_FLAGS, *tuning])
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            reason = f"NumPy ({compiler[0]} did not build the kernel: {type(error).__name__})"
            continue
        if _agrees(made):
            return made, f"code compiled with {' '.join([*compiler, *tuning])}"
        reason = f"NumPy (what {compiler[0]} built gives other bits)"
    return None, reason


def _compile(command: list[str]) -> Kernel:
    text = "".join(f"#define {name} {value.hex()}\n" for name, value in boxmuller.constants().items())
    text += "".join(path.read_text(encoding="utf-8") for path in _SOURCES)
    with tempfile.TemporaryDirectory(prefix="dptrainer-") as folder:  # only this user may enter it
        source, library = Path(folder, "noise.c"), Path(folder, "noise.so")
        source.write_text(text, encoding="utf-8")
        command = [*command, "-o", str(library), str(source), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)  # noqa: S603
        return Kernel(ctypes.CDLL(str(library)))


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
            made.add([(mine, 3, 5 * BLOCK_ELEMENTS + skip)], key, 1.1)
            plain.add(other, skip, 1.1)
            if not torch.equal(mine, other):
                return False
    return True


def _extreme_words(blocks: int) -> bytes:
    words = np.random.default_rng(1).integers(0, 2**64, (blocks, 8), dtype=np.uint64)
    for row in range(40):
        words[row, :5] >>= np.uint64(row + 20)
        words[row, 2:5] ^= np.uint64(2**64 - 1)
    words[40:44, :] = np.array([[0], [2**64 - 1], [2**63], [2**63 - 1]], dtype=np.uint64)
    return words.tobytes()
