"""The account of an ``rdp`` ledger: what every Renyi order has spent, in integers, without any privacy arithmetic.

The owner signs orders, shares of delta and allowances, and with every plan a table of what one step costs at each
order. From then on all is addition: each phase of each run has spent ``ceil(count * cost * 2^100)`` units at an order,
and a lease is admitted while *some* order stays within its allowance. The bounded tail of the noise has two accounts
of its own, which must both hold. That the signed numbers are bounds is what a verifier of epsilon recomputes
(docs/filters.md, docs/accounting.md).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

from dpbudget._record import float_to_hex, hex_to_float
from dpbudget._renyi import COST_BITS, TAIL_BITS, TAIL_SHARE, PhaseCost, RenyiTerms
from dpbudget.errors import Tampered
from dpbudget.plan import Plan


def costs_to_jsonable(table: Sequence[PhaseCost]) -> dict[str, Any]:
    """The three columns that the statement of a plan carries in an ``rdp`` ledger."""
    return {
        "costs": [[None if cost is None else float_to_hex(cost) for cost in phase.costs] for phase in table],
        "factors": [float_to_hex(phase.factor) for phase in table],
        "tails": [float_to_hex(phase.tail) for phase in table],
    }


def costs_from_jsonable(columns: Mapping[str, Any], *, phases: int, orders: int) -> tuple[PhaseCost, ...]:
    """Inverse of :func:`costs_to_jsonable`; raises :class:`Tampered` (DP082) for a table of another shape."""
    costs, tails, factors = (columns.get(name) for name in ("costs", "tails", "factors"))
    for column in (costs, tails, factors):
        if not isinstance(column, list) or len(column) != phases:
            raise Tampered(f"costs, tails and factors have one entry for each of the {phases} phases", code="DP082")
    table = []
    for row, tail, factor in zip(costs or (), tails or (), factors or (), strict=True):
        if not isinstance(row, list) or len(row) != orders:
            raise Tampered(f"every phase states its cost at the {orders} orders of the ledger", code="DP082")
        known = tuple(None if cost is None else _positive(cost) for cost in row)
        table.append(PhaseCost(known, _positive(tail), _positive(factor)))
    return tuple(table)


def _positive(text: object) -> float:
    number = hex_to_float(text) if isinstance(text, str) else -1.0
    if number < 0.0:
        raise Tampered("a cost is a float that is not negative", code="DP082")
    return number


@dataclass
class RenyiAccount:
    """What was spent, per phase of each run, and what every order may spend in all; change only a :meth:`copy`.

    Attributes:
        terms: as the owner fixed them, with the newest allowances.
        delta: the total delta, of which the tails take at most a hundredth.
        spent: units at each order, None where an order bounds nothing any more.
        tail, factor: units of the two accounts of the tail.
        counts: steps charged by (run, phase).
    """

    terms: RenyiTerms
    delta: float
    spent: list[int | None]
    tail: int = 0
    factor: int = 0
    counts: dict[tuple[str, int], int] = field(default_factory=dict)

    @classmethod
    def fresh(cls, terms: RenyiTerms, delta: float) -> RenyiAccount:
        """Nothing spent."""
        return cls(terms, delta, [0] * len(terms.orders))

    def copy(self) -> RenyiAccount:
        """An account of its own."""
        return replace(self, spent=list(self.spent), counts=dict(self.counts))

    @property
    def fits(self) -> bool:
        """Whether some order is within its allowance and the tails are within theirs."""
        return self.tails_fit(self.delta) and any(
            spent is not None and spent <= _floor(Fraction(allowance), COST_BITS)
            for spent, allowance in zip(self.spent, self.terms.allowances, strict=True)
        )

    def tails_fit(self, delta: float) -> bool:
        """Whether the tails are within their hundredth of ``delta``."""
        most = _floor(Fraction(delta) * TAIL_SHARE, TAIL_BITS)
        return self.tail <= most and self.factor <= _floor(TAIL_SHARE, TAIL_BITS)

    def charge(self, run_id: str, uses: Sequence[tuple[int, int, PhaseCost]]) -> None:
        """Add ``uses``: (phase, further steps, cost of one step) of one run."""
        for phase, steps, cost in uses:
            old = self.counts.get((run_id, phase), 0)
            new = self.counts[run_id, phase] = old + steps
            self.tail += _grown(cost.tail, old, new, TAIL_BITS)
            self.factor += _grown(cost.factor, old, new, TAIL_BITS)
            for index, one in enumerate(cost.costs):
                total = self.spent[index]
                self.spent[index] = None if one is None or total is None else total + _grown(one, old, new, COST_BITS)

    def grant(self, allowances: tuple[float, ...], delta: float) -> None:
        """Go on under new totals."""
        self.terms, self.delta = replace(self.terms, allowances=allowances), delta


def uses_of(plan: Plan, costs: tuple[PhaseCost, ...], first: int, end: int) -> list[tuple[int, int, PhaseCost]]:
    """Steps ``first`` to ``end - 1`` of a plan as (phase, steps, cost of a step)."""
    ends = list(accumulate(phase.steps for phase in plan.phases))
    uses, at = [], first
    while at < end:
        phase = bisect_right(ends, at)
        until = min(end, ends[phase])
        uses.append((phase, until - at, costs[phase]))
        at = until
    return uses


def steps_that_fit(account: RenyiAccount, run_id: str, plan: Plan, costs: tuple[PhaseCost, ...], most: int) -> int:
    """The largest number of further steps of a run, at most ``most``, for which some order has room."""
    first = sum(account.counts.get((run_id, phase), 0) for phase in range(len(plan.phases)))

    def fits(steps: int) -> bool:
        tried = account.copy()
        tried.charge(run_id, uses_of(plan, costs, first, first + steps))
        return tried.fits

    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _grown(cost: float, old: int, new: int, bits: int) -> int:
    """ceil(new * cost * 2^bits) - ceil(old * cost * 2^bits), exactly: a phase is rounded up once, not once a lease."""
    numerator, denominator = cost.as_integer_ratio()
    numerator <<= bits
    return -(-new * numerator // denominator) + (-old * numerator // denominator)


def _floor(value: Fraction, bits: int) -> int:
    return (value.numerator << bits) // value.denominator
