"""Which noise a plan gets: the one that it states."""

from __future__ import annotations

from dpbudget.errors import PrivacyViolation
from dpbudget.plan import Plan
from dptrainer.noise.exact import ExactNoise
from dptrainer.noise.source import NoiseSource, SecureNoise, check_mode


def source_for(plan: Plan, given: NoiseSource | None) -> NoiseSource:
    """The source of noise for a run of ``plan``: ``given``, or the one of the plan's mode.

    A source without a ``mode`` counts as ``secure``: what is claimed of exact noise must be said by whoever makes it.

    Raises:
        PrivacyViolation: ``given`` makes noise of another mode (DP054).
    """
    if given is None:
        return ExactNoise() if plan.noise == "exact" else SecureNoise()
    check_mode(plan.noise, getattr(given, "mode", "secure"))
    return given


def require_secure(plan: Plan, who: str) -> None:
    """Refuse a plan with exact noise where records are clipped in batches.

    Raises:
        PrivacyViolation: (DP054).
    """
    if plan.noise == "exact":
        raise PrivacyViolation(
            f"the plan's noise is exact, and {who} clips whole batches by book-keeping: there is never one record's "
            "gradient that could be rounded to integers, and how it is rounded depends on the other records",
            code="DP054",
            hint="train with dptrainer.PrivateTrainer or dpbudget train, or sign a plan with secure noise",
        )
