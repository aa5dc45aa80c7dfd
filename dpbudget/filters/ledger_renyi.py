"""The numbers that an ``rdp`` ledger is given: allowances for its orders, and what a step costs at each of them.

The allowances are those of :mod:`dpbudget.filters.renyi` at 98/100 of delta. The bounded tail of the noise takes at
most 1/100 of delta and a factor of at most exp(1/100), so that everything admitted is (epsilon, delta)-DP with the
noise as it is drawn (docs/filters.md, "In a ledger").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from dpbudget._renyi import COST_BITS, IDEAL_SHARE, MAX_ORDERS, PhaseCost, RenyiTerms
from dpbudget._truncation import truncation_delta, truncation_factor_log
from dpbudget.errors import InvalidParameter
from dpbudget.filters.renyi import admitting_epsilon_of, allowance, running_epsilon_of, step_costs
from dpbudget.mechanisms import Adjacency, Charge
from dpbudget.plan import Budget, Plan

#: What a writer adds to its own bounds, so that another machine's, which differ by far less, never exceed them.
PAD = 2.0**-30


def terms(budget: Budget, orders: Sequence[float], shares: Sequence[int]) -> RenyiTerms:
    """Orders, shares and allowances for ``budget``, rounded down and padded.

    Raises:
        InvalidParameter: more orders than a record holds (DP009).
    """
    if not 1 <= len(orders) <= MAX_ORDERS:
        raise InvalidParameter(f"{len(orders)} Renyi orders; a ledger has 1 to {MAX_ORDERS}", hint="name fewer")
    bounds = [_padded_down(bound) for bound in certified_allowances(budget, orders, shares)]
    return RenyiTerms(tuple(orders), tuple(shares), tuple(bounds))


def certified_allowances(budget: Budget, orders: Sequence[float], shares: Sequence[int]) -> list[float]:
    """The largest allowances that are proved here, without padding."""
    total, delta = sum(shares), ideal_delta(budget.delta)
    return [
        allowance(budget.epsilon, delta, order, Fraction(share, total))
        for order, share in zip(orders, shares, strict=True)
    ]


def ideal_delta(delta: float) -> float:
    """The part of delta that the ideal mechanism may use, rounded down."""
    return math.nextafter(float(Fraction(delta) * IDEAL_SHARE), 0.0)


def costs(plan: Plan, orders: Sequence[float]) -> tuple[PhaseCost, ...]:
    """Padded upper bounds of what one step of each phase costs at each order, and of its tail."""
    return tuple(_pad(cost) for cost in certified_costs(plan, orders))


def certified_costs(plan: Plan, orders: Sequence[float]) -> tuple[PhaseCost, ...]:
    """Upper bounds of what one step of each phase costs, without padding.

    Raises:
        InvalidParameter: the tail of the noise has no bound for so little noise (DP053).
    """
    known: dict[tuple[int, float], PhaseCost] = {}
    for phase in plan.phases:
        key = (phase.rate_k, phase.noise_multiplier)
        if key not in known:
            charge = Charge(phase.charge.mechanism, 1)
            tail = truncation_delta(
                [(phase.rate, phase.noise_multiplier, 1)], plan.bounded_values, plan.adjacency is Adjacency.REPLACE_ONE
            )
            if not math.isfinite(tail):
                raise InvalidParameter(
                    f"noise multiplier {phase.noise_multiplier:g} is too small for the bounded tail of secure noise",
                    code="DP053",
                    hint="plan with more noise",
                )
            factor = truncation_factor_log(1, plan.bounded_values)
            known[key] = PhaseCost(step_costs(charge, plan.adjacency, orders), tail, factor)
    return tuple(known[phase.rate_k, phase.noise_multiplier] for phase in plan.phases)


def spent_epsilon(spent: Sequence[int | None], terms: RenyiTerms, delta: float) -> float:
    """An epsilon that holds at all times at once for what was spent (an odometer), at ``delta`` fixed in advance."""
    totals = [None if units is None else Fraction(units, 1 << COST_BITS) for units in spent]
    return running_epsilon_of(totals, terms.orders, terms.weights, ideal_delta(delta))


def admitting_epsilon(spent: Sequence[int | None], terms: RenyiTerms, delta: float) -> float:
    """The smallest epsilon whose filter, **had it been fixed in advance** at ``delta``, admits what was spent.

    Read at one stopping time it is an ex-post guarantee, whatever outputs decided on the steps and the stop
    (docs/filters.md, "Odometer"); it presumes that the tails take no more than their hundredth of ``delta``. About two
    times at once it says nothing; :func:`spent_epsilon` does.
    """
    totals = [None if units is None else Fraction(units, 1 << COST_BITS) for units in spent]
    return admitting_epsilon_of(totals, terms.orders, terms.weights, ideal_delta(delta))


def _pad(cost: PhaseCost) -> PhaseCost:
    up = 1.0 + PAD
    return PhaseCost(
        tuple(None if one is None else one * up for one in cost.costs),
        cost.tail * up,
        cost.factor * up,
    )


def _padded_down(bound: float) -> float:
    return bound - PAD * max(1.0, abs(bound))
