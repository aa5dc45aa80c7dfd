"""Mounts that nobody else sees: a child process with a mount namespace of its own, gone when it ends."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# linux/sched.h and linux/mount.h.
_NEW_NAMESPACE, _NEW_USER = 0x00020000, 0x10000000
_RDONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18
_DETACH = 2


def _call(name: str, *args: Any) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str, target: Path, kind: str | None, flags: int, options: str | None = None) -> None:
    def encoded(text: str | None) -> bytes | None:
        return None if text is None else text.encode()

    arguments = (encoded(source), os.fsencode(target), encoded(kind), ctypes.c_ulong(flags), encoded(options))
    _call("mount", *arguments)


def mount_memory(folder: Path, size: int) -> None:
    """A file system of ``size`` bytes on ``folder``."""
    _mount("none", folder, "tmpfs", 0, f"size={size},mode=700")


def grow_memory(folder: Path, size: int) -> None:
    """Make room on a file system of :func:`mount_memory`."""
    _mount("none", folder, None, _REMOUNT, f"size={size}")


def cover_read_only(folder: Path) -> None:
    """Let ``folder`` refuse every write by name; a file that is open for writing keeps a mount itself from it."""
    _mount(str(folder), folder, None, _BIND)
    _mount("none", folder, None, _REMOUNT | _BIND | _RDONLY)


def lose(folder: Path) -> None:
    """Take the mount off ``folder`` while files on it are open, as a disk that is pulled out."""
    _call("umount2", os.fsencode(folder), _DETACH)


def in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, as JSON, from a forked child; its failure is the test's."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            status = 0
        except BaseException:
            os.write(writing, json.dumps(traceback.format_exc()).encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0, json.loads(data) if data else f"the child ended with status {status}"
    return json.loads(data)


def _enter_namespace() -> None:
    _call("unshare", _NEW_NAMESPACE if os.geteuid() == 0 else _NEW_NAMESPACE | _NEW_USER)
    _mount("none", Path("/"), None, _RECURSIVE | _PRIVATE)


def _try_namespace(folder: Path) -> str:
    try:
        _enter_namespace()
        mount_memory(folder, 1 << 16)
        cover_read_only(folder)
    except OSError as error:
        return str(error)
    return ""


def with_mounts(folder: Path, work: Callable[[], Any]) -> Any:
    """:func:`in_child`, where mounts are its own; skips the test where the machine allows none.

    Args:
        folder: an empty folder, on which mounting is tried first.
        work: what to do.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("mount namespaces are Linux's")
    refused = in_child(lambda: _try_namespace(folder))
    if refused:
        pytest.skip(f"no mounts of its own for a test here: {refused}")

    def inside() -> Any:
        _enter_namespace()
        return work()

    return in_child(inside)
