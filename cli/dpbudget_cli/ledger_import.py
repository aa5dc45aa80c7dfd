"""``dpbudget ledger import``: a ledger from its export, in another store."""

from __future__ import annotations

import click

from dpbudget_cli import _output as out
from dpbudget_cli._keys import PASSPHRASE_FD, load_signer, read_passphrases, shown
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf

ONE_COPY = (
    "Spend from this copy alone and retire the other: two that spend are two histories, and only a kept head tells."
)


@click.command("import", cls=Leaf)
@click.argument("source", metavar="EXPORT")
@click.argument("path")
@click.option(
    "--writer-key", required=True, metavar="FILE", help="The writer's key, which signs the note of the import."
)
@click.option("--trust", required=True, metavar="KEY", help="The owner's public key: a .pub file or 64 digits.")
@PASSPHRASE_FD
@JSON
def command(source: str, path: str, writer_key: str, trust: str, passphrase_fd: int | None, as_json: bool) -> None:
    """Make the ledger PATH (a new file, or postgresql://...#name) from EXPORT, after checking every record of it.

    A note in the new ledger tells it from the old one.

    Examples:
      dpbudget ledger import budget.jsonl moved.ledger --writer-key writer.key --trust owner.key.pub
      dpbudget ledger import budget.jsonl other.ledger --writer-key writer.key --trust owner.key.pub --json
    """
    from dpbudget.ledger.keys import load_public_key
    from dpbudget.ledger.ledger import Ledger

    writer = load_signer(writer_key, read_passphrases(passphrase_fd))
    with Ledger.import_export(source, path, writer=writer, trust=load_public_key(trust)) as ledger:
        head, records = ledger.head, ledger.state.size
    if as_json:
        out.emit_json({"ledger": shown(path), "records": records, "head": str(head), "notes": [ONE_COPY]})
    else:
        out.emit_table([("ledger", shown(path)), ("records", records), ("head", head)])
        out.talk(ONE_COPY)
