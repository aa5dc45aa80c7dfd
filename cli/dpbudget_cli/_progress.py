"""How a command shows that it goes on, and when ``dpbudget train`` ends early: by public facts alone."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out

if TYPE_CHECKING:
    from dpbudget.curve import Bounds
    from dpbudget.ledger.run import Run
    from dptrainer.trainer import TrainingResult


@dataclass
class Interrupt:
    """Whether somebody asked for an end."""

    asked: bool = False


@contextmanager
def stop_on_interrupt() -> Iterator[Interrupt]:
    """The first interrupt ends training after the running step, so that the weights are kept; the second ends all."""
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True
        out.talk("stopping after this step; interrupt again to stop at once")

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread, which alone receives signals
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def lease_steps(planned: int, most: int | None) -> int | None:
    """Steps a lease where a call takes at most ``most``, so that few are charged in vain; None for the usual number.

    A function of public numbers alone, as the default is: as many leases as usual, all of one size.
    """
    from dpbudget.ledger.run import default_lease_steps

    if most is None:
        return None
    most = min(most, planned)
    leases = -(-most // default_lease_steps(planned))
    return -(-most // leases)


@dataclass(frozen=True)
class StopRule:
    """An end before that of the plan, which is decided without looking at the data.

    Attributes:
        max_steps: most steps of this call.
        epsilon: live epsilon that the charged steps shall not exceed. The guarantee stays the plan's claim.
    """

    max_steps: int | None = None
    epsilon: float | None = None

    def check(self, run: Run) -> None:
        """Refuse a rule by which not even the next lease may be charged.

        Raises:
            InvalidParameter: (DP009); nothing was charged.
        """
        if self.epsilon is None or not run.remaining or not self._beyond(run):
            return
        raise InvalidParameter(
            f"the next steps of this run would take its live epsilon above {self.epsilon:g} at once",
            code="DP009",
            hint="pass a larger --stop-epsilon, or leave it out to train to the plan's end; nothing was charged",
        )

    def ends(self, run: Run, steps: int) -> bool:
        """Whether to end after ``steps`` steps of this call."""
        return (self.max_steps is not None and steps >= self.max_steps) or (
            self.epsilon is not None and self._beyond(run)
        )

    def _beyond(self, run: Run) -> bool:
        """Whether one step more would charge a lease that goes beyond epsilon."""
        from dpbudget.ledger.run import default_lease_steps

        count = lease_steps(run.planned, self.max_steps) or default_lease_steps(run.planned)
        if run.charged > run.planned - run.remaining or run.meter is None or self.epsilon is None:
            return False  # steps that are charged already, or nobody can say
        after = min(run.charged + count, run.planned)
        return run.meter.epsilon(after).upper > self.epsilon


@contextmanager
def progress(run: Run) -> Iterator[Callable[[Bounds | None], None]]:
    """A bar with live epsilon on a terminal; silence elsewhere. It shows the run's clock, which is public."""
    target = round_up(run.plan.claim.epsilon, 3)
    with bar(run.planned, f"epsilon 0 of {target}", done=run.planned - run.remaining) as advance:
        yield lambda epsilon: advance("" if epsilon is None else f"epsilon {round_up(epsilon.upper, 3)} of {target}")


@contextmanager
def bar(total: int, text: str, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, which moves on with each call and shows its text; silence in a pipe and with --quiet."""
    if out.VOICE.quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(text, total=total, completed=done)
        yield lambda text: shown.update(task, advance=1, description=text)


@dataclass
class Clock:
    """Time since it was made. How long training takes depends on the batches that were drawn, and so on the data."""

    began: float = field(default_factory=time.monotonic)

    def shown(self) -> str:
        """``4.1 s`` for somebody at a terminal, who has a clock anyway; nothing for a log that may be published."""
        return f"{time.monotonic() - self.began:.1f} s" if sys.stderr.isatty() else ""


def last_line(result: TrainingResult, public_accuracy: float | None, clock: Clock) -> str:
    """``epsilon 2.99 of 3 (delta 1e-05), 4.1 s``: what was charged so far, of what the plan claims."""
    claim, reached = round_up(result.claim, 3), result.epsilon
    epsilon = f"at most {claim}" if reached is None else f"{round_up(reached.upper, 3)} of {claim}"
    parts = [f"epsilon {epsilon} (delta {show_delta(result.delta)})"]
    parts += [] if public_accuracy is None else [f"public accuracy {public_accuracy:.3f}"]
    return ", ".join(part for part in (*parts, clock.shown()) if part)
