"""What ``dpbudget doctor`` looks at: one finding a thing, with its way out. It changes nothing and loads little."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sqlite3
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from dpbudget.errors import DPBudgetError, UnsafeKeyFile

Status = Literal["ok", "warn", "fail"]

#: Distribution -> oldest release that will do; a test compares with pyproject.toml.
NEEDED = {
    "click": "8.1",
    "cryptography": "42",
    "mpmath": "1.3",
    "numpy": "1.26",
    "pydantic": "2.7",
    "rich": "13.7",
    "scipy": "1.11",
}
#: Extra -> what it installs.
EXTRAS = {
    "train": {"torch": "2.6", "safetensors": "0.4"},
    "gpu": {"triton": "3.4"},
    "demo": {"scikit-learn": "1.4"},
    "plot": {"matplotlib": "3.8"},
    "parquet": {"pyarrow": "15"},
    "keyring": {"keyring": "24"},
    "postgres": {"psycopg": "3.1"},
}
_PYTHON = (3, 11)
#: A folder with more names than this is looked through in part.
_MOST_NAMES = 2000
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        status: ``fail`` is unsafe, ``warn`` lacks something, ``ok`` is neither.
        says: what was found.
        fix: the way out; also how to get what is optional.
    """

    name: str
    status: Status
    says: str
    fix: str = ""


def installed() -> Iterator[Finding]:
    """Python, this package, what it needs, and what it could use; versions are read, nothing is imported."""
    from dpbudget import __version__

    version = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info[:2] < _PYTHON
    yield Finding("python", "warn" if old else "ok", version, "take Python 3.11 or newer" if old else "")
    yield Finding("dpbudget", "ok", __version__)
    for name, least in NEEDED.items():
        yield _package(name, least, f"pip install '{name}>={least}'", missing="warn")
    for extra, packages in EXTRAS.items():
        for name, least in packages.items():
            # Without torch nobody trains here; a machine that only verifies needs none of them.
            missing: Status = "warn" if extra == "train" else "ok"
            yield _package(name, least, f"pip install 'dpbudget[{extra}]'", missing=missing)


def _package(name: str, least: str, fix: str, *, missing: Status) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, missing, "not installed", fix)
    if _numbers(version) < _numbers(least):
        return Finding(name, "warn", f"{version}, older than {least}", fix)
    return Finding(name, "ok", version)


def _numbers(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version)[:2]]


def compiler() -> Finding:
    """The C compiler that dptrainer will call for its native code, found as dptrainer.native finds it."""
    slow = "without it the same results are slower"
    if os.environ.get("DPTRAINER_NATIVE", "1") == "0":
        return Finding("C compiler", "warn", f"not used (DPTRAINER_NATIVE=0); {slow}", "unset DPTRAINER_NATIVE")
    try:
        named = shlex.split(os.environ.get("CC", ""))[:1]
    except ValueError:
        return Finding("C compiler", "warn", f"CC is not a command; {slow}", "unset CC, or name a compiler in it")
    found = next((path for path in map(shutil.which, named or ("cc", "gcc", "clang")) if path), None)
    if found is None:
        asked = f"{named[0]} (of CC) is not there" if named else "none found"
        return Finding("C compiler", "warn", f"{asked}; {slow}", "install gcc or clang, or name one in CC")
    return Finding("C compiler", "ok", found)


def database() -> Finding:
    """Whether this SQLite gives what a ledger asks of it, tried in a temporary folder."""
    version = sqlite3.sqlite_version
    try:
        with tempfile.TemporaryDirectory() as folder, closing(sqlite3.connect(Path(folder, "try"))) as connection:
            connection.execute("PRAGMA synchronous=EXTRA")
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
            level = connection.execute("PRAGMA synchronous").fetchone()[0]
    except (sqlite3.Error, OSError) as error:
        return Finding("SQLite", "warn", f"{version}, could not be tried: {error}", "see to the temporary folder")
    if (mode, level) != ("delete", 3):
        says = f"{version} gives journal {mode} and synchronous {level}, where ledgers need delete and 3"
        return Finding("SQLite", "fail", says, "take another build of Python or SQLite, or keep ledgers in PostgreSQL")
    says = f"{version}; ledgers use a rollback journal, synced fully; no WAL, so its reset bug (< 3.51.3) is not met"
    return Finding("SQLite", "ok", says)


