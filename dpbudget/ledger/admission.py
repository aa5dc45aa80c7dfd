"""Admitting a plan: does it belong into this ledger, does it claim enough, and does it fit what is left?"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from dpbudget._renyi import PhaseCost
from dpbudget.curve import round_down, round_up
from dpbudget.errors import BudgetExceeded, InvalidParameter, Tampered
from dpbudget.ledger.claims import covers, portfolio_claim
from dpbudget.ledger.journal import Draft, Journal
from dpbudget.ledger.renyi import RenyiAccount, steps_that_fit
from dpbudget.ledger.rules import MAX_ALL_COSTS, MAX_ALL_PHASES, MAX_RUNS
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, Signer, sign_envelope
from dpbudget.ledger.state import LedgerState, Portfolio, SpendingFilter
from dpbudget.ledger.statement import plan_statement, statement_digest
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER
from dpbudget.plan import Budget, Plan


def seal_record(owner: Signer, line: bytes) -> bytes:
    """The owner's envelope around the line of a genesis or portfolio record."""
    return sign_envelope(line, RECORD_TYPE, owner)


def admit_plan(journal: Journal, spending: SpendingFilter, plan: Plan, owner: Signer) -> str:
    """Sign ``plan`` in; returns the run id.

    In a ``portfolio`` ledger it joins the open portfolio, or opens the next one where the newest is frozen; in an
    ``rdp`` ledger it gets its table of costs.

    Raises:
        BudgetExceeded: the joint claim, or the plan's delta, does not fit (DP052); nothing was written.
        InvalidParameter: see :func:`check_owner` and :func:`check_facts`.
        Tampered: see :func:`check_frozen`.
    """
    check_owner(journal.state, owner)
    check_facts(journal.state, plan)
    run_id = secrets.token_hex(16)
    if journal.state.genesis.filter == "rdp":
        return _admit_rdp(journal, spending, plan, owner, run_id)
    while True:
        # The accountant takes its time, so it answers outside the lock; inside, its question must still be the same.
        target = check_portfolio(journal.state, spending, plan)
        if journal.transact(partial(_write, target, plan, owner, run_id)):
            return run_id


def check_portfolio(state: LedgerState, spending: SpendingFilter, plan: Plan) -> Target:
    """The portfolio that a plan fits.

    Raises:
        BudgetExceeded: the joint claim, or the plan's delta, does not fit (DP052).
        InvalidParameter: the plan claims less than the filter certifies, or at another delta (DP052).
        Tampered: see :func:`check_frozen`.
    """
    target = _target(state, plan)
    check_frozen(state, spending)
    _check_claim(state, target, spending, plan)
    return target


def check_rdp(state: LedgerState, spending: SpendingFilter, plan: Plan, run_id: str) -> tuple[PhaseCost, ...]:
    """The costs of a plan for which some order of an ``rdp`` ledger has room.

    Raises:
        BudgetExceeded: no order has (DP052).
        InvalidParameter: the plan claims less than the filter certifies (DP052).
    """
    if state.account is None:
        raise Tampered("an rdp ledger without its orders", code="DP082")
    _check_alone(spending, plan, plan.claim.delta)
    costs = spending.renyi_costs(plan, state.account.terms)
    try:
        _check_fits(state.account, run_id, plan, costs)
    except BudgetExceeded as refusal:
        factor = _least_noise_factor(state.account, spending, plan)
        if factor is None:
            raise
        least = f"{_ceil(plan.phases[0].noise_multiplier * factor)}" if len(plan.phases) == 1 else ""
        noise = f"a noise multiplier of {least}" if least else f"{_ceil(factor)} times the noise in every phase"
        raise BudgetExceeded(refusal.message, hint=f"all of it fits with {noise}; {refusal.hint}") from None
    return costs


