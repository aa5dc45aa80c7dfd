"""The sections of the page, each made from the document alone."""

from __future__ import annotations

from collections.abc import Iterable

from dpbudget.curve import round_down, round_up
from dpbudget.mechanisms import Adjacency
from dpbudget.report.charts import profile_figure, spending_figure, table, trade_off_figure
from dpbudget.report.document import Document, EventPart, RunPart
from dpbudget.report.html import Child, Safe, join, tag
from dpbudget.report.svg import bar
from dpbudget.report.words import NOISE, percent, small, span

#: Rows that a page has room for; the JSON form has all.
MOST_RUNS, MOST_EVENTS, MOST_PHASES, MOST_NOTES = 200, 60, 20, 60
_LONGEST_NOTE = 2000
#: A longer table stands below its chart, not beside it.
_FEW_EVENTS = 10
_EVENTS = {
    "genesis": "Ledger made, budget granted",
    "budget": "Totals changed by the owner",
    "portfolio": "Portfolio {about} opened",
    "plan": "Plan of run {about} signed",
    "commit": "Noise of run {about} committed to a key",
    "entropy": "Auditor's entropy for run {about}",
    "rekey": "New key for the role of {about}",
    "note": "Noted: {about}",
}


def budget_section(document: Document) -> Safe:
    """What is spent, by run and in the order of events."""
    return section("budget", "Budget", _meter(document), _by_run(document), _over_time(document))


def attack_section(document: Document) -> Safe | None:
    """What an attacker gains, and the profile it follows from."""
    if document.attack is None and not document.left_out:
        return None
    parts: list[Child] = [_tiles(document)]
    if (figure := trade_off_figure(document)) is not None:
        parts += [tag("h3", "Trade-off curve"), tag("p", _TRADE_OFF), figure]
    if (figure := profile_figure(document)) is not None:
        parts += [tag("h3", "Privacy profile"), tag("p", _PROFILE), figure]
    parts += [tag("p", "Left out: ", text, class_="quiet") for text in document.left_out]
    said = _ATTACKER[document.scope] + (_REPLACED if document.adjacency is Adjacency.REPLACE_ONE else "")
    return section("attack", "What an attacker gains", tag("p", said), *parts)


_TRADE_OFF = (
    "An attack that accuses few people wrongly must miss most of those whose data were used. The line is the best that "
    "any attack can do, whatever it knows of all other records."
)
_PROFILE = (
    "One pair of epsilon and delta is a point on this line; the whole line holds. Delta is the part of the promise "
    "that epsilon alone does not keep."
)
_ATTACKER = {
    "spent": "The attacker knows the training code and every record but one, sees everything that was released, and "
    "guesses whether that record was used. No computing power helps beyond these numbers.",
    "planned": "Nothing was released yet. These are the numbers once the signed plans have run: the attacker knows "
    "every record but one, sees everything released, and guesses whether that record was used.",
    "pair": "Steps or plans of this ledger may have been chosen after the outputs of others, so what was spent is "
    "itself an outcome. An attack is bounded by the total that was granted in advance, and these are its numbers.",
    "none": "",
}


_REPLACED = (
    " Neighbours differ by a replacement here: the attacker guesses which of two records was used, and below, read "
    "“used” as the one and “others” as the other."
)


def _tiles(document: Document) -> Safe | None:
    attack = document.attack
    if attack is None:
        return None
    tiles = (
        (
            percent(attack.tpr_at_1_percent_fpr.upper),
            "of the used records are found at most, by an attack that wrongly accuses 1 in 100 of the others",
        ),
        (
            percent(attack.tpr_at_1_permille_fpr.upper),
            "are found at most by one that wrongly accuses 1 in 1,000",
        ),
        (
            percent(attack.right_guess_from_even_odds.upper),
            "of guesses are right at most, where a coin is right for 50 %",
        ),
        (
            round_up(attack.advantage.upper, 3),
            "is the largest advantage: true positive rate minus false positive rate",
        ),
    )
    return tag("ul", *(tag("li", tag("b", number), tag("span", text)) for number, text in tiles), class_="tiles")


