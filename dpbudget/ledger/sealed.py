"""Whoever opens a file of sealed noise keys can remove all noise of the runs in it.

A run that is started with :class:`SealedKeys` appends the key of every lease, sealed to an auditor, and syncs the file
before the lease is written, so that no noise is drawn whose key is not kept. One line of canonical JSON a key::

    {"auditor": 64 digits, "commitment": 64 digits, "ephemeral": 64 digits, "ledger": 64 digits, "run": 32 digits,
     "sealed": 96 digits, "type": "lease-key" or "plan-key", "v": 1}

``auditor`` and ``ephemeral`` are X25519 public keys, ``commitment`` stands in the ledger too, and ``sealed`` is the key
as :mod:`dpbudget.ledger.auditor` seals it beside the canonical bytes of all other fields. A line that a crash left
unfinished is followed by a line feed and counts as nothing: no noise was drawn from its key.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from dpbudget._record import decode, encode
from dpbudget.errors import InvalidParameter, StorageFailed, Tampered, Unreadable, UnsafeKeyFile
from dpbudget.ledger.auditor import AuditorKey, AuditorPublicKey
from dpbudget.ledger.store.files import as_path, create_private, read_regular

#: A file of more than a hundred thousand keys is not one.
MAX_FILE_BYTES = 1 << 26

Kind = Literal["lease-key", "plan-key"]
KINDS: tuple[Kind, ...] = ("lease-key", "plan-key")
_DIGITS = {"auditor": 64, "commitment": 64, "ephemeral": 64, "ledger": 64, "run": 32, "sealed": 96}


class SealedKeys:
    """Whoever opens this file can remove all noise: in it a run keeps its noise keys, sealed to an auditor.

    For ``dpbudget.start(..., keep_keys=SealedKeys("noise.sealed", auditor))``; off by default. Only someone who is
    cleared for the raw data may have the auditor's private key: a noise key reveals the clipped sum of its step, and
    the key of a batch voids what sampling amplifies.

    Args:
        path: made with mode 0600 where it is missing; keys are appended to what is there.
        auditor: to whom the keys are sealed.

    Raises:
        InvalidParameter: ``auditor`` is no public key of an auditor (DP080).
    """

    def __init__(self, path: str | os.PathLike[str], auditor: AuditorPublicKey) -> None:
        if not isinstance(auditor, AuditorPublicKey):
            raise InvalidParameter(
                f"auditor is a {type(auditor).__name__}, not an auditor's public key",
                code="DP080",
                hint='auditor=dpbudget.load_auditor_public_key("auditor.key.pub")',
            )
        self._path, self._auditor = as_path(path), auditor
        self._failed = False

    @property
    def path(self) -> Path:
        """Where the keys are."""
        return self._path

    def prepare(self) -> None:
        """Make the file, or check the one that is there, before anything is charged.

        Raises:
            UnsafeKeyFile: a link, not a regular file, of another user, or open to group or world (DP073).
            Unreadable: the folder is missing or not writable (DP070).
        """
        if not os.path.lexists(self._path):
            create_private(self._path)
        os.close(self._open())

    def keep(self, kind: Kind, *, ledger: str, run: str, commitment: str, key: bytes) -> None:
        """Append a key, sealed; durable on return.

        Raises:
            StorageFailed: it could not be written, now or earlier (DP075); nothing may be drawn from the key.
            UnsafeKeyFile, Unreadable: as :meth:`prepare`.
        """
        if self._failed:
            raise self._failure("failed before")
        facts = {"commitment": commitment, "ledger": ledger, "run": run, "type": kind, "v": 1}
        line = seal_line(self._auditor, facts, key)
        descriptor = self._open()
        try:
            _append(descriptor, line)
        except OSError as error:
            # Never tried again: after a failed sync nobody knows what is on disk.
            self._failed = True
            raise self._failure(error.strerror or "the write was cut short") from error
        finally:
            os.close(descriptor)

    def _failure(self, problem: str) -> StorageFailed:
        return StorageFailed(
            f"the noise key could not be kept in {self._path}: {problem}; nothing was released",
            hint="see to the disk, and start the run again",
        )

    def _open(self) -> int:
        """A descriptor that appends, of a file that nobody else can read or put another in the place of."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if self._path.is_symlink():
                raise UnsafeKeyFile(f"{self._path} is a symbolic link", hint="name the file itself") from None
            raise Unreadable(f"{self._path}: {error.strerror}", hint="keep the file where the run began") from None
        status = os.fstat(descriptor)
        problem = None
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            problem = "is not a regular file with one name"
        elif status.st_uid != os.getuid():
            problem = f"belongs to user {status.st_uid}"
        elif status.st_mode & 0o077:
            problem = f"has mode {stat.S_IMODE(status.st_mode):04o}: others can read or replace it"
        if problem:
            os.close(descriptor)
            raise UnsafeKeyFile(f"{self._path} {problem}", hint="keep noise keys in a file of your own, chmod 600")
        return descriptor


def seal_line(auditor: AuditorPublicKey, facts: Mapping[str, Any], key: bytes) -> bytes:
    """One line of the file, without its line feed."""
    known = {**facts, "auditor": auditor.hex}
    # The ephemeral key takes part in the wrapping key, so that it needs no place in what is authenticated beside.
    ephemeral, sealed = auditor.seal(key, encode(known))
    return encode({**known, "ephemeral": ephemeral.hex(), "sealed": sealed.hex()})


def open_sealed(path: str | os.PathLike[str], auditor: AuditorKey, facts: Mapping[str, Any]) -> bytes:
    """The key in a file of sealed keys about which its line says ``facts``.

    Not checked against the commitment: that is for whoever knows what the ledger commits to.

    Raises:
        Unreadable: the file cannot be read (DP070), or has no such key (DP085).
        Tampered: no line about it opens with this key (DP085).
    """
    place, refusal = as_path(path), None
    for record in _lines(read_regular(place, MAX_FILE_BYTES)):
        if any(record[name] != value for name, value in facts.items()):
            continue
        beside = encode({name: value for name, value in record.items() if name not in ("ephemeral", "sealed")})
        try:
            return auditor.open(bytes.fromhex(record["ephemeral"]), bytes.fromhex(record["sealed"]), beside)
        except Tampered as error:
            refusal = error
    if refusal is not None:
        raise refusal
    raise Unreadable(
        f"{place} holds no key of {facts['type'].partition('-')[0]} {facts['commitment'][:16]}… of run {facts['run']}",
        code="DP085",
        hint="name the file that the run was started with (keep_keys)",
    )


def _lines(data: bytes) -> Iterator[dict[str, Any]]:
    """What can be read of the lines; the others are torn or not ours."""
    for line in data.split(b"\n"):
        try:
            record = decode(line, max_depth=1)
        except Tampered:
            continue
        if set(record) == {*_DIGITS, "type", "v"} and record["v"] == 1 and record["type"] in KINDS and _digits(record):
            yield record


def _digits(record: Mapping[str, Any]) -> bool:
    values = ((record[name], count) for name, count in _DIGITS.items())
    return all(isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{count}}}", value) for value, count in values)


def _append(descriptor: int, line: bytes) -> None:
    size = os.fstat(descriptor).st_size
    torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
    # One write, so that processes that share the file do not mix their lines.
    whole = b"\n" * torn + line + b"\n"
    if os.write(descriptor, whole) != len(whole):
        raise OSError(errno.EIO, "the write was cut short")
    os.fsync(descriptor)
