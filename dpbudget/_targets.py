"""Plans for what an attacker may gain, and the largest batch for a budget.

A plan's profile includes the bounded tail of its noise (docs/accounting.md, "Truncated noise"), so that an advantage or
a true positive rate solved for here holds for the noise that is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any

from dpbudget._calibrate import _Draft, _draft
from dpbudget._checks import as_count, as_epochs, as_epsilon, as_noise_multiplier
from dpbudget._guarantee import as_real
from dpbudget._schedule import Schedule, make_schedule
from dpbudget._search import least_count, most_steps, smallest_noise
from dpbudget._truncation import truncation_delta, truncation_factor_log
from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.errors import InvalidParameter, NotComputable
from dpbudget.filters import PortfolioFilter
from dpbudget.mechanisms import Adjacency
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER
from dpbudget.plan import DEFAULT_MAX_PARAMETERS, MAX_SIZE, MAX_STEPS, Phase, Plan
from dpbudget.risk import Profile, power_bound

_NORMAL = NormalDist()


class TailCurve(PrivacyCurve):
    """The profile of a composition together with the bounded tail of its noise.

    The upper end covers the tail; the lower end is that of the mechanism in real arithmetic.

    Args:
        ideal: the profile in real arithmetic.
        parts: phases with the most values of bounded noise in a step of them.
        replace: neighbours differ by the replacement of a record.
    """

    def __init__(
        self, ideal: PrivacyCurve, parts: Sequence[tuple[tuple[Phase, ...], int]], *, replace: bool = False
    ) -> None:
        self._ideal, self._added, self._log_factor = ideal, 0.0, 0.0
        for phases, bounded in parts:
            triples = [(phase.rate, phase.noise_multiplier, phase.steps) for phase in phases]
            self._added += truncation_delta(triples, bounded, replace)
            self._log_factor += truncation_factor_log(sum(phase.steps for phase in phases), bounded)

    def epsilon(self, delta: float) -> Bounds:
        """Epsilon at ``delta``; raises InvalidParameter (DP053) where delta does not cover the tail."""
        left = (delta - self._added) * math.exp(-self._log_factor) * (1.0 - 1e-14)
        if not 0.0 < left < 1.0:
            raise InvalidParameter(
                f"delta {delta:g} does not cover the bounded tail of the noise", code="DP053", hint="raise delta"
            )
        upper, lower = self._ideal.epsilon(left), self._ideal.epsilon(delta)
        return Bounds(min(lower.lower, upper.upper), upper.upper, upper.kind)

    def delta(self, epsilon: float) -> Bounds:
        """Delta at ``epsilon``, at most 1."""
        ideal = self._ideal.delta(epsilon)
        high = ideal.upper * math.exp(min(self._log_factor, 700.0)) * (1.0 + 1e-14) + self._added * (1.0 + 1e-14)
        return Bounds(min(ideal.lower, 1.0), min(high, 1.0), ideal.kind)


def curve_of(plan: Plan) -> PrivacyCurve:
    """The certified profile of a plan, bounded noise tail included."""
    return joint_curve_of((plan,))


def joint_curve_of(plans: Sequence[Plan]) -> PrivacyCurve:
    """The certified profile of plans of one adjacency that compose jointly, bounded noise tails included."""
    charges = [charge for plan in plans for charge in plan.charges]
    ideal = PortfolioFilter().accountant_for(plans).curve(charges, plans[0].adjacency)
    parts = [(plan.phases, plan.bounded_values) for plan in plans]
    return TailCurve(ideal, parts, replace=plans[0].adjacency is Adjacency.REPLACE_ONE)


# ---------------------------------------------------------------------------------------------------------------------
# Targets of an attack
# ---------------------------------------------------------------------------------------------------------------------


def calibrate_to_attack(
    *,
    advantage: float | None = None,
    tpr: float | None = None,
    fpr: float | None = None,
    delta: float | None,
    schedule: Schedule,
    clip_norm: float,
    adjacency: str,
    accountant: str,
    max_parameters: int,
    noise: str = "secure",
) -> Plan:
    """The plan with the smallest noise whose certified advantage, or TPR at an FPR, is at most the target.

    Guarantee: the upper bound of the plan's own profile meets the target; its claim is the epsilon of that noise.

    Raises:
        InvalidParameter: not exactly one target (DP064), or one out of its range (DP009).
        NotComputable: no noise multiplier up to 1e6 reaches the target (DP004).
    """
    goal = _goal(advantage, tpr, fpr)
    draft = _draft(schedule, delta, clip_norm, adjacency, accountant, max_parameters, noise)

    def profile(sigma: float) -> Profile:
        phase = Phase(rate_k=schedule.rate_k, noise_multiplier=sigma, steps=schedule.steps)
        ideal = draft.accountant.curve([phase.charge], draft.adjacency)
        replaced = draft.adjacency is Adjacency.REPLACE_ONE
        return Profile(TailCurve(ideal, [((phase,), draft.bounded_values)], replace=replaced).delta)

    sigma = _smallest(profile, goal, _guess(schedule, goal.mu))
    if sigma is None:
        raise NotComputable(
            f"no noise multiplier up to {MAX_NOISE_MULTIPLIER:g} brings the attack down to {goal.target:g}",
            code="DP004",
            hint="pass fewer epochs, a smaller batch or a weaker target",
        )
    return draft.plan(sigma)


def _smallest(profile: Callable[[float], Profile], goal: _Goal, guess: float) -> float | None:
    """The smallest noise at the Gaussian's threshold, then at the threshold that is best for that noise.

    Each threshold bounds the attack, and near the best one the bound changes to second order only, so that a full
    search at every noise multiplier would gain nothing.
    """
    x = goal.mu * _NORMAL.inv_cdf(1.0 - goal.fpr) - 0.5 * goal.mu * goal.mu if goal.fpr > 0.0 else 0.0

    def solve(x: float, guess: float) -> float | None:
        return smallest_noise(lambda sigma: power_bound(profile(sigma), goal.fpr, x), goal.target, guess)

    first = solve(x, guess)
    if goal.fpr == 0.0 or first is None:
        return first
    second = solve(_settle(profile(first), goal.fpr, x), first)
    return first if second is None else min(first, second)


def _settle(profile: Profile, fpr: float, x: float) -> float:
    """A threshold near the best one: two parabolas through three points each."""
    for width in (0.2, 0.05):
        low, here, high = (power_bound(profile, fpr, x + shift) for shift in (-width, 0.0, width))
        bend = low - 2.0 * here + high
        shift = 0.5 * width * (low - high) / bend if bend > 0.0 else math.copysign(math.inf, low - high)
        x += min(max(shift, -5.0 * width), 5.0 * width)
    return x


@dataclass(frozen=True)
class _Goal:
    """An attack to be bounded by ``target``: TPR at ``fpr``, or the advantage where fpr is 0 (threshold 1).

    Attributes:
        mu: the Gaussian test N(0, 1) against N(mu, 1) that reaches exactly the target.
    """

    target: float
    fpr: float
    mu: float


def _goal(advantage: float | None, tpr: float | None, fpr: float | None) -> _Goal:
    if (advantage is None) == (tpr is None) or (tpr is None) != (fpr is None):
        raise InvalidParameter(
            "the target is either advantage, or tpr together with fpr",
            code="DP064",
            hint="pass advantage=0.1, or tpr=0.05 and fpr=0.01",
        )
    if advantage is not None:
        target = _inside("advantage", advantage)
        return _Goal(target, 0.0, 2.0 * _NORMAL.inv_cdf((1.0 + target) / 2.0))
    target, rate = _inside("tpr", tpr), _inside("fpr", fpr)
    if target <= rate:
        raise InvalidParameter(
            f"a guess without any output has tpr = fpr, so nothing keeps tpr at {target:g} for fpr {rate:g}",
            hint="pass a tpr above the fpr",
        )
    return _Goal(target, rate, _NORMAL.inv_cdf(target) - _NORMAL.inv_cdf(rate))


def _inside(name: str, value: object) -> float:
    number = as_real(value)
    if number is None or not 0.0 < number < 1.0:
        raise InvalidParameter(
            f"{name} must lie strictly between 0 and 1, got {value!r}", hint=f"pass {name} as a number such as 0.1"
        )
    return number


def _guess(schedule: Schedule, mu: float) -> float:
    """The noise whose central limit, mu = q sqrt(T (exp(1/sigma^2) - 1)) (Bu et al. 2020), has this mu."""
    if schedule.rate_k == 1 << 64:
        sigma = math.sqrt(schedule.steps) / mu
    else:
        sigma = 1.0 / math.sqrt(math.log1p(mu * mu / schedule.rate / schedule.rate / schedule.steps))
    return min(max(sigma, MIN_NOISE_MULTIPLIER), MAX_NOISE_MULTIPLIER)


# ---------------------------------------------------------------------------------------------------------------------
# The largest batch
# ---------------------------------------------------------------------------------------------------------------------


def max_batch_size(
    *,
    epsilon: float,
    noise_multiplier: float,
    dataset_size: int,
    steps: int | None = None,
    epochs: float | Fraction | None = None,
    delta: float | None = None,
    adjacency: str = "add-remove",
    accountant: str = "prv",
    max_parameters: int | None = None,
    noise: str = "secure",
) -> int:
    """The largest expected batch size, at most ``dataset_size``, whose plan claims at most ``epsilon``; 0 if none.

    The returned size was itself seen to fit. Arguments and errors are those of ``calibrate``.
    """
    target, sigma = as_epsilon(epsilon), as_noise_multiplier(noise_multiplier)
    size = as_count("dataset size", dataset_size, MAX_SIZE)
    extra: dict[str, Any] = {} if max_parameters is None else {"max_parameters": max_parameters}

    def draft(batch: int) -> _Draft:
        schedule = make_schedule(batch_size=batch, dataset_size=size, steps=steps, epochs=epochs)
        return _draft(schedule, delta, 1.0, adjacency, accountant, noise=noise, **{"max_parameters": 1 << 30, **extra})

    def fits(batch: int) -> bool:
        return batch <= size and draft(batch).claim(sigma) <= target

    whole = draft(size)
    per_rate = math.sqrt(2.0 * whole.schedule.steps * math.log(1.25 / whole.delta)) / sigma
    # With epochs fixed the steps shrink as the batch grows, and epsilon is about sqrt(rate); else about the rate.
    share = target / per_rate if epochs is None else (target / per_rate) ** 2
    return most_steps(fits, int(min(max(share * size, 1.0), size, 1e9)))


# ---------------------------------------------------------------------------------------------------------------------
# The smallest dataset
# ---------------------------------------------------------------------------------------------------------------------


def min_dataset_size(
    *,
    epsilon: float,
    noise_multiplier: float,
    batch_size: int,
    steps: int | None = None,
    epochs: float | Fraction | None = None,
    delta: float | None = None,
    adjacency: str = "add-remove",
    accountant: str = "prv",
    max_parameters: int = DEFAULT_MAX_PARAMETERS,
    noise: str = "secure",
) -> int:
    """The smallest public dataset size, at least ``batch_size``, whose plan claims at most ``epsilon``; 0 if none.

    Without ``delta`` each size has its own default. The returned size was itself seen to fit. Arguments and errors are
    those of ``calibrate``.
    """
    target, sigma = as_epsilon(epsilon), as_noise_multiplier(noise_multiplier)
    batch = as_count("batch size", batch_size, MAX_SIZE)

    def draft(size: int) -> _Draft:
        schedule = make_schedule(batch_size=batch, dataset_size=size, steps=steps, epochs=epochs)
        return _draft(schedule, delta, 1.0, adjacency, accountant, max_parameters, noise)

    def fits(size: int) -> bool:
        return draft(size).claim(sigma) <= target

    whole = draft(batch)
    largest = MAX_SIZE if epochs is None else min(MAX_SIZE, max(int(MAX_STEPS * batch / as_epochs(epochs)), batch))
    # Epsilon is about the rate, or its root where epochs are given, since then the steps grow with the dataset.
    excess = math.sqrt(2.0 * whole.schedule.steps * math.log(1.25 / whole.delta)) / sigma / target
    start = batch * (excess if epochs is None else excess * excess)
    return least_count(fits, int(min(max(start, batch), largest)), batch, largest)
