"""``dpbudget ledger head``: what an outsider keeps to recognise the ledger later."""

from __future__ import annotations

import click

from dpbudget_cli import _output as out
from dpbudget_cli._files import write_new
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf


@click.command("head", cls=Leaf)
@click.argument("path")
@click.option("--output", "-o", metavar="FILE", help="Write the signed checkpoint note to this new file.")
@JSON
def command(path: str, output: str | None, as_json: bool) -> None:
    """Show size, root and the signed checkpoint of the ledger PATH, after checking every record.

    Keep it where the ledger's machine cannot change it: in a commit, a model card, a mail, a C2SP witness. A cut tail
    or a rewritten history shows only against a head that somebody kept (ledger verify --expect-head).

    Examples:
      dpbudget ledger head budget.ledger
      dpbudget ledger head budget.ledger --output head.txt
    """
    from dpbudget.ledger.ledger import Ledger

    with Ledger.open(path) as ledger:
        head, witness = ledger.head, ledger.witness_key
    if output is not None:
        write_new(output, head.note.encode("utf-8"))
    if as_json:
        out.emit_json(
            {"head": str(head), "size": head.size, "root": head.root, "note": head.note, "writer_key": witness}
        )
        return
    out.emit_table([("head", head), ("size", head.size), ("root", head.root), ("verifier key", witness)])
    if output is None:
        click.echo()
        click.echo(head.note, nl=False)
