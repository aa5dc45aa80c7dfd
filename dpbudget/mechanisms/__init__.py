"""Mechanisms as values: one family a file, each with its dominating pair."""

from dpbudget.mechanisms.base import Adjacency, Charge, Direction, DominatingPair, Mechanism, Tails
from dpbudget.mechanisms.black_box import ApproximatePair, BlackBox
from dpbudget.mechanisms.discrete import DiscreteGaussian, DiscreteGaussianPair, DiscreteLaplace, DiscreteLaplacePair
from dpbudget.mechanisms.exponential import BoundedRangePair, Exponential
from dpbudget.mechanisms.factorised import MatrixFactorised, TreeAggregated
from dpbudget.mechanisms.gaussian import Gaussian
from dpbudget.mechanisms.gaussian_pairs import ReplaceOneGaussianPair, SubsampledGaussianPair
from dpbudget.mechanisms.laplace import Laplace, LaplacePair
from dpbudget.mechanisms.pair_of import FinitePair, FinitePairOf, PairOf
from dpbudget.mechanisms.random_allocation import RandomAllocation, RandomAllocationPair
from dpbudget.mechanisms.randomised_response import RandomisedResponse, RandomisedResponsePair
from dpbudget.mechanisms.sampled import PoissonSampled, ShuffledEpoch, WithoutReplacement
from dpbudget.mechanisms.sampled_pairs import PoissonSampledPair, SubsetSampledPair
from dpbudget.mechanisms.truncated_poisson import TruncatedPoisson

__all__ = [
    "Adjacency",
    "ApproximatePair",
    "BlackBox",
    "BoundedRangePair",
    "Charge",
    "Direction",
    "DiscreteGaussian",
    "DiscreteGaussianPair",
    "DiscreteLaplace",
    "DiscreteLaplacePair",
    "DominatingPair",
    "Exponential",
    "FinitePair",
    "FinitePairOf",
    "Gaussian",
    "Laplace",
    "LaplacePair",
    "MatrixFactorised",
    "Mechanism",
    "PairOf",
    "PoissonSampled",
    "PoissonSampledPair",
    "RandomAllocation",
    "RandomAllocationPair",
    "RandomisedResponse",
    "RandomisedResponsePair",
    "ReplaceOneGaussianPair",
    "ShuffledEpoch",
    "SubsampledGaussianPair",
    "SubsetSampledPair",
    "Tails",
    "TreeAggregated",
    "TruncatedPoisson",
    "WithoutReplacement",
]
