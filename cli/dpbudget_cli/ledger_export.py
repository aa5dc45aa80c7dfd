"""``dpbudget ledger export``: the ledger as text that needs no database to read."""

from __future__ import annotations

import click

from dpbudget_cli import _output as out
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf


@click.command("export", cls=Leaf)
@click.argument("path")
@click.argument("target", metavar="OUT")
@JSON
def command(path: str, target: str, as_json: bool) -> None:
    """Write the ledger PATH to the new file OUT as JSON lines, after checking every record.

    Examples:
      dpbudget ledger export budget.ledger budget.jsonl
      dpbudget ledger export budget.ledger again.jsonl --json
    """
    from dpbudget.ledger.ledger import Ledger

    with Ledger.open(path) as ledger:
        head = ledger.export(target)
    if as_json:
        out.emit_json({"export": target, "head": str(head)})
    else:
        out.emit_table([("export", target), ("head", head)])
