"""A report checked from its JSON alone: every plan is rebuilt, every number computed again and compared.

What this cannot show is that the ledger holds these plans and charges and no others: a document is what somebody wrote.
For that the ledger itself is verified, against the head that the report names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

from pydantic import BaseModel

from dpbudget._recompute import Clock, Recomputation, spent
from dpbudget._renyi import PhaseCost, RenyiTerms
from dpbudget.errors import DPBudgetError, Tampered
from dpbudget.ledger.renyi import RenyiAccount, uses_of
from dpbudget.ledger.state import Grant, LedgerState, Portfolio, RunState
from dpbudget.ledger.statement import plan_statement, statement_digest
from dpbudget.report.document import Document, RunPart
from dpbudget.report.figures import figures_of
from dpbudget.report.words import statement

#: How far a number may lie from the recomputed one: elementary functions differ between machines by far less, and a
#: digit that was changed within it is seen by the digest.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-12
#: By what an epsilon of the same charges may be smaller: a sum of claims is the same everywhere, and what an rdp ledger
#: spent is up to the last bits of a logarithm.
_LAST_DIGITS = 1e-13


def check_report(document: Document, clock: Clock) -> list[str]:
    """What does not hold, in words; empty when every number follows from the plans, charges and totals of the report.

    Raises:
        Tampered: a plan of the report is none (DP082).
    """
    if document.epsilon is None or document.delta is None:
        drawn = document.attack or document.profile or document.trade_off or document.spending
        return ["figures of a ledger that does not hold"] if drawn or document.ok else []
    state = rebuild(document)
    problems = [*_sums(document, state), *_statements(document, state)]
    if problems:
        return problems  # what is computed from inconsistent facts means nothing
    problems += Recomputation(state, clock).run().problems
    problems += _epsilon(document, state, clock)
    problems += _figures(document, state, clock)
    return problems


def rebuild(document: Document) -> LedgerState:
    """The part of a ledger's state from which its numbers follow.

    Raises:
        Tampered: a plan of the report is none, or parts that belong together are missing (DP082).
    """
    runs = {run.run: _run_state(run) for run in document.runs}
    grants = tuple(
        Grant(grant.record, grant.epsilon, grant.delta, grant.allowances, grant.charged_before)
        for grant in document.grants
    )
    if len(runs) != len(document.runs) or not grants:
        raise Tampered("the report names a run twice, or no totals", code="DP082")
    portfolios = tuple(Portfolio(p.index, p.delta, p.epsilon, p.claim, p.runs) for p in document.portfolios)
    if any(run not in runs for portfolio in portfolios for run in portfolio.runs):
        raise Tampered("a portfolio of the report has a run that the report does not have", code="DP082")
    account = _account(document, grants[-1], runs)
    return LedgerState(
        grants=grants,
        portfolios=portfolios,
        account=account,
        runs=runs,
        charged=sum(run.charged for run in runs.values()),
    )


def _run_state(run: RunPart) -> RunState:
    costs = None
    if run.costs is not None:
        costs = tuple(PhaseCost(cost.costs, cost.tail, cost.factor) for cost in run.costs)
    return RunState(run.run, run.plan.plan(), run.statement, run.portfolio, costs, run.charged, run.released)


def _account(document: Document, grant: Grant, runs: dict[str, RunState]) -> RenyiAccount | None:
    """What the orders of an rdp ledger have spent, by its charges."""
    if document.renyi is None:
        return None
    orders, shares, allowances = document.renyi.orders, document.renyi.shares, grant.allowances or ()
    widths = {len(cost.costs) for run in runs.values() for cost in run.costs or ()}
    if not len(orders) == len(shares) == len(allowances) or not widths <= {len(orders)} or not orders:
        raise Tampered("orders, shares, allowances and costs of the report are of different numbers", code="DP082")
    account = RenyiAccount.fresh(RenyiTerms(orders, shares, allowances), grant.delta)
    for run in runs.values():
        if len(run.costs or ()) != len(run.plan.phases):
            raise Tampered(f"run {run.run_id} has no costs for each of its phases", code="DP082")
        if 0 < run.charged <= run.plan.steps:
            account.charge(run.run_id, uses_of(run.plan, run.costs or (), 0, run.charged))
    return account


def _sums(document: Document, state: LedgerState) -> Iterator[str]:
    """What must agree before anything is computed."""
    last, portfolios = state.grants[-1], state.portfolios
    if document.budget is None or (document.budget.epsilon, document.budget.delta) != (last.epsilon, last.delta):
        yield "the budget is not what was granted last"
    if document.steps != state.charged:
        yield f"{document.steps} steps are stated, and the runs have {state.charged}"
    if (document.filter == "rdp") != (state.account is not None) or (document.filter == "rdp") == bool(portfolios):
        yield "the filter does not fit the parts of the report"
    for run in document.runs:
        if run.planned != run.plan.plan().steps or not run.released <= run.charged <= run.planned:
            yield f"run {run.run}: its steps do not fit its plan"
        if (run.plan.adjacency, run.plan.unit) != (document.adjacency, document.unit):
            yield f"run {run.run}: another adjacency or unit than the ledger's"
        if portfolios and [p.index for p in portfolios if run.run in p.runs] != [run.portfolio]:
            yield f"run {run.run} is not in its portfolio"
    for portfolio in portfolios:
        if portfolio.frozen != any(state.runs[run].charged for run in portfolio.runs):
            yield f"portfolio {portfolio.index}: a claim is made when its first step is charged"
        if portfolio.claim is not None and Fraction(portfolio.claim) > state.room_for(portfolio):
            yield f"portfolio {portfolio.index} claims more than its share"
    if portfolios and (state.remaining_epsilon < 0 or state.remaining_delta < 0):
        yield "the portfolios take more than the budget"
    yield from _history(document, state)
    if state.account is not None and document.renyi is not None:
        units = tuple(None if total is None else str(total) for total in state.account.spent)
        if units != document.renyi.spent:
            yield "what the Renyi orders have spent is not what the charges cost"


def _history(document: Document, state: LedgerState) -> Iterator[str]:
    charged: dict[str, int] = {}
    for event in document.history:
        for run, count in event.steps.items():
            charged[run] = charged.get(run, 0) + count
    if charged != {run.run_id: run.charged for run in state.runs.values() if run.charged}:
        yield "the history charges other steps than the runs have"


def _statements(document: Document, state: LedgerState) -> Iterator[str]:
    """Every plan is, byte for byte, the one whose digest stands in the ledger."""
    for run in state.runs.values():
        try:
            payload = plan_statement(run.plan, ledger_id=document.ledger or "", run_id=run.run_id, costs=run.costs)
        except (DPBudgetError, ValueError) as error:
            yield f"run {run.run_id}: its plan cannot be stated: {error}"
            continue
        if statement_digest(payload) != run.statement:
            yield f"run {run.run_id}: its plan is not the one that was signed"


def _epsilon(document: Document, state: LedgerState, clock: Clock) -> Iterator[str]:
    bounds, delta = spent(state, clock)
    stated = document.epsilon
    if stated is None:
        return
    below = stated.upper < bounds.upper * (1.0 - _LAST_DIGITS)  # however little: it is an upper bound
    if below or not _same(stated.upper, bounds.upper) or document.delta != delta:
        yield (
            f"epsilon {stated.upper:.12g} at delta {document.delta:g} is stated, and {bounds.upper:.12g} at {delta:g} "
            "follows from the plans and charges"
        )
    if not _same(stated.lower, bounds.lower) or stated.kind != bounds.kind:
        yield f"the lower bound {stated.lower:.12g} is stated, and {bounds.lower:.12g} follows"


def _figures(document: Document, state: LedgerState, clock: Clock) -> Iterator[str]:
    bounds, _ = spent(state, clock)
    figures = figures_of(state, bounds, document.history, clock)
    late = [name for name in figures.left_out if "not computed in" in name]
    if late:
        yield f"{late[0]}, so nothing of it is confirmed; give more time (--time-limit)"
        return
    parts: tuple[tuple[str, object, object], ...] = (
        ("what an attacker gains", document.attack, figures.attack),
        ("the privacy profile", document.profile, figures.profile),
        ("the trade-off curve", document.trade_off, figures.trade_off),
        ("the budget over time", document.spending, figures.spending),
    )
    left_out = [text.partition(":")[0] for text in document.left_out]
    for name, stated, own in parts:
        if not _alike(stated, own) and not (name in left_out and not stated):
            yield f"{name} does not follow from the plans"
    if document.scope != figures.scope:
        yield "the figures are of something else than is stated"
    yield from _words(document)


def _words(document: Document) -> Iterator[str]:
    said = statement(
        epsilon=document.epsilon,
        delta=document.delta,
        adjacency=document.adjacency,
        unit=document.unit,
        filter=document.filter,
        runs=document.runs,
        checked_by=document.checked_by,
        attack=document.attack,
        scope=document.scope,
    )
    from dpbudget.report.make import this_version

    if said != document.statement and document.dpbudget == this_version():
        yield "the claim in words does not say what the numbers say"


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def _alike(one: object, other: object) -> bool:
    """Whether two parts have the same shape, texts and counts, and floats that are close."""
    if isinstance(one, BaseModel) and isinstance(other, BaseModel):
        return type(one) is type(other) and _all_alike(vars(one).values(), vars(other).values())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and _all_alike(one, other)
    if isinstance(one, float) and isinstance(other, float):
        return _same(one, other)
    return one == other


def _all_alike(some: Iterable[object], others: Iterable[object]) -> bool:
    return all(_alike(one, other) for one, other in zip(some, others, strict=True))
