"""From a ledger to the document of its report: one reading, one verdict, every number once."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from typing import Any

from dpbudget._recompute import Clock
from dpbudget._renyi import PhaseCost
from dpbudget._verdict import Report
from dpbudget._verify import Examination, examine
from dpbudget.accountants import ACCOUNTANTS, get_accountant
from dpbudget.ledger.signing import PublicKey
from dpbudget.ledger.state import LedgerState
from dpbudget.ledger.store.locate import Location
from dpbudget.ledger.store.postgres_url import PostgresUrl, is_database
from dpbudget.report.document import (
    FORM,
    CostPart,
    Document,
    Ends,
    EventPart,
    GrantPart,
    Pair,
    PlanPart,
    PortfolioPart,
    RenyiPart,
    RunPart,
)
from dpbudget.report.figures import SECONDS, UNTRUSTED_SECONDS, Figures, figures_of
from dpbudget.report.history import History
from dpbudget.report.words import statement

_LONGEST_NAME, _FOREIGN = 120, "\N{REPLACEMENT CHARACTER}"


def make_report(
    location: Location,
    *,
    trust: PublicKey | None = None,
    expect_head: str | Sequence[str] | None = None,
    checkpoints: Sequence[bytes] = (),
    time_limit: float | None = None,
) -> Document:
    """Verify a ledger or an export, and tell all that its report says.

    Guarantee: the same ledger, key and anchors give the same document, unless a time limit ended its figures, which it
    says. The verdict and its numbers are those of :func:`dpbudget.verify`. Nothing is written.

    Args:
        location: a ledger file, an export, or ``postgresql://...#name``.
        trust: the owner's public key, got by another way than this file.
        expect_head: ``size:root`` of heads that were seen before.
        checkpoints: signed notes of heads that were kept.
        time_limit: seconds for the verification, and again for the figures; see :func:`dpbudget.verify`.

    Raises:
        Unreadable: missing or no ledger at all (DP070), or unsafe to read (DP083).
        InvalidParameter: an anchor of another form (DP082).
    """
    history = History()
    found = examine(location, trust, expect_head, checkpoints, time_limit=time_limit, see=history.see)
    seconds = time_limit or (SECONDS if found.report.trusted else UNTRUSTED_SECONDS)
    return document_of(found, history, name_of(location), Clock(seconds))


def document_of(found: Examination, history: History, name: str, clock: Clock) -> Document:
    """The document of a ledger that was examined."""
    report, state = found.report, found.state
    events = _events(history) if state is not None else ()
    figures = Figures() if state is None else figures_of(state, report.epsilon, events, clock)
    runs = () if state is None else _runs(state)
    told = verdict_parts(report)
    words = statement(
        epsilon=told["epsilon"],
        delta=report.delta,
        adjacency=told["adjacency"],
        unit=told["unit"],
        filter=told["filter"],
        runs=runs,
        checked_by=report.checked_by,
        attack=figures.attack,
        scope=figures.scope,
    )
    return Document(
        report=FORM,
        dpbudget=this_version(),
        accountants={name: get_accountant(name).version for name in sorted(ACCOUNTANTS)},
        name=name,
        **told,
        **_ledger_parts(state),
        statement=words,
        runs=runs,
        scope=figures.scope,
        attack=figures.attack,
        profile=figures.profile,
        trade_off=figures.trade_off,
        spending=figures.spending,
        history=events,
        unheard=history.unheard if state is not None else 0,
        left_out=tuple(figures.left_out),
    )


def verdict_parts(report: Report) -> dict[str, Any]:
    """The fields of a document that are the verdict's."""
    said = ("ok", "filter", "unit", "steps", "head", "trusted", "anchored", "anchors", "heads", "checked_by")
    return {
        **{name: getattr(report, name) for name in said},
        "verdict": {0: "valid", 1: "not valid", 5: "not anchored"}[report.exit_code],
        "problems": tuple(map(printable, report.problems)),
        "warnings": tuple(map(printable, report.warnings)),
        "epsilon": report.epsilon and Ends.of(report.epsilon),
        "delta": report.delta,
        "budget": report.budget and Pair(epsilon=report.budget[0], delta=report.budget[1]),
        "adjacency": report.adjacency and _adjacency(report.adjacency),
        "ledger": report.ledger_id,
    }


def name_of(location: Location) -> str:
    """The last part of a file's path, or the name after the # of a database: a report tells no hosts and no folders."""
    if is_database(location):
        return f"postgresql://...#{PostgresUrl.parse(str(location)).name}"
    name = os.path.basename(os.fspath(location).rstrip("/"))
    return printable(name or "ledger")[:_LONGEST_NAME]


def printable(text: str) -> str:
    """Text without control characters, marks of direction and halves of characters, which forge a line or a page."""
    return "".join(char if char == " " or unicodedata.category(char)[0] not in "CZ" else _FOREIGN for char in text)


def _adjacency(name: str) -> Any:
    from dpbudget.mechanisms import Adjacency

    return Adjacency(name)


def this_version() -> str:
    """The version of the package that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dpbudget")
    except PackageNotFoundError:
        return "unknown"


def _ledger_parts(state: LedgerState | None) -> dict[str, Any]:
    if state is None:
        absent = dict.fromkeys(("owner", "writer", "public_data", "renyi"))
        return {**absent, "records": 0, "portfolios": (), "grants": ()}
    return {
        "owner": state.owner.hex,
        "writer": state.writer.hex,
        "public_data": state.genesis.public_data,
        "records": state.size,
        "portfolios": tuple(
            PortfolioPart(index=p.index, delta=p.delta, epsilon=p.epsilon, claim=p.claim, runs=p.runs)
            for p in state.portfolios
        ),
        "grants": tuple(
            GrantPart(
                record=grant.seq,
                epsilon=grant.epsilon,
                delta=grant.delta,
                charged_before=grant.charged,
                allowances=grant.allowances,
            )
            for grant in state.grants
        ),
        "renyi": _renyi(state),
    }


def _renyi(state: LedgerState) -> RenyiPart | None:
    account = state.account
    if account is None:
        return None
    spent = tuple(None if units is None else str(units) for units in account.spent)
    return RenyiPart(orders=account.terms.orders, shares=account.terms.shares, spent=spent)


def _runs(state: LedgerState) -> tuple[RunPart, ...]:
    return tuple(
        RunPart(
            run=run.run_id,
            portfolio=run.portfolio,
            statement=run.statement,
            planned=run.plan.steps,
            charged=run.charged,
            released=run.reserved,
            plan=PlanPart.of(run.plan),
            costs=None if run.costs is None else tuple(map(_cost, run.costs)),
            commitment=run.commitment,
            entropy=run.entropy,
        )
        for run in state.runs.values()
    )


def _cost(cost: PhaseCost) -> CostPart:
    return CostPart(costs=cost.costs, tail=cost.tail, factor=cost.factor)


def _events(history: History) -> tuple[EventPart, ...]:
    single = [
        EventPart(first=event.record, last=event.record, kind=event.kind, about=event.about, steps={})
        for event in history.events
    ]
    spent = [
        EventPart(first=part.first, last=part.last, kind="steps", about="", steps=dict(sorted(part.steps.items())))
        for part in history.spending()
    ]
    return tuple(sorted([*single, *spent], key=lambda event: event.first))
