"""``dpbudget ledger apply``: write what the owner signed elsewhere."""

from __future__ import annotations

import click

from dpbudget_cli import _output as out
from dpbudget_cli._keys import PASSPHRASE_FD
from dpbudget_cli._options import JSON
from dpbudget_cli._owner import open_for_writer
from dpbudget_cli.main import Leaf


@click.command("apply", cls=Leaf)
@click.argument("path")
@click.argument("signed", metavar="SIGNED")
@click.option("--writer-key", metavar="FILE", help="The writer's key; PATH.writer.key, else writer.key beside PATH.")
@PASSPHRASE_FD
@JSON
def command(path: str, signed: str, writer_key: str | None, passphrase_fd: int | None, as_json: bool) -> None:
    """Write SIGNED, which dpbudget key sign made from a request, into the ledger PATH, under all its rules.

    Requests come from dpbudget plan new --request FILE and from ledger grant and lower --request FILE.

    Examples:
      dpbudget ledger apply budget.ledger plan.signed
      dpbudget ledger apply budget.ledger plan.signed --json
    """
    from dpbudget.ledger.requests import MAX_REQUEST_BYTES
    from dpbudget.ledger.store.files import as_path, read_regular

    data = read_regular(as_path(signed), MAX_REQUEST_BYTES)
    with open_for_writer(path, writer_key, passphrase_fd) as ledger:
        run_id = ledger.apply_request(data)
        state, head = ledger.state, ledger.head
    if as_json:
        out.emit_json({"run": run_id, "epsilon": state.epsilon, "delta": state.delta, "head": str(head)})
        return
    rows: list[tuple[str, object]] = [("run", run_id)] if run_id else []
    out.emit_table([*rows, ("budget", f"epsilon {state.epsilon:g}, delta {state.delta:g}"), ("head", head)])