def _least_noise_factor(account: RenyiAccount, spending: SpendingFilter, plan: Plan) -> float | None:
    """By how much the noise of a plan must grow, to one part in a million and a little more; None beyond a thousand."""

    def fits(factor: float) -> bool:
        noises = (min(phase.noise_multiplier * factor, MAX_NOISE_MULTIPLIER) for phase in plan.phases)
        phases = tuple(p.replace(noise_multiplier=noise) for p, noise in zip(plan.phases, noises, strict=True))
        louder = plan.replace(phases=phases)
        costs = spending.renyi_costs(louder, account.terms)
        return steps_that_fit(account, "", louder, costs, plan.steps) == plan.steps

    low, high = 1.0, 2.0
    while not fits(high):
        if high > 1000.0:
            return None
        low, high = high, 2.0 * high
    while high > low * (1.0 + 1e-6):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _ceil(value: float) -> str:
    """Rounded up to six digits."""
    digits = 5 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10.0**digits) / 10.0**digits:.{max(digits, 0)}f}"


def _admit_rdp(journal: Journal, spending: SpendingFilter, plan: Plan, owner: Signer, run_id: str) -> str:
    costs = check_rdp(journal.state, spending, plan, run_id)
    payload = plan_statement(plan, ledger_id=journal.state.genesis.ledger_id, run_id=run_id, costs=costs)
    envelope = sign_envelope(payload, STATEMENT_TYPE, owner)

    def write(draft: Draft) -> None:
        if draft.state.account is not None:
            _check_fits(draft.state.account, run_id, plan, costs)
        fields = {"run": run_id, "statement": statement_digest(payload), "portfolio": 0}
        draft.add("plan", seal=lambda _: envelope, **fields)

    journal.transact(write)
    return run_id


def _check_fits(account: RenyiAccount, run_id: str, plan: Plan, costs: tuple[PhaseCost, ...]) -> None:
    fitting = steps_that_fit(account, run_id, plan, costs, plan.steps)
    if fitting < plan.steps:
        raise BudgetExceeded(
            f"no Renyi order has room for the {plan.steps} steps of the plan beside what is spent",
            hint=(f"{fitting} of its steps would fit; nothing was written" if fitting else _NOT_ONE),
        )


_NOT_ONE = "not one of its steps fits: plan with more noise, or let the owner grant more; nothing was written"


def check_facts(state: LedgerState, plan: Plan) -> None:
    """Refuse a plan that the rules would refuse, with the way out.

    Raises:
        InvalidParameter: another adjacency or unit (DP062), no nominal size, or more runs, phases or costs than a
            ledger holds (DP009).
    """
    genesis = state.genesis
    _check_is_plan(plan)
    _check_caps(state, plan)
    if plan.nominal_size is None:
        raise InvalidParameter(
            "the plan has no nominal dataset size, from which rate and divisor come",
            hint="plan with the public size of the dataset; its true size may stay private",
        )
    if plan.adjacency != genesis.adjacency or plan.unit != genesis.unit:
        raise InvalidParameter(
            f"a plan for {plan.adjacency} neighbours of one {plan.unit} in a ledger for {genesis.adjacency} "
            f"neighbours of one {genesis.unit}",
            code="DP062",
            hint=f"plan with adjacency {genesis.adjacency}"
            if plan.adjacency != genesis.adjacency
            else f'plan with unit="{genesis.unit}"; sizes and rates then count {genesis.unit}s',
        )


def _check_is_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise InvalidParameter(
            f"plan is a {type(plan).__name__}, not a Plan",
            code="DP060",
            hint="plan = dpbudget.calibrate(epsilon=3.0, dataset_size=..., batch_size=..., epochs=...)",
        )


def _check_caps(state: LedgerState, plan: Plan) -> None:
    phases = state.phases + len(plan.phases)
    costs = 0 if state.account is None else phases * len(state.account.terms.orders)
    counts = (
        (len(state.runs) + 1, MAX_RUNS, "runs"),
        (phases, MAX_ALL_PHASES, "phases"),
        (costs, MAX_ALL_COSTS, "costs"),
    )
    for count, most, what in counts:
        if count > most:
            raise InvalidParameter(
                f"with this plan the ledger would hold {count} {what}; {most} is the most",
                code="DP009",
                hint="plan with fewer phases, or lower this ledger and begin another with what was left",
            )


