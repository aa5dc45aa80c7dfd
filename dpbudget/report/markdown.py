"""The report as Markdown: what the page says, for a model card or a merge request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dpbudget.curve import round_down, round_up
from dpbudget.report.document import Document, RunPart
from dpbudget.report.figures import TABLED
from dpbudget.report.page import commands
from dpbudget.report.words import ASSUMPTIONS, NOISE, NOT_COVERED, percent, small, span

#: Runs and notes that are told one by one.
_MOST = 200
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")


def markdown(document: Document) -> str:
    """The whole report; text that comes from the ledger is escaped and makes no markup."""
    return "\n".join([*_head(document), *_numbers(document), *_plans(document), *_limits(), *_verification(document)])


def plain(text: str) -> str:
    """Text inside a line, in which no character means anything to Markdown or HTML."""
    return _SPECIAL.sub(r"\\\1", text.replace("\n", " "))


def _head(document: Document) -> Iterator[str]:
    yield f"# Privacy budget report of {plain(document.name)}\n"
    trust = "" if document.trusted else "; the owner's key was not known from outside"
    yield f"**{document.verdict.capitalize()}{trust}.**\n"
    for paragraph in document.statement:
        subject, _, text = paragraph.partition(": ")
        yield f"- **{subject}.** {plain(text[:1].upper() + text[1:])}"
    yield ""


def _numbers(document: Document) -> Iterator[str]:
    if document.budget is not None:
        spent = "unknown" if document.epsilon is None else round_up(document.epsilon.upper)
        yield "## Budget\n"
        yield (
            f"Epsilon {spent} of {document.budget.epsilon:.6g} is spent, at delta {small(document.delta or 0.0)} of "
            f"{small(document.budget.delta)}, by {document.steps:,} steps.\n"
        )
    attack = document.attack
    if attack is None:
        return
    of = {"planned": ", once the plans have run", "pair": ", by the total that was granted"}.get(document.scope, "")
    yield f"## What an attacker gains{of}\n"
    rows = [
        ("used records found, 1 % of the others accused", percent(attack.tpr_at_1_percent_fpr.upper)),
        ("used records found, 0.1 % of the others accused", percent(attack.tpr_at_1_permille_fpr.upper)),
        ("right guesses from even odds", percent(attack.right_guess_from_even_odds.upper)),
        ("advantage, TPR - FPR", round_up(attack.advantage.upper, 3)),
    ]
    yield from _table(("attack", "at most"), rows)
    trade = [(p.false_positives, p.false_negatives) for p in document.trade_off if p.false_positives in TABLED]
    if trade:
        told = [(f"{100 * a:.4g} %", percent(1.0 - b), f"{round_down(100.0 * b, 3)} %") for a, b in trade]
        yield from _table(("accused wrongly", "found, at most", "missed, at least"), told)
    points = document.profile[:: max(1, len(document.profile) // 8)]
    if points:
        yield from _table(
            ("epsilon", "delta at most"), [(f"{point.epsilon:.4g}", small(point.upper)) for point in points]
        )


def _plans(document: Document) -> Iterator[str]:
    if not document.runs:
        return
    yield "## Plans\n"
    names = ("run", "steps", "of", "q", "sigma", "C", "epsilon, alone", "delta", "accountant", "noise")
    yield from _table(names, [_row(run) for run in document.runs[:_MOST]])
    if len(document.runs) > _MOST:
        yield f"and {len(document.runs) - _MOST} more.\n"
    for mode in sorted({run.plan.noise for run in document.runs}):
        yield f"Noise: {plain(NOISE[mode])}.\n"


def _row(run: RunPart) -> Sequence[str]:
    plan, claim = run.plan, run.plan.claim
    return (
        f"`{run.run}`",
        f"{run.charged:,}",
        f"{run.planned:,}",
        span(phase.sample_rate for phase in plan.phases),
        span(phase.noise_multiplier for phase in plan.phases),
        f"{plan.clip_norm:.6g}",
        round_up(claim.epsilon),
        small(claim.delta),
        f"{claim.accountant} {claim.accountant_version}",
        plan.noise,
    )


def _limits() -> Iterator[str]:
    for title, pairs in (("Assumed", ASSUMPTIONS), ("Not covered", NOT_COVERED)):
        yield f"## {title}\n"
        yield from (f"- **{name}:** {text}" for name, text in pairs)
        yield ""


def _verification(document: Document) -> Iterator[str]:
    yield "## Verification\n"
    yield from (f"- Problem: {plain(text)}" for text in document.problems[:_MOST])
    yield from (f"- Note: {plain(text)}" for text in document.warnings[:_MOST])
    yield ""
    facts = (("Head", document.head), ("Ledger", document.ledger), ("Owner", document.owner))
    yield from (f"- {name}: `{value}`" for name, value in facts if value)
    yield ""
    for text, command in commands(document, "report.json"):
        told = text.replace("from this file alone", "from its JSON form alone")
        # An indented block: whatever a name holds cannot end it.
        yield f"{plain(told)}\n\n    {' '.join(command.split())}\n"
    names = ", ".join(f"{name} {version}" for name, version in document.accountants.items())
    yield plain(f"Made by dpbudget {document.dpbudget} (accountants {names}).") + "\n"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headers)} |"
    yield f"|{'---|' * len(headers)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
