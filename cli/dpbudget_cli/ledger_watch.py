"""``dpbudget ledger watch``: steps and epsilon of every run, as they are charged."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from dpbudget.curve import round_up, show_delta
from dpbudget_cli import _output as out
from dpbudget_cli._options import JSON, POSITIVE
from dpbudget_cli._watching import LedgerView, changes
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from rich.table import Table


@click.command("watch", cls=Leaf)
@click.argument("path")
@click.option("--once", is_flag=True, help="Show how it stands, and end.")
@click.option("--seconds", type=POSITIVE, metavar="S", help="End after so many seconds.")
@click.option("--interval", type=POSITIVE, default=1.0, metavar="S", help="Seconds between two looks (1).")
@JSON
def command(path: str, once: bool, seconds: float | None, interval: float, as_json: bool) -> None:
    """Watch the ledger PATH: steps charged, epsilon so far and steps left of every run, as records arrive.

    It only reads, from a copy, needs no key, and checks every record that it shows. Epsilon so far is what the charged
    steps would claim if stopping there had been planned. It ends when every plan is used up, or with Ctrl-C. On a
    terminal it is a table that changes; else a line for each change, and with --json one object a line.

    Examples:
      dpbudget ledger watch budget.ledger --once
      dpbudget ledger watch budget.ledger --seconds 1 --json
    """
    view = LedgerView(path)
    looks = changes(view, interval, 0.0 if once else seconds)
    if as_json:
        for _ in looks:
            out.emit_json({"head": view.head, **view.budget(), "runs": [row.to_json() for row in view.rows()]})
    elif sys.stdout.isatty() and not once:
        _live(view, looks)
    else:
        _lines(view, looks)


def _lines(view: LedgerView, looks: Iterator[None]) -> None:
    """A line for every run that changed; all of them at first."""
    shown: dict[str, str] = {}
    for _ in looks:
        lines = {row.run.run_id: row.line() for row in view.rows()}
        if not shown:
            click.echo(_title(view))
        for run_id, line in lines.items():
            if shown.get(run_id) != line:
                click.echo(line)
        shown = lines or {"": ""}


def _live(view: LedgerView, looks: Iterator[None]) -> None:
    """A table that is drawn anew at every change."""
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), auto_refresh=False) as screen:
        for _ in looks:
            screen.update(_table(view), refresh=True)


def _table(view: LedgerView) -> Table:
    from rich.table import Table

    table = Table(title=_title(view), title_justify="left", box=None)
    for name in ("run", "charged", "left", "epsilon so far", "of", "delta"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in view.rows():
        claim = row.run.plan.claim
        table.add_row(
            row.run.run_id[:8],
            str(row.run.charged),
            str(row.left),
            "?" if row.epsilon is None else round_up(row.epsilon.upper, 4),
            round_up(claim.epsilon, 4),
            show_delta(claim.delta),
        )
    return table


def _title(view: LedgerView) -> str:
    """The budget of the whole ledger, and what of it portfolios that began have taken."""
    answer = view.budget()
    total = f"epsilon {answer['budget']['epsilon']:g}, delta {show_delta(answer['budget']['delta'])}"
    if answer["spent"] is None:
        return f"budget {total}; of an rdp ledger, dpbudget ledger show says what is left"
    return f"budget {total}: spent {round_up(answer['spent']['epsilon'], 6)}, left {_floor(answer['left']['epsilon'])}"


def _floor(value: float) -> str:
    from dpbudget.curve import round_down

    return round_down(value, 6)