def check_owner(state: LedgerState, owner: Signer) -> None:
    """Refuse a key that is not the owner's (DP080)."""
    if owner.public != state.owner:
        raise InvalidParameter(
            f"the key {owner.public.hex} is not the owner's",
            code="DP080",
            hint=f"only the owner grants and signs plans, with the key whose public half is {state.owner.hex}",
        )


def check_frozen(state: LedgerState, spending: SpendingFilter) -> None:
    """Recompute what the frozen portfolios claim, before the owner grants what they seem to leave.

    The writer states a portfolio's claim when it takes the first lease, and the rules only bound it from above: a claim
    of 0 would make the owner grant the whole budget once more.

    Raises:
        Tampered: a claim is below what ``spending`` certifies.
    """
    for portfolio in state.portfolios:
        if portfolio.claim is None:
            continue
        certified = spending.joint_claim(state.plans_of(portfolio), portfolio.delta)
        if not covers(portfolio.claim, certified):
            raise Tampered(
                f"portfolio {portfolio.index} was frozen at a claim of epsilon {portfolio.claim!r}; the filter "
                f"certifies {certified!r} for its plans, so what seems to be left of the budget is not",
                hint="sign nothing more into this ledger; dpbudget ledger verify says what it spent",
            )


@dataclass(frozen=True)
class Target:
    """The portfolio that a plan would join; a new one when ``opens``."""

    portfolio: Portfolio
    opens: bool


def _target(state: LedgerState, plan: Plan) -> Target:
    newest, delta = state.portfolios[-1], plan.claim.delta
    if not newest.frozen:
        if delta != newest.delta:
            hint = f"plan with delta {newest.delta!r}"
            if newest.index == 1 and delta == state.delta:  # the delta of the budget, of which a ledger keeps half
                hint += "; only a new ledger with whole_budget=True (--whole-budget) lets one plan have all of it"
            raise InvalidParameter(
                f"the plan claims epsilon at delta {delta:g}, the open portfolio {newest.index} has delta "
                f"{newest.delta:g}",
                code="DP052",
                hint=hint,
            )
        return Target(newest, opens=False)
    left = state.remaining_delta
    if Fraction(delta) > left:
        raise BudgetExceeded(
            f"portfolio {newest.index} is frozen, and the plan's delta {delta:g} exceeds the {float(left):g} that is "
            f"left for another one",
            hint="plan with a smaller delta" if left else "the delta of the budget is used up",
        )
    return Target(Portfolio(newest.index + 1, delta, None), opens=True)


def _check_claim(state: LedgerState, target: Target, spending: SpendingFilter, plan: Plan) -> None:
    portfolio = target.portfolio
    alone = _check_alone(spending, plan, portfolio.delta)
    others = state.plans_of(portfolio)
    joint = portfolio_claim(spending, (*others, plan), portfolio.delta) if others else min(alone, plan.claim.epsilon)
    room = state.room_for(portfolio)
    if Fraction(joint) > room:
        together = f" together with {len(others)} signed before" if others else ""
        still = f"; those before stay signed and claim {_before(spending, others, portfolio)}" if others else ""
        fits = spending.what_fits(others, plan, portfolio.delta, out_of(room))
        raise BudgetExceeded(
            f"the plan{together} would claim epsilon {round_up(joint, 10)} at delta {portfolio.delta:g}; "
            f"{round_down(out_of(room), 10)} of {state.epsilon:.10g} is left for {'all of them' if others else 'it'}",
            hint=f"{fits}{still}; nothing was written",
        )


