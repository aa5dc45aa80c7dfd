"""Where a portfolio ledger stands: what is spent, what is promised, and what the next plan may add."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from dpbudget.curve import round_down, round_up
from dpbudget.errors import DPBudgetError
from dpbudget_cli import _output as out

if TYPE_CHECKING:
    from dpbudget.ledger.state import LedgerState, Portfolio
    from dpbudget.plan import Plan

#: Less than this share of the total epsilon is what rounding left: a plan for it would be noise alone.
_DUST = Fraction(1, 10**6)
_ZERO = Fraction(0)


@dataclass(frozen=True)
class Standing:
    """What became of a budget; every pair is (epsilon, delta).

    Attributes:
        spent: what the portfolios that began take, as a whole.
        promised: the joint claim of the open portfolio's plans, which none of them has begun to spend, at its delta.
        plannable: by how much the next plan may raise the claim of its portfolio, and the delta that it must be made
            for; dust is zero.
    """

    spent: tuple[float, float]
    promised: tuple[float, float]
    plannable: tuple[float, float]

    def rows(self) -> list[tuple[str, str]]:
        """Three rows of a table."""
        return [
            ("spent", _pair(self.spent, round_up)),
            ("promised", _pair(self.promised, round_up)),
            ("plannable", _pair(self.plannable, round_down)),
        ]

    def to_json(self) -> dict[str, Any]:
        """The same under the keys ``spent``, ``promised`` and ``left``, of which the last is what is plannable."""
        pairs = {"spent": self.spent, "promised": self.promised, "left": self.plannable}
        return {name: {"epsilon": pair[0], "delta": pair[1]} for name, pair in pairs.items()}


def standing(state: LedgerState, plan_delta: float) -> Standing:
    """Where the ledger stands.

    Args:
        state: the state of a ``portfolio`` ledger.
        plan_delta: the delta of the next plan.
    """
    frozen = [portfolio for portfolio in state.portfolios if portfolio.frozen]
    spent = [sum((Fraction(value) for value in values), _ZERO) for values in _columns(frozen)]
    promised, room = (0.0, 0.0), state.remaining_epsilon
    newest = state.portfolios[-1]
    if not newest.frozen:
        room = state.room_for(newest)
        if plans := state.plans_of(newest):
            promised = (_joint_claim(plans, newest.delta), newest.delta)
    left = usable(state, room - Fraction(promised[0])) if math.isfinite(promised[0]) else _ZERO
    return Standing(
        (out.ceil_float(spent[0]), out.ceil_float(spent[1])), promised, (out.floor_float(left), max(plan_delta, 0.0))
    )


def usable(state: LedgerState, room: Fraction) -> Fraction:
    """What a plan can use of ``room``: 0 for what rounding left."""
    return room if room >= _DUST * Fraction(state.epsilon) else _ZERO


def _columns(portfolios: list[Portfolio]) -> tuple[list[float], list[float]]:
    return [portfolio.charged_epsilon for portfolio in portfolios], [portfolio.delta for portfolio in portfolios]


def _joint_claim(plans: tuple[Plan, ...], delta: float) -> float:
    """What the plans claim together; infinite where that is not computable here, so that nothing seems to be left."""
    from dpbudget.filters import LedgerFilter
    from dpbudget.ledger.claims import portfolio_claim

    try:
        return portfolio_claim(LedgerFilter(), plans, delta)
    except DPBudgetError:
        return math.inf


def _pair(pair: tuple[float, float], rounded: Callable[[float, int], str]) -> str:
    epsilon, delta = pair
    return f"epsilon {rounded(epsilon, 10)}, delta {delta:.9g}" if epsilon or delta else "nothing"
