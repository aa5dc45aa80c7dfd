"""Mechanisms as values: bad input is named, unproved adjacencies are refused, canonical bytes come back."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpbudget.errors import InvalidParameter, NotComputable, Tampered
from dpbudget.mechanisms import (
    Adjacency,
    BlackBox,
    DiscreteGaussian,
    DiscreteLaplace,
    Exponential,
    FinitePairOf,
    Gaussian,
    Laplace,
    LaplacePair,
    MatrixFactorised,
    PairOf,
    PoissonSampled,
    RandomAllocation,
    RandomAllocationPair,
    RandomisedResponse,
    ShuffledEpoch,
    TreeAggregated,
    TruncatedPoisson,
    WithoutReplacement,
)

ADD, ZERO, REPLACE = Adjacency.ADD_REMOVE, Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE
LAPLACE = Laplace(noise_multiplier=2.0)
MECHANISMS = [
    LAPLACE,
    DiscreteGaussian(sigma=2.5, sensitivity=3),
    DiscreteLaplace(scale=2.0),
    RandomisedResponse(epsilon=1.0, categories=4),
    BlackBox(epsilon=0.5, delta=1e-6),
    Exponential(bounded_range=0.25),
    FinitePairOf(first=(0.5, 0.5), second=(0.25, 0.75), adjacencies=(ADD,)),
    TreeAggregated(noise_multiplier=3.0, steps=100),
    MatrixFactorised(noise_multiplier=3.0, strategy=((1.0,), (0.5, 1.0)), separation=2),
    PoissonSampled(rate_k=1 << 60, inner=LAPLACE),
    WithoutReplacement(size=10, population=1000, inner=Gaussian(noise_multiplier=1.0)),
    ShuffledEpoch(inner=LAPLACE),
    TruncatedPoisson(sampled=PoissonSampled(rate_k=1 << 60, inner=LAPLACE), population=1000, cap=200),
    RandomAllocation(noise_multiplier=1.0, steps=100),
]


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.kind)
def test_canonical_bytes_come_back_as_the_same_value(mechanism):
    assert type(mechanism).parse(mechanism.encode()) == mechanism


def test_the_bytes_of_a_sampled_gaussian_are_what_they_were():
    sampled = PoissonSampled(rate_k=1 << 63, inner=Gaussian(noise_multiplier=2.0))
    assert sampled.encode() == (
        b'{"inner":{"kind":"gaussian","noise_multiplier":"0x1.0000000000000p+1"},'
        b'"kind":"poisson-sampled","rate_k":"08000000000000000"}'
    )


@pytest.mark.parametrize(
    ("mechanism", "adjacency"),
    [
        (RandomisedResponse(epsilon=1.0), ADD),
        (BlackBox(epsilon=1.0, delta=0.0), ZERO),
        (BlackBox(epsilon=1.0, delta=0.0, adjacency=REPLACE), ADD),
        (FinitePairOf(first=(1.0,), second=(1.0,), adjacencies=(ADD,)), REPLACE),
        (PairOf(pair=LaplacePair(1.0), adjacencies=(ADD,)), ZERO),
        (TreeAggregated(noise_multiplier=1.0, steps=3), ADD),
        (MatrixFactorised(noise_multiplier=1.0, strategy=((1.0,),), separation=1), ADD),
        (PoissonSampled(rate_k=1 << 60, inner=LAPLACE), REPLACE),
        (PoissonSampled(rate_k=1 << 60, inner=Exponential(bounded_range=1.0)), ZERO),
        (WithoutReplacement(size=1, population=2, inner=LAPLACE), ADD),
        (
            WithoutReplacement(
                size=1, population=2, inner=FinitePairOf(first=(1.0,), second=(1.0,), adjacencies=(REPLACE,))
            ),
            REPLACE,
        ),
        (ShuffledEpoch(inner=LAPLACE), ADD),
        (MECHANISMS[-2], ZERO),
        (RandomAllocation(noise_multiplier=1.0, steps=3), REPLACE),
    ],
)
def test_an_adjacency_without_a_proof_is_refused_with_a_way_out(mechanism, adjacency):
    with pytest.raises(NotComputable) as caught:
        mechanism.dominating_pair(adjacency)
    assert caught.value.code == "DP062"
    assert caught.value.hint


BAD = st.one_of(st.just(math.nan), st.just(math.inf), st.just("1.0"), st.just(None), st.just(True), st.just(-1.0))


@settings(max_examples=30, deadline=None)
@given(BAD)
def test_bad_numbers_are_refused_by_the_name_of_the_parameter(bad):
    for make, name in (
        (lambda x: Laplace(noise_multiplier=x), "noise_multiplier"),
        (lambda x: DiscreteGaussian(sigma=x), "sigma"),
        (lambda x: DiscreteLaplace(scale=x), "scale"),
        (lambda x: RandomisedResponse(epsilon=x), "epsilon"),
        (lambda x: BlackBox(epsilon=x, delta=0.0), "epsilon"),
        (lambda x: BlackBox(epsilon=1.0, delta=x), "delta"),
        (lambda x: Exponential(bounded_range=x), "bounded_range"),
        (lambda x: RandomAllocation(noise_multiplier=x, steps=3), "noise_multiplier"),
        (lambda x: TreeAggregated(noise_multiplier=1.0, steps=x), "steps"),
    ):
        # A text is read as the canonical spelling of a float, and "1.0" is not one.
        with pytest.raises((ValidationError, ValueError, Tampered)) as caught:
            make(bad)
        assert name in str(caught.value) or "canonical" in str(caught.value)


@pytest.mark.parametrize("first", [(0.5, 0.6), (-0.5, 1.5), (1.0,)])
def test_weights_that_are_no_distribution_are_refused(first):
    with pytest.raises(ValidationError, match="first"):
        FinitePairOf(first=first, second=(0.5, 0.5), adjacencies=(ADD,))


def test_a_sample_larger_than_the_population_is_refused():
    with pytest.raises(ValidationError, match="population"):
        WithoutReplacement(size=3, population=2, inner=LAPLACE)


def test_replacing_a_record_costs_two_steps_everywhere():
    assert LAPLACE.dominating_pair(REPLACE) == LaplacePair(1.0)
    assert DiscreteGaussian(sigma=2.0).dominating_pair(REPLACE).shift == 2
    assert DiscreteLaplace(scale=2.0).dominating_pair(REPLACE).shift == 2
    assert Exponential(bounded_range=0.5).dominating_pair(REPLACE).width == 1.0
    group = BlackBox(epsilon=1.0, delta=1e-6).dominating_pair(REPLACE)
    assert group.epsilon == 2.0
    assert (1 + math.e) * 1e-6 <= group.delta_mass <= (1 + math.e) * 1.00001e-6


def test_a_user_pair_can_be_counted_but_not_written():
    mechanism = PairOf(pair=LaplacePair(1.0), adjacencies=(ADD,))
    assert mechanism.dominating_pair(ADD) == LaplacePair(1.0)
    with pytest.raises(TypeError, match="LaplacePair"):
        mechanism.encode()


@pytest.mark.parametrize(("steps", "levels"), [(1, 1), (2, 2), (7, 3), (8, 4), (1000, 10)])
def test_a_tree_has_a_level_for_every_bit_of_the_number_of_steps(steps, levels):
    sigma = TreeAggregated(noise_multiplier=3.0, steps=steps).dominating_pair(ZERO).sigma
    assert sigma <= 3.0 / math.sqrt(levels)
    assert sigma == pytest.approx(3.0 / math.sqrt(levels), rel=1e-14)


def test_the_sensitivity_of_a_strategy_is_the_worst_pattern_found_by_brute_force():
    rng = np.random.default_rng(1)
    for separation, width in ((1, 6), (2, 2), (3, 3), (2, 6), (6, 6)):
        c = np.tril(rng.normal(size=(6, 6))) * (np.subtract.outer(range(6), range(6)) < width)
        strategy = tuple(tuple(float(x) for x in c[i, : i + 1]) for i in range(6))
        bound = float(
            MatrixFactorised(noise_multiplier=1.0, strategy=strategy, separation=separation).squared_sensitivity()
        )
        patterns = [
            p
            for p in (np.flatnonzero([k >> i & 1 for i in range(6)]) for k in range(1, 64))
            if len(p) == 1 or min(np.diff(p)) >= separation
        ]
        signs = [np.array([1 - 2 * (k >> i & 1) for i in range(6)]) for k in range(64)]
        worst = max(float(np.sum((c[:, p] @ s[: len(p)]) ** 2)) for p in patterns for s in signs)
        assert worst <= bound * (1 + 1e-12)
        if separation == 6 or width <= separation:
            assert worst == pytest.approx(bound, rel=1e-12)


def test_moments_of_random_allocation_are_multinomial_sums():
    """E_Q (mean of likelihood ratios)^a for two steps, expanded by hand; and by quadrature for one."""
    pair, s2 = RandomAllocationPair(2, 1.5), 1.5**2
    for order in (2, 3, 7):
        exact = sum(
            math.comb(order, j) * math.exp((j * (j - 1) + (order - j) * (order - j - 1)) / (2 * s2))
            for j in range(order + 1)
        )
        assert pair.log_moment(order - 1.0, "remove") == pytest.approx(math.log(exact / 2**order), rel=1e-12)
    one = RandomAllocationPair(1, 1.5)
    assert one.log_moment(2.5, "remove") >= 2.5 * 3.5 / (2 * s2)
    assert one.log_moment(200.0, "remove") == pytest.approx(200 * 201 / (2 * s2))


@pytest.mark.parametrize(
    ("tilt", "direction"), [(0.3, "remove"), (1.5, "remove"), (2.6, "remove"), (0.5, "add"), (3.0, "add")]
)
def test_moments_of_random_allocation_bound_the_integral(tilt, direction):
    sigma = 1.2
    u = np.linspace(-14, 14, 1401)
    x, y = np.meshgrid(u * 1.0, u * 1.0)
    ratio = 0.5 * (np.exp((x - 0.5) / sigma**2) + np.exp((y - 0.5) / sigma**2))
    weight = np.exp(-(x**2 + y**2) / (2 * sigma**2)) / (2 * math.pi * sigma**2) * (u[1] - u[0]) ** 2
    exact = math.log(np.sum(weight * ratio ** (tilt + 1 if direction == "remove" else -tilt)))
    assert exact <= RandomAllocationPair(2, sigma).log_moment(tilt, direction) + 1e-9


def test_random_allocation_sends_the_reader_to_the_accountant_that_can():
    with pytest.raises(NotComputable, match="rdp"):
        RandomAllocationPair(10, 1.0).tails(np.array([0.0]), "remove")
    with pytest.raises(InvalidParameter, match="tilt"):
        RandomAllocationPair(10, 1.0).log_moment(math.nan, "add")


@pytest.mark.parametrize(("population", "cap"), [(50, 20), (50, 49), (50, 13), (50, 5), (1000, 400)])
def test_the_price_of_a_cap_bounds_the_binomial_tail(population, cap):
    sampled = PoissonSampled(rate_k=1 << 62, inner=LAPLACE)
    price = TruncatedPoisson(sampled=sampled, population=population, cap=cap).additive_delta(1.0, 3)
    with mpmath.workdps(40):
        q = mpmath.mpf(1) / 4
        terms = (
            mpmath.binomial(population, k) * q**k * (1 - q) ** (population - k) for k in range(cap + 1, population + 1)
        )
        exact = (1 + mpmath.e) * 3 * mpmath.fsum(terms)
    assert min(exact, 1) <= price
    assert cap <= 13 or price <= 2.5 * exact


def test_a_cap_that_never_binds_changes_nothing():
    sampled = PoissonSampled(rate_k=1 << 62, inner=LAPLACE)
    capped = TruncatedPoisson(sampled=sampled, population=50, cap=50)
    assert capped.dominating_pair(ZERO) == sampled.dominating_pair(ZERO)
    assert capped.additive_delta(1.0, 10) == 0.0
    with pytest.raises(InvalidParameter, match="steps"):
        capped.additive_delta(1.0, -1)
