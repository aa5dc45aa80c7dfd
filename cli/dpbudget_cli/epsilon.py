"""``dpbudget epsilon``: the epsilon of a schedule at a delta."""

from __future__ import annotations

from typing import Any

import click

from dpbudget.curve import round_down, round_up
from dpbudget_cli import _output as out
from dpbudget_cli._options import DELTA, JSON, meaning_options, mechanism_options, question_options
from dpbudget_cli.main import Leaf


@click.command("epsilon", cls=Leaf)
@mechanism_options
@click.option("--delta", type=DELTA, metavar="D", required=True, help="Delta, such as 1e-5 or 1/60000.")
@question_options
@meaning_options
@JSON
def command(as_json: bool, explain: bool, plot: str | None, **values: Any) -> None:
    """Certified bounds of epsilon for a schedule of Poisson-sampled Gaussian steps.

    The upper bound is the guarantee. Numbers may be written 1e-5 or 256/60000.

    Examples:
      dpbudget epsilon --sample-rate 256/60000 --noise-multiplier 1.1 --steps 14062 --delta 1e-5
      dpbudget epsilon --phase 0.01,1.0,500 --phase 0.02,1.5,500 --delta 1e-5 --accountant rdp
      dpbudget epsilon --dataset-size 60000 --batch-size 256 --epochs 10 --noise-multiplier 1.1 --delta 1e-5 --explain
    """
    from dpbudget._calibrate import epsilon_of
    from dpbudget._schedule import warn_of_delta
    from dpbudget_cli._question import ask_mechanism

    question = ask_mechanism(values)
    warn_of_delta(values["delta"], values["dataset_size"])
    bounds = epsilon_of(values["phases"], **question.pick("delta", "adjacency", "accountant"))
    shared = question.pick("delta", "accountant", "adjacency")
    answer = out.bounds_json(bounds)
    if plot is not None:
        from dpbudget.report.plots import figure_of_schedule, save_figure

        save_figure(figure_of_schedule(values["phases"], **shared), plot)
        out.talk(f"drawn into {plot}")
    if explain:
        from dpbudget_cli._meaning import meaning_json, meaning_of_schedule, talk_meaning

        meaning = meaning_of_schedule(values["phases"], bounds, **shared)
    if as_json:
        more = {"explain": meaning_json(meaning)} if explain else {}
        out.emit_json({"epsilon": answer, **shared, **more, "assumed": out.assumed_json(question.assumed)})
        return
    out.talk_assumed(question.assumed)
    out.emit_table(
        [
            ("epsilon", f"{round_up(bounds.upper)}  ({bounds.kind} upper bound)"),
            ("at least", round_down(bounds.lower)),
            *shared.items(),
        ]
    )
    if explain:
        talk_meaning(meaning)
