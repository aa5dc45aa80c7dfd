"""The high-water mark: the newest head that this machine has seen of each ledger, kept apart from the ledger.

A ledger that was put back from a backup is consistent in itself. Whoever restores it on the machine that spent from it
is stopped by this mark; on another machine only a head that somebody kept can tell.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpbudget.errors import Tampered
from dpbudget.ledger.head import Head
from dpbudget.ledger.state import LedgerState

#: Size and root of a head.
Mark = tuple[int, str]

_MARK = re.compile(rb"([0-9]{16}):([0-9a-f]{64})\n")


def state_folder() -> Path:
    """``DPBUDGET_STATE``, else ``dpbudget`` in the user's state folder (XDG Base Directory: ~/.local/state)."""
    own = os.environ.get("DPBUDGET_STATE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "dpbudget"


@dataclass(frozen=True)
class HighWater:
    """Marks in one folder, one small file a ledger; they hold size and root and nothing else.

    A mark that cannot be read or written counts as absent: it is a second line of defence, never a reason to stop.
    """

    folder: Path

    @classmethod
    def of_user(cls) -> HighWater | None:
        """The marks of this user; None where there is no home to keep them in."""
        try:
            return cls(state_folder() / "heads")
        except (RuntimeError, OSError):
            return None

    def known(self, ledger_id: str) -> Mark | None:
        """Size and root of the newest head seen of a ledger."""
        try:
            with open(self._file(ledger_id), "rb") as file:
                return _parse(file.read(128))
        except OSError:
            return None

    def check(self, mark: Mark | None, state: LedgerState, roots: Mapping[int, bytes]) -> None:
        """Refuse a history that lacks what this machine has seen of it.

        Args:
            mark: what :meth:`known` said before the history was read.
            state: the history.
            roots: its root at the size of the mark, when it is that long.

        Raises:
            Tampered: it is shorter than the mark, or another one (DP079).
        """
        if mark is None:
            return
        size, (seen, root) = state.size, mark
        if size < seen:
            raise self._refusal(
                state.genesis.ledger_id,
                f"this machine has seen {seen} records of the ledger, and this copy has {size}: it is an older one",
            )
        if roots.get(seen, b"").hex() != root:
            raise self._refusal(
                state.genesis.ledger_id,
                f"this machine has seen another history of the ledger: its first {seen} records differ from these",
            )

    def raise_to(self, ledger_id: str, head: Head) -> tuple[Mark, Mark | None]:
        """Remember ``head``, unless a newer one is known: one write of one length; a torn one counts as absent.

        Returns:
            The mark of ``head``, and the one that was there before; None where there was none or it cannot be read.
        """
        mark = (head.size, head.root)
        return mark, self._raise(ledger_id, mark)

    def _raise(self, ledger_id: str, mark: Mark) -> Mark | None:
        """Write ``mark`` over a smaller one, and return the one that was there."""
        before = None
        with suppress(OSError):
            try:
                descriptor = self._open(ledger_id)
            except FileNotFoundError:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = self._open(ledger_id)
            try:
                # Compared and written under one lock, or the slower of two processes would lower the mark.
                _lock(descriptor)
                before = _parse(os.pread(descriptor, 128, 0))
                if before is None or before[0] < mark[0]:
                    line = f"{mark[0]:016d}:{mark[1]}\n".encode("ascii")
                    os.pwrite(descriptor, line, 0)
                    os.ftruncate(descriptor, len(line))
            finally:
                os.close(descriptor)
        return before

    def _refusal(self, ledger_id: str, problem: str) -> Tampered:
        return Tampered(
            problem,
            code="DP079",
            hint="find the newest copy or an export: what was spent there is missing here. If it is lost for good and "
            f"the owner accepts that, remove {self._file(ledger_id)}",
        )

    def _open(self, ledger_id: str) -> int:
        return os.open(self._file(ledger_id), os.O_CREAT | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def _file(self, ledger_id: str) -> Path:
        return self.folder / ledger_id


def marks_in(high_water: HighWater | bool) -> HighWater | None:
    """The marks that an argument names: True for the user's, False for none."""
    if isinstance(high_water, bool):
        return HighWater.of_user() if high_water else None
    return high_water


def _lock(descriptor: int) -> None:
    """Take the file's lock, for which nobody needs more than an instant; give up after a second (OSError)."""
    import fcntl  # of POSIX; the rest of the package loads without it

    for _ in range(100):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return
    raise TimeoutError


def _parse(data: bytes) -> Mark | None:
    match = _MARK.fullmatch(data)
    return (int(match[1]), match[2].decode("ascii")) if match else None
