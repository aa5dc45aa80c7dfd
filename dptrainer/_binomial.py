"""Exact binomial counts from uniform bits: integers only, with more bits wherever the first 64 do not decide."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray


def binomial_counts(
    words: NDArray[np.uint64], trials: int, rate_k: int, more: Callable[[int, int], int]
) -> NDArray[np.int64]:
    """One count of Bin(``trials``, ``rate_k`` / 2^64) for every uniform 64-bit word, exactly in law.

    A word w stands for a real uniform U in [w, w + 1) / 2^64, and the count is the smallest c with U < F(c), where F is
    the distribution function. Where a value F(c) lies inside that interval, further bits of U decide.

    Args:
        words: [n] independent uniform words.
        trials: number of trials, a power of two in [64, 2^64], with trials * rate_k / 2^64 < 2.
        rate_k: success probability times 2^64.
        more: ``more(i, n)`` gives 64 n further bits of the i-th uniform; a longer answer starts with the shorter one.
    """
    edges = np.array(distribution_floors(trials, rate_k, 64), dtype=np.uint64)
    # A word above floor(2^64 F(c)) has U >= F(c); below it U < F(c).
    counts = np.searchsorted(edges, words, side="left").astype(np.int64)
    undecided = np.flatnonzero(edges[counts] == words)  # the last edge is the largest word
    for at in undecided:
        counts[at] = _refine(int(words[at]), trials, rate_k, partial(more, int(at)))
    return counts


def _refine(word: int, trials: int, rate_k: int, more: Callable[[int], int]) -> int:
    """The count of one uniform whose first 64 bits are ``word``, reading bits until its interval holds no F(c)."""
    extra = 1
    while True:
        low = (word << 64 * extra) | more(extra)
        edges = distribution_floors(trials, rate_k, 64 * (1 + extra))
        count = sum(edge < low for edge in edges)
        if edges[count] != low:
            return count
        extra += 1


@lru_cache(maxsize=64)
def distribution_floors(trials: int, rate_k: int, bits: int) -> tuple[int, ...]:
    """floor(2^bits F(c)) for c = 0, 1, ... up to the first that equals 2^bits - 1, for trials >= 64.

    Interval arithmetic in integers: the two ends must have the same floor, otherwise the precision is doubled.
    """
    guard = 96
    while True:
        floors = _floors(trials, rate_k, bits, guard)
        if floors is not None:
            return floors
        guard *= 2


def _floors(trials: int, rate_k: int, bits: int, guard: int) -> tuple[int, ...] | None:
    precision = bits + guard
    low = high = ((1 << 64) - rate_k) << (precision - 64)
    for _ in range(trials.bit_length() - 1):  # (1 - q)^trials by squaring, rounded outwards
        low, high = low * low >> precision, -(-high * high >> precision)
    cdf_low, cdf_high, floors = 0, 0, list[int]()
    for successes in range(trials):
        cdf_low, cdf_high = cdf_low + low, min(cdf_high + high, (1 << precision) - 1)  # F(c) < 1 for c < trials
        if cdf_low >> guard != cdf_high >> guard:
            return None
        floors.append(cdf_low >> guard)
        if floors[-1] == (1 << bits) - 1:
            break
        # P(c + 1) = P(c) (trials - c) q / ((c + 1) (1 - q))
        up, down = (trials - successes) * rate_k, (successes + 1) * ((1 << 64) - rate_k)
        low, high = low * up // down, -(-high * up // down)
    return tuple(floors)
