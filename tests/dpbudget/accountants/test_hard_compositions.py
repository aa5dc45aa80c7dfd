"""Rare large losses, cuts and replaced records: brackets are narrow and agree with whatever else is known."""

from __future__ import annotations

import math
import random

import mpmath
import numpy as np
import pytest
from accounting_cases import WORKLOADS, sampled
from replace_one_oracle import log_moment_of
from scipy.special import ndtr

from dpbudget.accountants import get_accountant
from dpbudget.accountants._closed_form import one_step_delta
from dpbudget.accountants._cutting import cut_laws
from dpbudget.accountants._direction import DirectionCurve
from dpbudget.accountants._jump import jumps_of, log_delta_without_jumps, split_at
from dpbudget.accountants._law import Cut, Law, losses_at
from dpbudget.accountants._phases import Phase
from dpbudget.accountants._tilted_step import TiltedStep
from dpbudget.mechanisms import Adjacency, ReplaceOneGaussianPair, SubsampledGaussianPair

PRV, RDP = get_accountant("prv"), get_accountant("rdp")

#: Queries whose contour needs cuts or the jumps' contour: rate, noise multiplier, steps, delta.
HARD = [
    (1.035e-4, 1.007, 5689, 1.47e-12),
    (2.413e-4, 0.731, 162, 1.64e-11),
    (2.409e-4, 1.610, 1194, 2.5e-12),
    (1.269e-4, 1.166, 511, 4.74e-8),
    (4.191e-4, 3.051, 173, 1.51e-12),
    (1e-4, 0.6, 100_000, 1e-8),
]

#: True epsilon under replace-one adjacency, by a separate implementation.
REPLACED = {"W1": 4.221296734379, "W2": 14.711200061352}


def curve(*step, adjacency=Adjacency.ADD_REMOVE):
    return PRV.curve([sampled(*step)], adjacency)


@pytest.mark.parametrize(("rate", "sigma", "count", "delta"), HARD)
def test_hard_brackets_are_narrow(rate, sigma, count, delta):
    bounds = curve(rate, sigma, count).epsilon(delta)
    assert bounds.kind == "certified"
    assert bounds.width <= 1e-6


@pytest.mark.parametrize(("rate", "sigma", "count", "delta"), HARD)
def test_each_method_alone_gives_an_interval_that_meets_the_others(rate, sigma, count, delta):
    # The plain contour, the cut one and the jumps' one share no rounding; _intersect refuses disjoint intervals.
    one = DirectionCurve((Phase(SubsampledGaussianPair(rate, sigma), count),), "remove")
    ceiling = RDP.curve([sampled(rate, sigma, count)], Adjacency.ADD_REMOVE).epsilon(delta).upper
    rows, _ = one._rows_at_delta(one._table, math.log(delta))
    plain, _ = one._refine(one._table, rows, delta, (0.0, ceiling * (1 + 1e-6)))
    cut = one._refine_cut(delta, (0.0, ceiling * (1 + 1e-6)))
    assert max(plain[0], cut[0]) <= min(plain[1], cut[1])


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "sigma", "count", "delta"), [HARD[3], HARD[1]])
def test_hard_brackets_contain_the_truth_of_a_fine_discretisation(rate, sigma, count, delta):
    bounds = get_accountant("pld").curve([sampled(rate, sigma, count)], Adjacency.ADD_REMOVE).epsilon(delta)
    ours = curve(rate, sigma, count).epsilon(delta)
    assert max(bounds.lower, ours.lower) <= min(bounds.upper, ours.upper)


def test_two_steps_with_a_rare_large_loss_agree_with_an_integral_over_the_first():
    rate, sigma, epsilon = int(0.01 * 2**64) / 2**64, 0.5, 3.0
    m = 1 / sigma

    def one(loss):  # delta of the second step, closed form, at any sign of its argument
        growth = (np.exp(loss) - 1 + rate) / rate
        x = (np.log(np.maximum(growth, 1e-300)) + m * m / 2) / m
        reached = (1 - rate) * ndtr(-x) + rate * ndtr(m - x) - np.exp(loss) * ndtr(-x)
        return np.where(growth > 0, reached, 1 - np.exp(loss))

    x = np.arange(-12, 16, 1e-4)
    ratio = rate * np.expm1(m * x - m * m / 2)
    true = float(
        (np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (1 + ratio) * one(epsilon - np.log1p(ratio))).sum() * 1e-4
    )
    for accountant in (PRV, get_accountant("pld")):
        bounds = accountant.curve([sampled(rate, sigma, 2)], Adjacency.ADD_REMOVE).delta(epsilon)
        assert bounds.lower <= true * (1 + 1e-9)
        assert bounds.upper >= true * (1 - 1e-9)
        assert bounds.width <= 1e-5 * true


