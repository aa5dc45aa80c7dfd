"""``dpbudget ledger plans`` and ``dpbudget ledger runs``: what was signed, and what became of it."""

from __future__ import annotations

import click

from dpbudget_cli import _output as out
from dpbudget_cli._options import JSON
from dpbudget_cli.ledger_show import runs_json, show_runs
from dpbudget_cli.main import Leaf


@click.command("plans", cls=Leaf)
@click.argument("path")
@JSON
def plans(path: str, as_json: bool) -> None:
    """List the signed plans of the ledger PATH, after checking every record.

    Examples:
      dpbudget ledger plans budget.ledger
      dpbudget ledger plans budget.ledger --json
    """
    from dpbudget.ledger.ledger import Ledger

    with Ledger.open(path) as ledger:
        state = ledger.state
    if as_json:
        out.emit_json({"ledger": state.genesis.ledger_id, "plans": runs_json(state)})
    else:
        show_runs(state)


@click.command("runs", cls=Leaf)
@click.argument("path")
@JSON
def runs(path: str, as_json: bool) -> None:
    """List the runs of the ledger PATH: steps charged, steps known to be released, steps left, kind of noise keys.

    A charged step that was never reserved may have been released all the same: it counts.

    Examples:
      dpbudget ledger runs budget.ledger
      dpbudget ledger runs budget.ledger --json
    """
    from dpbudget.ledger.ledger import Ledger

    with Ledger.open(path) as ledger:
        state = ledger.state
    rows = [
        (run.run_id, run.plan.steps, run.charged, run.reserved, run.plan.steps - run.charged, len(run.leases), run.keys)
        for run in state.runs.values()
    ]
    names = ("run", "planned", "charged", "released", "left", "open_leases", "noise_keys")
    if as_json:
        out.emit_json({"ledger": state.genesis.ledger_id, "runs": [dict(zip(names, row, strict=True)) for row in rows]})
    elif rows:
        out.emit_columns([name.replace("_", " ") for name in names], rows)
    else:
        out.talk("no plan is signed in yet: dpbudget plan new")
