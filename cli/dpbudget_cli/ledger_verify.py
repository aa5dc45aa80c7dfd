"""``dpbudget ledger verify``: check every record and recompute every number."""

from __future__ import annotations

import click

from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._documents import Demands, other_document, read_anchors
from dpbudget_cli._options import JSON, POSITIVE
from dpbudget_cli.main import Leaf


@click.command("verify", cls=Leaf)
@click.argument("path")
@click.option("--trust", metavar="KEY", help="The owner's public key: a .pub file or 64 hexadecimal digits.")
@click.option(
    "--expect-head",
    multiple=True,
    metavar="HEAD",
    help="A head seen before, SIZE:ROOT or a checkpoint file, which must be part of this history. May be repeated.",
)
@click.option("--witness", multiple=True, metavar="VKEY", help="A witness that must have cosigned a checkpoint.")
@click.option("--all-heads", is_flag=True, help="Check every head that the store kept, not the newest alone.")
@click.option("--time-limit", type=POSITIVE, metavar="SECONDS", help="Give up after this; 6 without a trusted key.")
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    path: str,
    trust: str | None,
    expect_head: tuple[str, ...],
    witness: tuple[str, ...],
    all_heads: bool,
    time_limit: float | None,
    as_json: bool,
) -> None:
    """Replay every record of a ledger or an export and recompute its epsilon with two accountants.

    A run proof (ledger prove) is checked against the owner's key, a signed verdict (ledger attest) against the
    signer's, a consistency proof against two heads.
    Reads only. Exits with 0 if everything holds, 1 if something does not, 5 if it is valid but --expect-head is not
    part of it. Without --trust the owner's key is taken from the file, which proves nothing.

    Examples:
      dpbudget ledger verify budget.ledger
      dpbudget ledger verify budget.ledger --trust budget.ledger.owner.key.pub
    """
    from dpbudget._verify import verify
    from dpbudget.ledger.keys import load_public_key

    show = other_document(path)
    if show is not None:
        if all_heads:
            raise InvalidParameter(
                "--all-heads is about the heads that a ledger's store kept, and this document is no ledger",
                code="DP064",
                hint="leave --all-heads out, or verify the ledger itself",
            )
        show(path, Demands.of(trust, expect_head, witness, as_json))
        return
    heads, notes = read_anchors(expect_head)
    report = verify(
        path,
        trust=None if trust is None else load_public_key(trust),
        expect_head=heads,
        checkpoints=notes,
        witnesses=witness,
        all_heads=all_heads,
        time_limit=time_limit,
    )
    if as_json:
        out.emit_json(report.to_json())
    else:
        for line in report.summary().splitlines():
            click.echo(out.clean(line))
    ctx.exit(report.exit_code)
