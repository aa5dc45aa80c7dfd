"""New files that a command writes: never over an old one."""

from __future__ import annotations

import os

from dpbudget.errors import InvalidParameter, Unreadable


def write_new(name: str, data: bytes) -> None:
    """Write a new file.

    Raises:
        InvalidParameter: the name exists (DP074).
        Unreadable: its folder is missing or not writable (DP070).
    """
    try:
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise InvalidParameter(
            f"{name} exists", code="DP074", hint="choose another path; nothing was written"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreadable(f"cannot create {name}: {reason}", hint="make the folder first") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
