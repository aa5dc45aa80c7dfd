"""``dpbudget plan show``: the plans of a ledger."""

from __future__ import annotations

from dataclasses import replace

import click

from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._options import JSON
from dpbudget_cli.main import Leaf


@click.command("show", cls=Leaf)
@click.option("--ledger", "path", required=True, metavar="PATH", help="The ledger.")
@click.argument("run", required=False)
@JSON
def command(path: str, run: str | None, as_json: bool) -> None:
    """Show the plan of RUN, or all plans of a ledger. The start of a run id is enough.

    Examples:
      dpbudget plan show --ledger budget.ledger
      dpbudget plan show --ledger budget.ledger --json
    """
    from dpbudget.ledger.ledger import Ledger
    from dpbudget_cli.ledger_show import runs_json, show_runs

    with Ledger.open(path) as ledger:
        state = ledger.state
    if run is not None:
        found = find_run(tuple(state.runs), run)
        state = replace(state, runs={found: state.runs[found]})
    if as_json:
        out.emit_json({"ledger": state.genesis.ledger_id, "runs": runs_json(state)})
    else:
        show_runs(state)


def find_run(run_ids: tuple[str, ...], text: str) -> str:
    """The run id that begins with ``text``; raises InvalidParameter (DP081) unless exactly one does."""
    found = [run_id for run_id in run_ids if text and run_id.startswith(text)]
    if len(found) == 1:
        return found[0]
    raise InvalidParameter(
        f"{len(found) or 'no'} runs of this ledger begin with {text[:40]!r}",
        code="DP081",
        hint=f"the runs are {', '.join(run_ids)}" if run_ids else "sign a plan in first: dpbudget plan new",
    )
