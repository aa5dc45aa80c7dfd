"""Faults for the ledger's store: the preloaded zygote, its jobs, and what must hold after each of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ledgerkit import OWNER, make_ledger, make_plan, reopen

from dpbudget.ledger.ledger import Ledger

SOURCE = Path(__file__).resolve().parents[2] / "faults" / "shim.c"
#: The kinds, files and modes of shim.c.
WRITE, TRUNCATE, SYNC, UNLINK, RENAME, CREATE, MARK = range(1, 8)
LEDGER, JOURNAL, FOLDER, BESIDE = range(4)
COUNT, KILL_BEFORE, KILL_AFTER, KILL_HALF, FAIL, FAIL_FROM_HERE, HALF_THEN_FAIL = range(7)
_EVENT = struct.Struct("=iiqq")


@dataclass(frozen=True)
class Event:
    """One traced call; a MARK is a release of step ``offset``."""

    kind: int
    file: int
    offset: int
    data: bytes


@dataclass
class Outcome:
    """How a child ended: by a signal, or with a report."""

    signal: int
    code: str = ""
    calls: int = 0
    now: int = 0
    failures: list[tuple[str, str, int]] = field(default_factory=list)


def compile_shim(folder: Path) -> Path:
    """The shim as a shared object; skips the test where it cannot exist."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C compiler for the fault shim")
    if not sys.platform.startswith("linux"):
        pytest.skip("the fault shim is preloaded and reads /proc: Linux only")
    shim = folder / "shim.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shim, SOURCE, "-ldl"], check=True)
    return shim


class Zygote:
    """The preloaded process; :meth:`run` gives it one job."""

    def __init__(self, folder: Path) -> None:
        here = Path(__file__).resolve()
        paths = os.pathsep.join([str(here.parents[3]), str(here.parent)])
        environment = {**os.environ, "LD_PRELOAD": str(compile_shim(folder)), "PYTHONPATH": paths}
        program = str(here.with_name("zygote.py"))
        self._process = subprocess.Popen(
            [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self._report = folder / "report"

    def start(self, **job: Any) -> int:
        """Begin a job; the child's id."""
        self._report.unlink(missing_ok=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**job, "report": str(self._report)}) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def wait(self) -> Outcome:
        """The end of the job that was begun."""
        status = int(self._answer())
        if os.WIFSIGNALED(status):
            return Outcome(os.WTERMSIG(status))
        assert status == 0, "the child failed; its traceback is on standard error"
        return Outcome(0, **json.loads(self._report.read_text(encoding="utf-8")))

    def run(self, **job: Any) -> Outcome:
        """One job from begin to end."""
        self.start(**job)
        return self.wait()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote ended"
        return line


@contextmanager
def zygote_in(folder: Path) -> Iterator[Zygote]:
    zygote = Zygote(folder)
    try:
        yield zygote
    finally:
        zygote.close()


class Place:
    """A ledger with one signed run, alone in its folder, and beside it what was released."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.log = folder / "disk", folder / "log"
        self.folder.mkdir(parents=True)
        self.path = self.folder / "ledger"
        with make_ledger(self.path) as ledger:
            self.run_id = ledger.sign_plan(make_plan(steps), owner=OWNER)
        self._fresh = self.path.read_bytes()

    def reset(self) -> None:
        """As it was made."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.path.write_bytes(self._fresh)
        self.path.chmod(0o600)
        self.log.unlink(missing_ok=True)

    @property
    def job(self) -> dict[str, str]:
        return {"path": str(self.path), "log": str(self.log), "run": self.run_id}

    def released(self) -> list[int]:
        return [int(line) for line in self.log.read_bytes().split()] if self.log.exists() else []

    def charged(self) -> int:
        """What a reader who trusts the owner alone finds after replaying every record."""
        with Ledger.open(self.path, trust=OWNER.public) as ledger:
            return ledger.state.runs[self.run_id].charged

    def check(self, *, waste: int) -> None:
        """Nothing is under-counted, little is wasted, and a new process goes on behind everything released.

        Args:
            waste: steps that may be charged and not released.
        """
        steps = self.released()
        charged = self.charged()
        assert len(steps) == len(set(steps)), "a step was released twice"
        assert len(steps) <= charged, f"{len(steps)} steps released, {charged} charged"
        assert charged <= len(steps) + waste
        assert all(step < charged for step in steps)
        with reopen(self.path, high_water=False) as ledger:
            step = ledger.start(self.run_id, lease_steps=1).next_receipt().step
        assert step == charged
        assert self.charged() == charged + 1


def read_trace(path: Path) -> list[Event]:
    data, start, events = path.read_bytes(), 0, []
    while start < len(data):
        kind, file, offset, length = _EVENT.unpack_from(data, start)
        start += _EVENT.size
        events.append(Event(kind, file, offset, data[start : start + length]))
        start += length
    return events


def died(outcome: Outcome) -> bool:
    return outcome.signal == signal.SIGKILL
