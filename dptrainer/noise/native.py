"""``boxmuller.c`` compiled on the machine that runs it, or a reason why not; results do not depend on which.

The first large request compiles once a process (under half a second) with the C compiler named by ``CC``, else ``cc``,
``gcc`` or ``clang``, in a private directory that is removed at once. What was built is used only if it gives the bits
of :mod:`dptrainer.noise.boxmuller` on a set of ordinary and extreme words. Otherwise noise is made by NumPy, with the
same values: :func:`status` says which, and so does the log at level INFO.
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
from pathlib import Path

import numpy as np
import torch

from dptrainer.noise import boxmuller
from dptrainer.noise.chacha import BLOCK_BYTES

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("boxmuller.c")
#: No fused multiply-add and no fast-math: the bits are those of the text. ``sqrt`` need not set errno.
_FLAGS = ("-O3", "-std=c99", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_SECONDS = 60.0


class Kernel:
    """The functions of a compiled ``boxmuller.c``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library  # keeps the code mapped
        self._add = {torch.float32: library.add_float, torch.float64: library.add_double}
        for function in self._add.values():
            function.restype = None
            function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p]

    def add(self, words: int, skip: int, std: float, out: torch.Tensor) -> None:
        """Add noise of the words at an address to a contiguous CPU tensor; other threads run meanwhile."""
        self._add[out.dtype](words, skip, out.numel(), std, out.data_ptr())


class Workbench:
    """Keystream for up to ``blocks`` blocks, and the compiled counterpart of :class:`boxmuller.Workbench`."""

    def __init__(self, kernel: Kernel, blocks: int) -> None:
        self.blocks = blocks
        self.words = bytearray(BLOCK_BYTES * blocks)
        self._kernel = kernel
        self._bytes = np.frombuffer(self.words, dtype=np.uint8)  # its export also pins the memory
        self._address = int(self._bytes.ctypes.data)
        self._used = 0

    def room(self, blocks: int) -> memoryview:
        """Where the words of the next ``blocks`` blocks go."""
        self._used = max(self._used, blocks)
        return memoryview(self.words)[: BLOCK_BYTES * blocks]

    def add(self, out: torch.Tensor, skip: int, std: float) -> None:
        """Add ``std`` times the values of the words, the first ``skip`` < 10 left out, to a contiguous CPU tensor."""
        if not (out.is_contiguous() and skip >= 0 and skip + out.numel() <= self.blocks * boxmuller.BLOCK_ELEMENTS):
            raise ValueError(f"{out.numel()} values after {skip} of {self.blocks} blocks")
        self._kernel.add(self._address, skip, std, out)

    def erase(self) -> None:
        """Overwrite the keystream (best effort); the kernel overwrites its own buffers."""
        self._bytes[: BLOCK_BYTES * self._used].fill(0)
        self._used = 0


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
    for tuning in (["-march=native"], []):
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
    constants = "".join(f"#define {name} {value.hex()}\n" for name, value in boxmuller.constants().items())
    with tempfile.TemporaryDirectory(prefix="dptrainer-") as folder:  # only this user may enter it
        source, library = Path(folder, "boxmuller.c"), Path(folder, "boxmuller.so")
        source.write_text(constants + _SOURCE.read_text(encoding="utf-8"), encoding="utf-8")
        command = [*command, "-o", str(library), str(source), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)  # noqa: S603
        return Kernel(ctypes.CDLL(str(library)))


def _agrees(made: Kernel) -> bool:
    """Whether the kernel gives NumPy's bits on random words and on extreme ones, in both types and at odd edges."""
    blocks = 101
    ours, theirs = Workbench(made, blocks), boxmuller.Workbench(blocks)
    words = np.random.default_rng(1).integers(0, 2**64, (blocks, 8), dtype=np.uint64)  # public: a test pattern
    for row in range(40):
        words[row, :5] >>= np.uint64(row + 20)
        words[row, 2:5] ^= np.uint64(2**64 - 1)
    words[40:44, :] = np.array([[0], [2**64 - 1], [2**63], [2**63 - 1]], dtype=np.uint64)
    ours.words[:] = theirs.words[:] = words.tobytes()
    for dtype in (torch.float32, torch.float64):
        for skip, count in ((0, 10 * blocks), (3, 10 * blocks - 7), (9, 1), (1, 321)):
            start = torch.linspace(-1.0, 1.0, count, dtype=dtype)
            mine, other = start.clone(), start.clone()
            ours.add(mine, skip, 1.1)
            theirs.add(other, skip, 1.1)
            if not torch.equal(mine, other):
                return False
    return True
