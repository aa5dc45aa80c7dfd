"""``dpbudget calibrate``: the one unknown among noise, length, batch, dataset size and epsilon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dpbudget.curve import round_up, show_delta
from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._next import following
from dpbudget_cli._options import (
    ADVANTAGE,
    CLIP,
    DELTA,
    EPSILON,
    INSIDE,
    JSON,
    MODE,
    NO_PRIVACY,
    NOISE,
    accounting_options,
    meaning_options,
    schedule_options,
)
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.plan import Plan
    from dpbudget_cli._question import Question


#: What may be unknown, as --json names it.
_SOLVED = {
    "noise": "noise_multiplier",
    "steps": "steps",
    "batch": "batch_size",
    "size": "dataset_size",
    "epsilon": "epsilon",
}


@click.command("calibrate", cls=Leaf, elsewhere=NO_PRIVACY)
@click.option("--epsilon", type=EPSILON, metavar="E", help="What the run may claim.")
@ADVANTAGE
@click.option("--tpr", type=INSIDE, metavar="R", help="Instead of epsilon: largest TPR of an attack at --fpr.")
@click.option("--fpr", type=INSIDE, metavar="F", help="The false positive rate of --tpr.")
@click.option("--delta", type=DELTA, metavar="D", help="Delta; 1 / dataset-size^1.1 if not given.")
@schedule_options
@click.option("--noise-multiplier", type=NOISE, metavar="S", help="Solve for another unknown at this noise.")
@click.option("--clip-norm", type=CLIP, metavar="C", help="L2 bound of each record's gradient.")
@MODE
@accounting_options
@meaning_options
@JSON
def command(as_json: bool, explain: bool, plot: str | None, **values: Any) -> None:
    """The smallest noise multiplier whose certified claim is at most epsilon, or another unknown.

    --epsilon with --noise-multiplier asks for the most steps; with --steps or --epochs too, for the largest batch; with
    --batch-size too, for the smallest dataset. --noise-multiplier alone asks for epsilon. --advantage, or --tpr with
    --fpr, takes the place of --epsilon: no membership attack does better. The claim covers the bounded tail of secure
    noise. What is not given comes from the settings or documented defaults, and is reported as assumed.

    Examples:
      dpbudget calibrate --epsilon 3
      dpbudget calibrate --epsilon 3 --delta 1e-5 --sample-rate 256/60000 --noise-multiplier 1.1
      dpbudget calibrate --epsilon 3 --noise-multiplier 1.1 --epochs 10 --batch-size 256
      dpbudget calibrate --noise-multiplier 1.1 --dataset-size 60000
      dpbudget calibrate --advantage 0.1 --explain
      dpbudget calibrate --tpr 0.05 --fpr 0.01
    """
    from dpbudget._schedule import delta_warning
    from dpbudget_cli._question import Question, ask_schedule

    question = Question(values)
    solving = _unknown(question)
    ask_schedule(question, solve_steps=solving == "steps", solve_batch=solving == "batch", solve_size=solving == "size")
    question.need("clip_norm", "max_parameters", "noise")
    plan = _solve(question, solving)
    if plot is not None:
        from dpbudget.report.plots import figure_of_plan, save_figure

        save_figure(figure_of_plan(plan), plot)
        out.talk(f"drawn into {plot}")
    if explain:
        from dpbudget_cli._meaning import meaning_json, meaning_of_plan, talk_meaning

        meaning = meaning_of_plan(plan)
    if as_json:
        more = {"explain": meaning_json(meaning)} if explain else {}
        warning = delta_warning(plan.claim.delta, plan.nominal_size)
        answer = describe(plan, question, [warning] if warning else [])
        out.emit_json({**answer, "solved_for": _SOLVED[solving], **more})
        return
    out.talk_assumed(question.assumed)
    phase = plan.phases[0]
    out.emit_table(
        [
            ("solved for", _SOLVED[solving].replace("_", " ")),
            ("noise multiplier", f"{phase.noise_multiplier:.10g}"),
            ("epsilon", f"{round_up(plan.claim.epsilon)}  (certified claim)"),
            ("delta", show_delta(plan.claim.delta)),
            ("sampling rate", f"{phase.rate:.10g}"),
            *([("batch size", round(phase.rate * plan.nominal_size))] if plan.nominal_size else []),
            *([("dataset size", plan.nominal_size)] if solving == "size" else []),
            ("steps", plan.steps),
            ("epochs", f"{plan.steps * phase.rate:.4g}"),
            ("clip norm", f"{plan.clip_norm:g}"),
            ("noise", plan.noise),
            ("accountant", plan.claim.accountant),
            ("adjacency", plan.adjacency),
            *_following(question, plan),
        ]
    )
    if explain:
        talk_meaning(meaning)


def _following(question: Question, plan: Plan) -> list[tuple[str, str]]:
    """What to type next; nothing without a dataset size, which a signed plan needs."""
    if plan.nominal_size is None:
        return []
    phase, values = plan.phases[0], question.values
    if not question.has("noise_multiplier") and question.has("epsilon"):
        target, total = f"--epsilon {values['epsilon']!r}", values["epsilon"]
    else:
        target, total = f"--noise-multiplier {phase.noise_multiplier!r}", plan.claim.epsilon
    if question.has("sample_rate"):
        batch = f"--sample-rate {values['sample_rate']!r}"
    else:
        batch = f"--batch-size {round(phase.rate * plan.nominal_size)}"
    shape = f"--dataset-size {plan.nominal_size} {batch} --steps {plan.steps}"
    return following(question, plan, target, shape, total)


def _unknown(question: Question) -> str:
    """What is solved for, a key of :data:`_SOLVED`; raises InvalidParameter (DP064) for a muddled target."""
    attack = [name for name in ("advantage", "tpr", "fpr") if question.has(name)]
    noise = question.has("noise_multiplier")
    if noise and not attack and not question.has("epsilon"):
        return "epsilon"
    if attack not in ([], ["advantage"], ["tpr", "fpr"]) or bool(attack) == question.has("epsilon"):
        raise _muddled_target([*attack, *(["epsilon"] if question.has("epsilon") else [])])
    if not noise:
        return "noise"
    if attack:
        raise InvalidParameter(
            "an attack is a target for the noise, and --noise-multiplier states it already",
            code="DP064",
            hint="leave --noise-multiplier out, or ask dpbudget epsilon --explain",
        )
    length, batch = (any(map(question.has, names)) for names in (("steps", "epochs"), ("batch_size", "sample_rate")))
    if length and question.has("batch_size") and not question.has("dataset_size"):
        return "size"
    return "batch" if length and not batch else "steps"


def _muddled_target(given: list[str]) -> InvalidParameter:
    """Why the options that were given are not one target (DP064)."""
    names = " and ".join(f"--{name}" for name in sorted(given))
    if not given:
        said, hint = (
            "no target is given",
            "pass --epsilon E: What the run may claim. Or --advantage A, or --tpr with --fpr",
        )
    elif len(given) == 1:
        said, hint = f"{names} alone is no target", "pass --tpr R and --fpr F together: true positives at false ones"
    else:
        said, hint = f"{names} are more than one target", "keep one of --epsilon, --advantage, or --tpr with --fpr"
    return InvalidParameter(said, code="DP064", hint=hint)


def _solve(question: Question, solving: str) -> Plan:
    from dpbudget._calibrate import calibrate, max_steps, plan_for
    from dpbudget._targets import max_batch_size, min_dataset_size
    from dpbudget_cli._question import ask_delta

    shared = question.pick("adjacency", "accountant", "max_parameters", "noise")
    rate = question.pick("delta", "sample_rate", "dataset_size", "batch_size")
    length = question.pick("steps", "epochs")
    if solving == "noise":
        target = question.pick("epsilon", "advantage", "tpr", "fpr", "clip_norm")
        return calibrate(**rate, **length, **target, **shared)
    given = question.pick("epsilon", "noise_multiplier")
    found: dict[str, Any] = length
    if solving == "steps":
        found = {"steps": _some(max_steps(**given, **rate, **shared), "one step", question)}
    elif solving == "batch":
        size = max_batch_size(**given, **length, **rate, **shared)
        found = {**length, "batch_size": _some(size, "one record a batch", question)}
    elif solving == "size":
        size = min_dataset_size(**given, **length, **rate, **shared)
        found = {**length, "dataset_size": _some(size, "the largest dataset", question)}
        question.values["dataset_size"] = size
        if not question.has("delta"):
            ask_delta(question)
    noise = question.pick("noise_multiplier", "clip_norm")
    return plan_for(**noise, **found, **rate, **shared)


def _some(count: int, what: str, question: Question) -> int:
    """The count; raises NotComputable (DP004) where nothing fits."""
    from dpbudget.errors import NotComputable

    if count == 0:
        raise NotComputable(
            f"not even {what} fits epsilon {question.values['epsilon']:g} at noise multiplier "
            f"{question.values['noise_multiplier']:g}",
            code="DP004",
            hint="pass a larger noise multiplier, epsilon or delta",
        )
    return count


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
        "noise": plan.noise,
        "dataset_size": plan.nominal_size,
        "accountant": plan.claim.accountant,
        "adjacency": str(plan.adjacency),
        "assumed": out.assumed_json(question.assumed),
        "warnings": warnings,
    }
