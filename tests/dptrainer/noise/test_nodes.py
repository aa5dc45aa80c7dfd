"""The tree of a pass against its definition: every node by its steps, every weight in rational numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import pytest

from dptrainer.noise.nodes import Weighted, averaged_nodes, levels, node_number, norm, plain_nodes

PASSES = [1, 2, 3, 7, 8, 9, 31, 32, 33, 100]
Ways = Callable[[int], Iterable[Weighted]]


def tree(steps: int) -> dict[int, range]:
    """Number -> the steps of every node that is complete within a pass."""
    found: dict[int, range] = {}
    for level in range(steps.bit_length()):
        for end in range(1 << level, steps + 1, 1 << level):
            number = node_number(level, end)
            assert number not in found
            found[number] = range(end - (1 << level) + 1, end + 1)
    return found


def prefix(step: int) -> list[tuple[int, int]]:
    """(level, end) of the nodes of a prefix, straight from its binary digits."""
    found, end = [], 0
    for level in reversed(range(step.bit_length())):
        if step >> level & 1:
            end += 1 << level
            found.append((level, end))
    return found


def estimate(level: int, end: int) -> dict[int, Fraction]:
    """Honaker's recursion: a node and the sum of its two halves, weighted by their inverse variances."""
    own = {node_number(level, end): Fraction(1)}
    if level == 0:
        return own
    halves = {**estimate(level - 1, end - (1 << level - 1)), **estimate(level - 1, end)}
    below = sum(weight**2 for weight in halves.values())
    share = below / (1 + below)
    return {number: share * weight for number, weight in own.items()} | {
        number: (1 - share) * weight for number, weight in halves.items()
    }


def summed(way: Ways, step: int) -> dict[int, float]:
    """N_t by node, from what the first ``step`` steps hand out."""
    total: dict[int, float] = {}
    for one in range(1, step + 1):
        for number, weight in way(one):
            total[number] = total.get(number, 0.0) + weight
    return {number: weight for number, weight in total.items() if abs(weight) > 1e-12}


@pytest.mark.parametrize("steps", PASSES)
def test_nodes_have_numbers_of_their_own_below_twice_the_steps(steps: int) -> None:
    numbers = tree(steps)
    assert len(numbers) == sum(steps >> level for level in range(steps.bit_length()))
    assert set(numbers) <= set(range(max(1, 2 * steps - 1)))


@pytest.mark.parametrize("steps", PASSES)
def test_a_step_is_in_at_most_l_nodes_and_the_first_in_exactly_l(steps: int) -> None:
    nodes = tree(steps).values()
    most = {one: sum(one in held for held in nodes) for one in range(1, steps + 1)}
    assert levels(steps) == math.floor(math.log2(steps)) + 1
    assert max(most.values()) == most[1] == levels(steps)


@pytest.mark.parametrize("steps", PASSES)
def test_the_nodes_of_a_prefix_cover_its_steps_once(steps: int) -> None:
    held = tree(steps)
    for step in range(1, steps + 1):
        covered = [one for level, end in prefix(step) for one in held[node_number(level, end)]]
        assert sorted(covered) == list(range(1, step + 1))
        assert len(prefix(step)) == step.bit_count()


@pytest.mark.parametrize("way", [plain_nodes, averaged_nodes])
@pytest.mark.parametrize("step", range(1, 41))
def test_no_step_takes_noise_of_a_node_that_is_not_complete_or_the_same_twice(way: Ways, step: int) -> None:
    """Completeness is causality: the sum of a node that ends later is not known yet."""
    numbers = [number for number, _ in way(step)]
    held = tree(step)
    assert len(set(numbers)) == len(numbers)
    assert all(number in held and held[number][-1] <= step for number in numbers)


@pytest.mark.parametrize("step", range(1, 41))
def test_plain_noise_is_that_of_the_nodes_of_the_prefix(step: int) -> None:
    assert summed(plain_nodes, step) == {node_number(level, end): 1.0 for level, end in prefix(step)}


@pytest.mark.parametrize("step", range(1, 41))
def test_averaged_noise_is_that_of_honakers_estimate_of_the_nodes_of_the_prefix(step: int) -> None:
    expected: dict[int, Fraction] = {}
    for level, end in prefix(step):
        expected |= estimate(level, end)
    found = summed(averaged_nodes, step)
    assert found.keys() == expected.keys()
    assert all(found[number] == pytest.approx(float(weight), rel=1e-12) for number, weight in expected.items())


@pytest.mark.parametrize("step", range(1, 41))
def test_averaging_leaves_every_step_in_the_prefix_with_weight_one(step: int) -> None:
    """Without noise the estimate is the sum itself, so only the noise is other than in the plain tree."""
    held, found = tree(step), summed(averaged_nodes, step)
    for one in range(1, step + 1):
        assert sum(weight for number, weight in found.items() if one in held[number]) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("step", range(1, 41))
def test_the_variances_of_prefixes_are_those_of_the_formulas(step: int) -> None:
    plain, averaged = (norm(summed(way, step).items()) ** 2 for way in (plain_nodes, averaged_nodes))
    assert plain == pytest.approx(step.bit_count())
    assert averaged == pytest.approx(sum(1 / (2 - 2.0**-level) for level, _ in prefix(step)))


@pytest.mark.parametrize("steps", [64, 100, 1000])
def test_draws_a_step_are_two_or_as_many_as_there_are_levels(steps: int) -> None:
    plain, averaged = (sum(len(list(way(t))) for t in range(1, steps + 1)) for way in (plain_nodes, averaged_nodes))
    assert plain < 2 * steps
    assert averaged < (levels(steps) + 1) * steps