@pytest.mark.parametrize("name", sorted(REPLACED))
def test_replacing_a_record_costs_what_a_separate_implementation_found(name):
    workload = next(w for w in WORKLOADS if w.name == name)
    bounds = PRV.curve(workload.charges, Adjacency.REPLACE_ONE).epsilon(workload.delta)
    assert bounds.lower <= REPLACED[name] + 1e-12
    assert bounds.upper >= REPLACED[name] - 1e-12
    assert bounds.width <= 1e-9 * max(1.0, bounds.upper)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_replacing_costs_more_than_removing_and_less_than_twice_the_group(workload):
    replaced = PRV.curve(workload.charges, Adjacency.REPLACE_ONE).epsilon(workload.delta)
    removed = PRV.curve(workload.charges, Adjacency.ADD_REMOVE).epsilon(workload.delta)
    renyi = RDP.curve(workload.charges, Adjacency.REPLACE_ONE).epsilon(workload.delta)
    assert removed.lower <= replaced.upper
    assert replaced.lower <= renyi.upper
    # Removing one record and adding another: group privacy of two records at delta (1 + e^eps) of each half.
    if removed.upper < 100:
        half = removed.upper
        weaker = workload.delta * (1 + math.exp(half))
        if weaker < 1.0:
            assert PRV.curve(workload.charges, Adjacency.REPLACE_ONE).epsilon(weaker).lower <= 2 * half


@pytest.mark.parametrize(
    ("rate", "sigma", "epsilon"), [(0.3, 0.8, 0.7), (0.01, 1.0, 1.4), (1e-5, 0.5, 0.01), (0.9, 2.0, 0.0)]
)
def test_one_replacement_has_the_hockey_stick_of_its_densities(rate, sigma, epsilon):
    low, high = one_step_delta(ReplaceOneGaussianPair(rate, sigma), epsilon, "remove")
    with mpmath.workdps(30):
        q, m, e = mpmath.mpf(rate), 1 / mpmath.mpf(sigma), mpmath.exp(mpmath.mpf(epsilon))

        def gain(x):
            return (1 - q) * (1 - e) * mpmath.npdf(x) + q * mpmath.npdf(x - m) - q * e * mpmath.npdf(x + m)

        cut = mpmath.findroot(gain, (0, 30), solver="bisect", tol=1e-40) if epsilon else mpmath.mpf(0)
        true = mpmath.quad(gain, [cut, cut + 1, cut + 3, cut + 10, cut + 40])
    assert low <= true * (1 + mpmath.mpf(10) ** -14)
    assert high >= true * (1 - mpmath.mpf(10) ** -14)
    assert high - low <= 1e-14 * high


@pytest.mark.parametrize(
    "law", [Law(0.01, 1.0, "replace"), Law(1e-3, 1.2, "remove", Cut(7.0, 0.02)), Law(0.2, 0.3, "replace")]
)
def test_complex_moments_of_new_laws_lie_within_their_error_bounds(law):
    tilt, u = 2.5, np.array([0.0, 1.0, 7.0, 20.0])
    step = TiltedStep(law, tilt, 20.0, 45.0)
    answers = [step.moments(u), step.moments_along(1.0, 20)]
    answers[1] = type(answers[1])(answers[1].log_moment[[0, 1, 7, 20]], answers[1].error[[0, 1, 7, 20]])
    for answer in answers:
        for at, value, error in zip(u, answer.log_moment, answer.error, strict=True):
            true = log_moment_of(law, complex(tilt, at))
            assert abs(np.exp(np.clongdouble(value) - true) - 1) <= error + 1e-15
            assert error < 1e-11


def test_jumps_and_their_rest_bound_the_parts_of_a_step():
    law = cut_laws([Law(1e-3, 1.0, "remove")], [500], 0.5, 1e-9, 1e-9)[0]
    split = split_at(law, 0.1)
    step = TiltedStep(law, 3.0, 10.0, 80.0, sharp=False)
    jumps = jumps_of(step, split, 1.0, 10)
    x = np.arange(-60000, 60000).astype(np.longdouble) * np.longdouble(2e-4)
    near = 1 - np.longdouble(1e-3) + np.longdouble(1e-3) * np.exp(x - np.longdouble(0.5))
    weight = np.exp(-x * x / 2) / np.sqrt(2 * np.longdouble(np.pi)) * np.longdouble(2e-4) * near
    weight *= 1 / (1 + np.exp((x - law.cut.at) / law.cut.width)) / (1 + np.exp(-(x - split.at) / split.width))
    for k in (0, 1, 10):
        true = (weight * np.exp((3.0 + 1j * k) * np.log(near))).sum()
        assert (
            abs(jumps.value[k] * math.exp(step.log_scale) - true) <= jumps.error[k] * math.exp(step.log_scale) + 1e-19
        )
        assert jumps.error[k] <= 1e-10 * jumps.top
    # What has no jump: its delta is below the bound, here by brute force for one step.
    bound = log_delta_without_jumps(law, 1, split, 0.3)
    rest = weight * 0 + np.exp(-x * x / 2) / np.sqrt(2 * np.longdouble(np.pi)) * np.longdouble(2e-4) * near
    rest = rest * (1 - 1 / (1 + np.exp(-(x - split.at) / split.width)))
    true = (rest * np.maximum(1 - np.exp(0.3 - np.log(near)), 0)).sum()
    assert true <= math.exp(bound)


