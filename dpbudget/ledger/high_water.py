"""The high-water mark: the newest head that this machine has seen of each ledger, kept apart from the ledger.

A ledger that was put back from a backup is consistent in itself. Whoever restores it on the machine that spent from it
is stopped by this mark; on another machine only a head that somebody kept can tell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpbudget.errors import Tampered
from dpbudget.ledger.head import Head
from dpbudget.ledger.state import LedgerState

_MARK = re.compile(r"([0-9]{16}):([0-9a-f]{64})\n")


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

    def known(self, ledger_id: str) -> tuple[int, str] | None:
        """Size and root of the newest head seen of a ledger."""
        try:
            with open(self._file(ledger_id), encoding="ascii") as file:
                match = _MARK.fullmatch(file.read(128))
        except (OSError, UnicodeDecodeError):
            return None
        return (int(match[1]), match[2]) if match else None

    def check(self, mark: tuple[int, str] | None, state: LedgerState, roots: Mapping[int, bytes]) -> None:
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
            problem = (
                f"this machine has seen {seen} records of the ledger, and this copy has {size}: it is an older one"
            )
        elif roots.get(seen, b"").hex() != root:
            problem = f"this machine has seen another history of the ledger: its first {seen} records differ from these"
        else:
            return
        raise Tampered(
            problem,
            code="DP079",
            hint="find the newest copy or an export: what was spent there is missing here. If it is lost for good and "
            f"the owner accepts that, remove {self._file(state.genesis.ledger_id)}",
        )

    def raise_to(self, ledger_id: str, head: Head) -> None:
        """Remember ``head``: one write of one length over the old mark; a torn one counts as absent."""
        with suppress(OSError):
            try:
                descriptor = self._open(ledger_id)
            except FileNotFoundError:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = self._open(ledger_id)
            try:
                mark = f"{head.size:016d}:{head.root}\n".encode("ascii")
                os.pwrite(descriptor, mark, 0)
                os.ftruncate(descriptor, len(mark))
            finally:
                os.close(descriptor)

    def _open(self, ledger_id: str) -> int:
        return os.open(self._file(ledger_id), os.O_CREAT | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    def _file(self, ledger_id: str) -> Path:
        return self.folder / ledger_id
