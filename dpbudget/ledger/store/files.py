"""Files that can be trusted to be what they were: regular, local, not links, not replaced under an open ledger."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from dpbudget.errors import InvalidParameter, StorageFailed, Unreadable

#: File systems whose locks or syncs do not hold across machines.
# fmt: off
_NETWORK = frozenset({
    "9p", "afs", "beegfs", "ceph", "cephfs", "cifs", "coda", "davfs", "fuse", "gfs", "gfs2",
    "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs3", "nfs4", "ocfs2", "orangefs", "panfs",
    "pvfs2", "smb2", "smb3", "smbfs", "vboxsf", "vmhgfs", "wekafs",
})
# fmt: on
#: Of the user-space file systems only these are known to be local.
_LOCAL_FUSE = frozenset({"fuseblk", "fuse.fuse-overlayfs", "fuse.ntfs", "fuse.ntfs-3g"})
#: Names of a folder that are compared with one that is missing.
_MOST_NAMES = 2000
_OCTAL = re.compile(r"\\([0-7]{3})")


def as_path(path: str | os.PathLike[str]) -> Path:
    """The path as given, made absolute without following links; a NUL byte is refused."""
    text = os.fspath(path)
    if "\0" in text or not text:
        raise InvalidParameter(f"{text[:80]!r} is not a path", code="DP070")
    return Path(os.path.abspath(text))


def check_path(path: str | os.PathLike[str]) -> str:
    """The way out where a file cannot be had: its path, and the name of a file beside it that is nearly the same."""
    from difflib import get_close_matches

    folder, name = os.path.split(os.fspath(path))
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry in islice(entries, _MOST_NAMES)]
    except (OSError, ValueError):
        return "check the path"
    close = [] if name in names else get_close_matches(name, names, n=1, cutoff=0.75)
    return f"check the path. Did you mean {os.path.join(folder, close[0])}?" if close else "check the path"


def name_a_ledger(path: Path) -> str:
    """The way out where another file stands in a ledger's place: an export, most likely, which nobody spends from."""
    if path.suffix == ".jsonl":  # not by what is in it: to close a file gives up SQLite's locks on it
        return f"an export is read and verified alone; to spend from it, dpbudget ledger import {path.name} NEW.ledger"
    return "name the ledger file or an export of it"


def identity(path: Path) -> tuple[int, int]:
    """Device and inode of a regular file with one name.

    Raises:
        Unreadable: missing (DP070), or a symbolic link, a device, a FIFO or a hard-linked file (DP083).
    """
    try:
        status = os.lstat(path)
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}", hint=check_path(path)) from None
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(f"{path} is not a regular file", code="DP083", hint="name the file itself, not a link to it")
    if status.st_nlink == 0:
        raise Unreadable(f"{path} is being removed", hint="try again")
    if status.st_nlink != 1:
        # SQLite names its journal after the path: a second name would hide a hot journal.
        raise Unreadable(f"{path} has {status.st_nlink} hard links", code="DP083", hint="keep one name for a ledger")
    return status.st_dev, status.st_ino


def create_private(path: Path) -> None:
    """Create an empty file of mode 0600 and sync its name.

    Raises:
        InvalidParameter: something of this name exists (DP074).
        Unreadable: the folder is missing or not writable (DP070).
        StorageFailed: a sync failed (DP075); an empty file is left.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise InvalidParameter(
            f"{path} exists",
            code="DP074",
            hint="go on with what is there (dpbudget.open_ledger, dpbudget ledger show), or choose another path; "
            "nothing was written",
        ) from None
    except OSError as error:
        raise Unreadable(f"cannot create {path}: {error.strerror}", hint="make the folder first") from None
    try:
        os.fsync(descriptor)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageFailed(
            f"cannot make {path} durable: {error.strerror}", hint="see to the disk and remove the empty file"
        ) from error
    finally:
        os.close(descriptor)


def open_folder(folder: Path) -> int:
    """A descriptor through which the names in ``folder`` can be synced.

    Raises:
        Unreadable: it cannot be opened (DP070).
    """
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"{folder}: {error.strerror}", hint="a ledger's folder must be readable") from None


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = open_folder(folder)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path, limit: int) -> BinaryIO:
    """A regular file of at most ``limit`` bytes, opened for reading; links are followed, FIFOs and devices refused."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}", hint=check_path(path)) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise Unreadable(f"{path} is not a regular file", code="DP083", hint="name the file itself")
    if status.st_size > limit:
        os.close(descriptor)
        raise Unreadable(f"{path} has {status.st_size} bytes; the limit is {limit}")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of such a file."""
    with open_regular(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Unreadable(f"{path} grew beyond {limit} bytes while it was read")
    return data


def refuse_network_file_system(path: Path) -> None:
    """Raise :class:`Unreadable` (DP083) where the folder of ``path`` lies on a network file system.

    Only Linux tells its mounts in a file; elsewhere nothing is checked.
    """
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    kind = file_system_of(os.path.realpath(path.parent), mounts.splitlines())
    if kind is not None and is_network(kind):
        raise Unreadable(
            f"{path} lies on a network file system ({kind}), where locks and syncs cannot be relied on",
            code="DP083",
            hint="keep the ledger on a local disk and export it to share it",
        )


def file_system_of(folder: str, mounts: Iterable[str]) -> str | None:
    """The type of the file system that holds ``folder``, from the lines of /proc/mounts; later mounts hide earlier."""
    best, kind = -1, None
    for line in mounts:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[1])
        inside = folder == point or folder.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, kind = len(point), fields[2]
    return kind


def is_network(kind: str) -> bool:
    """Whether a file system of this type may lie on another machine."""
    return kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)
