"""What the owner's commands share: both keys of a ledger, and a ledger opened with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dpbudget_cli._keys import PASSPHRASE_FD, key_path, load_signer, read_passphrases, require_ledger

if TYPE_CHECKING:
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.signing import Ed25519Signer

_Command = TypeVar("_Command", bound=Callable[..., Any])

REQUEST = click.option(
    "--request", metavar="FILE", help="Write an unsigned request for an owner elsewhere; no key is needed."
)


def key_options(command: _Command) -> _Command:
    """--owner-key, --writer-key and --passphrase-fd."""
    for option in (
        PASSPHRASE_FD,
        click.option(
            "--writer-key", metavar="FILE", help="The writer's key; PATH.writer.key, else writer.key beside PATH."
        ),
        click.option(
            "--owner-key", metavar="FILE", help="The owner's key; PATH.owner.key, else owner.key beside PATH."
        ),
    ):
        command = option(command)
    return command


def open_for_owner(
    path: str, owner_key: str | None, writer_key: str | None, passphrase_fd: int | None
) -> tuple[Ledger, Ed25519Signer]:
    """The ledger, opened with its writer's key, and the owner's key."""
    from dpbudget._surface import open_ledger

    require_ledger(path)
    passphrases = read_passphrases(passphrase_fd)
    owner = load_signer(key_path(owner_key, path, "owner"), passphrases)
    writer = load_signer(key_path(writer_key, path, "writer"), passphrases)
    return open_ledger(path, writer=writer), owner


def open_for_writer(path: str, writer_key: str | None, passphrase_fd: int | None) -> Ledger:
    """The ledger, opened with its writer's key."""
    from dpbudget._surface import open_ledger

    require_ledger(path)
    passphrases = read_passphrases(passphrase_fd)
    return open_ledger(path, writer=load_signer(key_path(writer_key, path, "writer"), passphrases))
