"""``--explain``: what stands behind a number, what it means for an attacker, and what it does not cover."""

from __future__ import annotations

import math
import shutil
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dpbudget.curve import round_down, round_up, show_delta
from dpbudget_cli import _output as out

if TYPE_CHECKING:
    from dpbudget.curve import Bounds, PrivacyCurve
    from dpbudget.plan import Plan

_ADJACENCY = {
    "add-remove": "Two datasets are neighbours if one has one record more than the other.",
    "zero-out": "Two datasets are neighbours if one record of one of them is replaced by nothing; the size is public.",
    "replace-one": "Two datasets are neighbours if one record differs.",
}
_NOT_COVERED = (
    "anything that is tuned, selected or measured on the same data outside this schedule",
    "several records of one person: the guarantee is for one record",
    "batches that are shuffled instead of drawn independently with the stated rate",
    "what an attacker learns about a person from the population as a whole",
)
_TAIL = "the bounded tail of a noise generator (the claim of a plan covers it)"


@dataclass(frozen=True)
class Meaning:
    """The facts of ``--explain``, as numbers.

    Attributes:
        epsilon, delta: the answer that is explained.
        curve: the profile that it comes from.
        rdp: upper bound of epsilon by the Renyi accountant; infinite where it has none.
        with_tail: whether the noise's bounded tail is part of the answer.
    """

    epsilon: Bounds
    delta: float
    adjacency: str
    accountant: str
    curve: PrivacyCurve
    rdp: float
    with_tail: bool

    def attack(self) -> dict[str, Bounds]:
        """What an attacker may gain; the upper ends are the guarantee."""
        return {
            "advantage": self.curve.advantage(),
            "tpr_at_fpr_0.01": self.curve.tpr_at(0.01),
            "bayes_success_at_prior_0.5": self.curve.bayes_risk(0.5),
        }

    def looser(self) -> float:
        """By how many percent the Renyi upper bound exceeds this one."""
        return 100.0 * (self.rdp / self.epsilon.upper - 1.0) if self.epsilon.upper > 0.0 else math.nan

    def not_covered(self) -> list[str]:
        """What the number does not promise."""
        return [*_NOT_COVERED, *([] if self.with_tail else [_TAIL])]


def meaning_of_schedule(phases: Any, epsilon: Bounds, delta: float, adjacency: str, accountant: str) -> Meaning:
    """The facts about a schedule of phases, in real arithmetic."""
    from dpbudget._calibrate import make_phases
    from dpbudget.accountants import get_accountant
    from dpbudget.mechanisms import Adjacency

    charges = [phase.charge for phase in make_phases(phases)]
    curve = get_accountant(accountant).curve(charges, Adjacency(adjacency))
    rdp = get_accountant("rdp").curve(charges, Adjacency(adjacency)).epsilon(delta).upper
    return Meaning(epsilon, delta, adjacency, accountant, curve, rdp, with_tail=False)


def meaning_of_plan(plan: Plan) -> Meaning:
    """The facts about a plan, the bounded tail of its noise included."""
    from dpbudget._calibrate import bounds_of
    from dpbudget._targets import curve_of
    from dpbudget.accountants import get_accountant

    delta, ideal = plan.claim.delta, plan.ideal_delta(plan.claim.delta)
    rdp = get_accountant("rdp").curve(plan.charges, plan.adjacency).epsilon(ideal).upper
    shown = plan.claim.accountant
    return Meaning(bounds_of(plan), delta, str(plan.adjacency), shown, curve_of(plan), rdp, with_tail=True)


def meaning_json(meaning: Meaning) -> dict[str, Any]:
    """The value of the key ``explain``."""
    return {
        "adjacency": meaning.adjacency,
        "sampling": "poisson",
        "accountant": meaning.accountant,
        "kind": meaning.epsilon.kind,
        "rdp_epsilon": meaning.rdp,
        "rdp_looser_percent": meaning.looser(),
        **{name: out.bounds_json(bounds) for name, bounds in meaning.attack().items()},
        "noise_tail_covered": meaning.with_tail,
        "not_covered": meaning.not_covered(),
    }


def talk_meaning(meaning: Meaning) -> None:
    """Print the facts in plain words, wrapped at the width of the terminal."""
    width = min(max(shutil.get_terminal_size((88, 24)).columns, 40), 100)
    click.echo("")
    for line in _paragraphs(meaning):
        hang = "  " if line.startswith("- ") else ""
        click.echo(textwrap.fill(line, width, subsequent_indent=hang, break_long_words=False))


def _paragraphs(meaning: Meaning) -> list[str]:
    bounds, attack = meaning.epsilon, meaning.attack()
    certified = "Every error term of it is bounded." if bounds.kind == "certified" else "Some constant is an estimate."
    lines = [
        f"Behind the number: {_ADJACENCY[meaning.adjacency]} Every record enters every batch independently (Poisson "
        f"sampling). The accountant {meaning.accountant} proves epsilon {round_up(bounds.upper)} at delta "
        f"{show_delta(meaning.delta)}: {bounds.kind}. {certified}"
        + (f" Nothing below {round_down(bounds.lower)} is true for its worst case." if bounds.lower > 0.0 else "")
    ]
    if meaning.accountant != "rdp" and math.isfinite(meaning.looser()):
        lines.append(
            f"The Renyi accountant would have stated {round_up(meaning.rdp)}, {meaning.looser():.1f} % more, for the "
            "same mechanism."
        )
    lines += [
        "",
        "For an attacker who knows everything but whether one record was used:",
        f"- true positive rate minus false positive rate is at most {round_up(attack['advantage'].upper, 4)};",
        f"- at 1 % false positives at most {round_up(100 * attack['tpr_at_fpr_0.01'].upper, 4)} % true positives;",
        f"- a guess that is right with 50 % without the output is right with at most "
        f"{round_up(100 * attack['bayes_success_at_prior_0.5'].upper, 4)} %.",
        "",
        "Not covered:",
    ]
    return lines + [f"- {item};" for item in meaning.not_covered()[:-1]] + [f"- {meaning.not_covered()[-1]}."]
