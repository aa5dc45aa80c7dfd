"""``dpbudget compare``: one schedule, counted by every accountant and by the conventions of other tools."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from dpbudget.curve import round_down, round_up, show_delta
from dpbudget_cli import _output as out
from dpbudget_cli._options import ADJACENCY, COUNT, DELTA, JSON, mechanism_options
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget._compare import Comparison, Row


@click.command("compare", cls=Leaf)
@mechanism_options
@click.option("--delta", type=DELTA, metavar="D", help="Delta; 1 / dataset-size^1.1 if not given.")
@click.option("--adjacency", type=ADJACENCY, help="add-remove (default), zero-out or replace-one.")
@click.option("--group", type=COUNT, metavar="K", help="Also for K records together.")
@JSON
def command(as_json: bool, **values: Any) -> None:
    """The epsilon of one schedule by every accountant, by the conventions of other tools, and for other samplings.

    Each row says what it is worth: certified, upper bound (a proved formula in another tool's floating point) or not a
    bound, and which question it answers. No other tool is needed: their conventions are computed here. In real
    arithmetic; the claim of a plan also covers the bounded tail of its noise.

    Examples:
      dpbudget compare --dataset-size 60000 --batch-size 256 --epochs 10 --noise-multiplier 1.1 --delta 1e-5
      dpbudget compare --sample-rate 0.01 --noise-multiplier 1 --steps 500 --delta 1e-5 --group 4
    """
    from dpbudget._compare import compare
    from dpbudget._schedule import warn_of_delta
    from dpbudget_cli._question import ask_delta, ask_mechanism

    accountant = values.setdefault("accountant", "prv")  # all of them are asked
    question = ask_mechanism(values)
    question.need("delta")
    if not question.has("delta"):
        question.require("dataset_size", "pass --delta D, or --dataset-size N, from which delta follows")
        ask_delta(question)
    warn_of_delta(values["delta"], values["dataset_size"])
    loader = None
    if all(map(question.has, ("dataset_size", "batch_size", "epochs"))):
        loader = (values["dataset_size"], values["batch_size"], values["epochs"])
    shared = question.pick("delta", "adjacency")
    found = compare(values["phases"], group=values["group"], loader=loader, **shared)
    if as_json:
        epsilon = out.bounds_json(found.certified)
        rows = [_row_json(row, found) for row in found.rows]
        assumed = out.assumed_json(question.assumed)
        out.emit_json({"epsilon": epsilon, **shared, "accountant": accountant, "rows": rows, "assumed": assumed})
        return
    out.talk_assumed(question.assumed)
    title = f"epsilon at delta {show_delta(values['delta'])}, {values['adjacency']}"
    click.secho(f"{title}: at least {round_down(found.certified.lower)} is spent", bold=True)
    out.emit_columns(("way", "epsilon", "to prv", "worth", "what"), [_cells(row, found) for row in found.rows])


def _cells(row: Row, found: Comparison) -> tuple[object, ...]:
    shown = f"{row.epsilon:.6g}" if row.standing == "not a bound" else round_up(row.epsilon)
    beside = _ratio(row, found)
    ratio = "" if beside is None else f"{beside:.3f}"
    what = row.note if row.question == "same" else f"{row.question}: {row.note}"
    return row.name, shown if math.isfinite(row.epsilon) else "", ratio, row.standing, what


def _ratio(row: Row, found: Comparison) -> float | None:
    """The row's epsilon over the certified one; None where either is no number to divide."""
    upper = found.certified.upper
    return row.epsilon / upper if upper > 0.0 and math.isfinite(row.epsilon) else None


def _row_json(row: Row, found: Comparison) -> dict[str, Any]:
    return {
        "name": row.name,
        "epsilon": row.epsilon,
        "ratio": _ratio(row, found),
        "standing": row.standing,
        "question": row.question,
        "note": row.note,
    }
