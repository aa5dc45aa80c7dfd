"""``dpbudget report``: what a ledger guarantees, as one page for whoever owns the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._documents import read_anchors
from dpbudget_cli._files import write_anew, write_new
from dpbudget_cli._options import JSON, POSITIVE
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.report.document import Document

_STDOUT = "-"


def _html(document: Document) -> bytes:
    from dpbudget.report.page import page

    return page(document)


def _json(document: Document) -> bytes:
    from dpbudget.report.document import write

    return write(document)


def _markdown(document: Document) -> bytes:
    from dpbudget.report.markdown import markdown

    return markdown(document).encode("utf-8")


def _pdf(document: Document) -> bytes:
    from dpbudget.report.pdf import print_pdf

    return print_pdf(_html(document))


_FORMATS: dict[str, Callable[[Document], bytes]] = {"html": _html, "json": _json, "md": _markdown, "pdf": _pdf}


@click.command("report", cls=Leaf)
@click.argument("ledger")
@click.option("-o", "--output", metavar="OUT", help="Where to write; report.html by default, - for standard output.")
@click.option(
    "--format", "kind", type=click.Choice(list(_FORMATS)), help="html, md, json or pdf; else by the name of OUT."
)
@click.option("--trust", metavar="KEY", help="The owner's public key: a .pub file or 64 hexadecimal digits.")
@click.option(
    "--expect-head", multiple=True, metavar="HEAD", help="A head seen before, SIZE:ROOT or a checkpoint file."
)
@click.option("--replace", is_flag=True, help="Write over OUT where it exists.")
@click.option("--time-limit", type=POSITIVE, metavar="SECONDS", help="Give up after this; 6 without a trusted key.")
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    ledger: str,
    output: str | None,
    kind: str | None,
    trust: str | None,
    expect_head: tuple[str, ...],
    replace: bool,
    time_limit: float | None,
    as_json: bool,
) -> None:
    """Verify LEDGER and write its report: the claim in plain words, budget, attacks, plans, limits, how to repeat it.

    The page is one file that loads nothing, for screens, phones, paper and screen readers. Its numbers, as those of the
    JSON form, are computed again by the command verify. A PDF is printed by an installed Chromium. The ledger is only
    read. Exits as verify does; the report then says what does not hold.

    Examples:
      dpbudget report budget.ledger --trust budget.ledger.owner.key.pub
      dpbudget report budget.ledger -o report.json
      dpbudget report budget.ledger --format md -o -
    """
    from dpbudget.ledger.keys import load_public_key
    from dpbudget.report.make import make_report

    kind, output = _target(kind, output, as_json)
    heads, notes = read_anchors(expect_head)
    document = make_report(
        ledger,
        trust=None if trust is None else load_public_key(trust),
        expect_head=heads,
        checkpoints=notes,
        time_limit=time_limit,
    )
    data = _FORMATS[kind](document)
    if output == _STDOUT:
        click.echo(data, nl=False)
    else:
        if replace:
            write_anew(output, data)
        else:
            write_new(output, data, way_out="pass --replace to write over it, or -o OUT for another path")
        _tell(document, output, kind, len(data), as_json)
    ctx.exit({"valid": 0, "not valid": 1, "not anchored": 5}[document.verdict])


def _target(kind: str | None, output: str | None, as_json: bool) -> tuple[str, str]:
    """Format and place, each from the other where it is not given."""
    if output is None:
        kind = kind or "html"
        output = f"report.{kind}"
    if kind is None:
        kind = output.rpartition(".")[2].lower() if output != _STDOUT else "html"
    if kind not in _FORMATS:
        raise InvalidParameter(
            f"no format is known by the name {output!r}", code="DP060", hint="pass --format html, md, json or pdf"
        )
    if output == _STDOUT and as_json:
        raise InvalidParameter(
            "--json says what was written, and -o - writes to the same place",
            code="DP064",
            hint="pass --format json -o - for the report itself as JSON",
        )
    return kind, output


def _tell(document: Document, output: str, kind: str, size: int, as_json: bool) -> None:
    epsilon = document.epsilon
    facts = {"report": output, "format": kind, "bytes": size, "ok": document.ok, "head": document.head}
    if as_json:
        ends = epsilon and {"lower": epsilon.lower, "upper": epsilon.upper, "kind": epsilon.kind}
        out.emit_json({**facts, "epsilon": ends, "delta": document.delta, "problems": list(document.problems)})
        return
    spent = "no guarantee"
    if epsilon is not None and not document.steps:
        spent = "nothing yet"
    elif epsilon is not None:
        spent = f"epsilon <= {round_up(epsilon.upper, 10)} at delta {show_delta(document.delta or 0.0)}"
    rows = [("report", output), ("verdict", document.verdict), ("spent", spent), ("head", document.head or "none")]
    out.emit_table(rows)
    for problem in document.problems:
        out.talk(f"problem: {problem}")
