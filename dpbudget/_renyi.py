"""The numbers of an ``rdp`` ledger, which a filter computes and the rules only add: terms and costs at Renyi orders."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

#: Units of Renyi divergence and of the tails: costs of 1e-15 keep 15 digits, tails of 1e-38 keep 22.
COST_BITS, TAIL_BITS = 100, 200
MAX_ORDERS, MAX_SHARE = 64, 1_000_000
#: The tails may take this part of delta, and multiply what the ideal mechanism costs by at most exp of it; the
#: allowances are those of IDEAL_SHARE of delta: exp(1/100) * 98/100 + 1/100 < 1.
TAIL_SHARE, IDEAL_SHARE = Fraction(1, 100), Fraction(98, 100)


@dataclass(frozen=True)
class RenyiTerms:
    """What the owner fixes: orders > 1, the share of delta of each (relative to their sum), and its allowance."""

    orders: tuple[float, ...]
    shares: tuple[int, ...]
    allowances: tuple[float, ...]

    @property
    def weights(self) -> tuple[Fraction, ...]:
        """The shares as fractions with sum 1."""
        total = sum(self.shares)
        return tuple(Fraction(share, total) for share in self.shares)


@dataclass(frozen=True)
class PhaseCost:
    """Upper bounds of what one step of a phase costs.

    Attributes:
        costs: Renyi divergence at each order, in the worse direction; None where no bound is known.
        tail: additive delta of the bounded tail of the noise.
        factor: logarithm of the factor on the ideal mechanism's delta.
    """

    costs: tuple[float | None, ...]
    tail: float
    factor: float
