"""The Renyi filter: every step may be chosen after seeing the outputs of the ones before.

Orders a_1 < ... < a_k and weights w_i with sum 1 are fixed first. With c = a - 1 and kappa of Canonne, Kamath and
Steinke (2020, Proposition 12) order a_i has the allowance

    B_i = eps + (log(w_i delta) - log kappa(c_i)) / c_i,

and a charge is admitted while *some* order keeps what was spent within its allowance. Then everything that is admitted
is (eps, delta)-DP, however it is chosen (docs/filters.md; Feldman and Zrnic 2021 for one order). The same rule with all
weights 1 has no proof and is not offered.

What is spent is counted in integers, in units of 2^-100, rounded up once per distinct mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from types import MappingProxyType

from dpbudget._numerics import UNIT, log_kappa
from dpbudget.errors import BudgetExceeded, InvalidParameter
from dpbudget.mechanisms import Adjacency, Charge, Direction, DominatingPair
from dpbudget.plan import Budget

#: Beyond it no float is; what costs so much bounds nothing.
_HUGE = Fraction(2) ** 1023
#: One unit of Renyi divergence is 2^-100: a step of rate 1e-7 costs about 1e-15, which leaves 15 digits.
UNITS = 1 << 100
#: Orders for delta between 1e-3 and 1e-12; equal weights cost log(15)/(a - 1) of epsilon against one best order.
DEFAULT_ORDERS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 14.0, 20.0, 32.0, 64.0, 256.0)


@dataclass(frozen=True)
class Spent:
    """How often each dominating pair was used; a value, compared by content."""

    counts: Mapping[DominatingPair, int] = field(default_factory=lambda: MappingProxyType({}))

    def __add__(self, charges: object) -> Spent:
        """What is spent after more charges, given as a mapping of pairs to counts."""
        if not isinstance(charges, Mapping):
            return NotImplemented
        counts = dict(self.counts)
        for pair, count in charges.items():
            counts[pair] = counts.get(pair, 0) + count
        return Spent(MappingProxyType(counts))


class RDPFilter:
    """Admits charges while a fully adaptive composition stays (epsilon, delta)-DP.

    Args:
        budget: epsilon and delta of everything that is ever admitted.
        adjacency: neighbouring relation of all charges.
        orders: Renyi orders > 1, increasing, fixed in advance.
        weights: share of delta of each order, positive with sum exactly 1; equal if not given.

    Raises:
        InvalidParameter: orders or weights are no such numbers (DP009).
    """

    def __init__(
        self,
        budget: Budget,
        adjacency: Adjacency = Adjacency.ADD_REMOVE,
        orders: Sequence[float] = DEFAULT_ORDERS,
        weights: Sequence[Fraction] | None = None,
    ) -> None:
        self.budget, self.adjacency = budget, adjacency
        self.orders = _checked_orders(orders)
        self.weights = _checked_weights(weights, len(self.orders))
        self._allowances = tuple(
            math.floor(Fraction(allowance(budget.epsilon, budget.delta, order, weight)) * UNITS)
            for order, weight in zip(self.orders, self.weights, strict=True)
        )
        self._costs: dict[DominatingPair, tuple[Fraction | None, ...]] = {}

    def admit(self, spent: Spent, charges: Sequence[Charge]) -> Spent:
        """What is spent after ``charges``.

        Raises:
            BudgetExceeded: no order has room; the message says how many uses of a single charge would fit (DP050).
            InvalidParameter: a count is negative or no integer (DP009).
            NotComputable: a mechanism has no pair under the filter's adjacency (DP062).
        """
        from dpbudget.accountants._phases import uses_of

        uses = uses_of(charges, self.adjacency)
        after = spent + uses
        if self._fits(after):
            return after
        raise BudgetExceeded(
            f"the charges do not fit epsilon {self.budget.epsilon:g} at delta {self.budget.delta:g} "
            "beside what is spent at any Renyi order",
            hint=self._what_fits(spent, uses),
        )

    def units(self, spent: Spent) -> tuple[int | None, ...]:
        """What is spent at each order, in units of 2^-100, rounded up; None where an order bounds nothing."""
        totals: list[int | None] = [0] * len(self.orders)
        for pair, count in spent.counts.items():
            for index, cost in enumerate(self._cost(pair)):
                total = totals[index]
                totals[index] = None if cost is None or total is None else total + math.ceil(count * cost * UNITS)
        return tuple(totals)

    def epsilon(self, spent: Spent, delta: float | None = None) -> float:
        """The smallest epsilon for which this filter, **had it been fixed in advance**, admits what is spent.

        An upper bound of what a composition costs whose budget was that epsilon. At one stopping time, chosen from the
        outputs, it is an ex-post guarantee although it is random: E (1 - e^(epsilon - L))_+ <= delta (docs/filters.md).
        No statement about all times at once.
        """
        return self._odometer(spent, self.budget.delta if delta is None else delta, log_kappa)

    def running_epsilon(self, spent: Spent, delta: float | None = None) -> float:
        """An epsilon that holds at all times at once (an odometer), larger than :meth:`epsilon`.

        With probability at least 1 - delta the privacy loss is below it at every time, by Ville's inequality for the
        supermartingales e^{c (L - spent)} (docs/filters.md; Whitehouse et al. 2023).
        """
        return self._odometer(spent, self.budget.delta if delta is None else delta, lambda _: 0.0)

    def _odometer(self, spent: Spent, delta: float, log_constant: Callable[[float], float]) -> float:
        totals = [None if total is None else Fraction(total, UNITS) for total in self.units(spent)]
        best = _least_epsilon(totals, self.orders, self.weights, delta, log_constant)
        return max(best, 0.0) if any(spent.counts.values()) else 0.0

    def _fits(self, spent: Spent) -> bool:
        return any(
            total is not None and total <= allowance
            for total, allowance in zip(self.units(spent), self._allowances, strict=True)
        )

    def _cost(self, pair: DominatingPair) -> tuple[Fraction | None, ...]:
        """Upper bounds of one use's Renyi divergence at each order, the larger direction."""
        if pair not in self._costs:
            self._costs[pair] = _costs_of(pair, self.orders)
        return self._costs[pair]

    def _what_fits(self, spent: Spent, uses: Mapping[DominatingPair, int]) -> str:
        if len(uses) != 1:
            return "admit fewer charges, or charges with more noise"
        ((pair, count),) = uses.items()
        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(spent + {pair: middle}) else (low, middle)
        return f"{low} of the {count} uses would fit" if low else "not one use fits; add noise or grant more budget"


