"""``dpbudget ledger note``: record that something happened, in a word of a list."""

from __future__ import annotations

import click

from dpbudget_cli import _output as out
from dpbudget_cli._keys import PASSPHRASE_FD
from dpbudget_cli._options import JSON
from dpbudget_cli._owner import open_for_writer
from dpbudget_cli.main import Leaf


@click.command("note", cls=Leaf)
@click.argument("path")
@click.argument("event")
@click.option("--writer-key", metavar="FILE", help="The writer's key; PATH.writer.key, else writer.key beside PATH.")
@PASSPHRASE_FD
@JSON
def command(path: str, event: str, writer_key: str | None, passphrase_fd: int | None, as_json: bool) -> None:
    """Write EVENT into the ledger PATH: checked, published, restored, imported, incident or retired.

    A note changes nothing. There is no free text, since a ledger is read by everybody and text could carry data.

    Examples:
      dpbudget ledger note budget.ledger published
      dpbudget ledger note budget.ledger incident --json
    """
    with open_for_writer(path, writer_key, passphrase_fd) as ledger:
        ledger.note(event)
        head = ledger.head
    if as_json:
        out.emit_json({"event": event, "head": str(head)})
    else:
        out.emit_table([("event", event), ("head", head)])
