"""``dpbudget ledger prove``: a run without the runs of others, or one head as the continuation of another."""

from __future__ import annotations

import click

from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._files import write_new
from dpbudget_cli._options import COUNT, JSON
from dpbudget_cli.main import Leaf


@click.command("prove", cls=Leaf)
@click.argument("path")
@click.argument("target", metavar="OUT")
@click.option("--run", metavar="RUN", help="Prove this run; the start of a run id is enough.")
@click.option("--details", is_flag=True, help="Show reserves and settles too, so that noise can be replayed.")
@click.option("--since", type=COUNT, metavar="SIZE", help="Prove that the head continues the one of SIZE records.")
@JSON
def command(path: str, target: str, run: str | None, details: bool, since: int | None, as_json: bool) -> None:
    """Write a proof out of the ledger PATH to the new file OUT. dpbudget verify OUT checks it without the ledger.

    A run proof shows plan and charges of one run under the signed head, and nothing of other runs.

    Examples:
      dpbudget ledger prove budget.ledger run.proof --run 3f9c
      dpbudget ledger prove budget.ledger longer.proof --since 2
    """
    from dpbudget.ledger.journal import CheckedReading
    from dpbudget.ledger.proof_file import make_consistency_proof, make_run_proof
    from dpbudget.ledger.store.base import Snapshot
    from dpbudget.ledger.store.locate import reading_at
    from dpbudget_cli.plan_show import find_run

    if (run is None) == (since is None) or (details and run is None):
        raise InvalidParameter(
            "a proof is of one run, or of one head as the continuation of another",
            code="DP064",
            hint="pass --run RUN, perhaps with --details, or --since SIZE",
        )
    with reading_at(path) as reading:
        checked = CheckedReading(reading, None)
        snapshot = Snapshot.of(checked)
    state, head = checked.conclusion()
    if run is not None:
        found = find_run(tuple(state.runs), run)
        data = make_run_proof(snapshot.entries, snapshot.note or b"", found, with_settles=details)
        facts: list[tuple[str, object]] = [("run", found)]
    else:
        data = make_consistency_proof(snapshot.entries, since or 0)
        facts = [("since", since)]
    write_new(target, data)
    facts += [("proof", target), ("head", head), ("bytes", len(data))]
    if as_json:
        out.emit_json({name: value if isinstance(value, int) else str(value) for name, value in facts})
    else:
        out.emit_table(facts)
