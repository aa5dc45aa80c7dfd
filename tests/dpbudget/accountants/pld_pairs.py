"""Dominating pairs with tails of their own, for the tests of the ``pld`` accountant, and mechanisms that have them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_ndtr, ndtr

from dpbudget.mechanisms import Adjacency, Charge, Direction, DominatingPair, Mechanism, Tails

PAD = 1e-13


def padded(first, second, lost=0.0) -> Tails:
    """Bounds from values that are right to 1e-13, up to ``lost`` in underflow."""
    first, second = np.clip(first, 0.0, 1.0), np.clip(second, 0.0, 1.0)
    up, down = 1.0 + PAD, 1.0 - PAD
    return Tails(
        np.where(first > 1e-290, first * down, 0.0), np.minimum(first * up + lost, 1.0),
        np.where(second > 1e-290, second * down, 0.0), np.minimum(second * up + lost, 1.0),
    )  # fmt: skip


@dataclass(frozen=True)
class NormalPair(DominatingPair):
    """The sampled Gaussian pair, its tails by scipy's normal distribution function."""

    rate: float
    sigma: float

    @property
    def symmetric(self) -> bool:
        return self.rate >= 1.0

    def tails(self, losses, direction: Direction) -> Tails:
        q, s = self.rate, self.sigma
        sign = 1.0 if direction == "remove" else -1.0
        t = np.asarray(losses, dtype=float) * sign
        # l(x) > t for x above the root of 1 - q + q e^((2x-1)/2s^2) = e^t
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            big = t + np.log1p(np.maximum(-(1.0 - q) * np.exp(-t), -1.0)) - math.log(q)
            small = np.log1p(np.maximum(np.expm1(t) / q, -1.0))
            x = s * s * np.where(t > 0.5, big, small) + 0.5
        x = np.where(np.isnan(x), -np.inf, x)
        if direction == "remove":
            q_law = ndtr(-x / s)
            p_law = (1.0 - q) * q_law + q * ndtr((1.0 - x) / s)
            return padded(p_law, q_law, 1e-300)
        # the loss -l exceeds its threshold for x below the root
        q_law = ndtr(x / s)
        p_law = (1.0 - q) * q_law + q * ndtr((x - 1.0) / s)
        return padded(q_law, p_law, 1e-300)


@dataclass(frozen=True)
class FinitePair(DominatingPair):
    """Two laws on finitely many outputs, as floats; zeros allowed in either."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    def tails(self, losses, direction: Direction) -> Tails:
        p, q = np.array(self.first), np.array(self.second)
        if direction == "add":
            p, q = q, p
        p, q = p[p + q > 0.0], q[p + q > 0.0]
        with np.errstate(divide="ignore"):
            loss = np.log(p) - np.log(q)
        t = np.asarray(losses, dtype=float)[:, None]
        unsure = 1e-15 * (1.0 + np.abs(t))
        low, high = (loss > t + unsure).astype(float), (loss > t - unsure).astype(float)
        return Tails(
            low @ p * (1 - PAD), np.minimum(high @ p * (1 + PAD), 1.0),
            low @ q * (1 - PAD), np.minimum(high @ q * (1 + PAD), 1.0),
        )  # fmt: skip


def response(epsilon: float, delta: float = 0.0) -> FinitePair:
    """Randomised response, and the (epsilon, delta) black box: outputs (sure 0, 0, 1, sure 1)."""
    low = (1.0 - delta) / (1.0 + math.exp(epsilon))
    high = 1.0 - delta - low
    return FinitePair((delta, high, low, 0.0), (0.0, low, high, delta))


@dataclass(frozen=True)
class LaplacePair(DominatingPair):
    """Laplace(1, b) against Laplace(0, b): atoms at losses +-1/b and a density between."""

    scale: float

    @property
    def symmetric(self) -> bool:
        return True

    def tails(self, losses, direction: Direction) -> Tails:
        b, t = self.scale, np.asarray(losses, dtype=float)
        # L(x) = (|x| - |x - 1|) / b under x ~ Laplace(1, b), as a reflection of the other direction
        x = 0.5 * (1.0 + b * t)
        inside = np.abs(t) < 1.0 / b
        below = t < -1.0 / b
        first = np.where(inside, 1.0 - 0.5 * np.exp(np.minimum((x - 1.0) / b, 0.0)), np.where(below, 1.0, 0.0))
        second = np.where(inside, 0.5 * np.exp(-np.maximum(x, 0.0) / b), np.where(below, 1.0, 0.0))
        edge = t == -1.0 / b
        first = np.where(edge, 1.0 - 0.5 * math.exp(-1.0 / b), first)
        return padded(first, np.where(edge, 0.5, second))


class Uses(Mechanism):
    """A mechanism made of a test's pair; compared by identity of the pair."""

    kind: str = "test"
    pair: Any = None

    def dominating_pair(self, adjacency: Adjacency) -> DominatingPair:
        return self.pair


def uses(pair: DominatingPair, count: int) -> Charge:
    return Charge(Uses.model_construct(kind="test", pair=pair), count)


__all__ = ["FinitePair", "LaplacePair", "NormalPair", "Uses", "log_ndtr", "response", "uses"]