def sweep(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        rate, sigma = 10 ** rng.uniform(-4, math.log10(0.5)), 10 ** rng.uniform(math.log10(0.5), math.log10(20))
        yield rate, sigma, int(10 ** rng.uniform(2, 6)), 10 ** rng.uniform(-12, -4)


def share_of_wide(count, seed):
    wide = 0
    for rate, sigma, steps, delta in sweep(count, seed):
        bounds = curve(rate, sigma, steps).epsilon(delta)
        wide += bounds.width > 1e-6 * max(1.0, bounds.upper)
    return wide / count


def test_random_queries_are_answered_to_one_part_in_a_million():
    assert share_of_wide(150, 20261127) == 0.0


@pytest.mark.slow
def test_of_three_thousand_random_queries_at_most_one_in_a_thousand_is_wider():
    assert share_of_wide(3000, 7) <= 1e-3


@pytest.mark.parametrize("adjacency", [Adjacency.ADD_REMOVE, Adjacency.REPLACE_ONE])
def test_the_whole_box_of_parameters_always_has_a_valid_answer(adjacency):
    rng = random.Random(5)
    for _ in range(25):
        rate, sigma = min(10 ** rng.uniform(-7, 0.05), 1.0), 10 ** rng.uniform(math.log10(0.2), math.log10(200))
        steps, delta = int(10 ** rng.uniform(0, 9)), 10 ** rng.uniform(-300, -2)
        bounds = curve(rate, sigma, steps, adjacency=adjacency).epsilon(delta)
        alone = curve(rate, sigma, 1, adjacency=adjacency).epsilon(delta)
        renyi = RDP.curve([sampled(rate, sigma, steps)], adjacency).epsilon(delta)
        assert alone.lower * (1 - 1e-9) <= bounds.upper
        assert bounds.lower <= renyi.upper
        assert bounds.kind == "certified"


def test_the_ends_of_a_plans_epsilon_cost_one_question():
    one = curve(0.01, 1.0, 1000)
    between = one.epsilon_between(0.99e-6, 1e-6)
    assert between.upper == one.epsilon(0.99e-6).upper
    assert between.lower == pytest.approx(one.epsilon(1e-6).lower, rel=1e-10)
    assert between.lower <= one.epsilon(1e-6).upper


def test_estimates_for_searches_are_close():
    one = curve(0.01, 1.0, 1000)
    epsilon = one.epsilon(1e-6).upper
    assert one.rough_epsilon(1e-6) == pytest.approx(epsilon, rel=0.01)
    log_delta, slope = one.estimate_log_delta(epsilon)
    assert log_delta == pytest.approx(math.log(1e-6), abs=1e-8)
    assert slope == pytest.approx(one.estimate_log_delta(epsilon + 1e-5)[0] / 1e-5 - log_delta / 1e-5, rel=1e-3)


def test_what_has_no_jump_is_bounded_where_the_split_lies_below_the_shift():
    # One step, noise 0.15: the split at a tenth of epsilon lies left of the shifted mean.
    law = Law(1e-6, 1 / 0.15, "remove")
    assert log_delta_without_jumps(law, 1, split_at(law, 0.3), 3.0) >= -426.2


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "delta"),
    [(1e-4, 0.05, 3, 1e-300), (1e-7, 0.02, 10**12, 0.3), (0.9, 0.02, 10**9, 1e-300), (2.0**-60, 5.0, 10**12, 0.999)],
)
def test_epsilons_of_thousands_raise_nothing(rate, sigma, steps, delta):
    bounds = PRV.curve([sampled(rate, sigma, steps)], Adjacency.ADD_REMOVE).epsilon(delta)
    assert 0.0 <= bounds.lower <= bounds.upper


def test_the_weight_of_a_replaced_record_near_zero_has_its_whole_error_counted():
    law, x = Law(1 - 2.0**-53, 1 / 0.12303, "replace"), 2.0**-9
    one = losses_at(law, np.array([x]))
    with mpmath.workdps(50):
        q, m = mpmath.mpf(law.rate), mpmath.mpf(law.shift)
        true = 1 - q + q * mpmath.exp(m * mpmath.mpf(x) - m * m / 2)
        assert abs(one.weight[0] / true - 1) <= one.weight_error[0]