def _check_alone(spending: SpendingFilter, plan: Plan, delta: float) -> float:
    """What the filter certifies for the plan alone; refuses a plan that claims less."""
    alone = spending.joint_claim((plan,), delta)
    if not covers(plan.claim.epsilon, alone):
        raise InvalidParameter(
            f"the plan claims epsilon {plan.claim.epsilon!r}, the ledger's filter certifies {alone!r} at delta "
            f"{delta:g}",
            code="DP052",
            hint="make the plan with the accountant that the ledger is given",
        )
    return alone


def plan_delta_of(state: LedgerState) -> float:
    """The delta for which the next plan must be made; see :attr:`~dpbudget.ledger.ledger.Ledger.plan_delta`."""
    if not state.portfolios:
        return state.delta
    newest = state.portfolios[-1]
    return out_of(state.remaining_delta / 2) if newest.frozen else newest.delta


def out_of(room: Fraction) -> float:
    """The largest float that is at most ``room``."""
    nearest = float(room)
    return nearest if nearest <= room else math.nextafter(nearest, -math.inf)


def _before(spending: SpendingFilter, plans: tuple[Plan, ...], portfolio: Portfolio) -> str:
    return f"epsilon {round_up(portfolio_claim(spending, plans, portfolio.delta), 6)}"


def _write(target: Target, plan: Plan, owner: Signer, run_id: str, draft: Draft) -> bool:
    """Draft the plan; False where another process changed the portfolios meanwhile."""
    state, portfolio = draft.state, target.portfolio
    newest = state.portfolios[-1]
    if target.opens:
        if not (newest.frozen and newest.index + 1 == portfolio.index):
            return False
        seal = partial(seal_record, owner)
        draft.add("portfolio", seal=seal, index=portfolio.index, delta=portfolio.delta, epsilon=None)
    elif newest != portfolio:
        return False
    payload = plan_statement(plan, ledger_id=state.genesis.ledger_id, run_id=run_id)
    envelope = sign_envelope(payload, STATEMENT_TYPE, owner)
    fields = {"run": run_id, "statement": statement_digest(payload), "portfolio": portfolio.index}
    draft.add("plan", seal=lambda _: envelope, **fields)
    return True


def check_lowering(state: LedgerState, budget: Budget, allowances: tuple[float, ...] | None) -> None:
    """Refuse totals below what is in use, with the least that would do."""
    if state.account is not None:
        account = state.account.copy()
        account.grant(allowances or (), budget.delta)
        if not account.fits:
            raise InvalidParameter(
                f"epsilon {budget.epsilon:g} at delta {budget.delta:g} is below what is spent at every Renyi order",
                code="DP052",
                hint="lower it less; what is spent cannot be taken back",
            )
        return
    taken = state.epsilon - out_of(state.remaining_epsilon), state.delta - out_of(state.remaining_delta)
    used = [Fraction(state.epsilon) - state.remaining_epsilon, Fraction(state.delta) - state.remaining_delta]
    if Fraction(budget.epsilon) < used[0] or Fraction(budget.delta) < used[1]:
        raise InvalidParameter(
            f"totals of epsilon {budget.epsilon:g} and delta {budget.delta:g} are below what the portfolios take: "
            f"epsilon {taken[0]:.10g}, delta {taken[1]:.10g}",
            code="DP052",
            hint="lower it to no less; what is spent or promised to a portfolio cannot be taken back",
        )


def first_portfolio(budget: Budget, whole_budget: bool) -> dict[str, Any]:
    """The fields of a new ledger's first portfolio."""
    if whole_budget:
        return {"index": 1, "delta": budget.delta, "epsilon": budget.epsilon}
    return {"index": 1, "delta": budget.delta / 2, "epsilon": None}


def renyi_record(filter: SpendingFilter, budget: Budget) -> dict[str, Any]:
    """The fields of the second record of an ``rdp`` ledger."""
    terms = filter.renyi_terms(budget)
    return {"orders": terms.orders, "shares": terms.shares, "allowances": terms.allowances}
