"""What the commands that train share about noise keys: whether, and for whom, they are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dpbudget.errors import InvalidParameter

if TYPE_CHECKING:
    from dpbudget.ledger.sealed import SealedKeys

_Command = TypeVar("_Command", bound=Callable[..., Any])


def keep_options(command: _Command) -> _Command:
    """--keep-keys and --auditor."""
    for option in (
        click.option("--auditor", metavar="KEY", help="To whom the noise keys are sealed: a .pub file."),
        click.option(
            "--keep-keys", "keep_keys", metavar="FILE", help="Noise keys, sealed: opening them removes all noise."
        ),
    ):
        command = option(command)
    return command


def kept_keys(keep_keys: str | None, auditor: str | None) -> SealedKeys | None:
    """Where the noise keys are kept; None for nowhere.

    Raises:
        InvalidParameter: one of the two was given without the other (DP064).
        Unreadable: the auditor's key is none (DP070).
    """
    if (keep_keys is None) != (auditor is None):
        raise InvalidParameter(
            "noise keys are kept in a file and for an auditor, and only one of both was given",
            code="DP064",
            hint="pass --keep-keys FILE and --auditor KEY, or neither: nobody can replay the noise then",
        )
    if keep_keys is None or auditor is None:
        return None
    from dpbudget.ledger.auditor import load_auditor_public_key
    from dpbudget.ledger.sealed import SealedKeys

    return SealedKeys(keep_keys, load_auditor_public_key(auditor))