def marks() -> Finding:
    """The folder of the high-water marks, by which an older copy of a ledger is recognised."""
    from dpbudget.ledger.high_water import state_folder

    name, use = "state folder", "set DPBUDGET_STATE to a folder that only you can write"
    try:
        folder = state_folder()
    except (RuntimeError, OSError):
        return Finding(name, "warn", "no home to keep it in, so an older copy of a ledger is not recognised", use)
    place = folder / "heads" if (folder / "heads").exists() else folder
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, "warn", f"{place} cannot be written, so an older copy of a ledger is not recognised", use)
    status = there.stat()
    if there == place and status.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        says = f"others can write {place} (mode {mode:04o}), and so hide that a ledger is an older copy"
        return Finding(name, "fail", says, f"chmod go-w {shlex.quote(str(place))}")
    return Finding(name, "ok", f"{place}{'' if there == place else ' (made when a ledger is written)'}")


def settings() -> Finding:
    """The settings file that questions asked here take their defaults from."""
    from dpbudget._config import load_settings

    try:
        found = load_settings()
    except DPBudgetError as error:
        return Finding("settings", "warn", error.message, error.hint)
    if found.source is None:
        return Finding("settings", "ok", "none here; documented defaults hold", "dpbudget init writes dpbudget.toml")
    return Finding("settings", "ok", f"{found.source}: {', '.join(found.values)}")


def ledgers_and_keys(folder: Path) -> Iterator[Finding]:
    """Every ledger and private key of a folder, with what makes it unsafe; its content is not judged."""
    from dpbudget.ledger.store import files

    try:
        files.refuse_network_file_system(folder / "ledger")
    except DPBudgetError:
        says = f"{folder} lies on a network file system, where a ledger is refused"
        yield Finding("folder", "warn", says, "keep ledgers on a local disk, or in PostgreSQL")
    found = 0
    for path in _files_of(folder):
        head = _beginning(path)
        if head.startswith(b"SQLite format 3\0") and head[68:72] == b"dpbl":
            found += 1
            yield _ledger(path, head)
        elif head.startswith(b"-----BEGIN ") and b"PRIVATE KEY-----" in head and _ours(path):
            found += 1
            yield _key(path)
    if not found:
        where = "here" if folder == Path() else f"in {folder}"
        yield Finding("ledgers", "ok", f"none {where}, and no keys", "dpbudget init makes the first")


def _files_of(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for _, entry in zip(range(_MOST_NAMES), entries, strict=False) if entry.is_file()]
    return [folder / name for name in sorted(names)]


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(100)
    except OSError:
        return b""


def _ours(path: Path) -> bool:
    """Whether a key belongs to this package: by its name, or by the public half beside it."""
    return path.suffix == ".key" or _beginning(path.with_name(f"{path.name}.pub")).startswith(b"dpbudget-")


def _ledger(path: Path, head: bytes) -> Finding:
    from dpbudget.ledger.store import files, sqlite

    name = f"ledger {path.name}"
    try:
        files.identity(path)
        sqlite.refuse_wal(path)
        sqlite.refuse_wal_header(path, head)
    except DPBudgetError as error:
        return Finding(name, "fail", error.message, error.hint)
    if path.stat().st_mode & _OTHERS_WRITE:
        return Finding(name, "fail", "others can write it", f"chmod go-w {shlex.quote(str(path))}")
    if os.path.lexists(sqlite.journal_of(path)):
        says = "a journal lies beside it: a writer is at work, or died and is rolled back when the ledger is opened"
        return Finding(name, "warn", says, f"dpbudget ledger show {shlex.quote(str(path))}")
    fix = f"whether its content holds: dpbudget verify {shlex.quote(str(path))}"
    return Finding(name, "ok", "a regular local file that only its owner can write", fix)


def _key(path: Path) -> Finding:
    from dpbudget.ledger.keys import check_key_file

    try:
        check_key_file(path)
    except UnsafeKeyFile as error:
        return Finding(f"key {path.name}", "fail", error.message, error.hint)
    except DPBudgetError as error:
        return Finding(f"key {path.name}", "warn", error.message, error.hint)
    return Finding(f"key {path.name}", "ok", "only you can read or replace it")
