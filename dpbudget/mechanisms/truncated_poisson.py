"""Poisson sampling with a cap on the batch size."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from dpbudget.errors import InvalidParameter
from dpbudget.mechanisms.base import Adjacency, DominatingPair, Mechanism, unproved
from dpbudget.mechanisms.sampled import PoissonSampled


class TruncatedPoisson(Mechanism):
    """Poisson sampling whose batches are cut to ``cap`` records at random; ``population`` is public.

    No pair is proved: which records survive the cut depends on the others. Instead the whole run is within total
    variation steps * P(Binomial(population, rate) > cap) of the run without a cap, on every dataset of that size, so
    that an (epsilon, delta) guarantee of ``sampled`` becomes (epsilon, delta + :meth:`additive_delta`) (triangle
    inequality; cf. Chua et al. 2024, Scalable DP-SGD). Zero-out and replace-one adjacency only, as the size is public.
    """

    kind: Literal["truncated-poisson"] = "truncated-poisson"
    sampled: PoissonSampled
    population: int = Field(ge=1, le=1 << 50)
    cap: int = Field(ge=1, le=1 << 50)

    def dominating_pair(self, adjacency: Adjacency) -> DominatingPair:
        """Always refused (DP062), unless the cap can never bind."""
        if self.cap >= self.population and adjacency is not Adjacency.ADD_REMOVE:
            return self.sampled.dominating_pair(adjacency)
        raise unproved(self, adjacency, "count `sampled` at delta minus additive_delta(epsilon, steps), size public")

    def additive_delta(self, epsilon: float, steps: int) -> float:
        """Upper bound of (1 + e^epsilon) * steps * P(a batch exceeds the cap), at most 1.

        Raises:
            InvalidParameter: epsilon is not in [0, 700] or steps is no integer >= 0.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise InvalidParameter(f"steps must be an integer >= 0, got {steps!r}", code="DP009")
        if isinstance(epsilon, bool) or not isinstance(epsilon, float | int) or not 0.0 <= epsilon <= 700.0:
            raise InvalidParameter(f"epsilon must lie in [0, 700], got {epsilon!r}", code="DP001")
        total = (1.0 + math.exp(epsilon)) * steps * _binomial_tail(self.population, self.sampled.rate, self.cap)
        return min(total * (1.0 + 1e-14), 1.0)


def _binomial_tail(trials: int, rate: float, cap: int) -> float:
    """Upper bound of P(Binomial(trials, rate) > cap): its first term over 1 - its first ratio of terms."""
    import mpmath

    first = cap + 1
    if first > trials:
        return 0.0
    with mpmath.workdps(60):
        q = mpmath.mpf(rate)
        if rate >= 1.0:
            return 1.0
        ratio = (trials - first) * q / ((first + 1) * (1 - q))
        if ratio >= 1:
            return 1.0
        log_term = mpmath.loggamma(trials + 1) - mpmath.loggamma(first + 1) - mpmath.loggamma(trials - first + 1)
        log_term += first * mpmath.log(q) + (trials - first) * mpmath.log(1 - q)
        bound = mpmath.exp(log_term) / (1 - ratio)
        return min(float(bound) * (1.0 + 1e-14) + 5e-324, 1.0)
