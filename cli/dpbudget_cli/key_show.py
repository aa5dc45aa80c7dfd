"""``dpbudget key show``: the public half of a key."""

from __future__ import annotations

import click

from dpbudget.errors import Unreadable
from dpbudget_cli import _output as out
from dpbudget_cli._keys import PASSPHRASE_FD, load_auditor, load_signer, read_passphrases
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf


@click.command("show", cls=Leaf)
@click.argument("path")
@PASSPHRASE_FD
@JSON
def command(path: str, passphrase_fd: int | None, as_json: bool) -> None:
    """Show the public half of the key in PATH: a private key file, a .pub file or 64 hexadecimal digits.

    Examples:
      dpbudget key show owner.key
      dpbudget key show owner.key.pub --json
    """
    from dpbudget.ledger.keys import load_public_key

    try:
        public = load_public_key(path)
    except Unreadable as error:
        if "auditor" in error.hint:
            _show_auditor(path, as_json)
            return
        if "private key" not in error.hint:
            raise
        passphrases = read_passphrases(passphrase_fd)
        try:
            public = load_signer(path, passphrases).public
        except Unreadable as other:
            if "auditor" not in other.hint:
                raise
            _show_auditor(load_auditor(path, passphrases).public.hex, as_json)
            return
    if as_json:
        out.emit_json({"public": public.hex, "key_id": public.key_id})
    else:
        out.emit_table([("public", public.hex), ("key id", public.key_id)])


def _show_auditor(source: str, as_json: bool) -> None:
    from dpbudget.ledger.auditor import load_auditor_public_key

    public = load_auditor_public_key(source)
    if as_json:
        out.emit_json({"public": public.hex, "key_id": None})
    else:
        out.emit_table([("public", public.hex), ("use", "noise keys are sealed to it; it signs nothing")])
