"""C code compiled on the machine that runs it, at its first use; or in words why there is none.

The compiler is the one named by ``CC``, else ``cc``, ``gcc`` or ``clang``; it works in a private directory that is
removed at once. What it built is used only if it passes the caller's test. Everything that is compiled also exists
in PyTorch or NumPy: without a compiler, or with ``DPTRAINER_NATIVE=0`` in the environment, the same results are slower.

Threads are OpenMP's, which are PyTorch's own where it is built with the library of that name that the compiler links:
others would compete with them for the processor while those wait for work.
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
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Generic, TypeVar

import torch

_LOG = logging.getLogger(__name__)
_SECONDS = 60.0
#: Tried in turn: threads and the processor's own instructions, where compiler and machine have them.
_TUNINGS: tuple[list[str], ...] = (["-fopenmp", "-march=native"], ["-march=native"], ["-fopenmp"], [])

#: Whatever ``CC`` asks for: NaN and inf are seen, and loading the library leaves this process its denormal numbers.
_EXACT = ("-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-finite-math-only")

#: Stands before every text: how many 32-bit lanes a vector register has.
_WIDE = """
#if defined(__AVX512F__)
#define WIDE 16
#elif defined(__AVX2__)
#define WIDE 8
#else
#define WIDE 4
#endif
"""

Made = TypeVar("Made")


class Native(Generic[Made]):
    """A compiled library that is made once a process, by whoever asks first. Forked children inherit it.

    Args:
        what: what it is for, as the log names it.
        text: -> the source, in which WIDE is the number of 32-bit lanes of a vector.
        flags: options of the compiler that the code relies on.
        wrap: the loaded library -> the object that is handed out.
        test: whether that object gives the right results.
    """

    def __init__(
        self,
        what: str,
        text: Callable[[], str],
        flags: tuple[str, ...],
        wrap: Callable[[ctypes.CDLL], Made],
        test: Callable[[Made], bool],
    ) -> None:
        self._what, self._text, self._flags, self._wrap, self._test = what, text, flags, wrap, test
        self._lock = threading.Lock()
        self._made: Made | None = None
        self._tried = False
        self.status = "not compiled yet"

    def get(self, *, compile_now: bool = True) -> Made | None:
        """The library, or None where there is none (yet): made by the first call that says so."""
        if compile_now and not self._tried:
            with self._lock:
                if not self._tried:
                    self._made, self.status = self.build()
                    self._tried = True
                    _LOG.info("%s: %s", self._what, self.status)
        return self._made

    def build(self) -> tuple[Made | None, str]:
        """Compile, load and test; never raises for a compiler that fails."""
        if os.environ.get("DPTRAINER_NATIVE", "1") == "0":
            return None, "not compiled (DPTRAINER_NATIVE=0)"
        if sys.byteorder != "little":
            return None, "not compiled (the code reads little-endian words)"
        try:
            named = shlex.split(os.environ.get("CC", ""))
        except ValueError:
            return None, "not compiled (CC is not a command)"
        found = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
        compiler = named or ([found] if found else [])
        if not compiler:
            return None, "not compiled (no C compiler found)"
        reason = ""
        for tuning in _TUNINGS:
            try:
                made = self.compiled([*compiler, *tuning])
            except (OSError, subprocess.SubprocessError, AttributeError) as error:
                reason = f"not compiled ({compiler[0]} did not build it: {type(error).__name__})"
                if isinstance(error, subprocess.TimeoutExpired):
                    break  # it would hang again
                continue
            with torch.device("cpu"):  # whatever the program's default is
                passed = self._test(made)
            if passed:
                return made, f"compiled with {' '.join([*compiler, *tuning])}"
            reason = f"not compiled (what {compiler[0]} built gives other results)"
        return None, reason

    def compiled(self, command: list[str]) -> Made:
        """What ``command`` makes of the text, loaded and untested.

        Raises:
            OSError, subprocess.SubprocessError, AttributeError: there is no such compiler, it fails or takes a minute,
                or what it made has not the functions.
        """
        with tempfile.TemporaryDirectory(prefix="dptrainer-") as folder:  # only this user may enter it
            source, library = Path(folder, "code.c"), Path(folder, "code.so")
            source.write_text(_WIDE + self._text(), encoding="utf-8")
            command = [*command, *_EXACT, *self._flags, "-fPIC", "-shared", "-o", str(library), str(source), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)  # noqa: S603
            return self._wrap(ctypes.CDLL(str(library)))


_PROCESS = os.getpid()


def threads(work: int, each: int) -> int:
    """How many threads share ``work``: PyTorch's number where there is enough for two, one in a forked child.

    The threads of OpenMP do not outlive a fork, and a region that asks for them would wait for ever.
    """
    return torch.get_num_threads() if work >= 2 * each and os.getpid() == _PROCESS else 1


def disjoint(flats: Sequence[torch.Tensor]) -> bool:
    """Whether no two contiguous tensors share memory, so that threads may write to them."""
    ends = sorted((f.data_ptr(), f.data_ptr() + f.numel() * f.element_size()) for f in flats if f.numel())
    return all(first[1] <= second[0] for first, second in pairwise(ends))
