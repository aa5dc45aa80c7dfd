"""Key files and passphrases, as the commands name them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from dpbudget.errors import DPBudgetError, InvalidParameter, Unreadable
from dpbudget_cli._output import detail

if TYPE_CHECKING:
    from dpbudget.ledger.auditor import AuditorKey
    from dpbudget.ledger.signing import Ed25519Signer

_Key = TypeVar("_Key")
_MAX_PASSPHRASE = 4096

#: The way out where a passphrase is needed and nobody is there to type it.
BY_DESCRIPTOR = "pass --passphrase-fd FD, as in --passphrase-fd 3 3< FILE"
PASSPHRASE_FD = click.option(
    "--passphrase-fd", type=int, metavar="FD", help="Read passphrases of encrypted keys here, one a line."
)


def read_passphrases(fd: int | None) -> tuple[bytes, ...]:
    """The lines of a file descriptor, without their line feeds; none where none is named.

    Raises:
        InvalidParameter: it cannot be read (DP070), or it is empty or too long (DP073).
    """
    if fd is None:
        return ()
    try:
        with os.fdopen(os.dup(fd), "rb") as stream:
            data = stream.read(_MAX_PASSPHRASE + 1)
    except (OSError, OverflowError):
        raise InvalidParameter(
            f"file descriptor {fd} cannot be read", code="DP070", hint="open it, as in --passphrase-fd 3 3< FILE"
        ) from None
    lines = tuple(line for line in data.splitlines() if line)
    if not lines or len(data) > _MAX_PASSPHRASE:
        raise InvalidParameter(
            f"file descriptor {fd} gives no passphrase of 1 to {_MAX_PASSPHRASE} bytes",
            code="DP073",
            hint="write one passphrase a line",
        )
    return lines


def ask_passphrase(*, twice: bool = False) -> bytes:
    """Ask a person at a terminal; refused in a pipe, where nobody could answer."""
    if not sys.stdin.isatty():
        raise InvalidParameter(
            "a passphrase is needed and there is no terminal to ask at",
            code="DP073",
            hint=BY_DESCRIPTOR,
        )
    text = click.prompt("passphrase", hide_input=True, confirmation_prompt=twice, err=True)
    return str(text).encode()


def local_name(ledger: str) -> str:
    """The name beside which keys of a ledger lie: its path, or for a database the ledger's name in this folder."""
    from dpbudget.ledger.store.postgres_url import PostgresUrl, is_database

    return PostgresUrl.parse(ledger).name if is_database(ledger) else ledger


def shown(ledger: str) -> str:
    """A location as it may be printed: without a password."""
    from dpbudget.ledger.store.postgres_url import is_database, show_location

    return show_location(ledger) if is_database(ledger) else ledger


def require_ledger(ledger: str) -> None:
    """Say that a ledger is missing before its keys are (DP070); a database is asked when it is opened."""
    from dpbudget.ledger.store.files import check_path
    from dpbudget.ledger.store.postgres_url import is_database

    if not is_database(ledger) and not os.path.lexists(ledger):
        new = f"dpbudget init {ledger}, or dpbudget ledger init {ledger} --epsilon E --delta D"
        raise Unreadable(
            f"{ledger}: no such ledger",
            hint=f"{check_path(ledger)}; a new one is made by {new}",
        )


def key_path(given: str | None, ledger: str, role: str) -> str:
    """The key file that was named, else PATH.<role>.key or <role>.key beside the ledger.

    Raises:
        Unreadable: there is none of them (DP070).
    """
    if given is not None:
        return given
    name = local_name(ledger)
    candidates = (f"{name}.{role}.key", str(Path(name).parent / f"{role}.key"))
    for name in candidates:
        if Path(name).exists():
            detail(f"the {role}'s key is {name}")
            return name
    missing = " nor ".join(Path(name).name for name in candidates)
    raise Unreadable(
        f"no --{role}-key given, and beside the ledger is neither {missing}",
        hint=f"pass --{role}-key FILE",
    )


def load_signer(path: str, passphrases: tuple[bytes, ...] = ()) -> Ed25519Signer:
    """The private key of a file; an encrypted one by the given passphrases, the keyring, or a person at the terminal.

    Raises:
        Unreadable: missing, unsafe, not a key, or no passphrase opens it (DP070, DP073).
    """
    from dpbudget.ledger.keys import load_key

    return _open(load_key, path, passphrases)


def load_auditor(path: str, passphrases: tuple[bytes, ...] = ()) -> AuditorKey:
    """The private key of an auditor, found as :func:`load_signer` finds a signer's."""
    from dpbudget.ledger.auditor import load_auditor_key

    return _open(load_auditor_key, path, passphrases)


def _open(load: Callable[[str, bytes | None], _Key], path: str, passphrases: tuple[bytes, ...]) -> _Key:
    try:
        return load(path, None)
    except Unreadable as error:
        if "needs a passphrase" not in error.message:
            raise
        refusal = error
    for passphrase in passphrases:
        try:
            return load(path, passphrase)
        except Unreadable as error:
            refusal = error
    if not passphrases:
        kept = _kept_passphrase(path)
        if kept is not None:
            return load(path, kept)
    if not passphrases and not sys.stdin.isatty():
        raise Unreadable(refusal.message, code=refusal.code, hint=BY_DESCRIPTOR)
    if passphrases:
        raise refusal
    return load(path, ask_passphrase())


def _kept_passphrase(path: str) -> bytes | None:
    """What the keyring has for the key whose public half lies beside it; None for nothing."""
    from dpbudget.ledger.keys import read_any_public
    from dpbudget_cli._keyring import recall

    try:
        _, public = read_any_public(f"{path}.pub")
    except DPBudgetError:
        return None
    return recall(public)
