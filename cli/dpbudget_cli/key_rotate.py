"""``dpbudget key rotate``: hand a role of a ledger to a new key."""

from __future__ import annotations

import os

import click

from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._keys import PASSPHRASE_FD, key_path, load_signer, read_passphrases, require_ledger
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf


@click.command("rotate", cls=Leaf)
@click.argument("role")
@click.argument("path", metavar="LEDGER")
@click.option("--new-key", required=True, metavar="FILE", help="The new key; it is made here if the file is missing.")
@click.option("--owner-key", metavar="FILE", help="The owner's present key; needed for the owner's role.")
@click.option("--writer-key", metavar="FILE", help="The writer's present key.")
@click.option("--lost", is_flag=True, help="The writer's key is lost or stolen: the owner signs in its place.")
@PASSPHRASE_FD
@JSON
def command(
    role: str,
    path: str,
    new_key: str,
    owner_key: str | None,
    writer_key: str | None,
    lost: bool,
    passphrase_fd: int | None,
    as_json: bool,
) -> None:
    """Give ROLE (owner or writer) of the ledger LEDGER to a new key, signed by the old one and the new one.

    From then on the old key is good for nothing in this ledger, and no key comes back. Hand the new owner's .pub file
    to whoever verifies.

    Examples:
      dpbudget key rotate writer budget.ledger --new-key writer2.key
      dpbudget key rotate writer budget.ledger --new-key writer2.key --lost
    """
    from dpbudget._surface import open_ledger
    from dpbudget.ledger.keys import new_key as make_key
    from dpbudget.ledger.ledger import Ledger

    if role not in ("owner", "writer") or (lost and role == "owner"):
        raise InvalidParameter(
            f"role {role[:40]!r}{' with --lost' if lost else ''}: roles are owner and writer, and only the writer's "
            "key can be replaced without itself",
            code="DP080",
            hint="dpbudget key rotate writer LEDGER --new-key FILE",
        )
    passphrases = read_passphrases(passphrase_fd)
    signing = "owner" if lost or role == "owner" else "writer"
    require_ledger(path)
    by = load_signer(key_path(owner_key if signing == "owner" else writer_key, path, signing), passphrases)
    writer = load_signer(key_path(writer_key, path, "writer"), passphrases) if role == "owner" else by
    made = not os.path.lexists(new_key)
    new = make_key(new_key, passphrases[0] if passphrases else None) if made else load_signer(new_key, passphrases)
    if lost:
        ledger = Ledger.replace_writer(path, new=new, owner=by)
    else:
        ledger = open_ledger(path, writer=writer)
        try:
            ledger.rekey("owner" if role == "owner" else "writer", new=new, by=by)
        except BaseException:
            ledger.close()
            raise
    with ledger:
        answer = {"role": role, "old": by.public.hex, "new": new.public.hex, "key": new_key, "head": str(ledger.head)}
    if as_json:
        out.emit_json(answer)
    else:
        out.emit_table(list(answer.items()))
        out.talk(f"The old {role}'s key is good for nothing in this ledger any more.")
