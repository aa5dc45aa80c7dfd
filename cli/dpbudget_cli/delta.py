"""``dpbudget delta``: the delta of a schedule at an epsilon."""

from __future__ import annotations

from typing import Any

import click

from dpbudget.curve import round_down, round_up
from dpbudget_cli import _output as out
from dpbudget_cli._options import EPSILON, JSON, mechanism_options, question_options
from dpbudget_cli.main import Leaf


@click.command("delta", cls=Leaf)
@mechanism_options
@click.option("--epsilon", type=EPSILON, metavar="E", required=True, help="Epsilon, such as 3.")
@question_options
@JSON
def command(as_json: bool, **values: Any) -> None:
    """Certified bounds of delta for a schedule of Poisson-sampled Gaussian steps.

    The upper bound is the guarantee. Numbers may be written 1e-5 or 256/60000.

    Examples:
      dpbudget delta --sample-rate 256/60000 --noise-multiplier 1.1 --steps 14062 --epsilon 3
      dpbudget delta --phase 0.01,1.0,500 --phase 0.02,1.5,500 --epsilon 2 --accountant rdp
    """
    from dpbudget._calibrate import delta_of
    from dpbudget_cli._question import ask_mechanism

    question = ask_mechanism(values)
    bounds = delta_of(values["phases"], **question.pick("epsilon", "adjacency", "accountant"))
    shared = question.pick("epsilon", "accountant", "adjacency")
    answer = out.bounds_json(bounds)
    if as_json:
        out.emit_json({"delta": answer, **shared, "assumed": out.assumed_json(question.assumed)})
        return
    out.talk_assumed(question.assumed)
    out.emit_table(
        [
            ("delta", f"{round_up(bounds.upper)}  ({bounds.kind} upper bound)"),
            ("at least", round_down(bounds.lower)),
            *shared.items(),
        ]
    )
