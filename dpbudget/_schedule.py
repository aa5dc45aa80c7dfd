"""How often each record is used: sampling rate, steps and the public size, from exactly the facts that decide them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction

from dpbudget._checks import as_count, as_delta, as_epochs, as_rate
from dpbudget.curve import round_down, show_delta
from dpbudget.errors import DPBudgetWarning, InvalidParameter
from dpbudget.plan import MAX_SIZE, MAX_STEPS


@dataclass(frozen=True)
class Schedule:
    """How often each record is sampled, without its noise.

    Attributes:
        rate_k: inclusion probability is ``rate_k / 2**64``.
        steps: number of steps, T.
        nominal_size: public dataset size n0; None for a question about a rate alone.
    """

    rate_k: int
    steps: int
    nominal_size: int | None

    @property
    def rate(self) -> float:
        """The inclusion probability, exactly."""
        return self.rate_k / (1 << 64)


def default_delta(nominal_size: int) -> float:
    """The delta taken when none is given: 1 / n0^1.1, below 1 / n0 for every public size n0 >= 2."""
    return float(nominal_size) ** -1.1 if nominal_size > 1 else 0.5


def delta_warning(delta: float, nominal_size: int | None) -> str | None:
    """DP003 where delta >= 1 / n0: publishing a whole random record would satisfy such a guarantee.

    The one place that says so: for plans, for the command line and for the report of a verification.
    """
    if nominal_size is None or delta * nominal_size < 1.0:
        return None
    return (
        f"DP003 delta {show_delta(delta)} allows publishing {round_down(delta * nominal_size, 3)} of {nominal_size} "
        f"records outright. Fix: take a delta well below {float(round_down(1.0 / nominal_size, 2)):g}"
    )


def warn_of_delta(delta: float, nominal_size: int | None) -> None:
    """Emit :func:`delta_warning` as a DPBudgetWarning of the line that called the caller of this function."""
    found = delta_warning(delta, nominal_size)
    if found is not None:
        warnings.warn(found, DPBudgetWarning, stacklevel=3)


def make_schedule(
    *,
    sample_rate: float | None = None,
    steps: int | None = None,
    dataset_size: int | None = None,
    batch_size: int | None = None,
    epochs: float | Fraction | None = None,
) -> Schedule:
    """Sampling rate and number of steps from exactly as many facts as determine them.

    The rate is ``sample_rate`` or ``batch_size / dataset_size``; the steps are ``steps`` or
    ``ceil(epochs / rate)`` in exact rational arithmetic, with epochs times dataset_size / batch_size where those are
    given. ``dataset_size`` is the public nominal size.

    Raises:
        InvalidParameter: a value is out of range (DP008, DP009), or too many or too few are given (DP064).
    """
    size = None if dataset_size is None else as_count("dataset size", dataset_size, MAX_SIZE)
    if (sample_rate is None) == (batch_size is None):
        raise _unknowns("the sampling rate needs either sample_rate, or batch_size with dataset_size")
    if (steps is None) == (epochs is None):
        raise _unknowns("the length of training needs either steps or epochs")
    if sample_rate is not None:
        rate_k = as_rate(sample_rate)
        inverse_rate = Fraction(1 << 64, rate_k)
    else:
        if size is None:
            raise _unknowns("batch_size needs dataset_size to give a sampling rate")
        batch = as_count("batch size", batch_size, MAX_SIZE)
        if batch > size:
            raise InvalidParameter(
                f"batch size {batch} of {size} records gives a sampling rate of {batch / size:.3g}, "
                "and a rate is a probability in (0, 1]",
                code="DP008",
                hint=f"did you mean dataset size {batch} and batch size {size}? The batch must fit the dataset",
            )
        rate_k = as_rate(batch / size)
        inverse_rate = Fraction(size, batch)
    if epochs is None:
        return Schedule(rate_k, as_count("steps", steps, MAX_STEPS), size)
    return Schedule(rate_k, _steps_for(as_epochs(epochs), inverse_rate), size)


def _steps_for(epochs: Fraction, inverse_rate: Fraction) -> int:
    steps = math.ceil(epochs * inverse_rate)
    if steps > MAX_STEPS:
        raise InvalidParameter(
            f"epochs {float(epochs):g} at sampling rate {float(1 / inverse_rate):.3g} are {steps} steps; "
            f"a plan has at most {MAX_STEPS:g}",
            code="DP009",
            hint="pass fewer epochs or a larger batch size",
        )
    return steps


def _unknowns(message: str) -> InvalidParameter:
    hint = "pass dataset_size, batch_size and epochs, or sample_rate and steps"
    return InvalidParameter(message, code="DP064", hint=hint)


def delta_or_default(delta: float | None, nominal_size: int | None) -> float:
    """``delta`` checked, or the default for the public size; raises InvalidParameter (DP002) where there is neither."""
    if delta is not None:
        return as_delta(delta)
    if nominal_size is None:
        raise InvalidParameter(
            "delta is not given and there is no dataset size to choose it by",
            code="DP002",
            hint="pass delta well below 1 / dataset size, or pass dataset_size",
        )
    return default_delta(nominal_size)
