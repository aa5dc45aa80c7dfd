"""Places in long computations where whoever asked may call a halt, without a thread or a signal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_check: ContextVar[Callable[[], None] | None] = ContextVar("dpbudget_pause", default=None)


@contextmanager
def interruptible(check: Callable[[], None]) -> Iterator[None]:
    """Within the block, accountants call ``check`` every few milliseconds; what it raises ends their work."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def pause() -> None:
    """Called in the innermost steps that still take a good part of a millisecond."""
    check = _check.get()
    if check is not None:
        check()