def step_costs(charge: Charge, adjacency: Adjacency, orders: Sequence[float]) -> tuple[float | None, ...]:
    """Upper bounds of a charge's Renyi divergence at each order, the larger direction; None where nothing is known.

    Raises:
        NotComputable: the mechanism has no pair under this adjacency (DP062).
    """
    from dpbudget.accountants._phases import uses_of

    totals: list[Fraction | None] = [Fraction()] * len(orders)
    for pair, count in uses_of([charge], adjacency).items():
        for index, cost in enumerate(_costs_of(pair, orders)):
            total = totals[index]
            totals[index] = None if cost is None or total is None else total + count * cost
    return tuple(None if total is None else _float_up(total) for total in totals)


def running_epsilon_of(
    totals: Sequence[Fraction | None], orders: Sequence[float], weights: Sequence[Fraction], delta: float
) -> float:
    """The odometer of :meth:`RDPFilter.running_epsilon` for given totals at each order; 0 for nothing spent."""
    if not any(total is None or total for total in totals):
        return 0.0
    return max(_least_epsilon(totals, orders, weights, delta, lambda _: 0.0), 0.0)


def admitting_epsilon_of(
    totals: Sequence[Fraction | None], orders: Sequence[float], weights: Sequence[Fraction], delta: float
) -> float:
    """The odometer of :meth:`RDPFilter.epsilon` for given totals at each order; 0 for nothing spent."""
    if not any(total is None or total for total in totals):
        return 0.0
    return max(_least_epsilon(totals, orders, weights, delta, log_kappa), 0.0)


def _least_epsilon(
    totals: Sequence[Fraction | None],
    orders: Sequence[float],
    weights: Sequence[Fraction],
    delta: float,
    log_constant: Callable[[float], float],
) -> float:
    """Min over orders of total + (log constant - log(weight delta)) / (order - 1), rounded up."""
    best = math.inf
    for order, weight, total in zip(orders, weights, totals, strict=True):
        if total is None:
            continue
        c = order - 1.0
        used = _up(float(total)) if total < _HUGE else math.inf
        parts = (log_constant(c), math.log(float(weight)), math.log(delta))
        value = used + (parts[0] - parts[1] - parts[2]) / c
        best = min(best, value + 64.0 * UNIT * (used + sum(map(abs, parts)) / c))
    return best


def _costs_of(pair: DominatingPair, orders: Sequence[float]) -> tuple[Fraction | None, ...]:
    from dpbudget.accountants._moment_bound import MomentBound
    from dpbudget.accountants._phases import use_of

    directions: tuple[Direction, ...] = ("remove",) if pair.symmetric else ("remove", "add")
    bounds = [MomentBound([use_of(pair, 1)], direction) for direction in directions]
    return tuple(_fraction_up(max(bound(order - 1.0) for bound in bounds), order) for order in orders)


def _float_up(value: Fraction) -> float:
    nearest = float(value)
    return nearest if nearest >= value else _up(nearest)


def allowance(epsilon: float, delta: float, order: float, weight: Fraction) -> float:
    """B_i of one order and weight (docs/filters.md), rounded down."""
    c = order - 1.0
    parts = (math.log(float(weight)), math.log(delta), log_kappa(c))
    value = epsilon + (parts[0] + parts[1] - parts[2]) / c
    return value - 64.0 * UNIT * (epsilon + sum(map(abs, parts)) / c)


def _fraction_up(log_moment: float, order: float) -> Fraction | None:
    """Log moment / (order - 1) as a fraction that is not below it; None where it is infinite."""
    if not math.isfinite(log_moment):
        return None
    return Fraction(_up(log_moment)) / Fraction(order - 1.0)


def _up(value: float) -> float:
    return math.nextafter(value, math.inf)


def _checked_orders(orders: Sequence[float]) -> tuple[float, ...]:
    values = tuple(orders)
    fine = bool(values) and all(
        isinstance(a, int | float) and not isinstance(a, bool) and 1.0 < a < 1e6 for a in values
    )
    if not fine or any(b <= a for a, b in pairwise(values)):
        raise InvalidParameter(
            f"Renyi orders must be increasing numbers in (1, 1e6), got {values!r}", code="DP009", hint="pass (2, 4, 8)"
        )
    return tuple(float(a) for a in values)


def _checked_weights(weights: Sequence[Fraction] | None, count: int) -> tuple[Fraction, ...]:
    values = tuple([Fraction(1, count)] * count if weights is None else weights)
    if len(values) != count or not all(isinstance(w, Fraction) and w > 0 for w in values) or sum(values) != 1:
        raise InvalidParameter(
            f"weights must be {count} positive fractions with sum 1, got {values!r}",
            code="DP009",
            hint="pass fractions.Fraction values that add up to exactly 1",
        )
    return values
