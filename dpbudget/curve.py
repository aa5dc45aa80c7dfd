"""Answers of an accountant: two-sided bounds and privacy curves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Literal

Kind = Literal["certified", "numerical"]


@dataclass(frozen=True)
class Bounds:
    """A two-sided answer; ``upper`` is the guarantee, ``lower`` shows how much of it could be slack.

    ``certified`` means that every error term of both ends is bounded (assuming IEEE arithmetic and elementary functions
    within 8 ulp); ``numerical`` means that some constant is an estimate, and such an interval is never claimed.
    """

    lower: float
    upper: float
    kind: Kind = "certified"

    def __post_init__(self) -> None:
        # An interval with NaN or crossed ends would be a guarantee about nothing.
        if not (self.lower <= self.upper) or math.isnan(self.lower) or math.isnan(self.upper):
            raise ArithmeticError(f"bounds [{self.lower!r}, {self.upper!r}] are not an interval")

    def __str__(self) -> str:
        """The guarantee, and below it what is known to be spent; both rounded outward to six digits."""
        return f"{round_up(self.upper)} (at least {round_down(self.lower)})"

    @property
    def width(self) -> float:
        """Upper - lower; infinite when nothing is known above."""
        return self.upper - self.lower


class PrivacyCurve(ABC):
    """The privacy profile of a composition, as far as an accountant can bound it.

    An accountant bounds ``epsilon`` and ``delta``; what they mean for an attacker follows (``dpbudget.risk``).
    """

    @abstractmethod
    def epsilon(self, delta: float) -> Bounds:
        """Smallest epsilon >= 0 such that the composition is (epsilon, delta)-DP in both directions; 0 < delta < 1."""

    @abstractmethod
    def delta(self, epsilon: float) -> Bounds:
        """Smallest delta such that the composition is (epsilon, delta)-DP in both directions; epsilon >= 0."""

    def profile(self, epsilons: Sequence[float]) -> tuple[Bounds, ...]:
        """Delta at each epsilon."""
        return tuple(self.delta(epsilon) for epsilon in epsilons)

    def advantage(self) -> Bounds:
        """Largest TPR - FPR of any membership attack: the total variation distance, delta(0)."""
        return self.delta(0.0)

    def trade_off(self, alphas: Sequence[float]) -> tuple[Bounds, ...]:
        """Smallest type II error at each type I error; the *lower* end is the guarantee (Dong, Roth and Su 2022)."""
        from dpbudget import risk  # it returns Bounds, so that this module comes first

        profile = risk.Profile(self.delta)
        return tuple(risk.trade_off(profile, alpha) for alpha in alphas)

    def tpr_at(self, fpr: float) -> Bounds:
        """Largest true positive rate of a membership attack at false positive rate ``fpr``, in [0, 1]."""
        from dpbudget import risk

        return risk.true_positive_rate(risk.Profile(self.delta), fpr)

    def bayes_risk(self, prior: float) -> Bounds:
        """Probability that the best guess of membership is right, where ``prior`` is that of membership."""
        from dpbudget import risk

        return risk.bayes_success(risk.Profile(self.delta), prior)

    def reconstruction(self, baseline: float) -> Bounds:
        """Success probability of reconstructing a record that a guess without the output gets with ``baseline``.

        It is at most the true positive rate at that false positive rate, 1 - beta(baseline) (Hayes, Mahloujifar and
        Balle 2023; Kaissis et al. 2023; the notion is that of Balle, Cherubin and Hayes 2022). The lower end
        belongs to the pair; an actual reconstruction may succeed less often.
        """
        from dpbudget import risk

        return risk.true_positive_rate(risk.Profile(self.delta), risk.as_probability("baseline", baseline))


def round_up(value: float, digits: int = 6) -> str:
    """An upper bound in at most ``digits`` decimal digits, never rounded below it; every printed guarantee uses it."""
    return _directed(value, digits, ROUND_CEILING)


def round_down(value: float, digits: int = 6) -> str:
    """A lower bound in at most ``digits`` decimal digits, never rounded above it."""
    return _directed(value, digits, ROUND_FLOOR)


def show_delta(delta: float) -> str:
    """A delta in six digits, never rounded below it: a guarantee at a smaller delta than the proved one is none."""
    return f"{float(round_up(delta)):g}"


def _directed(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return str(value)
    # The shortest decimal that reads back as this float stands for it: 3.1 is shown as 3.1 and not as 3.100001.
    shown = Context(prec=digits, rounding=rounding).create_decimal(Decimal(repr(value))).normalize()
    return f"{shown:f}" if shown == 0 or 1e-4 <= abs(shown) < 1e9 else f"{shown:g}"
