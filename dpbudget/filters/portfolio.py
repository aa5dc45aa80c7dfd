"""What may still be spent: the arithmetic that a ledger asks before it admits a plan.

A ledger holds rules and no privacy arithmetic; it is given a filter. ``portfolio``: the plans of one portfolio are
fixed before any of them touches data, so they compose as one non-adaptive composition, interleaved in any order
(Vadhan and Zhang 2023); between portfolios the declared (epsilon_i, delta_i) add up, which is a valid filter under
fully adaptive choice (Rogers, Roth, Ullman and Vadhan 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpbudget.accountants import get_accountant
from dpbudget.accountants.base import Accountant
from dpbudget.curve import Bounds
from dpbudget.errors import InvalidParameter
from dpbudget.plan import Plan, claimed_epsilon, joint_ideal_delta

#: A portfolio whose plans claim this share of its epsilon is full: what is left would make a plan of noise alone.
FULL = 0.999


@dataclass(frozen=True)
class PortfolioFilter:
    """Joint epsilon of the plans of one portfolio.

    Attributes:
        accountant: whose certified upper bound counts; None takes the one that the plans name, ``prv`` if they differ.
    """

    accountant: Accountant | None = None

    def accountant_for(self, plans: Sequence[Plan]) -> Accountant:
        """The accountant that answers for these plans."""
        if self.accountant is not None:
            return self.accountant
        names = {plan.claim.accountant for plan in plans}
        return get_accountant(names.pop() if len(names) == 1 else "prv")

    def joint_bounds(self, plans: Sequence[Plan], delta: float) -> Bounds:
        """Bounds of epsilon at ``delta`` for all ``plans`` together; [0, 0] for none.

        The upper end holds for the noise generator with its bounded tail; the lower end is that of the mechanism in
        real arithmetic at ``delta``, so the width includes what the tail costs.

        Raises:
            InvalidParameter: the plans differ in adjacency (DP062) or delta is too small for their noise (DP053).
        """
        if not plans:
            return Bounds(0.0, 0.0)
        adjacencies = {plan.adjacency for plan in plans}
        if len(adjacencies) > 1:
            raise InvalidParameter(
                f"plans of one portfolio have different adjacencies: {', '.join(sorted(adjacencies))}",
                code="DP062",
                hint="a ledger has one adjacency; plan every run with it",
            )
        charges = [charge for plan in plans for charge in plan.charges]
        curve = self.accountant_for(plans).curve(charges, plans[0].adjacency)
        upper = curve.epsilon(joint_ideal_delta(tuple(plans), delta))
        lower = min(curve.epsilon(delta).lower, upper.upper)
        return Bounds(lower, upper.upper, upper.kind)

    def joint_claim(self, plans: Sequence[Plan], delta: float) -> float:
        """The certified upper end of :meth:`joint_bounds`, rounded up to the form in which ledgers state it.

        Raises:
            InvalidParameter: the accountant's answer is not certified (DP062); such an answer is never claimed.
        """
        bounds = self.joint_bounds(plans, delta)
        if bounds.kind != "certified":
            raise InvalidParameter(
                f"the accountant gave a {bounds.kind} interval, which is never claimed",
                code="DP062",
                hint="plan with the accountant prv or rdp",
            )
        return claimed_epsilon(bounds.upper) if plans else 0.0
