"""``dpbudget plan explore``: what batch size and length of training cost in noise, before anything is signed."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import InvalidParameter, NotComputable
from dpbudget_cli import _output as out
from dpbudget_cli._next import exact, following, sign
from dpbudget_cli._options import (
    ADJACENCY,
    BATCH,
    COUNT,
    DELTA,
    EPOCHS,
    EPSILON,
    JSON,
    MODE,
    NO_PRIVACY,
    SIZE,
    TwoNames,
)
from dpbudget_cli._progress import bar
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget._explore import Cell, Member, Sweep
    from dpbudget.plan import Plan
    from dpbudget_cli._question import Question

_SIGNAL = (
    "batch size / noise multiplier: the largest that the average of a step's clipped gradients can be, over the noise "
    "in its direction"
)
# Said once, for all sweeps.
_ONCE = ("assumed", "warnings")
_ESTIMATE = "an estimate, no guarantee"


@click.command("explore", cls=Leaf, elsewhere=NO_PRIVACY)
@click.option("--epsilon", type=EPSILON, multiple=True, metavar="E", help="What it may claim; repeat. 1, 3 and 8.")
@click.option("--delta", type=DELTA, metavar="D", help="Delta; 1 / dataset-size^1.1 if not given.")
@click.option(*SIZE, cls=TwoNames, type=COUNT, metavar="N", help="Public nominal size of the dataset.")
@click.option("--max-batch", type=COUNT, metavar="B", help="The largest batch that is of use.")
@click.option("--max-epochs", type=EPOCHS, metavar="K", help="The longest training that is of use; 100.")
@click.option("--min-steps", type=COUNT, metavar="T", help="Steps that the model needs at least; 500.")
@click.option(*BATCH, "batch_sizes", cls=TwoNames, type=COUNT, multiple=True, metavar="B", help="This batch; repeat.")
@click.option("--epochs", "lengths", type=EPOCHS, multiple=True, metavar="K", help="This length; repeat.")
@click.option("--points", type=COUNT, metavar="P", help="P batch sizes and P lengths; 20, for several epsilons 12.")
@click.option("--adjacency", type=ADJACENCY, help="add-remove (default), zero-out or replace-one.")
@click.option("--max-parameters", type=COUNT, metavar="D", help="Most trainable parameters.")
@MODE
@click.option("--plot", metavar="FILE", help="Draw the sweep into a .png, .svg or .pdf file.")
@JSON
def command(plot: str | None, as_json: bool, **values: Any) -> None:
    """Sweep batch size, epochs and epsilon, find the noise of each, and name what is worth its compute.

    A row is on the efficient frontier if no other with --min-steps steps has more signal to noise per step for as
    little compute. The noise of the sweep is an estimate. The row with the least compute for 90 % of the highest
    signal is certified, and the command that signs it is printed. The number of steps is a matter of the model: take
    what it needs without privacy.

    Examples:
      dpbudget plan explore --dataset-size 60000
      dpbudget plan explore --epsilon 3 --dataset-size 60000 --max-batch 4096
      dpbudget plan explore --epsilon 1 --epsilon 8 --dataset-size 60000 --max-epochs 40 --plot sweep.svg
      dpbudget plan explore --epsilon 3 --dataset-size 1437 --batch-size 64 --batch-size 512 --epochs 80 --min-steps 100
    """
    question = _ask(values)
    sweeps = _sweep(question)
    chosen = [_certify(question, sweep) for sweep in sweeps]
    if plot is not None:
        from dpbudget.report.sweeps import SweepPicture, save_sweeps

        save_sweeps(SweepPicture(sweeps, values["min_steps"]), plot)
        out.talk(f"drawn into {plot}")
    if as_json:
        _emit(question, sweeps, chosen)
        return
    out.talk_assumed(question.assumed)
    out.talk(f"signal/noise is {_SIGNAL}")
    out.talk("records is batch size x steps, the compute; signal and compute are compared with the row above")
    out.talk("Delta and adjacency of a signed plan are its ledger's; if they differ from these, so does the noise.")
    for sweep, (members, best, plan) in zip(sweeps, chosen, strict=True):
        _show(question, sweep, members, best, plan)
    if len(sweeps) > 1:
        _show_together(sweeps, chosen)


def _ask(values: dict[str, Any]) -> Question:
    """The question with everything that was not said."""
    from dpbudget._explore import EPSILONS, FEWER_POINTS, MAX_EPOCHS, MIN_STEPS, POINTS
    from dpbudget_cli._question import Question, ask_delta

    question = Question(values)
    question.need("delta", "dataset_size", "adjacency", "max_parameters", "noise")
    if not question.has("delta"):
        ask_delta(question)
    if not values["epsilon"]:
        question.note("epsilon", EPSILONS, "documented default; pass --epsilon for another")
    if not question.has("points"):
        values["points"] = POINTS if len(set(values["epsilon"])) == 1 else FEWER_POINTS
    if not values["lengths"] and not question.has("max_epochs"):
        question.note("max_epochs", MAX_EPOCHS, "documented default")
    if not question.has("min_steps"):
        question.note("min_steps", MIN_STEPS, "documented default")
    if not values["batch_sizes"] and not question.has("max_batch"):
        size, longest = values["dataset_size"], max(values["lengths"], default=values["max_epochs"])
        most = max(int(Fraction(longest) * size / values["min_steps"]), 1)
        why = "the whole dataset" if most >= size else "larger ones have too few steps"
        question.note("max_batch", min(most, size), why)
    return question


def _sweep(question: Question) -> tuple[Sweep, ...]:
    from dpbudget._explore import MOST_CELLS, explore

    values = question.values
    facts = question.pick("dataset_size", "delta", "max_batch", "max_epochs", "points", "adjacency")
    facts |= question.pick("noise", "max_parameters", "min_steps")
    targets = tuple(dict.fromkeys(values["epsilon"]))
    size = (len(set(values["batch_sizes"])) or values["points"]) * (len(set(values["lengths"])) or values["points"])
    cells = size * len(targets)
    if cells > MOST_CELLS:
        raise InvalidParameter(
            f"{size} cells for each of {len(targets)} targets are more than {MOST_CELLS}",
            hint="pass fewer --points, or fewer values of --epsilon, --batch-size and --epochs",
        )
    with bar(cells, "cells") as advance:
        return tuple(
            explore(
                epsilon=target,
                batch_sizes=values["batch_sizes"] or None,
                epochs=values["lengths"] or None,
                progress=lambda: advance("cells"),
                **facts,
            )
            for target in targets
        )


def _certify(question: Question, sweep: Sweep) -> tuple[tuple[Member, ...], Member, Plan]:
    """The frontier, the member of it that is enough, and the certified plan of that member."""
    min_steps = question.values["min_steps"]
    most = max(cell.steps for cell in sweep.cells)
    if most < min_steps:
        raise InvalidParameter(
            f"no cell of the sweep has {min_steps} steps; the most is {most}",
            hint=f"pass --min-steps {most} or less, smaller batches or more epochs",
        )
    best = sweep.chosen(min_steps)
    if best is None:
        # Where no estimate was found the certified search says why.
        _plan(question, sweep, next(cell for cell in sweep.cells if cell.steps >= min_steps))
        raise NotComputable(
            f"no noise was found for epsilon {sweep.epsilon:g} in any cell of the sweep",
            hint="pass larger batches, or a larger epsilon or delta",
        )
    return sweep.frontier(min_steps), best, _plan(question, sweep, best.cell)


def _plan(question: Question, sweep: Sweep, cell: Cell) -> Plan:
    from dpbudget._calibrate import calibrate

    facts = question.pick("dataset_size", "delta", "adjacency", "max_parameters", "noise")
    return calibrate(epsilon=sweep.epsilon, batch_size=cell.batch_size, epochs=cell.epochs, **facts)


def _why(member: Member, members: tuple[Member, ...], best: Member, *, in_full: bool) -> str:
    """Why a cell is on the frontier, in a few words."""
    from dpbudget._explore import ENOUGH

    words = []
    if member == best:
        words.append(f"chosen, least compute with {ENOUGH:.0%} of the highest signal" if in_full else "chosen")
    elif member == members[0]:
        words.append("least compute")
    elif member == members[-1]:
        words.append("highest signal")
    if member.more_signal is not None and member.more_records is not None:
        words.append(f"{member.more_signal:+.0%} signal for {member.more_records:+.0%} compute")
    return "; ".join(words)


def _words(sweep: Sweep, cell: Cell) -> tuple[str, str]:
    """Target and shape of the chosen plan, as options of plan new."""
    shape = f"--dataset-size {sweep.dataset_size} --batch-size {cell.batch_size} --epochs {exact(cell.epochs)}"
    return f"--epsilon {exact(Fraction(repr(sweep.epsilon)))}", shape


def _show(question: Question, sweep: Sweep, members: tuple[Member, ...], best: Member, plan: Plan) -> None:
    from dpbudget._explore import ENOUGH

    shape = f"{len(sweep.batch_sizes)} batch sizes x {len(sweep.epochs)} lengths"
    click.secho(f"epsilon {sweep.epsilon:g} at delta {show_delta(sweep.delta)}: {shape}, noise estimated", bold=True)
    out.emit_columns(
        ("batch", "epochs", "steps", "noise", "signal/noise", "records", "why"),
        [(*_row(member.cell), _why(member, members, best, in_full=False)) for member in members],
    )
    cell, phase = best.cell, plan.phases[0]
    click.echo("")
    out.emit_table(
        [
            ("chosen", f"least compute with {ENOUGH:.0%} of the highest signal"),
            ("noise multiplier", f"{phase.noise_multiplier:.10g}  (certified)"),
            ("epsilon", f"{round_up(plan.claim.epsilon)}  (certified claim)"),
            ("delta", show_delta(plan.claim.delta)),
            ("batch size", cell.batch_size),
            ("steps", plan.steps),
            ("adjacency", plan.adjacency),
            *following(question, plan, *_words(sweep, cell), sweep.epsilon),
        ]
    )


def _show_together(sweeps: tuple[Sweep, ...], chosen: list[tuple[tuple[Member, ...], Member, Plan]]) -> None:
    """What each epsilon would buy."""
    click.echo("")
    click.secho("the chosen row of every epsilon, its noise certified", bold=True)
    rows = []
    for sweep, (_, best, plan) in zip(sweeps, chosen, strict=True):
        batch, epochs, steps, _, signal, records = _row(best.cell)
        noise = f"{plan.phases[0].noise_multiplier:.4g}"
        rows.append((f"{sweep.epsilon:g}", batch, epochs, steps, noise, signal, records))
    out.emit_columns(("epsilon", "batch", "epochs", "steps", "noise", "signal/noise", "records"), rows)


def _row(cell: Cell) -> tuple[object, ...]:
    noise = "" if cell.noise_multiplier is None else f"~{cell.noise_multiplier:.3g}"
    signal = f"{cell.signal:.0f}" if cell.signal >= 100.0 else f"{cell.signal:.3g}"
    return cell.batch_size, exact(cell.epochs), cell.steps, noise, signal, cell.records


def _emit(question: Question, sweeps: tuple[Sweep, ...], chosen: list[tuple[tuple[Member, ...], Member, Plan]]) -> None:
    from dpbudget._schedule import delta_warning
    from dpbudget_cli.calibrate import describe

    answers = []
    for sweep, (members, best, plan) in zip(sweeps, chosen, strict=True):
        answers.append(
            {
                "epsilon": sweep.epsilon,
                "kind": sweep.kind,
                "cells": [_cell_json(cell) for cell in sweep.cells],
                "frontier": [_cell_json(m.cell) | {"why": _why(m, members, best, in_full=True)} for m in members],
                "chosen": _cell_json(best.cell),
                "plan": {name: fact for name, fact in describe(plan, question, []).items() if name not in _ONCE},
                "next": sign(question, plan, *_words(sweep, best.cell)),
            }
        )
    warning = delta_warning(sweeps[0].delta, sweeps[0].dataset_size)
    out.emit_json(
        {
            "dataset_size": sweeps[0].dataset_size,
            "delta": sweeps[0].delta,
            "min_steps": question.values["min_steps"],
            "signal": _SIGNAL,
            "noise_multiplier_of_cells": _ESTIMATE,
            "sweeps": answers,
            "assumed": out.assumed_json(question.assumed),
            "warnings": [warning] if warning else [],
        }
    )


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {
        "batch_size": cell.batch_size,
        "epochs": float(cell.epochs),
        "steps": cell.steps,
        "noise_multiplier": cell.noise_multiplier,
        "signal": cell.signal,
        "records": cell.records,
    }
