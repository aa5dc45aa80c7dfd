"""Computing again what a ledger claims: every plan and portfolio by two accountants, every table of an rdp ledger.

All of it asks a clock: a file that nobody vouches for may hold plans that take an accountant for ever.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from dpbudget._pause import interruptible
from dpbudget.accountants import ACCOUNTANTS, get_accountant
from dpbudget.curve import Bounds
from dpbudget.errors import DPBudgetError
from dpbudget.filters import PortfolioFilter
from dpbudget.filters.ledger_renyi import certified_allowances, certified_costs, spent_epsilon
from dpbudget.ledger.state import LedgerState, RunState
from dpbudget.plan import Budget, Phase, Plan


class Clock:
    """Says when the time for a verification is over; ``seconds`` None means never."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def over(self) -> bool:
        """Whether nothing more may be begun."""
        return self._end is not None and time.monotonic() > self._end

    def lift(self) -> None:
        """Take as long as it takes from now on."""
        self._end = None

    def check(self) -> None:
        """Raise :class:`OutOfTime` where the time is over."""
        if self.over:
            raise OutOfTime


class OutOfTime(Exception):
    """The time for a verification is over."""


@dataclass
class Findings:
    """What speaks against a ledger, and what a reader should know all the same."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Recomputation:
    """Checks every number of a ledger; equal questions are asked once."""

    def __init__(self, state: LedgerState, clock: Clock) -> None:
        self.state, self.found = state, Findings()
        self._clock = clock
        self._known: dict[tuple[str, tuple[tuple[Phase, ...], ...], tuple[int, ...], float], Bounds | str] = {}

    def run(self) -> Findings:
        """Everything there is to check, as long as there is time."""
        with interruptible(self._clock.check):
            self._run()
        return self.found

    def _run(self) -> None:
        checks = [(f"plan of run {run.run_id}", run) for run in self.state.runs.values()]
        for done, (label, run) in enumerate(checks):
            try:
                self._clock.check()
                self._check_claim(label, (run.plan,), run.plan.claim.epsilon, run.plan.claim.delta)
                if run.costs is not None:
                    self._check_table(label, run)
            except OutOfTime:
                return self._out_of_time(f"{len(checks) - done} plans were not recomputed")
        for portfolio in self.state.portfolios:
            if portfolio.claim is None:
                continue
            plans = self.state.plans_of(portfolio)
            try:
                self._clock.check()
                self._check_claim(f"portfolio {portfolio.index}", plans, portfolio.claim, portfolio.delta)
            except OutOfTime:
                return self._out_of_time(f"portfolio {portfolio.index} was not recomputed")
        try:
            self._check_allowances()
        except OutOfTime:
            self._out_of_time("the allowances were not recomputed")

    def _out_of_time(self, what: str) -> None:
        self.found.problems.append(
            f"after {self._clock.seconds:g} s {what}, so nothing is confirmed; give the owner's key (--trust) or more "
            "time (--time-limit)"
        )

    def _check_claim(self, label: str, plans: Sequence[Plan], claim: float, delta: float) -> None:
        """A claim against the named accountant's bounds, the other's lower end, and both against each other."""
        named = PortfolioFilter().accountant_for(plans).name
        own = self._bounds(named, plans, delta)
        if isinstance(own, str):
            self.found.problems.append(f"{label}: {named} cannot recompute epsilon: {own}")
            return
        if claim < own.lower:
            self.found.problems.append(
                f"{label} claims epsilon {claim:.12g}, below the truth: {named} proves >= {own.lower:.12g}"
            )
        elif claim < own.upper or own.kind != "certified":
            self.found.problems.append(
                f"{label} claims epsilon {claim:.12g}, which cannot be confirmed: {named} gives "
                f"[{own.lower:.12g}, {own.upper:.12g}] ({own.kind})"
            )
        for name in ACCOUNTANTS:
            if name == named:
                continue
            other = self._bounds(name, plans, delta)
            if isinstance(other, str):
                self.found.warnings.append(f"{label}: the cross-check by {name} has no answer: {other}")
            elif claim < other.lower or other.lower > own.upper or other.upper < own.lower:
                self.found.problems.append(
                    f"{label}: {name} gives [{other.lower:.12g}, {other.upper:.12g}], at odds with the claim "
                    f"{claim:.12g}"
                )

    def _bounds(self, name: str, plans: Sequence[Plan], delta: float) -> Bounds | str:
        key = (name, tuple(plan.phases for plan in plans), tuple(plan.bounded_values for plan in plans), delta)
        if key not in self._known:
            try:
                self._known[key] = PortfolioFilter(get_accountant(name)).joint_bounds(plans, delta)
            except DPBudgetError as error:
                self._known[key] = error.message
        return self._known[key]

    def _check_table(self, label: str, run: RunState) -> None:
        account = self.state.account
        assert account is not None  # noqa: S101 - a run has costs only in a ledger with an account
        try:
            certified = certified_costs(run.plan, account.terms.orders)
        except DPBudgetError as error:
            self.found.problems.append(f"{label}: its costs cannot be recomputed: {error.message}")
            return
        low, tails = [], []
        for phase, (stated, own) in enumerate(zip(run.costs or (), certified, strict=True)):
            costs = zip(own.costs, stated.costs, strict=True)
            if any(his is not None and (mine is None or his < mine) for mine, his in costs):
                low.append(phase)
            if stated.tail < own.tail or stated.factor < own.factor:
                tails.append(phase)
        # One problem a kind: a hostile table has 65,536 costs.
        if low:
            self.found.problems.append(f"{label}: its costs are below what is certified in {_phases(low)}")
        if tails:
            self.found.problems.append(f"{label}: the tail of the noise costs more than is stated in {_phases(tails)}")

    def _check_allowances(self) -> None:
        account = self.state.account
        if account is None:
            return
        for grant in self.state.grants:
            self._clock.check()
            budget = Budget(epsilon=grant.epsilon, delta=grant.delta)
            most = certified_allowances(budget, account.terms.orders, account.terms.shares)
            if any(stated > bound for stated, bound in zip(grant.allowances or (), most, strict=True)):
                self.found.problems.append(
                    f"record {grant.seq}: its allowances are beyond epsilon {grant.epsilon:g} at delta {grant.delta:g}"
                )


def _phases(indices: list[int]) -> str:
    first = ", ".join(map(str, indices[:5]))
    return f"phase {first}" + (f" and {len(indices) - 5} more" if len(indices) > 5 else "")


def spent(state: LedgerState, clock: Clock) -> tuple[Bounds, float]:
    """Epsilon of everything charged, and its delta.

    Above, the sum of the claims of portfolios, or what an rdp ledger guarantees. Below, the lower bound of all as one
    composition; adaptive choice can only make the worst case worse, so the lower end holds for it too.
    """
    if state.account is not None:
        return _spent_rdp(state, clock)
    begun = [portfolio for portfolio in state.portfolios if portfolio.frozen]
    if not begun:
        return Bounds(0.0, 0.0), state.delta
    delta = sum_up(portfolio.delta for portfolio in begun)
    upper = sum_up(portfolio.claim or 0.0 for portfolio in begun)
    plans = [plan for portfolio in begun for plan in state.plans_of(portfolio)]
    return Bounds(min(_lower(plans, delta, clock), upper), upper), delta


def _spent_rdp(state: LedgerState, clock: Clock) -> tuple[Bounds, float]:
    account = state.account
    charged = [run for run in state.runs.values() if run.charged]
    if account is None or not charged:
        return Bounds(0.0, 0.0), state.delta
    upper = state.epsilon
    # The odometer needs a delta that was fixed before the first step.
    if len({grant.delta for grant in state.grants}) == 1:
        upper = min(upper, spent_epsilon(account.spent, account.terms, state.delta))
    plans = [run.plan.first(run.charged) for run in charged]
    return Bounds(min(_lower(plans, state.delta, clock), upper), upper), state.delta


def _lower(plans: Sequence[Plan], delta: float, clock: Clock) -> float:
    try:
        with interruptible(clock.check):
            return PortfolioFilter(get_accountant("prv")).joint_bounds(plans, delta).lower
    except (DPBudgetError, OutOfTime):
        return 0.0


def sum_up(values: Iterable[float]) -> float:
    """The smallest float that is at least the exact sum: floats added one by one may end below it."""
    total = sum((Fraction(value) for value in values), Fraction())
    nearest = float(total)
    return nearest if nearest >= total else math.nextafter(nearest, math.inf)
