"""Budget and plan: every privacy fact of a run, stated once, before any data is touched."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StringConstraints

from dpbudget._guarantee import as_delta, as_epsilon
from dpbudget._record import HexFloat, RateK, Record
from dpbudget._truncation import MAX_SHARE, truncation_delta, truncation_factor_log
from dpbudget.errors import InvalidParameter
from dpbudget.mechanisms import Adjacency, Charge, Gaussian, PoissonSampled
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER

#: Largest number of steps of one phase, of phases of a plan and of a public dataset size.
MAX_STEPS, MAX_PHASES, MAX_SIZE = 10**9, 1024, 10**12
#: Trainable parameters that a plan allows unless told otherwise (docs/adr/0002).
DEFAULT_MAX_PARAMETERS = 2**30

#: Whose presence in the dataset is protected: one row of it, or one user with all of that user's rows.
Unit = Literal["example", "user"]
UNITS: tuple[Unit, ...] = get_args(Unit)

#: ``secure``: floating-point sums and Gaussians of bounded tail, which is charged. ``exact``: integer sums and rounded
#: Gaussians, with no floating-point number in the argument (docs/exact.md).
NoiseMode = Literal["secure", "exact"]
NOISE_MODES: tuple[NoiseMode, ...] = get_args(NoiseMode)

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def rate_from_float(rate: float) -> int:
    """The integer k of the sampling rate k / 2^64 nearest to ``rate``; k / 2^64 is exactly one float64.

    Raises:
        InvalidParameter: ``rate`` is not a probability in [2^-64, 1] (DP008).
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 2.0**-64 <= rate <= 1.0:
        hint = "pass batch size / dataset size"
        if isinstance(rate, int | float) and rate > 1:
            hint = f"did you mean a batch size of {rate:g}? Pass it together with the dataset size"
        raise InvalidParameter(f"sampling rate is a probability in (0, 1], got {rate!r}", code="DP008", hint=hint)
    return round(float(rate) * 2**64)


class Budget(Record):
    """What the owner grants: (epsilon, delta)-DP for one record of one dataset.

    Raises:
        InvalidParameter: epsilon or delta is missing (DP064), out of its range (DP001, DP002), or not alone (DP060).
    """

    epsilon: HexFloat = Field(gt=0, le=1e6)
    delta: HexFloat = Field(gt=0, lt=1)

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in ("epsilon", "delta"):
                raise InvalidParameter(
                    f"a budget has epsilon and delta, and no {name!r:.60}",
                    code="DP060",
                    hint="write Budget(epsilon=3.0, delta=1e-5)",
                )
        for name, check in (("epsilon", as_epsilon), ("delta", as_delta)):
            if name not in values:
                raise InvalidParameter(
                    f"a budget needs {name}", code="DP064", hint="write Budget(epsilon=3.0, delta=1e-5)"
                )
            values[name] = check(values[name])
        super().__init__(**values)

    # pydantic's own mark: parsing goes straight to the fields, whose hexadecimal floats this constructor does not read.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # functions have no declared attributes


class Phase(Record):
    """A stretch of steps with one sampling rate and one noise multiplier.

    Attributes:
        rate_k: inclusion probability of every record is ``rate_k / 2**64``.
        noise_multiplier: standard deviation of the noise on the clipped sum, divided by the clipping norm.
        steps: number of steps.
    """

    rate_k: RateK = Field(ge=1, le=1 << 64)
    noise_multiplier: HexFloat = Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)
    steps: int = Field(ge=1, le=MAX_STEPS)

    @property
    def rate(self) -> float:
        """The inclusion probability, exactly."""
        return self.rate_k / (1 << 64)

    @property
    def charge(self) -> Charge:
        """The composition that this phase costs."""
        return Charge(
            PoissonSampled(rate_k=self.rate_k, inner=Gaussian(noise_multiplier=self.noise_multiplier)),
            self.steps,
        )


class Claim(Record):
    """The guarantee that a plan states: ``epsilon`` is a certified upper bound at ``delta``.

    ``epsilon`` is rounded up by :func:`claimed_epsilon`, so that the drift of elementary functions between machines can
    never turn an honest claim into a failing one.
    """

    epsilon: HexFloat = Field(ge=0)
    delta: HexFloat = Field(gt=0, lt=1)
    accountant: Literal["prv", "rdp"]
    accountant_version: int = Field(ge=1, le=10**6)


