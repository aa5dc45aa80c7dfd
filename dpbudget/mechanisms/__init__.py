"""Mechanisms as values: one family a file, each with its dominating pair."""

from dpbudget.mechanisms.base import Adjacency, Charge, Direction, DominatingPair, Mechanism, Tails
from dpbudget.mechanisms.gaussian import Gaussian
from dpbudget.mechanisms.gaussian_pairs import ReplaceOneGaussianPair, SubsampledGaussianPair
from dpbudget.mechanisms.sampled import PoissonSampled

__all__ = [
    "Adjacency",
    "Charge",
    "Direction",
    "DominatingPair",
    "Gaussian",
    "Mechanism",
    "PoissonSampled",
    "ReplaceOneGaussianPair",
    "SubsampledGaussianPair",
    "Tails",
]
