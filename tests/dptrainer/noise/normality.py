"""Whether values are standard Gaussian: p-values from sums that are fed piece by piece, so that memory stays small.

Every p-value is uniform (or larger) for a right generator. One below :data:`ALPHA` is a failure; as one call of
:func:`failed` looks at no more than :data:`MOST` of them, a right generator with a random key fails it with a
probability below 10^-6. Keys of the tests are fixed, so that the outcome is the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import special

from dptrainer.noise.chacha import keystream

Floats = NDArray[np.float64]
#: Whole blocks of words -> their values, 10 for each.
Generator = Callable[[bytearray], Floats]
MOST, ALPHA = 100, 1e-8
_KEY = bytes(range(32))
#: Bins of equal probability for chi-squared, and for the distance of Kolmogorov and Smirnov.
BINS, FINE = 4096, 1 << 20


class Sample:
    """Sums over values in the order of a stream, pairs first; ``p_values`` answers for all that was fed."""

    def __init__(self) -> None:
        self.count = 0
        self._fine = np.zeros(FINE, dtype=np.int64)
        self._joint = np.zeros(BINS, dtype=np.int64)
        self._angles = np.zeros(BINS, dtype=np.int64)
        self._beyond = np.zeros((2, 7))
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def feed(self, z: Floats) -> None:
        """Values from the beginning of a block on, a whole number of blocks."""
        assert len(z) % 10 == 0
        self.count += len(z)
        self._fine += np.bincount(_bins(special.ndtr(z), FINE), minlength=FINE)
        for bound in range(7):
            self._beyond[:, bound] += (z > bound).sum(), (z < -bound).sum()
        pairs = z.reshape(-1, 2)
        squares = pairs * pairs
        turns = _bins(np.arctan2(pairs[:, 1], pairs[:, 0]) / (2 * math.pi) + 0.5, BINS)
        self._angles += np.bincount(turns, minlength=BINS)
        rings = _bins(np.exp(-squares.sum(1) / 2), 16)
        self._joint += np.bincount(rings * 256 + turns // 16, minlength=BINS)
        self._add("mean", z, 1)
        self._add("variance", squares.reshape(-1) - 1, 2)
        self._add("within a pair", pairs[:, 0] * pairs[:, 1], 1)
        self._add("squares within a pair", (squares[:, 0] - 1) * (squares[:, 1] - 1), 4)
        self._add("next pair", z[2:] * z[:-2], 1)
        self._add("next block", z[10:] * z[:-10], 1)
        self._add("squares of the next pair", (squares[1:] - 1) * (squares[:-1] - 1), 4)

    def _add(self, name: str, terms: Floats, variance: float) -> None:
        """Terms of mean 0 and the given variance, uncorrelated."""
        self._sums[name] = self._sums.get(name, 0.0) + float(terms.sum())
        self._weights[name] = self._weights.get(name, 0.0) + variance * terms.size

    def p_values(self) -> dict[str, float]:
        """By name: moments, correlations, chi-squared, Kolmogorov and Smirnov, and counts beyond 0 to 6 sigma."""
        found = {name: _p_of_score(total / math.sqrt(self._weights[name])) for name, total in self._sums.items()}
        found["chi-squared"] = _p_of_counts(self._fine.reshape(BINS, -1).sum(1))
        found["angles"] = _p_of_counts(self._angles)
        found["angles by radius"] = _p_of_counts(self._joint)
        # At the edges of the bins only: the distance is at most larger, by less than 10^-6.
        steps = np.cumsum(self._fine) / self.count - np.arange(1, FINE + 1) / FINE
        found["kolmogorov"] = float(special.kolmogorov(math.sqrt(self.count) * float(np.abs(steps).max())))
        for bound in range(7):
            expected = self.count * float(special.ndtr(-bound))
            for side, counted in zip(["above", "below"], self._beyond[:, bound], strict=True):
                name = f"{side} {bound} sigma"
                if bound:
                    found[name] = _p_of_poisson(float(counted), expected)
                else:
                    found[name] = _p_of_score((float(counted) - expected) / math.sqrt(self.count / 4))
        return found


def p_values(values: Floats) -> dict[str, float]:
    """Of values at hand."""
    sample = Sample()
    sample.feed(values)
    return sample.p_values()


def p_of_correlation(first: Floats, second: Floats) -> float:
    """Whether two streams, steps or parameters have to do with each other: their products sum to N(0, n)."""
    return _p_of_score(float(first @ second) / math.sqrt(len(first)))


def p_of_tail(generate: Generator, zeros: int, blocks: int = 20_000) -> float:
    """Whether the tail is right where no sample reaches: radii of words whose top ``zeros`` bits are 0.

    U is uniform below 2^-zeros then, so that r^2 - 2 zeros ln 2 is exponential with mean 2.
    """
    k = np.frombuffer(keystream(_KEY, zeros, 0, blocks), dtype="<u8").reshape(-1, 8).copy()
    k[:, :5] >>= np.uint64(zeros)
    pairs = generate(bytearray(k.tobytes())).reshape(-1, 2)
    excess = (pairs * pairs).sum(1) / 2 - zeros * math.log(2)
    below = np.sort(-np.expm1(-np.maximum(excess, 0)))
    grid = np.arange(len(below)) / len(below)
    distance = float(max((below - grid).max(), (grid + 1 / len(below) - below).max()))
    return float(special.kolmogorov(math.sqrt(len(below)) * distance))


def p_of_tails(generate: Generator) -> dict[str, float]:
    """:func:`p_of_tail` from 3.3 sigma on to where few of the 64 bits are left."""
    return {f"tail below 2^-{zeros}": p_of_tail(generate, zeros) for zeros in (8, 16, 24, 32, 40, 48, 52)}


def failed(found: Mapping[str, float]) -> list[str]:
    """The names of the tests that failed."""
    assert len(found) <= MOST
    return [name for name, p in found.items() if not p >= ALPHA]


def suspicions(generate: Generator, count: int = 1_000_000) -> list[str]:
    """The names of the tests that a generator fails, of values in a row and of its tail."""
    values = generate(keystream(_KEY, 0, 0, count // 10))
    return failed({**p_values(values), **p_of_tails(generate)})


def _bins(u: Floats, bins: int) -> NDArray[np.int64]:
    return np.clip((u * bins).astype(np.int64), 0, bins - 1)


def _p_of_score(score: float) -> float:
    """Two-sided, of a number that should be standard normal."""
    return 2 * float(special.ndtr(-abs(score)))


def _p_of_counts(counts: NDArray[np.int64]) -> float:
    """Chi-squared for equally likely bins; counts that are too equal are as suspicious."""
    expected = counts.sum() / len(counts)
    statistic = float(((counts - expected) ** 2).sum() / expected)
    sides = special.chdtr(len(counts) - 1, statistic), special.chdtrc(len(counts) - 1, statistic)
    return min(1.0, 2 * float(min(sides)))


def _p_of_poisson(counted: float, expected: float) -> float:
    more = special.pdtrc(counted - 1, expected) if counted else 1.0
    return min(1.0, 2 * float(min(more, special.pdtr(counted, expected))))
