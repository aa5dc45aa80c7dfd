"""``dpbudget calibrate``: the smallest noise, or the most steps, for a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dpbudget.curve import round_up, show_delta
from dpbudget_cli import _output as out
from dpbudget_cli._options import CLIP, DELTA, EPSILON, JSON, NOISE, accounting_options, schedule_options
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.plan import Plan
    from dpbudget_cli._question import Question


@click.command("calibrate", cls=Leaf)
@click.option("--epsilon", type=EPSILON, metavar="E", required=True, help="What the run may claim.")
@click.option("--delta", type=DELTA, metavar="D", help="Delta; 1 / dataset-size^1.1 if not given.")
@schedule_options
@click.option("--noise-multiplier", type=NOISE, metavar="S", help="Solve for the steps at this noise instead.")
@click.option("--clip-norm", type=CLIP, metavar="C", help="L2 bound of each record's gradient.")
@accounting_options
@JSON
def command(as_json: bool, **values: Any) -> None:
    """The smallest noise multiplier whose certified claim is at most epsilon.

    With --noise-multiplier it solves for the largest number of steps instead. The claim covers the bounded tail of the
    secure noise. What is not given comes from [tool.dpbudget] in pyproject.toml or dpbudget.toml, else from documented
    defaults, and is reported as assumed. The dataset size is a public, nominal one.

    Examples:
      dpbudget calibrate --epsilon 3
      dpbudget calibrate --epsilon 3 --dataset-size 60000 --batch-size 256 --epochs 10
      dpbudget calibrate --epsilon 3 --delta 1e-5 --sample-rate 256/60000 --noise-multiplier 1.1
    """
    from dpbudget._schedule import delta_warning
    from dpbudget_cli._question import Question, ask_schedule

    question = Question(values)
    ask_schedule(question, solve_steps=values["noise_multiplier"] is not None)
    question.need("clip_norm", "max_parameters")
    plan = _solve(question)
    warning = delta_warning(plan.claim.delta, plan.nominal_size)
    if as_json:
        out.emit_json(describe(plan, question, [warning] if warning else []))
        return
    out.talk_assumed(question.assumed)
    if warning:
        out.talk(f"warning {warning}")
    phase = plan.phases[0]
    out.emit_table(
        [
            ("noise multiplier", f"{phase.noise_multiplier:.10g}"),
            ("epsilon", f"{round_up(plan.claim.epsilon)}  (certified claim)"),
            ("delta", show_delta(plan.claim.delta)),
            ("sampling rate", f"{phase.rate:.10g}"),
            ("steps", plan.steps),
            ("clip norm", f"{plan.clip_norm:g}"),
            ("accountant", plan.claim.accountant),
            ("adjacency", plan.adjacency),
        ]
    )


def _solve(question: Question) -> Plan:
    from dpbudget._calibrate import calibrate, max_steps, plan_for
    from dpbudget.errors import NotComputable

    rate = question.pick("delta", "sample_rate", "dataset_size", "batch_size")
    shared = question.pick("adjacency", "accountant", "max_parameters")
    if not question.has("noise_multiplier"):
        length = question.pick("epsilon", "steps", "epochs", "clip_norm")
        return calibrate(**rate, **length, **shared)
    noise = question.values["noise_multiplier"]
    steps = max_steps(epsilon=question.values["epsilon"], noise_multiplier=noise, **rate, **shared)
    if steps == 0:
        raise NotComputable(
            f"not even one step fits epsilon {question.values['epsilon']:g} at noise multiplier {noise:g}",
            code="DP004",
            hint="pass a larger noise multiplier, epsilon or delta",
        )
    return plan_for(noise_multiplier=noise, steps=steps, **rate, **question.pick("clip_norm"), **shared)


def describe(plan: Plan, question: Question, warnings: list[str]) -> dict[str, Any]:
    """The JSON form of a calibrated plan; epsilon's upper end is the claim."""
    from dpbudget._calibrate import bounds_of

    phase = plan.phases[0]
    return {
        "noise_multiplier": phase.noise_multiplier,
        "epsilon": out.bounds_json(bounds_of(plan)),
        "delta": plan.claim.delta,
        "sample_rate": phase.rate,
        "steps": plan.steps,
        "clip_norm": plan.clip_norm,
        "dataset_size": plan.nominal_size,
        "accountant": plan.claim.accountant,
        "adjacency": str(plan.adjacency),
        "assumed": out.assumed_json(question.assumed),
        "warnings": warnings,
    }
