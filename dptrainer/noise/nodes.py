"""The binary tree of a pass of DP-FTRL: which nodes' noise is in a prefix sum, and what one step changes of it.

The steps of a pass are t = 1..T. A node of level l holds the sum of 2^l steps, the last of which is a multiple of 2^l.
A step is in one node of each level at most, hence in at most L = floor(log2 T) + 1 of them. The sum of the first t
steps is that of one node for each bit of t that is set. The last of these is node t; its level low(t) is the number of
trailing zeros of t.

Two ways to compute it from nodes that have noise of their own:

* plain: each of these nodes as it is, so that the noise N_t has the variance of popcount(t) nodes;
* averaged: each of them as the mean of itself and of the sums of the nodes below it, level by level, weighted by the
  inverse of their variances. Level l then has 1 / (2 - 2^-l) of the variance of a node (Honaker 2015, estimation from
  below; Kairouz et al. 2021 use it).

Step t hands out its clipped sum plus N_t - N_{t-1}, in which the nodes up to step t - 2^low(t) cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

#: The number of a node, and its weight in N_t - N_{t-1}.
Weighted = tuple[int, float]


def levels(steps: int) -> int:
    """L = floor(log2(steps)) + 1: in how many nodes one step of a pass is at most."""
    return steps.bit_length()


def node_number(level: int, end: int) -> int:
    """The place of a node in the tree from left to right, 0 <= number < 2 T - 1, different for every node.

    Args:
        level: its steps are 2^level.
        end: the last of them, a multiple of 2^level.
    """
    return ((2 * (end >> level) - 1) << level) - 1


def plain_nodes(step: int) -> Iterator[Weighted]:
    """N_t - N_{t-1} for t = ``step``: node t, less those that it takes in. Two nodes a step on average."""
    yield node_number(_low(step), step), 1.0
    for level in range(_low(step)):
        yield node_number(level, step - (1 << level)), -1.0


def averaged_nodes(step: int) -> Iterator[Weighted]:
    """N_t - N_{t-1} for t = ``step``, averaged: all nodes of the last 2^low(t) steps, about L a step on average."""
    top = _low(step)
    for level in range(top + 1):
        for end in range(step - (1 << top) + (1 << level), step, 1 << level):
            below = (step - end).bit_length() - 1  # the level of the node of the prefix t - 1 that it was part of
            yield node_number(level, end), _weight(top, level) - _weight(below, level)
        yield node_number(level, step), _weight(top, level)


def norm(nodes: Iterable[Weighted]) -> float:
    """Standard deviation of a weighted sum of nodes, that of one node being 1."""
    return math.sqrt(math.fsum(weight * weight for _, weight in nodes))


def _low(step: int) -> int:
    """Trailing zeros."""
    return (step & -step).bit_length() - 1


def _weight(top: int, level: int) -> float:
    """Weight of a node of ``level`` in the averaged estimate of one of level ``top``: inverse variances, sum 1."""
    return (1 << level) / ((2 << top) - 1)
