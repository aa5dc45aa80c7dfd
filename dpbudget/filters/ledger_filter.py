"""The arithmetic that a ledger is given, whichever filter its genesis names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpbudget._renyi import PhaseCost, RenyiTerms
from dpbudget._search import most_steps, smallest_noise
from dpbudget.accountants.base import Accountant
from dpbudget.errors import DPBudgetError
from dpbudget.filters import ledger_renyi
from dpbudget.filters.portfolio import FULL, PortfolioFilter
from dpbudget.filters.renyi import DEFAULT_ORDERS
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER
from dpbudget.plan import Budget, Phase, Plan


@dataclass(frozen=True)
class LedgerFilter:
    """Joint claims of portfolios, and terms and costs of ``rdp`` ledgers.

    Attributes:
        accountant: whose certified upper bound counts for a portfolio; None takes the one that the plans name.
        orders: Renyi orders of a new ``rdp`` ledger, with equal shares of delta.
    """

    accountant: Accountant | None = None
    orders: tuple[float, ...] = DEFAULT_ORDERS

    def joint_claim(self, plans: Sequence[Plan], delta: float) -> float:
        """Certified epsilon of all ``plans`` together at ``delta``; see :meth:`PortfolioFilter.joint_claim`."""
        return PortfolioFilter(self.accountant).joint_claim(plans, delta)

    def renyi_terms(self, budget: Budget) -> RenyiTerms:
        """Orders, shares and allowances of a new ``rdp`` ledger; see :mod:`dpbudget.filters.ledger_renyi`."""
        return ledger_renyi.terms(budget, self.orders, (1,) * len(self.orders))

    def renyi_allowances(self, budget: Budget, terms: RenyiTerms) -> tuple[float, ...]:
        """The allowances of the same orders and shares under another budget."""
        return ledger_renyi.terms(budget, terms.orders, terms.shares).allowances

    def renyi_costs(self, plan: Plan, terms: RenyiTerms) -> tuple[PhaseCost, ...]:
        """What one step of each phase costs at most, padded so that every machine confirms it."""
        return ledger_renyi.costs(plan, terms.orders)

    def what_fits(self, others: Sequence[Plan], plan: Plan, delta: float, room: float) -> str:
        """The most steps and the least noise with which ``plan`` fits ``room`` beside ``others``, in words.

        Both were seen to fit; the number of steps is the largest, the noise the smallest to some 1e-8. Beside plans
        that have all of it, only noise alone would fit, which is not proposed.
        """
        if others and self._claim(others, None, delta) > FULL * room:
            return "no plan of use fits beside them; the owner can raise the total (dpbudget ledger grant)"
        steps = most_steps(lambda count: self._claim(others, _first_steps(plan, count), delta) <= room, plan.steps)
        parts = [f"at most {steps} of the {plan.steps} steps"] if steps else []
        sigma = self._least_noise(others, plan, delta, room)
        if sigma is not None:
            if len(plan.phases) == 1:
                parts.append(f"a noise multiplier of at least {_up(sigma)}")
            else:
                parts.append(f"{_up(sigma / plan.phases[0].noise_multiplier)} times the noise in every phase")
        return f"what fits: {' or '.join(parts)}" if parts else "no plan of this kind fits, whatever its noise"

    def _least_noise(self, others: Sequence[Plan], plan: Plan, delta: float, room: float) -> float | None:
        first, most = plan.phases[0].noise_multiplier, max(phase.noise_multiplier for phase in plan.phases)
        if room <= 0.0:
            return None

        def claim(sigma: float) -> float:
            return self._claim(others, _scaled(plan, sigma / first), delta)

        ceiling = MAX_NOISE_MULTIPLIER * first / most
        return smallest_noise(lambda sigma: claim(min(sigma, ceiling)), room, 2.0 * first)

    def _claim(self, others: Sequence[Plan], plan: Plan | None, delta: float) -> float:
        """The joint claim, infinite where it cannot be computed."""
        return _or_infinite(lambda: self.joint_claim([*others, plan] if plan else others, delta))


def _or_infinite(claim: Callable[[], float]) -> float:
    try:
        return claim()
    except DPBudgetError:
        return math.inf


def _first_steps(plan: Plan, count: int) -> Plan | None:
    """The plan that ends after ``count`` steps; None for none."""
    phases, left = [], count
    for phase in plan.phases:
        if left:
            phases.append(phase.replace(steps=min(left, phase.steps)))
            left -= phases[-1].steps
    if left:  # beyond the plan its last phase goes on
        phases[-1] = phases[-1].replace(steps=phases[-1].steps + left)
    return plan.replace(phases=tuple(phases)) if phases else None


def _scaled(plan: Plan, factor: float) -> Plan:
    """The plan with ``factor`` times the noise."""

    def scale(phase: Phase) -> Phase:
        return phase.replace(noise_multiplier=min(phase.noise_multiplier * factor, MAX_NOISE_MULTIPLIER))

    return plan.replace(phases=tuple(scale(phase) for phase in plan.phases))


def _up(value: float) -> str:
    """Rounded up to six digits."""
    digits = 5 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10.0**digits) / 10.0**digits:.{max(digits, 0)}f}"
