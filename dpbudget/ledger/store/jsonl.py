"""The export: a ledger as lines of text, for verification, for git and for the model card.

Every record is one line; an owner-signed record or a plan is followed by exactly one line with its DSSE envelope; the
last line is ``{"note": <base64 of the signed head>}``. Lines end in one line feed and there is exactly one spelling of
everything, so that changing any byte makes the file unreadable or a signature wrong.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from dpbudget._record import MAX_LINE_BYTES, decode, encode
from dpbudget.errors import DPBudgetError, InvalidParameter, StorageFailed, Tampered, Unreadable
from dpbudget.ledger.entries import ENVELOPED, FIELDS, MAX_ENVELOPE_BYTES, Entry, kind_of, read
from dpbudget.ledger.head import MAX_NOTE_BYTES
from dpbudget.ledger.scan import ENDS
from dpbudget.ledger.signing import strict_base64
from dpbudget.ledger.store.base import Reading, Snapshot

#: A ledger of a million records stays below it.
MAX_EXPORT_BYTES = 1 << 30


def write_export(reading: Reading, file: BinaryIO) -> bytes:
    """Write a reading in the export format and return its head, which must cover all its records."""
    for entry in reading.entries():
        file.write(entry.line + b"\n")
        if entry.envelope is not None:
            file.write(entry.envelope + b"\n")
    note = reading.newest()
    if note is None:
        raise Tampered("a ledger without a signed head cannot be exported", code="DP070")
    file.write(encode({"note": base64.b64encode(note).decode("ascii")}) + b"\n")
    return note


class ExportReading:
    """The records and the head of an export; what they say is not checked here but by the rules."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._note: bytes | None = None

    def entries(self) -> Iterator[Entry]:
        """Every record, in order.

        Raises:
            Tampered: not exactly in the export format (DP070 for another kind of file, DP082 for a damaged one).
        """
        first, lines, plain = True, _lines(self._file), ENDS
        for line in lines:
            if line[-11:] in plain and not first:
                yield Entry(line)
                continue
            if line.startswith(b'{"note":'):
                self._note = _note(line)
                if next(lines, None) is not None:
                    raise Tampered("the export goes on after its signed head", code="DP082")
                return
            kind = None if first else kind_of(line)
            if kind not in FIELDS:
                # Only to name what is wrong with it: the rules read every line.
                try:
                    kind = read(line)["type"]
                except Tampered as error:
                    raise Tampered(f"export: {error.message}", code="DP070" if first else error.code) from None
            yield Entry(line, next(lines, None) if kind in ENVELOPED else None)
            first = False
        raise Tampered("the export has no signed head at its end: it was cut", code="DP082")

    def newest(self) -> bytes | None:
        """The head, once the entries were read."""
        return self._note

    def heads(self) -> Iterator[bytes]:
        """The one head, once the entries were read."""
        if self._note is not None:
            yield self._note


def read_export(data: bytes) -> Snapshot:
    """All of an export in memory; raises :class:`Tampered` like :class:`ExportReading`."""
    return Snapshot.of(ExportReading(io.BytesIO(data)))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    limit, total, read_line = MAX_ENVELOPE_BYTES + 1, 0, file.readline
    while line := read_line(limit):
        total += len(line)
        if line[-1] != 0x0A:
            raise Tampered("the export has a line that is too long or does not end", code="DP082")
        if total > MAX_EXPORT_BYTES:
            raise Tampered(f"the export has more than {MAX_EXPORT_BYTES} bytes", code="DP082")
        yield line[:-1]


def _note(line: bytes) -> bytes:
    value = decode(line, max_bytes=max(MAX_LINE_BYTES, 2 * MAX_NOTE_BYTES), max_depth=1)
    if set(value) != {"note"}:
        raise Tampered("the last line of an export holds the note alone", code="DP082")
    return strict_base64(value["note"])


def create_export(reading: Reading, path: Path) -> bytes:
    """Write an export to a new file, sync it and return its head; a file that could not be written whole is removed.

    Raises:
        InvalidParameter: the path exists (DP074).
        Unreadable: the folder is missing or not writable (DP070).
        StorageFailed: the disk is full, or a write or sync failed (DP075).
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise InvalidParameter(f"{path} exists", code="DP074", hint="choose another path") from None
    except OSError as error:
        raise Unreadable(f"cannot create {path}: {error.strerror}", hint="make the folder first") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            head = write_export(reading, file)
            file.flush()
            os.fsync(descriptor)
    except BaseException as error:
        with suppress(OSError):
            path.unlink()
        if isinstance(error, OSError) and not isinstance(error, DPBudgetError):
            raise StorageFailed(f"cannot write {path}: {error.strerror}", hint="see to the disk") from None
        raise
    return head
