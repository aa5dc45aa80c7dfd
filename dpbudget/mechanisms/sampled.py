"""Sampling schemes wrap a mechanism."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dpbudget._record import RateK
from dpbudget.mechanisms.base import Adjacency, DominatingPair, Mechanism
from dpbudget.mechanisms.gaussian import Gaussian
from dpbudget.mechanisms.gaussian_pairs import ReplaceOneGaussianPair, SubsampledGaussianPair


class PoissonSampled(Mechanism):
    """Every record enters independently with probability ``rate_k / 2**64``, then ``inner`` runs on the sample.

    The rate is an integer over 2^64 so that planner, accountant and sampler hold the same number to the last bit.

    Guarantee: dominated by ((1-q) N(0) + q N(1), N(0)) under add-remove and zero-out adjacency (Zhu, Dong and Wang
    2022, Theorem 11; Mironov, Talwar and Zhang 2019, Theorem 4 for the reduction to one dimension), and by
    ((1-q) N(0) + q N(1), (1-q) N(0) + q N(-1)) under replace-one adjacency (docs/accounting.md, "Replacing a record").
    """

    kind: Literal["poisson-sampled"] = "poisson-sampled"
    rate_k: RateK = Field(ge=1, le=1 << 64)
    inner: Gaussian

    @property
    def rate(self) -> float:
        """The inclusion probability, exactly representable."""
        return self.rate_k / (1 << 64)

    def dominating_pair(self, adjacency: Adjacency) -> DominatingPair:
        """The sampled Gaussian pair of this adjacency."""
        if adjacency is Adjacency.REPLACE_ONE and self.rate < 1.0:
            return ReplaceOneGaussianPair(rate=self.rate, sigma=self.inner.noise_multiplier)
        return SubsampledGaussianPair(rate=self.rate, sigma=self.inner.dominating_pair(adjacency).sigma)
