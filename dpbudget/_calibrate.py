"""From a budget to a plan: the smallest noise, the most steps, and the epsilon or delta of a schedule.

Everything here is pure. Questions about a *mechanism* (:func:`epsilon_of`, :func:`delta_of`) are answered in real
arithmetic. The claim of a *plan* also covers the bounded tail of the noise generator, so it is taken at
``plan.ideal_delta(delta)`` and rounded up by :func:`~dpbudget.plan.claimed_epsilon`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from dpbudget._checks import (
    AccountantName,
    as_accountant,
    as_adjacency,
    as_any_accountant,
    as_clip_norm,
    as_count,
    as_delta,
    as_epsilon,
    as_noise_mode,
    as_noise_multiplier,
    as_rate,
    as_unit,
)
from dpbudget._schedule import Schedule, delta_or_default, make_schedule, warn_of_delta
from dpbudget._search import most_steps, quick_noise, smallest_noise
from dpbudget.accountants.base import Accountant
from dpbudget.curve import Bounds, PrivacyCurve, round_up
from dpbudget.errors import BudgetExceeded, DPBudgetError, InvalidParameter, NotComputable
from dpbudget.filters import PortfolioFilter
from dpbudget.filters.portfolio import FULL
from dpbudget.mechanisms import Adjacency, Charge, Gaussian, PoissonSampled
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER
from dpbudget.plan import (
    DEFAULT_MAX_PARAMETERS,
    MAX_PHASES,
    MAX_STEPS,
    Claim,
    NoiseMode,
    Phase,
    Plan,
    Unit,
    claimed_epsilon,
    ideal_delta_of,
    joint_ideal_delta,
)


def _load(name: str) -> Accountant:
    from dpbudget.accountants import get_accountant  # numpy and mpmath load on the first number, not on import

    return get_accountant(name)


# ---------------------------------------------------------------------------------------------------------------------
# Questions about a mechanism
# ---------------------------------------------------------------------------------------------------------------------


def make_phases(phases: Sequence[tuple[float, float, int]]) -> tuple[Phase, ...]:
    """Checked phases from (sampling rate, noise multiplier, steps); raises InvalidParameter (DP005 to DP009)."""
    if not 1 <= len(phases) <= MAX_PHASES:
        raise InvalidParameter(
            f"a schedule has between 1 and {MAX_PHASES} phases, got {len(phases)}",
            code="DP009",
            hint="pass one (sampling rate, noise multiplier, steps) per phase",
        )
    return tuple(
        Phase(
            rate_k=as_rate(rate), noise_multiplier=as_noise_multiplier(sigma), steps=as_count("steps", steps, MAX_STEPS)
        )
        for rate, sigma, steps in phases
    )


def epsilon_of(
    phases: Sequence[tuple[float, float, int]],
    *,
    delta: float,
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    accountant: str = "prv",
) -> Bounds:
    """Bounds of epsilon at ``delta`` for a schedule of (sampling rate, noise multiplier, steps) phases.

    Guarantee: the composition of the Poisson-sampled Gaussian mechanisms, in real arithmetic, is (upper, delta)-DP, and
    no epsilon below ``lower`` is true for the accountant's dominating pair. The bounded tail of a noise generator is
    not part of this question; the claim of a plan includes it.

    Raises:
        InvalidParameter: a value is out of range; the message names it.
        NotComputable: the accountant cannot bound this question (DP062, DP063).
    """
    charges = [phase.charge for phase in make_phases(phases)]
    delta, relation = as_delta(delta), as_adjacency(adjacency)
    return _load(as_any_accountant(accountant)).curve(charges, relation).epsilon(delta)


def delta_of(
    phases: Sequence[tuple[float, float, int]],
    *,
    epsilon: float,
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    accountant: str = "prv",
) -> Bounds:
    """Bounds of delta at ``epsilon`` for a schedule of phases; the counterpart of :func:`epsilon_of`.

    Raises:
        InvalidParameter: a value is out of range; the message names it.
        NotComputable: the accountant cannot bound this question (DP062, DP063).
    """
    charges = [phase.charge for phase in make_phases(phases)]
    epsilon, relation = as_epsilon(epsilon), as_adjacency(adjacency)
    return _load(as_any_accountant(accountant)).curve(charges, relation).delta(epsilon)


# ---------------------------------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    """A plan that lacks its noise multiplier and its claim."""

    schedule: Schedule
    delta: float
    clip_norm: float
    adjacency: Adjacency
    accountant: Accountant
    accountant_name: AccountantName
    max_parameters: int
    noise: NoiseMode = "secure"
    beside: tuple[Plan, ...] = ()
    unit: Unit = "example"

    @property
    def bounded_values(self) -> int:
        """As :attr:`~dpbudget.plan.Plan.bounded_values`."""
        return self.max_parameters if self.noise == "secure" else 0

    def plan(self, sigma: float, steps: int | None = None) -> Plan:
        """The plan with this noise, and the claim that its accountant certifies; infinite bounds raise NotComputable.

        Raises:
            InvalidParameter: delta does not cover the bounded tail of the noise (DP053).
            NotComputable: the accountant has no certified finite answer (DP062, DP063).
        """
        phase = Phase(rate_k=self.schedule.rate_k, noise_multiplier=sigma, steps=steps or self.schedule.steps)
        stated = Claim(
            epsilon=0.0,
            delta=self.delta,
            accountant=self.accountant_name,
            accountant_version=self.accountant.version,
        )
        plan = Plan(
            phases=(phase,),
            clip_norm=self.clip_norm,
            adjacency=self.adjacency,
            unit=self.unit,
            nominal_size=self.schedule.nominal_size,
            noise=self.noise,
            max_parameters=self.max_parameters,
            claim=stated,
        )
        bounds = self.accountant.curve(plan.charges, plan.adjacency).epsilon(joint_ideal_delta((plan,), self.delta))
        if bounds.kind != "certified" or not math.isfinite(bounds.upper):
            raise NotComputable(
                f"the {self.accountant_name} accountant has no certified finite epsilon at noise multiplier {sigma:g}, "
                f"rate {phase.rate:.4g} and {phase.steps} steps",
                hint="try the accountant rdp, or a larger delta",
            )
        return plan.replace(claim=stated.replace(epsilon=claimed_epsilon(bounds.upper)))

    def curve(self, sigma: float) -> PrivacyCurve:
        """The curve of the mechanism with this noise."""
        return self.accountant.curve([_charge(self.schedule, sigma)], self.adjacency)

    def ideal_delta(self, sigma: float) -> float:
        """What is left of delta after the bounded tail of this noise; the smallest float where nothing is."""
        phases = [(self.schedule.rate, sigma, self.schedule.steps)]
        return max(ideal_delta_of(phases, self.bounded_values, self.delta, self.adjacency), 5e-324)

    def claim(self, sigma: float, steps: int | None = None) -> float:
        """The epsilon claimed together with the plans beside it, infinite where nothing can be claimed."""
        try:
            return self.joint_claim(self.plan(sigma, steps))
        except NotComputable as error:
            if error.code == "DP062":
                raise
            return math.inf
        except InvalidParameter as error:
            if error.code != "DP053":
                raise
            return math.inf

    def joint_claim(self, plan: Plan) -> float:
        """What ``plan`` and the plans beside it claim together."""
        if not self.beside:
            return plan.claim.epsilon
        return PortfolioFilter().joint_claim((*self.beside, plan), self.delta)


def _draft(
    schedule: Schedule,
    delta: float | None,
    clip_norm: float,
    adjacency: Adjacency | str,
    accountant: str,
    max_parameters: int,
    noise: str = "secure",
) -> _Draft:
    name = as_accountant(accountant)
    return _Draft(
        schedule=schedule,
        delta=delta_or_default(delta, schedule.nominal_size),
        clip_norm=as_clip_norm(clip_norm),
        adjacency=as_adjacency(adjacency),
        accountant=_load(name),
        accountant_name=name,
        max_parameters=as_count("max_parameters", max_parameters, 1 << 40),
        noise=as_noise_mode(noise),
    )


def calibrate(
    *,
    epsilon: float | None = None,
    advantage: float | None = None,
    tpr: float | None = None,
    fpr: float | None = None,
    delta: float | None = None,
    sample_rate: float | None = None,
    steps: int | None = None,
    dataset_size: int | None = None,
    batch_size: int | None = None,
    epochs: float | Fraction | None = None,
    clip_norm: float = 1.0,
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    accountant: str = "prv",
    max_parameters: int = DEFAULT_MAX_PARAMETERS,
    noise: str = "secure",
    beside: Sequence[Plan] = (),
    unit: str = "example",
) -> Plan:
    """The plan with the smallest noise multiplier whose claim is at most ``epsilon``.

    Guarantee: the claim is a certified upper bound at ``delta``, bounded noise tail included, and at most ``epsilon``.
    Its noise multiplier exceeds the exact one by less than 1e-8 relative plus what the accountant's bracket, the
    rounding of the claim (2e-9 max(1, epsilon)) and the tail (at most one hundredth of delta) cost.

    Args:
        epsilon: what the run may claim, in (0, 1e6]; or one of the next two targets.
        advantage: instead of epsilon, the largest TPR - FPR of any membership attack, in (0, 1).
        tpr: instead of epsilon, the largest true positive rate of any membership attack at ``fpr``, in (fpr, 1).
        fpr: the false positive rate of ``tpr``, in (0, 1).
        delta: in (0, 1); 1 / dataset_size^1.1 if not given.
        sample_rate: probability with which each record enters a batch; or pass ``batch_size`` and ``dataset_size``.
        steps: number of steps; or pass ``epochs``, which gives ceil(epochs * dataset_size / batch_size).
        dataset_size: the *public* nominal size, declared or released with its own charge, never ``len(dataset)``.
        batch_size: expected batch size; Poisson batches vary around it.
        epochs: expected uses of each record, may be fractional.
        clip_norm: L2 bound C of each record's gradient; has no influence on epsilon.
        adjacency: which datasets are neighbours.
        accountant: ``prv`` (tight) or ``rdp`` (looser, faster to audit).
        max_parameters: largest number of trainable parameters; enters the bounded tail, and the grid of exact noise.
        noise: ``secure`` or ``exact``, see :class:`~dpbudget.plan.Plan`.
        beside: plans of the same portfolio; then ``epsilon`` bounds the joint claim of all of them.
        unit: what sizes and rates count, and the guarantee is for: ``example``, or ``user`` with all of its examples.

    Raises:
        InvalidParameter: not exactly one target (DP064), a value is out of range (DP001 to DP009), or delta is too
            small for the noise mode (DP053).
        NotComputable: no noise multiplier up to 1e6 reaches epsilon (DP004), or the accountant has no answer.

    Warns:
        DPBudgetWarning: delta is 1 / dataset_size or more (DP003), which protects nobody.
    """
    attack = not (advantage is None and tpr is None and fpr is None)
    if attack == (epsilon is not None) or (attack and beside):
        raise _muddled_target({"epsilon": epsilon, "advantage": advantage, "tpr": tpr, "fpr": fpr})
    schedule = make_schedule(
        sample_rate=sample_rate, steps=steps, dataset_size=dataset_size, batch_size=batch_size, epochs=epochs
    )
    if attack:
        from dpbudget._targets import calibrate_to_attack  # it builds on this module

        plan = calibrate_to_attack(
            advantage=advantage,
            tpr=tpr,
            fpr=fpr,
            delta=delta,
            schedule=schedule,
            clip_norm=clip_norm,
            adjacency=adjacency,
            accountant=accountant,
            max_parameters=max_parameters,
            noise=noise,
        )
        plan = plan.replace(unit=as_unit(unit))
    else:
        target = as_epsilon(epsilon)
        draft = _draft(schedule, delta, clip_norm, adjacency, accountant, max_parameters, noise)
        draft = replace(draft, beside=tuple(beside), unit=as_unit(unit))
        guess = _first_guess(schedule, target, draft.delta)
        plan = _quick_plan(draft, target, guess) or _careful_plan(draft, target, guess)
    warn_of_delta(plan.claim.delta, plan.nominal_size)
    return plan


def _quick_plan(draft: _Draft, target: float, guess: float) -> Plan | None:
    """The plan by a search on certified deltas, which needs a fifth of the work; None where that does not settle."""
    if draft.beside:
        return None
    # A certified upper end below this is claimed as at most the target.
    epsilon = target - 3e-9 * max(1.0, target)
    if epsilon <= 0.0:
        return None
    sigma = quick_noise(draft.curve, epsilon, draft.ideal_delta, guess)
    if sigma is None:
        return None
    try:
        plan = draft.plan(sigma)
    except InvalidParameter as error:
        if error.code != "DP053":
            raise
        return None  # epsilon would allow less noise than the bounded tail does: the claim jumps
    return plan if plan.claim.epsilon <= target else None


def _careful_plan(draft: _Draft, target: float, guess: float) -> Plan:
    if draft.beside and PortfolioFilter().joint_claim(draft.beside, draft.delta) > FULL * target:
        raise _no_room(draft, target)
    sigma = smallest_noise(draft.claim, target, guess)
    if sigma is None:
        raise _unreachable(draft, target)
    return draft.plan(sigma)


def noise_for(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    accountant: str = "prv",
) -> float:
    """The smallest noise multiplier at which a schedule is (epsilon, delta)-DP, for the mechanism in real arithmetic.

    Guarantee: the accountant's certified upper end of epsilon at ``delta`` is at most ``epsilon`` for the returned
    value, which exceeds the exact smallest one by about 1e-11 relative with ``prv`` (1e-9 in its hard corners). A plan
    also pays for the bounded tail of the noise generator and for the rounding of its claim: :func:`calibrate`.

    Raises:
        InvalidParameter: a value is out of range; the message names it.
        NotComputable: no noise multiplier up to 1e6 reaches epsilon (DP004).
    """
    target, delta, relation = as_epsilon(epsilon), as_delta(delta), as_adjacency(adjacency)
    schedule = Schedule(as_rate(sample_rate), as_count("steps", steps, MAX_STEPS), None)
    asked = _load(as_any_accountant(accountant))

    def curve(sigma: float) -> PrivacyCurve:
        return asked.curve([_charge(schedule, sigma)], relation)

    guess = _first_guess(schedule, target, delta)
    sigma = quick_noise(curve, target, lambda _: delta, guess)
    if sigma is None:
        sigma = smallest_noise(lambda sigma: curve(sigma).epsilon(delta).upper, target, guess)
    if sigma is None:
        raise NotComputable(
            f"epsilon {target:g} is not reachable in {schedule.steps} steps at sampling rate {schedule.rate:.4g} "
            f"with a noise multiplier up to {MAX_NOISE_MULTIPLIER:g}",
            code="DP004",
            hint="pass fewer steps, a smaller sampling rate, a larger delta or a larger epsilon",
        )
    return sigma


def _charge(schedule: Schedule, sigma: float) -> Charge:
    return Charge(PoissonSampled(rate_k=schedule.rate_k, inner=Gaussian(noise_multiplier=sigma)), schedule.steps)


def plan_for(
    *,
    noise_multiplier: float,
    delta: float | None = None,
    sample_rate: float | None = None,
    steps: int | None = None,
    dataset_size: int | None = None,
    batch_size: int | None = None,
    epochs: float | Fraction | None = None,
    clip_norm: float = 1.0,
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    accountant: str = "prv",
    max_parameters: int = DEFAULT_MAX_PARAMETERS,
    noise: str = "secure",
    unit: str = "example",
) -> Plan:
    """The plan with a given noise multiplier, and the epsilon that it can claim.

    Arguments, errors and warnings are those of :func:`calibrate`.
    """
    sigma = as_noise_multiplier(noise_multiplier)
    schedule = make_schedule(
        sample_rate=sample_rate, steps=steps, dataset_size=dataset_size, batch_size=batch_size, epochs=epochs
    )
    draft = _draft(schedule, delta, clip_norm, adjacency, accountant, max_parameters, noise)
    plan = replace(draft, unit=as_unit(unit)).plan(sigma)
    warn_of_delta(plan.claim.delta, plan.nominal_size)
    return plan


def bounds_of(plan: Plan) -> Bounds:
    """The claim of ``plan`` as the upper end, and below it what the mechanism in real arithmetic costs at least."""
    curve = _load(plan.claim.accountant).curve(plan.charges, plan.adjacency)
    return Bounds(min(curve.epsilon(plan.claim.delta).lower, plan.claim.epsilon), plan.claim.epsilon)


def max_steps(
    *,
    epsilon: float,
    noise_multiplier: float,
    delta: float | None = None,
    sample_rate: float | None = None,
    dataset_size: int | None = None,
    batch_size: int | None = None,
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    accountant: str = "prv",
    max_parameters: int = DEFAULT_MAX_PARAMETERS,
    noise: str = "secure",
) -> int:
    """The largest number of steps, at most 1e9, whose plan claims at most ``epsilon``; 0 if not even one fits.

    Arguments, errors and warnings are those of :func:`calibrate`.
    """
    target, sigma = as_epsilon(epsilon), as_noise_multiplier(noise_multiplier)
    schedule = make_schedule(sample_rate=sample_rate, steps=1, dataset_size=dataset_size, batch_size=batch_size)
    draft = _draft(schedule, delta, 1.0, adjacency, accountant, max_parameters, noise)
    warn_of_delta(draft.delta, schedule.nominal_size)
    guess = (target * sigma / schedule.rate) ** 2 / (2.0 * math.log(1.25 / draft.delta))
    start = min(max(guess, 1.0), float(MAX_STEPS))
    return most_steps(lambda steps: draft.claim(sigma, steps) <= target, int(start))


def _unreachable(draft: _Draft, target: float) -> DPBudgetError:
    """Why not even the largest noise fits. A refusal of the plan itself (DP053, DP062, DP063) is raised as it is."""
    least = draft.joint_claim(draft.plan(MAX_NOISE_MULTIPLIER))
    if draft.beside:
        return _no_room(draft, target)
    return NotComputable(
        f"epsilon {target:g} is not reachable in {draft.schedule.steps} steps at sampling rate "
        f"{draft.schedule.rate:.4g} with a noise multiplier up to {MAX_NOISE_MULTIPLIER:g}; the smallest reachable is "
        f"{round_up(least, 3)}",
        code="DP004",
        hint="pass fewer epochs, a smaller batch, a larger delta or a larger epsilon",
    )


def _no_room(draft: _Draft, target: float) -> BudgetExceeded:
    together, count = PortfolioFilter().joint_claim(draft.beside, draft.delta), len(draft.beside)
    beside = "plan beside it claims" if count == 1 else f"{count} plans beside it claim"
    return BudgetExceeded(
        f"the {beside} epsilon {round_up(together, 10)} of {target:.10g} already; another has no room",
        hint="sign fewer or smaller plans, or pass a larger epsilon",
    )


def _muddled_target(targets: dict[str, float | None]) -> InvalidParameter:
    """Why what was given is not one target (DP064)."""
    given = [name for name, value in targets.items() if value is not None]
    if not given:
        said, hint = "no target is given", "pass epsilon=3.0, or advantage=0.1, or tpr=0.05 with fpr=0.01"
    elif "epsilon" in given:
        said, hint = f"{' and '.join(given)} are more than one target", "keep one of epsilon, advantage, tpr with fpr"
    else:
        said, hint = f"plans beside it have no joint {given[0]}", "pass epsilon, which bounds what all of them claim"
    return InvalidParameter(said, code="DP064", hint=hint)


def _first_guess(schedule: Schedule, epsilon: float, delta: float) -> float:
    """A noise multiplier of the right order: the classical sigma = q sqrt(2 T log(1.25/delta)) / epsilon."""
    guess = 0.4 + schedule.rate * math.sqrt(2.0 * schedule.steps * math.log(1.25 / delta)) / epsilon
    return min(max(guess, MIN_NOISE_MULTIPLIER), MAX_NOISE_MULTIPLIER)
