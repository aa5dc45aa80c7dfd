"""The claim of a portfolio: what the filter certifies, with the drift of elementary functions between machines.

A claim exceeds its certified upper bound by one to two units of u = 1e-9 max(1, bound) (``claimed_epsilon``), and the
bounds of two machines differ by less than u. So a claim that another machine made is good here as long as it is not a
whole unit below the claim that would be made here: it still exceeds the bound of this machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpbudget.ledger.state import SpendingFilter
from dpbudget.plan import Plan


def covers(stated: float, certified: float) -> bool:
    """Whether a stated claim exceeds the upper bound behind ``certified``, the claim that is made on this machine."""
    # certified < bound + 2 u, so stated >= certified - u would be enough; 0.99 pays for u being taken of the claim.
    return stated >= certified - 0.99e-9 * max(1.0, certified)


def portfolio_claim(spending: SpendingFilter, plans: Sequence[Plan], delta: float) -> float:
    """Epsilon that ``plans`` claim together at ``delta``.

    A single plan claims what its owner signed where that covers what is certified here, so that a plan that was
    calibrated to exactly the budget on one machine fits it on every other.
    """
    certified = spending.joint_claim(plans, delta)
    if len(plans) == 1 and plans[0].claim.delta == delta and covers(plans[0].claim.epsilon, certified):
        return min(certified, plans[0].claim.epsilon)
    return certified
