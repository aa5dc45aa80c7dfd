"""One ``dpbudget train`` at a time for one output: two would overwrite each other's checkpoints and lose weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dpbudget.errors import InvalidParameter, Unreadable


@contextmanager
def hold_output(output: str) -> Iterator[None]:
    """Hold ``OUTPUT.lock`` for as long as the block runs; the system lets it go with the process, however that ends.

    Raises:
        InvalidParameter: another process holds it (DP078).
        Unreadable: it cannot be made or locked (DP070).
    """
    name = f"{output}.lock"
    try:
        descriptor = _lock(name)
    except BlockingIOError:
        raise InvalidParameter(
            "another dpbudget train works on this run and output",
            code="DP078",
            hint="wait for it, or pass another --output; nothing was charged",
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreadable(
            f"{name} cannot be locked: {reason}", hint="pass an --output in a folder of a local disk that you can write"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            if _stands(name, descriptor):  # else somebody tidied up, and another process may hold what stands there now
                os.unlink(name)
        os.close(descriptor)


def _lock(name: str) -> int:
    """A descriptor of the locked file that stands under ``name``; raises BlockingIOError where another holds it."""
    import fcntl  # of POSIX, as in the ledger's own store

    while True:
        descriptor = os.open(name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _stands(name, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between opening and locking


def _stands(name: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(name, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
