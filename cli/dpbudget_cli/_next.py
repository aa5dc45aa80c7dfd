"""The commands that follow from an answer about numbers: what grants the budget, and what signs the plan."""

from __future__ import annotations

import os
from fractions import Fraction
from typing import TYPE_CHECKING

from dpbudget.curve import round_up, show_delta

if TYPE_CHECKING:
    from dpbudget.plan import Plan
    from dpbudget_cli._question import Question

#: The ledger of every example.
LEDGER = "budget.ledger"


def following(question: Question, plan: Plan, target: str, shape: str, epsilon: float) -> list[tuple[str, str]]:
    """Rows of a table: ``first``, the command that makes the ledger where there is none here, and ``next``.

    Args:
        question: what was asked, with what was assumed.
        plan: the answer.
        target: options that state what the plan may claim, or its noise.
        shape: options that state dataset size, batch and length.
        epsilon: total of a ledger that holds this plan alone.
    """
    rows = [("next", sign(question, plan, target, shape))]
    if not os.path.lexists(LEDGER):
        grant = f"dpbudget ledger init {LEDGER} --epsilon {round_up(epsilon)} --delta {_delta(plan.claim.delta)}"
        adjacency = "" if plan.adjacency == "add-remove" else f" --adjacency {plan.adjacency}"
        rows.insert(0, ("first", f"{grant} --whole-budget{adjacency}"))
    return rows


def sign(question: Question, plan: Plan, target: str, shape: str) -> str:
    """The command that calibrates and signs the same plan, with the settings that differ from those of this folder."""
    words = [f"dpbudget plan new --ledger {LEDGER} {target} {shape}"]
    settings = question.settings
    for name in ("clip_norm", "max_parameters", "noise"):
        if not question.has(name):
            continue
        here, there = question.values[name], settings.assume(name)
        if there is None or here != there.value:
            words.append(f"--{name.replace('_', '-')} {here}")
    counts = settings.assume("accountant")
    if counts is not None and counts.value != plan.claim.accountant:
        words.append(f"--accountant {plan.claim.accountant}")
    return " ".join(words)


def exact(number: Fraction) -> str:
    """A number that reads back as the same one: 25, 2.7 or 1/3."""
    short = f"{float(number):.12g}"
    return short if Fraction(short) == number else str(number)


def _delta(delta: float) -> str:
    """Delta as it reads back: rounded where that loses nothing."""
    short = show_delta(delta)
    return short if float(short) == delta else repr(delta)
