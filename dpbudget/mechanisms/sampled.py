"""Sampling schemes wrap a mechanism."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dpbudget._record import RateK
from dpbudget.mechanisms.base import Adjacency, DominatingPair, Mechanism, unproved
from dpbudget.mechanisms.black_box import BlackBox
from dpbudget.mechanisms.discrete import DiscreteGaussian, DiscreteLaplace
from dpbudget.mechanisms.exponential import Exponential
from dpbudget.mechanisms.gaussian import Gaussian
from dpbudget.mechanisms.gaussian_pairs import ReplaceOneGaussianPair, SubsampledGaussianPair
from dpbudget.mechanisms.laplace import Laplace
from dpbudget.mechanisms.pair_of import FinitePairOf, PairOf
from dpbudget.mechanisms.randomised_response import RandomisedResponse
from dpbudget.mechanisms.sampled_pairs import PoissonSampledPair, SubsetSampledPair

_Known = Gaussian | Laplace | DiscreteGaussian | DiscreteLaplace | Exponential | RandomisedResponse | BlackBox
#: What a sampling scheme may wrap; a mechanism of one's own goes in as :class:`PairOf`.
Inner = Annotated[_Known | FinitePairOf | PairOf, Field(discriminator="kind")]
#: Noise on a sum: a zero record is exactly as none.
_SUMS = (Gaussian, Laplace, DiscreteGaussian, DiscreteLaplace)


class PoissonSampled(Mechanism):
    """Every record enters independently with probability ``rate_k / 2**64``, then ``inner`` runs on the sample.

    The rate is an integer over 2^64 so that planner, accountant and sampler hold the same number to the last bit.

    Guarantee: for a pair (P, Q) of ``inner``, dominated by ((1-q) Q + q P, Q) under add-remove adjacency (Zhu, Dong and
    Wang 2022, Theorem 11), and under zero-out adjacency where ``inner`` adds noise to a sum, so that a zero record is
    as none. For a Gaussian that is ((1-q) N(0) + q N(1), N(0)) (Mironov, Talwar and Zhang 2019, Theorem 4 for the
    reduction to one dimension), and under replace-one adjacency ((1-q) N(0) + q N(1), (1-q) N(0) + q N(-1))
    (docs/mechanisms.md, "Replacing a record"). Replace-one adjacency is refused for other mechanisms.
    """

    kind: Literal["poisson-sampled"] = "poisson-sampled"
    rate_k: RateK = Field(ge=1, le=1 << 64)
    inner: Inner

    @property
    def rate(self) -> float:
        """The inclusion probability, exactly representable."""
        return self.rate_k / (1 << 64)

    def dominating_pair(self, adjacency: Adjacency) -> DominatingPair:
        """The sampled pair of this adjacency; raises NotComputable (DP062) where none is proved."""
        if isinstance(self.inner, Gaussian):
            if adjacency is Adjacency.REPLACE_ONE and self.rate < 1.0:
                return ReplaceOneGaussianPair(rate=self.rate, sigma=self.inner.noise_multiplier)
            return SubsampledGaussianPair(rate=self.rate, sigma=self.inner.dominating_pair(adjacency).sigma)
        if self.rate >= 1.0:
            return self.inner.dominating_pair(adjacency)
        if adjacency is Adjacency.REPLACE_ONE:
            raise unproved(self, adjacency, "use a Gaussian, add-remove adjacency or WithoutReplacement")
        if adjacency is Adjacency.ZERO_OUT and not isinstance(self.inner, _SUMS):
            raise unproved(self, adjacency, "use add-remove adjacency: a null record may not be the same as none here")
        return PoissonSampledPair(self.inner.dominating_pair(adjacency), self.rate)


class WithoutReplacement(Mechanism):
    """A uniformly random set of ``size`` of the ``population`` records, then ``inner`` runs on it.

    Guarantee: under replace-one adjacency (both numbers public), the symmetric pair with the profile of
    ((1-q) Q + q P, Q) at epsilon >= 0, q = size / population, (P, Q) a symmetric pair of ``inner`` when one record of
    the sample is replaced (Balle, Barthe and Gaboardi 2018, Theorem 9; docs/mechanisms.md, "Fixed size").
    """

    kind: Literal["without-replacement"] = "without-replacement"
    size: int = Field(ge=1, le=1 << 50)
    population: int = Field(ge=1, le=1 << 50)
    inner: Inner

    @model_validator(mode="after")
    def _fits(self) -> WithoutReplacement:
        if self.size > self.population:
            raise ValueError(f"size {self.size} is larger than population {self.population}")
        return self

    @property
    def rate(self) -> float:
        """The share size / population, rounded up: a larger rate only costs more."""
        rate = self.size / self.population
        exact = Fraction(self.size, self.population)
        return rate if Fraction(rate) >= exact else math.nextafter(rate, 1.0)

    def dominating_pair(self, adjacency: Adjacency) -> DominatingPair:
        """The symmetric sampled pair; other adjacencies are refused (DP062)."""
        if adjacency is not Adjacency.REPLACE_ONE:
            raise unproved(self, adjacency, "use replace-one adjacency: size and population are public")
        pair = self.inner.dominating_pair(adjacency)
        if self.rate >= 1.0:
            return pair
        if not pair.symmetric:
            raise unproved(self, adjacency, "the inner pair must be symmetric; bound it by a symmetric one")
        return SubsetSampledPair(pair, self.rate)


class ShuffledEpoch(Mechanism):
    """One pass in any order, random or not: disjoint batches, ``inner`` on each; one use is one epoch.

    Guarantee: given the order, a record is in one batch and all other batches are the same, so that an epoch costs what
    one use of ``inner`` costs without sampling (parallel composition, then joint convexity over the order). No
    amplification by the shuffling is claimed: for batches it is far weaker than Poisson sampling's (Chua et al. 2024).
    Zero-out and replace-one adjacency; adding a record would move all others to other batches.
    """

    kind: Literal["shuffled-epoch"] = "shuffled-epoch"
    inner: Inner

    def dominating_pair(self, adjacency: Adjacency) -> DominatingPair:
        """The pair of ``inner``; add-remove adjacency is refused (DP062)."""
        if adjacency is Adjacency.ADD_REMOVE:
            raise unproved(self, adjacency, "use zero-out or replace-one adjacency: batches move when the size changes")
        return self.inner.dominating_pair(adjacency)
