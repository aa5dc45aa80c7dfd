"""Correlated Gaussian noise: tree aggregation and matrix factorisation (DP-FTRL)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from dpbudget._record import HexFloat
from dpbudget.mechanisms.base import Adjacency, Mechanism, unproved
from dpbudget.mechanisms.gaussian import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER
from dpbudget.mechanisms.gaussian_pairs import SubsampledGaussianPair

_HINT = "use zero-out adjacency: adding a record would move the others to other steps"


def _pair(sigma: float, square: Fraction, adjacency: Adjacency) -> SubsampledGaussianPair:
    """The plain Gaussian pair of a sensitivity given by its square, rounded so that sigma is never above the truth."""
    sensitivity = math.sqrt(math.nextafter(float(square), math.inf)) * (1.0 + 1e-15)
    ratio = sigma / sensitivity / (2.0 if adjacency is Adjacency.REPLACE_ONE else 1.0)
    return SubsampledGaussianPair(rate=1.0, sigma=ratio * (1.0 - 1e-15))


class TreeAggregated(Mechanism):
    """All prefix sums of ``steps`` releases through a binary tree of noisy partial sums; one use is one whole tree.

    Every record contributes to one step, with norm at most C; every node of the tree gets N(0, (noise_multiplier C)^2).

    Guarantee: a record is in one node of each of floor(log2(steps)) + 1 levels, so that the tree is one Gaussian
    release of sensitivity sqrt(levels) C (Kairouz et al. 2021, Theorem 4.1), also when gradients are adaptive (Denisov
    et al. 2022, Theorem 2.1). Zero-out adjacency, or replace-one with half the noise multiplier; under add-remove the
    steps of the other records would have to stay, which is zero-out, or be drawn by each record for itself: such a pass
    costs the same and is planned as a Gaussian of rate 1 (docs/mechanisms.md, "Trees").
    """

    kind: Literal["tree-aggregated"] = "tree-aggregated"
    noise_multiplier: HexFloat = Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)
    steps: int = Field(ge=1, le=1 << 50)

    def dominating_pair(self, adjacency: Adjacency) -> SubsampledGaussianPair:
        """A Gaussian of sensitivity sqrt(levels); add-remove adjacency is refused (DP062)."""
        if adjacency is Adjacency.ADD_REMOVE:
            raise unproved(self, adjacency, _HINT)
        return _pair(self.noise_multiplier, Fraction(self.steps.bit_length()), adjacency)


class MatrixFactorised(Mechanism):
    """Releases C G + Z for a lower-triangular strategy C [steps, steps], the rows of G being the steps' gradient sums.

    ``strategy`` holds row i as its first i + 1 entries. A record contributes to several steps, each with norm at most
    the clipping norm, any two at least ``separation`` steps apart; ``separation`` = steps means once. One use is the
    whole run.

    Guarantee: one Gaussian release whose sensitivity is the largest, over those patterns, of the norm of
    sum_i c_i u_i', |u_i| <= 1. Where columns at least ``separation`` apart have disjoint supports it is
    sqrt(sum |c_i|^2) exactly (Choquette-Choo et al. 2023, banded matrices), else sum |c_i| bounds it by the triangle
    inequality. Adaptive gradients: Denisov et al. 2022, Theorem 2.1, for lower-triangular C. Zero-out adjacency, or
    replace-one with half the noise multiplier.
    """

    kind: Literal["matrix-factorised"] = "matrix-factorised"
    noise_multiplier: HexFloat = Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)
    strategy: tuple[tuple[HexFloat, ...], ...] = Field(min_length=1, max_length=512)
    separation: int = Field(ge=1)

    @model_validator(mode="after")
    def _is_triangular(self) -> MatrixFactorised:
        for index, row in enumerate(self.strategy):
            if len(row) != index + 1:
                raise ValueError(f"strategy row {index} must have {index + 1} entries, got {len(row)}")
        if not any(entry for row in self.strategy for entry in row):
            raise ValueError("strategy is zero")
        return self

    def squared_sensitivity(self) -> Fraction:
        """Exact square of the sensitivity bound, in units of the squared clipping norm."""
        size, gap = len(self.strategy), self.separation
        squares = [sum((Fraction(self.strategy[i][j]) ** 2 for i in range(j, size)), Fraction(0)) for j in range(size)]
        if gap >= size:
            return max(squares)
        reach = [max((i for i in range(j, size) if self.strategy[i][j]), default=j) for j in range(size)]
        if all(reach[j] < j + gap for j in range(size)):
            return _heaviest(squares, gap)
        # Norms rounded up: math.sqrt is right to half a unit, the float of the square to another.
        norms = [Fraction(math.nextafter(math.sqrt(math.nextafter(float(x), math.inf)), math.inf)) for x in squares]
        return _heaviest(norms, gap) ** 2

    def dominating_pair(self, adjacency: Adjacency) -> SubsampledGaussianPair:
        """A Gaussian of the strategy's sensitivity; add-remove adjacency is refused (DP062)."""
        if adjacency is Adjacency.ADD_REMOVE:
            raise unproved(self, adjacency, _HINT)
        return _pair(self.noise_multiplier, self.squared_sensitivity(), adjacency)


def _heaviest(weights: list[Fraction], gap: int) -> Fraction:
    """The largest sum of weights >= 0 whose positions are at least ``gap`` apart, by dynamic programming."""
    best = [Fraction(0)] * (len(weights) + gap)
    for index in reversed(range(len(weights))):
        best[index] = max(best[index + 1] if index + 1 < len(best) else Fraction(0), weights[index] + best[index + gap])
    return best[0]
