"""Mechanisms as values: one family a file, each with its dominating pair."""

from dpbudget.mechanisms.base import Adjacency, Charge, DominatingPair, Mechanism, SubsampledGaussianPair
from dpbudget.mechanisms.gaussian import Gaussian
from dpbudget.mechanisms.sampled import PoissonSampled

__all__ = [
    "Adjacency",
    "Charge",
    "DominatingPair",
    "Gaussian",
    "Mechanism",
    "PoissonSampled",
    "SubsampledGaussianPair",
]
