"""``dpbudget epsilon``: the epsilon of a schedule at a delta."""

from __future__ import annotations

from typing import Any

import click

from dpbudget.curve import round_down, round_up
from dpbudget_cli import _output as out
from dpbudget_cli._options import DELTA, JSON, accounting_options, mechanism_options
from dpbudget_cli.main import Leaf


@click.command("epsilon", cls=Leaf)
@mechanism_options
@click.option("--delta", type=DELTA, metavar="D", required=True, help="Delta, such as 1e-5 or 1/60000.")
@accounting_options
@JSON
def command(as_json: bool, **values: Any) -> None:
    """Certified bounds of epsilon for a schedule of Poisson-sampled Gaussian steps.

    The upper bound is the guarantee. Numbers may be written 1e-5 or 256/60000.

    Examples:
      dpbudget epsilon --sample-rate 256/60000 --noise-multiplier 1.1 --steps 14062 --delta 1e-5
      dpbudget epsilon --phase 0.01,1.0,500 --phase 0.02,1.5,500 --delta 1e-5 --accountant rdp
    """
    from dpbudget._calibrate import epsilon_of
    from dpbudget_cli._question import ask_mechanism

    question = ask_mechanism(values)
    bounds = epsilon_of(values["phases"], **question.pick("delta", "adjacency", "accountant"))
    shared = question.pick("delta", "accountant", "adjacency")
    answer = out.bounds_json(bounds)
    if as_json:
        out.emit_json({"epsilon": answer, **shared, "assumed": out.assumed_json(question.assumed)})
        return
    out.talk_assumed(question.assumed)
    out.emit_table(
        [
            ("epsilon", f"{round_up(bounds.upper)}  ({bounds.kind} upper bound)"),
            ("at least", round_down(bounds.lower)),
            *shared.items(),
        ]
    )