class Plan(Record):
    """Everything that decides the privacy of a run; the trainer and the verifier read it from here alone.

    Attributes:
        phases: sampling rate, noise multiplier and steps, in order.
        clip_norm: L2 bound C of every record's gradient.
        adjacency: which datasets are neighbours.
        unit: what one record is: an ``example``, one row of the dataset, or a ``user`` with all rows of that user.
            Sizes and rates count units.
        nominal_size: the *public* size n0 of the dataset (declared, or released with its own charge). The divisor of
            the averaged gradient comes from it and never from ``len(dataset)``. None plans an accounting question only.
        noise: how sums are taken and noise is made: ``secure`` charges its bounded tail to delta (docs/accounting.md),
            ``exact`` has none and is certified down to the bit (docs/exact.md).
        max_parameters: largest number of trainable parameters; part of the charge for the bounded tail, and what the
            grid of ``exact`` noise is made for.
        claim: the guarantee.
        model_digest, code_digest: optional SHA-256 of the model definition and of the training code.
    """

    phases: tuple[Phase, ...] = Field(min_length=1, max_length=MAX_PHASES)
    clip_norm: HexFloat = Field(gt=0, le=1e12)
    adjacency: Adjacency = Adjacency.ADD_REMOVE
    unit: Unit = "example"
    sampling: Literal["poisson"] = "poisson"
    nominal_size: int | None = Field(default=None, ge=1, le=MAX_SIZE)
    noise: NoiseMode = "secure"
    max_parameters: int = Field(default=DEFAULT_MAX_PARAMETERS, ge=1, le=1 << 40)
    claim: Claim
    model_digest: Digest | None = None
    code_digest: Digest | None = None

    @property
    def bounded_values(self) -> int:
        """Most values of bounded noise in one step, for what their tail costs; ``exact`` noise has no bound."""
        return self.max_parameters if self.noise == "secure" else 0

    @property
    def steps(self) -> int:
        """Number of planned steps, T."""
        return sum(phase.steps for phase in self.phases)

    @property
    def charges(self) -> tuple[Charge, ...]:
        """The composition that the whole plan costs, whether or not all of it is run."""
        return tuple(phase.charge for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase of the 0-based ``step``."""
        if not 0 <= step < self.steps:
            raise InvalidParameter(f"step {step} is outside the plan of {self.steps} steps", code="DP009")
        ends = list(accumulate(phase.steps for phase in self.phases))
        return self.phases[bisect_right(ends, step)]

    def first(self, steps: int) -> Plan:
        """The same plan cut after its first ``steps`` steps, for what these cost; its claim stays that of the whole.

        Raises:
            InvalidParameter: not 1 to :attr:`steps` steps (DP009).
        """
        if not 1 <= steps <= self.steps:
            raise InvalidParameter(f"the first {steps} steps of a plan of {self.steps}", code="DP009")
        phases, left = [], steps
        for phase in self.phases:
            if left == 0:
                break
            phases.append(phase.replace(steps=min(left, phase.steps)))
            left -= phases[-1].steps
        return self.replace(phases=tuple(phases))

    def ideal_delta(self, delta: float) -> float:
        """What is left of ``delta`` for the mechanism in real arithmetic after the bounded tail is charged."""
        return joint_ideal_delta((self,), delta)


def joint_ideal_delta(plans: tuple[Plan, ...], delta: float) -> float:
    """What is left of ``delta`` after the bounded tails of all ``plans`` are charged, composed jointly.

    Raises:
        InvalidParameter: the tails would take more than one hundredth of delta (DP053).
    """
    additive = log_factor = 0.0
    for plan in plans:
        phases = [(phase.rate, phase.noise_multiplier, phase.steps) for phase in plan.phases]
        additive += truncation_delta(phases, plan.bounded_values, plan.adjacency is Adjacency.REPLACE_ONE)
        log_factor += truncation_factor_log(plan.steps, plan.bounded_values)
    return _left_of(delta, additive, log_factor)


def ideal_delta_of(
    phases: Sequence[tuple[float, float, int]], bounded: int, delta: float, adjacency: Adjacency
) -> float:
    """What :func:`joint_ideal_delta` leaves for (rate, noise multiplier, steps) phases; 0 where it refuses.

    ``bounded`` is what :attr:`Plan.bounded_values` says.
    """
    steps = sum(count for _, _, count in phases)
    try:
        additive = truncation_delta(phases, bounded, adjacency is Adjacency.REPLACE_ONE)
        return _left_of(delta, additive, truncation_factor_log(steps, bounded))
    except InvalidParameter:
        return 0.0


def _left_of(delta: float, additive: float, log_factor: float) -> float:
    if not additive <= MAX_SHARE * delta or not log_factor <= MAX_SHARE:
        raise InvalidParameter(
            f"delta {delta:g} is too small for secure noise in this plan: its bounded tail costs {additive:.3g} "
            f"and a factor of exp({log_factor:.3g}) of delta, more than one hundredth",
            code="DP053",
            hint="raise delta or the noise multiplier, lower max_parameters to what the model has, or plan exact noise",
        )
    # Rounded down: the additions above and the product below lose at most a few units in the last place.
    return (delta - additive) * math.exp(-log_factor) * (1.0 - 1e-14)


def claimed_epsilon(upper: float) -> float:
    """The claim for a certified upper bound: (floor(upper / u) + 2) u with u = 1e-9 max(1, upper).

    It exceeds ``upper`` by at least u, which covers the drift of elementary functions between machines.
    """
    unit = 1e-9 * max(1.0, upper)
    return (math.floor(upper / unit) + 2) * unit
