"""Sampling schemes wrap a mechanism."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dpbudget._record import RateK
from dpbudget.mechanisms.base import Adjacency, Mechanism, SubsampledGaussianPair
from dpbudget.mechanisms.gaussian import Gaussian


class PoissonSampled(Mechanism):
    """Every record enters independently with probability ``rate_k / 2**64``, then ``inner`` runs on the sample.

    The rate is an integer over 2^64 so that planner, accountant and sampler hold the same number to the last bit.

    Guarantee: dominated by ((1-q) N(0) + q N(1), N(0)) under add-remove and zero-out adjacency (Zhu, Dong and Wang
    2022, Theorem 11; Mironov, Talwar and Zhang 2019, Theorem 4 for the reduction to one dimension).
    """

    kind: Literal["poisson-sampled"] = "poisson-sampled"
    rate_k: RateK = Field(ge=1, le=1 << 64)
    inner: Gaussian

    @property
    def rate(self) -> float:
        """The inclusion probability, exactly representable."""
        return self.rate_k / (1 << 64)

    def dominating_pair(self, adjacency: Adjacency) -> SubsampledGaussianPair:
        """The sampled Gaussian pair; raises NotComputable (DP062) for replace-one, which is not built yet."""
        return SubsampledGaussianPair(rate=self.rate, sigma=self.inner.dominating_pair(adjacency).sigma)
