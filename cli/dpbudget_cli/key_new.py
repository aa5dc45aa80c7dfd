"""``dpbudget key new``: make a signing key, or an auditor's."""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from dpbudget_cli import _output as out
from dpbudget_cli._keyring import remember
from dpbudget_cli._keys import PASSPHRASE_FD, ask_passphrase, read_passphrases
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf


@click.command("new", cls=Leaf)
@click.argument("path")
@click.option("--auditor", is_flag=True, help="An X25519 key, to which noise keys are sealed; it signs nothing.")
@click.option("--passphrase", is_flag=True, help="Encrypt the key; asks for a passphrase at the terminal.")
@click.option("--keyring", is_flag=True, help="Encrypt the key with a random passphrase kept in your keyring.")
@PASSPHRASE_FD
@JSON
def command(
    path: str, auditor: bool, passphrase: bool, keyring: bool, passphrase_fd: int | None, as_json: bool
) -> None:
    """Make an Ed25519 key: the private half in PATH (mode 0600), the public half in PATH.pub.

    Nothing is overwritten. A passphrase is never taken from the command line, where others could read it.

    Examples:
      dpbudget key new owner.key
      dpbudget key new writer.key --json
      dpbudget key new auditor.key --auditor
    """
    from dpbudget.ledger.auditor import new_auditor_key
    from dpbudget.ledger.keys import new_key

    secret = next(iter(read_passphrases(passphrase_fd)), None)
    if passphrase and secret is None and not keyring:
        secret = ask_passphrase(twice=True)
    if keyring and secret is None:
        secret = secrets.token_hex(32).encode()
    public = new_auditor_key(path, secret).public.hex if auditor else new_key(path, secret).public.hex
    if keyring and secret is not None:
        try:
            remember(public, secret.decode("utf-8", "surrogateescape"))
        except BaseException:
            for name in (path, f"{path}.pub"):  # a key that nobody can open is none
                Path(name).unlink(missing_ok=True)
            raise
    if as_json:
        out.emit_json({"key": path, "public_file": f"{path}.pub", "public": public})
        return
    out.emit_table([("key", path), ("public file", f"{path}.pub"), ("public", public)])
    if auditor:
        out.talk("Give the public file to whoever trains (--keep-keys). What the key opens can remove all noise:")
        out.talk("only someone who is cleared for the raw data may have it.")
    else:
        out.talk("Keep the key file; give the public file to whoever verifies, by another way than the ledger.")