def plans_section(document: Document) -> Safe | None:
    """Every signed plan with every number that decides its privacy."""
    if not document.runs:
        return None
    shown = document.runs[:MOST_RUNS]
    more = len(document.runs) - len(shown)
    return section(
        "plans",
        "Plans",
        tag("p", "Each was signed by the owner before it ran. The ledger allows exactly these steps, once."),
        *(_plan(run) for run in shown),
        tag("p", f"{more} more plans are in the JSON form of this report and in the ledger.") if more else None,
    )


def _plan(run: RunPart) -> Safe:
    plan, claim = run.plan, run.plan.claim
    size = plan.dataset_size
    rates = [phase.sample_rate for phase in plan.phases]
    rows: list[tuple[str, Child]] = [
        ("Epsilon, alone", f"at most {round_up(claim.epsilon)} at delta {small(claim.delta)}"),
        ("Accountant", f"{claim.accountant}, version {claim.accountant_version}"),
        ("Steps T", f"{run.charged:,} of {run.planned:,} charged"),
        ("Sampling", "every record in every step" if set(rates) == {1.0} else f"{plan.sampling}, independent"),
        ("Sampling rate q", span(rates)),
        ("Expected batch", "–" if size is None else span(rate * size for rate in rates)),
        ("Noise multiplier sigma", span(phase.noise_multiplier for phase in plan.phases)),
        ("Clipping norm C", f"{plan.clip_norm:.6g}"),
        ("Public nominal size", "–" if size is None else f"{size:,}"),
        ("Unit and neighbours", f"one {plan.unit}, {plan.adjacency}"),
        ("Most parameters", f"{plan.max_parameters:,}"),
        ("Receipts issued", f"{run.released:,}"),
        ("Noise keys", "fresh, a new one in every lease" if run.commitment is None else "committed before the run"),
    ]
    wide: list[tuple[str, Child]] = [
        ("Noise", NOISE[plan.noise]),
        ("Signed statement, SHA-256", tag("span", run.statement, class_="hash")),
    ]
    digests = (
        ("Model, SHA-256", plan.model_digest),
        ("Training code, SHA-256", plan.code_digest),
        ("Noise committed to", run.commitment),
        ("Auditor's entropy", run.entropy),
    )
    wide += [(name, tag("span", digest, class_="hash")) for name, digest in digests if digest]
    facts = [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows]
    facts += [tag("div", tag("dt", name), tag("dd", value), class_="wide") for name, value in wide]
    title = tag("h3", "Run ", tag("span", run.run, class_="hash"))
    return tag("article", title, tag("dl", *facts, class_="facts"), _phases(run), class_="plan", id=f"run-{run.run}")


def _phases(run: RunPart) -> Safe | None:
    phases = run.plan.phases
    if len(phases) == 1:
        return None
    rows = [
        (str(i + 1), f"{phase.sample_rate:.6g}", f"{phase.noise_multiplier:.6g}", f"{phase.steps:,}")
        for i, phase in enumerate(phases[:MOST_PHASES])
    ]
    more = len(phases) - len(rows)
    shown = table(f"Phases of run {run.run[:8]}", ("phase", "rate q", "sigma", "steps"), rows)
    return join(shown, tag("p", f"{more} more phases are in the JSON form.") if more else None)


def _meter(document: Document) -> Safe | None:
    if document.budget is None:
        return None
    spent = document.epsilon.upper if document.epsilon else 0.0
    total = document.budget.epsilon
    text = f"{round_up(spent)} of {total:.6g} spent" if document.epsilon else f"{total:.6g} granted"
    granted = small(document.budget.delta)
    taken = small(document.delta or 0.0) if document.steps else "none"
    left = f"delta {taken} of {granted}"
    charged = f"{document.steps:,} steps charged"
    return tag(
        "div",
        bar(spent / total, f"epsilon: {text}"),
        tag("p", tag("span", "epsilon ", tag("b", text)), tag("span", left), tag("span", charged)),
        class_="meter",
    )


