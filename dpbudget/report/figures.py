"""The numbers behind the figures of a report, computed from plans and charges alone.

Everything follows from a :class:`LedgerState`, whether it was replayed from a ledger or rebuilt from the JSON of a
report, so that both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeVar

from dpbudget._pause import interruptible, pause
from dpbudget._recompute import Clock, OutOfTime, sum_up
from dpbudget._targets import joint_curve_of
from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.errors import DPBudgetError
from dpbudget.filters import PortfolioFilter
from dpbudget.filters.ledger_renyi import spent_epsilon
from dpbudget.ledger.renyi import RenyiAccount, uses_of
from dpbudget.ledger.state import LedgerState, Portfolio
from dpbudget.plan import Plan
from dpbudget.report.document import AttackPart, Ends, EventPart, ProfilePart, SpentPart, TradePart
from dpbudget.report.lines import PairCurve, Remembered, epsilon_grid, least_false_negatives

#: ``spent``: the profile of everything charged; ``planned``: of plans that did not begin; ``pair``: all that one pair
#: (epsilon, delta) says, that of the totals, where plans may be chosen one after the other; ``none``: nothing to draw.
Scope = Literal["spent", "planned", "pair", "none"]
#: Points of the profile, thresholds of the trade-off, and places where spending is looked at.
PROFILE_POINTS, THRESHOLDS, SPENDING_POINTS = 41, 41, 48
#: Seconds for all figures of a ledger, of one whose owner is trusted and of any other; what is not done by then is left
#: out, and said.
SECONDS, UNTRUSTED_SECONDS = 60.0, 20.0
#: A composition of fewer steps has a rugged law, which costs seconds to invert.
_FEW_STEPS = 10
#: False positive rates of the trade-off: dense near 0, where few are accused.
FALSE_POSITIVES = (
    *(a * 10.0**-k for k in (4, 3, 2) for a in (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)),
    *(i / 40 for i in range(4, 41)),
)
#: Those for which the best threshold is searched for, as for an attack at them, and those that a table shows.
SOUGHT = (1.0 * 10.0**-3, 1.0 * 10.0**-2)
TABLED = (*SOUGHT, 5.0 * 10.0**-2, 4 / 40, 10 / 40, 20 / 40)
T = TypeVar("T")


@dataclass
class Figures:
    """What is drawn; a part that could not be computed is empty and named in ``left_out``."""

    scope: Scope = "none"
    attack: AttackPart | None = None
    profile: tuple[ProfilePart, ...] = ()
    trade_off: tuple[TradePart, ...] = ()
    spending: tuple[SpentPart, ...] = ()
    left_out: list[str] = field(default_factory=list)


def figures_of(state: LedgerState, epsilon: Bounds | None, history: Sequence[EventPart], clock: Clock) -> Figures:
    """All figures of a ledger that was verified.

    Args:
        state: its plans and charges.
        epsilon: the verdict; without one nothing is drawn.
        history: what happened, in order.
        clock: what is not computed when it is over is left out.
    """
    found = Figures()
    if epsilon is None:
        return found
    curve, found.scope, mark = _curve_of(state, epsilon)
    if curve is not None:
        found.attack = _tried("what an attacker gains", lambda: _attack(curve), found, clock)
        found.profile = _tried("the privacy profile", lambda: _profile(curve, mark), found, clock) or ()
        found.trade_off = _tried("the trade-off curve", lambda: _trade_off(curve, mark), found, clock) or ()
    found.spending = _tried("the budget over time", lambda: tuple(_spending(state, history)), found, clock) or ()
    return found


def _tried(name: str, compute: Callable[[], T], found: Figures, clock: Clock) -> T | None:
    try:
        clock.check()
        with interruptible(clock.check):
            return compute()
    except OutOfTime:
        found.left_out.append(f"{name}: not computed in {clock.seconds:g} s")
    except DPBudgetError as error:
        found.left_out.append(f"{name}: {error.message}")
    return None


def _curve_of(state: LedgerState, epsilon: Bounds) -> tuple[PrivacyCurve | None, Scope, float]:
    """The profile to draw, what it is of, and the epsilon up to which it is of interest."""
    begun = [portfolio for portfolio in state.portfolios if portfolio.frozen]
    waiting = [portfolio for portfolio in state.portfolios if not portfolio.frozen and portfolio.runs]
    if len(begun) == 1:
        return Remembered(joint_curve_of(state.plans_of(begun[0]))), "spent", epsilon.upper
    if begun or epsilon.upper > 0.0:
        # Portfolios, and the steps of an rdp ledger, may be chosen after what the others gave. No joint law is known
        # then, and what was spent is itself an outcome: an attack is bounded by what was granted in advance.
        return PairCurve(state.epsilon, state.delta), "pair", state.epsilon
    if waiting:
        plans = state.plans_of(waiting[-1])
        curve = Remembered(joint_curve_of(plans))
        return curve, "planned", curve.epsilon(waiting[-1].delta).upper
    return None, "none", 0.0


def _attack(curve: PrivacyCurve) -> AttackPart:
    return AttackPart(
        advantage=Ends.of(curve.advantage()),
        tpr_at_1_percent_fpr=Ends.of(curve.tpr_at(0.01)),
        tpr_at_1_permille_fpr=Ends.of(curve.tpr_at(0.001)),
        right_guess_from_even_odds=Ends.of(curve.bayes_risk(0.5)),
    )


def _profile(curve: PrivacyCurve, epsilon: float) -> tuple[ProfilePart, ...]:
    grid = epsilon_grid(epsilon, PROFILE_POINTS)
    known = zip(grid, curve.profile(grid), strict=True)
    return tuple(ProfilePart(epsilon=at, lower=bounds.lower, upper=bounds.upper) for at, bounds in known)


def _trade_off(curve: PrivacyCurve, epsilon: float) -> tuple[TradePart, ...]:
    known = least_false_negatives(curve, epsilon, FALSE_POSITIVES, THRESHOLDS)
    best = dict(zip(SOUGHT, (bounds.lower for bounds in curve.trade_off(SOUGHT)), strict=True))
    known = [max(beta, best.get(alpha, 0.0)) for alpha, beta in zip(FALSE_POSITIVES, known, strict=True)]
    return tuple(
        TradePart(false_positives=alpha, false_negatives=beta)
        for alpha, beta in zip(FALSE_POSITIVES, known, strict=True)
    )


def _spending(state: LedgerState, history: Sequence[EventPart]) -> Iterable[SpentPart]:
    """What was spent at each looked-at number of steps, from none to all."""
    total, charged, steps = state.grants[0].epsilon, dict[str, int](), 0
    every = max(1, sum(run.charged for run in state.runs.values()) // SPENDING_POINTS)
    yield SpentPart(steps=0, spent=0.0, total=total, alone=0.0 if state.account is None else None)
    for event in history:
        granted = [grant.epsilon for grant in state.grants if grant.seq == event.first]
        if granted and event.kind == "budget":
            total = granted[0]
            yield _spent_at(state, charged, steps, total)
        for taken in _in_parts(event.steps, every):
            for run, count in taken.items():
                charged[run] = charged.get(run, 0) + count
            steps += sum(taken.values())
            yield _spent_at(state, charged, steps, total)


def _in_parts(steps: dict[str, int], every: int) -> Iterable[dict[str, int]]:
    """A stretch of one run in parts of about ``every`` steps; one of several runs, whose order is lost, whole."""
    if len(steps) != 1:
        return [steps] if steps else []
    ((run, count),) = steps.items()
    parts = max(1, count // every)
    ends = [count * i // parts for i in range(parts + 1)]
    return [{run: high - low} for low, high in pairwise(ends)]


def _spent_at(state: LedgerState, charged: dict[str, int], steps: int, total: float) -> SpentPart:
    pause()
    if state.account is not None:
        return SpentPart(steps=steps, spent=_odometer(state, charged, total), total=total, alone=None)
    begun = [p for p in state.portfolios if p.frozen and any(charged.get(run) for run in p.runs)]
    spent = sum_up(portfolio.claim or 0.0 for portfolio in begun)
    return SpentPart(steps=steps, spent=spent, total=total, alone=_alone(state, begun, charged, spent))


def _alone(state: LedgerState, begun: list[Portfolio], charged: dict[str, int], spent: float) -> float | None:
    """Epsilon of the charged steps, at most what is spent; None where few steps would take long."""
    costs = []
    for portfolio in begun:
        plans = [state.runs[run].plan for run in portfolio.runs if charged.get(run)]
        done = [charged[run] for run in portfolio.runs if charged.get(run)]
        if sum(done) < _FEW_STEPS:
            return None
        cut: list[Plan] = [plan.first(count) for plan, count in zip(plans, done, strict=True)]
        try:
            costs.append(PortfolioFilter().joint_bounds(cut, portfolio.delta).upper)
        except DPBudgetError:
            return None
    return min(sum_up(costs), spent)


def _odometer(state: LedgerState, charged: dict[str, int], total: float) -> float:
    """What an rdp ledger guarantees for these charges: the total, or what its orders have spent."""
    account = state.account
    if account is None or not charged:
        return 0.0
    if len({grant.delta for grant in state.grants}) > 1:
        return total
    at_that_time = RenyiAccount.fresh(account.terms, account.delta)
    for run_id, count in charged.items():
        run = state.runs[run_id]
        at_that_time.charge(run_id, uses_of(run.plan, run.costs or (), 0, count))
    return min(total, spent_epsilon(at_that_time.spent, account.terms, state.delta))
