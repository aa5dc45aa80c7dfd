"""What a power cut leaves: a model of a disk that keeps what was synced, and any part of the rest.

A killed process leaves everything that it wrote; a machine that loses power does not. The model replays a trace of
calls and makes the folders that a cut after any of them could leave: names as durable as their folder, bytes as their
file, unsynced writes kept, lost or torn between sectors in any combination.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from faultkit import CREATE, FOLDER, JOURNAL, LEDGER, MARK, SYNC, TRUNCATE, UNLINK, WRITE, Event

SECTOR = 512
NAMES = {LEDGER: "ledger", JOURNAL: "ledger-journal"}


@dataclass(eq=False)
class File:
    """Bytes that are safe, and the calls since."""

    durable: bytes = b""
    pending: list[Event] = field(default_factory=list)

    def content(self, chance: random.Random | None, *, all_kept: bool) -> bytes:
        """With everything pending, with nothing of it, or with what ``chance`` picks."""
        data = bytearray(self.durable)
        for event in self.pending:
            part = 2 if all_kept else chance.randrange(3) if chance else 0
            if part == 0:
                continue
            if event.kind == TRUNCATE:
                del data[event.offset :]
                continue
            written = event.data if part == 2 else event.data[: chance_sectors(chance, len(event.data))]
            data.extend(bytes(max(0, event.offset - len(data))))
            data[event.offset : event.offset + len(written)] = written
        return bytes(data)


def chance_sectors(chance: random.Random | None, size: int) -> int:
    """The bytes of a torn write: whole sectors."""
    assert chance is not None
    return chance.randrange(0, size // SECTOR + 1) * SECTOR


class Disk:
    """A folder with a ledger that was durable when the trace began."""

    def __init__(self, ledger: bytes) -> None:
        self._names = {LEDGER: File(ledger)}
        self._durable_names = dict(self._names)
        self._pending_names: list[tuple[int, File | None]] = []

    def apply(self, event: Event) -> None:
        """One call that succeeded."""
        kind, file = event.kind, event.file
        if kind == MARK:
            return
        if kind == SYNC and file == FOLDER:
            self._durable_names, self._pending_names = dict(self._names), []
            return
        assert file in NAMES, "the store touched a file that the model does not know"
        if kind == CREATE:
            if file not in self._names:
                self._rename(file, File())
        elif kind == UNLINK:
            self._rename(file, None)
        elif kind in (WRITE, TRUNCATE):
            self._names[file].pending.append(event)
        else:
            assert kind == SYNC, "the store makes a call that the model does not know"
            there = self._names[file]
            there.durable, there.pending = there.content(None, all_kept=True), []

    def cut(self, folder: Path, chance: random.Random | None = None, *, all_kept: bool = False) -> None:
        """Write into ``folder`` what is left when the power goes now."""
        names = dict(self._durable_names)
        kept = len(self._pending_names) if all_kept else chance.randint(0, len(self._pending_names)) if chance else 0
        for file, there in self._pending_names[:kept]:
            _name(names, file, there)
        for file, name in NAMES.items():
            path = folder / name
            path.unlink(missing_ok=True)
            if file in names:
                path.write_bytes(names[file].content(chance, all_kept=all_kept))

    def _rename(self, file: int, there: File | None) -> None:
        _name(self._names, file, there)
        self._pending_names.append((file, there))


def _name(names: dict[int, File], file: int, there: File | None) -> None:
    if there is None:
        names.pop(file, None)
    else:
        names[file] = there