def _by_run(document: Document) -> Safe | None:
    if not document.runs:
        return tag("p", "No plan is signed in yet.")
    deltas = {run.plan.claim.delta for run in document.runs}
    several, apart = len(document.portfolios) > 1, len(deltas) > 1
    headers = ["run", *(["portfolio"] if several else []), "steps charged", "of", "progress", "epsilon, alone"]
    headers += ["delta"] if apart else []
    rows: list[list[Child]] = []
    for run in document.runs[:MOST_RUNS]:
        share = run.charged / run.planned
        rows.append(
            [
                tag("a", tag("span", run.run[:8], class_="hash"), href=f"#run-{run.run}"),
                *([str(run.portfolio)] if several else []),
                f"{run.charged:,}",
                f"{run.planned:,}",
                bar(share, f"{100 * share:.0f} % of the plan"),
                round_up(run.plan.claim.epsilon),
                *([small(run.plan.claim.delta)] if apart else []),
            ]
        )
    together = "" if apart else f"Epsilon is at delta {small(deltas.pop())}. "
    together += (
        "A run is charged whole once it begins, and together runs cost less than the sum of what each would alone."
        if document.filter == "portfolio"
        else "Every step is charged by itself; what a plan does not use stays in the budget."
    )
    shown = table("By run", headers, rows, named=True)
    return join(tag("h3", "By run"), shown, tag("p", together, class_="quiet"))


def _over_time(document: Document) -> Safe | None:
    if not document.history:
        return None
    rows = _history_rows(document)
    shown, gap = rows, 0
    if len(rows) > MOST_EVENTS:
        half = MOST_EVENTS // 2
        shown, gap = [*rows[:half], *rows[-half:]], len(rows) - 2 * half
    events = table("Events in order", ("records", "what happened", "epsilon spent"), shown, numbers=False)
    said = [f"{gap} events in between are left out here"] if gap else []
    said += [f"{document.unheard} later single events are not listed"] if document.unheard else []
    return join(
        tag("h3", "Over time"),
        tag("p", "A ledger holds no times: the order of its records is its time."),
        tag("div", spending_figure(document), events, class_="pair" if len(shown) <= _FEW_EVENTS else None),
        tag("p", f"{'; '.join(said)}. The JSON form has more.", class_="quiet") if said else None,
    )


def _history_rows(document: Document) -> list[tuple[Child, ...]]:
    known = {point.steps: point.spent for point in document.spending}
    totals = {grant.record: grant for grant in document.grants}
    rows: list[tuple[Child, ...]] = []
    steps = 0
    for event in document.history:
        where = str(event.first) if event.first == event.last else f"{event.first} to {event.last}"
        steps += sum(event.steps.values())
        spent = known.get(steps)
        text: Child = _happened(event)
        if event.first in totals and event.kind in ("genesis", "budget"):
            grant = totals[event.first]
            text = f"{text}: epsilon {grant.epsilon:.6g}, delta {small(grant.delta)}"
        rows.append((where, text, "–" if spent is None else "0" if spent == 0.0 else round_up(spent)))
    return rows


def _happened(event: EventPart) -> str:
    if event.steps:
        runs = [f"{count:,} of run {run[:8]}" for run, count in event.steps.items()]
        more = f" and {len(runs) - 6} more runs" if len(runs) > 6 else ""
        return f"Steps charged: {', '.join(runs[:6])}{more}"
    about = event.about[:8] if event.kind in ("plan", "commit", "entropy") else event.about
    return _EVENTS.get(event.kind, event.kind).format(about=about)


def section(name: str, title: str, *children: Child) -> Safe:
    """A section with its heading, which names it."""
    return tag("section", tag("h2", title, id=f"{name}-heading"), *children, id=name, aria_labelledby=f"{name}-heading")


def verdict_lists(document: Document) -> Iterable[Safe]:
    """Problems and notes, as far as there is room."""
    for title, texts in (("Problems", document.problems), ("Notes", document.warnings)):
        if texts:
            more = len(texts) - MOST_NOTES
            items = [tag("li", text[:_LONGEST_NOTE]) for text in texts[:MOST_NOTES]]
            items += [tag("li", f"{more} more: dpbudget verify lists them")] if more > 0 else []
            yield tag("h3", title)
            yield tag("ul", *items, class_="list")


def lower_end(document: Document) -> str:
    """The lower bound as the headline says it."""
    return "" if document.epsilon is None else round_down(document.epsilon.lower, 4)
