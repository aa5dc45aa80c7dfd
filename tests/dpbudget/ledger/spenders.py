"""Processes that spend from one ledger at once, wherever it lives; and a counter without a lock, which over-releases.

A worker is given a location and an opener, so that every store is put to the same test.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from dpbudget.errors import DPBudgetError


class Step(Protocol):
    """What may be released: a receipt."""

    @property
    def step(self) -> int: ...


class SpendingRun(Protocol):
    """What a worker needs of a run."""

    def __iter__(self) -> Iterator[Step]: ...

    def close(self) -> None: ...


class Spendable(Protocol):
    """What a worker needs of a ledger."""

    def start(self, run: str, /, *, lease_steps: int) -> SpendingRun: ...

    def close(self) -> None: ...


#: Opens what a location names; called in each worker's own process.
Opener = Callable[[str], Spendable]


def spawn(work: Callable[[], None]) -> int:
    """Run ``work`` in a child process that opens the ledger itself; its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except DPBudgetError as error:
            print(error, flush=True)
            status = 10 + error.exit_code
        finally:
            os._exit(status)
    return child


def released(log: Path) -> list[int]:
    """The steps that any process logged as released, in the order of release."""
    return [int(line) for line in log.read_bytes().split()] if log.exists() else []


def spend(location: str, opener: Opener, run_id: str, log: Path, *, lease_steps: int = 1, most: int = 1 << 30) -> None:
    """Take receipts, at most ``most``, and log every released step, as a trainer would publish gradients."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    ledger = opener(location)
    run = ledger.start(run_id, lease_steps=lease_steps)
    receipts = iter(run)
    for _ in range(most):
        receipt = next(receipts, None)
        if receipt is None:
            break
        os.write(file, b"%d\n" % receipt.step)
    run.close()
    ledger.close()
    os.close(file)


def spend_at_once(
    location: str, opener: Opener, run_id: str, log: Path, *, processes: int, asked: int, lease_steps: int = 1
) -> list[int]:
    """Let ``processes`` workers ask for ``asked`` steps each at the same time; every released step, sorted."""
    children = [
        spawn(lambda: spend(location, opener, run_id, log, lease_steps=lease_steps, most=asked))
        for _ in range(processes)
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
    return sorted(released(log))


def assert_released_exactly(steps: Sequence[int], allowed: int) -> None:
    """Every allowed step was released, each once, and no other.

    Raises:
        AssertionError: a step is missing, was released twice or was not allowed.
    """
    assert len(steps) <= allowed, f"{len(steps)} steps were released, {allowed} allowed"
    assert list(steps) == list(range(allowed))


class UnlockedCounter:
    """The control: a budget in a file that is read, compared and then written, and nothing keeps others out."""

    def __init__(self, location: str, allowed: int) -> None:
        self._path, self._allowed = Path(location), allowed

    def start(self, run: str, /, *, lease_steps: int) -> UnlockedCounter:
        """The one run of a counter."""
        return self

    def __iter__(self) -> Iterator[UnlockedCounter]:
        while True:
            self.step = int(self._path.read_bytes() or b"0")
            if self.step >= self._allowed:
                return
            time.sleep(0.0002)  # about what a synced write takes
            self._path.write_bytes(b"%d" % (self.step + 1))
            yield self

    def close(self) -> None:
        """Nothing is open."""
