"""The export: a ledger as lines of text, for verification, for git and for the model card.

Every record is one line; an owner-signed record or a plan is followed by exactly one line with its DSSE envelope; the
last line is ``{"note": <base64 of the signed head>}``. Lines end in one line feed and there is exactly one spelling of
everything, so that changing any byte makes the file unreadable or a signature wrong.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dpbudget._record import MAX_LINE_BYTES, decode, encode
from dpbudget.errors import Tampered
from dpbudget.ledger.entries import ENVELOPED, MAX_ENVELOPE_BYTES, Entry, read
from dpbudget.ledger.head import MAX_NOTE_BYTES
from dpbudget.ledger.signing import strict_base64
from dpbudget.ledger.store.base import Snapshot

#: A ledger of a million records stays below it.
MAX_EXPORT_BYTES = 1 << 30


def write_export(snapshot: Snapshot, file: BinaryIO) -> None:
    """Write ``snapshot`` in the export format; its newest head must cover all its records."""
    if snapshot.note is None:
        raise Tampered("a ledger without a signed head cannot be exported", code="DP070")
    for entry in snapshot.entries:
        file.write(entry.line + b"\n")
        if entry.envelope is not None:
            file.write(entry.envelope + b"\n")
    file.write(encode({"note": base64.b64encode(snapshot.note).decode("ascii")}) + b"\n")


def read_export(data: bytes) -> Snapshot:
    """The records and the head of an export; what they say is not checked here but by the rules.

    Raises:
        Tampered: not exactly in the export format (DP070 for another kind of file, DP082 for a damaged one).
    """
    lines = _lines(data)
    entries: list[Entry] = []
    for line in lines:
        if line.startswith(b'{"note":'):
            note = _note(line)
            if next(lines, None) is not None:
                raise Tampered("the export goes on after its signed head", code="DP082")
            return Snapshot(tuple(entries), note, (note,))
        try:
            kind = read(line)["type"]
        except Tampered as error:
            code = error.code if entries else "DP070"
            raise Tampered(f"export, record {len(entries)}: {error.message}", code=code) from None
        envelope = next(lines, None) if kind in ENVELOPED else None
        entries.append(Entry(line, envelope))
    raise Tampered("the export has no signed head at its end: it was cut", code="DP082")


def _lines(data: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        end = data.find(b"\n", start, start + MAX_ENVELOPE_BYTES + 1)
        if end < 0:
            raise Tampered("the export has a line that is too long or does not end", code="DP082")
        yield data[start:end]
        start = end + 1


def _note(line: bytes) -> bytes:
    value = decode(line, max_bytes=max(MAX_LINE_BYTES, 2 * MAX_NOTE_BYTES), max_depth=1)
    if set(value) != {"note"}:
        raise Tampered("the last line of an export holds the note alone", code="DP082")
    return strict_base64(value["note"])


def create_export(snapshot: Snapshot, path: Path) -> None:
    """Write an export to a new file and sync it; the caller has checked that the path is free."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        write_export(snapshot, file)
        file.flush()
        os.fsync(descriptor)
