"""New files that a command writes: over an old one only where that was asked for."""

from __future__ import annotations

import os
import tempfile

from dpbudget.errors import InvalidParameter, Unreadable


def write_new(name: str, data: bytes, *, way_out: str = "choose another path") -> None:
    """Write a new file.

    Args:
        name: its path.
        data: what it holds.
        way_out: what to do where the name is taken.

    Raises:
        InvalidParameter: the name exists (DP074).
        Unreadable: its folder is missing or not writable (DP070).
    """
    try:
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise InvalidParameter(f"{name} exists", code="DP074", hint=f"{way_out}; nothing was written") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreadable(f"cannot create {name}: {reason}", hint="make the folder first") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def write_anew(name: str, data: bytes) -> None:
    """Write a file whole, in the place of an old one: a reader sees one of both and never a part.

    Raises:
        Unreadable: its folder is missing or not writable, or something else than a plain file is there (DP070).
    """
    if os.path.lexists(name) and not (os.path.isfile(name) and not os.path.islink(name)):
        raise Unreadable(f"{name} is not a plain file", hint="choose another path; nothing was written")
    try:
        descriptor, made = tempfile.mkstemp(prefix=".dpbudget-", dir=os.path.dirname(name) or ".")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.chmod(made, 0o644)
            os.replace(made, name)
        except BaseException:
            os.unlink(made)
            raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreadable(f"cannot write {name}: {reason}", hint="make the folder first") from None
