"""The Renyi filter: integers, order, monotony, and bounds that hold."""

from __future__ import annotations

import math
import operator
from fractions import Fraction
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpbudget import filters
from dpbudget.accountants import get_accountant
from dpbudget.errors import BudgetExceeded, InvalidParameter
from dpbudget.filters import RDPFilter, Spent
from dpbudget.filters.renyi import DEFAULT_ORDERS, UNITS
from dpbudget.mechanisms import Adjacency, Charge, Gaussian, PoissonSampled, RandomisedResponse
from dpbudget.plan import Budget, rate_from_float

BUDGET = Budget(epsilon=3.0, delta=1e-6)
FILTER = RDPFilter(BUDGET)


def sampled(rate, sigma, count):
    return Charge(PoissonSampled(rate_k=rate_from_float(rate), inner=Gaussian(noise_multiplier=sigma)), count)


def most(filter_, charge):
    """The largest admitted count of one mechanism."""
    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        try:
            filter_.admit(Spent(), [Charge(charge.mechanism, middle)])
            low = middle
        except BudgetExceeded:
            high = middle
    return low


def test_what_is_admitted_is_within_the_budget_by_the_best_single_order():
    charge = sampled(0.01, 1.0, 1)
    count = most(FILTER, charge)
    renyi = get_accountant("rdp").curve([Charge(charge.mechanism, count)], Adjacency.ADD_REMOVE).epsilon(1e-6)
    assert renyi.upper < 3.0
    # Fifteen equal weights cost a factor of fifteen of delta, and a little for what lies between the orders.
    spent = Spent({charge.mechanism.dominating_pair(Adjacency.ADD_REMOVE): count})
    best = get_accountant("rdp").curve([Charge(charge.mechanism, count)], Adjacency.ADD_REMOVE).epsilon(1e-6 / 15)
    assert best.upper <= FILTER.epsilon(spent) <= 1.06 * best.upper


def test_one_order_is_the_plain_renyi_filter():
    one = RDPFilter(BUDGET, orders=(8.0,))
    count = most(one, Charge(Gaussian(noise_multiplier=20.0), 1))
    allowance = 3.0 - math.log1p(-1 / 8) + math.log(1e-6 * 8) / 7
    assert count == math.floor(allowance / (8 / (2 * 20.0**2)) * (1 - 1e-12))


def test_a_refusal_names_what_would_fit():
    charge = sampled(0.01, 1.0, 10**6)
    with pytest.raises(BudgetExceeded) as caught:
        FILTER.admit(Spent(), [charge])
    fitting = int(caught.value.hint.split()[0])
    spent = FILTER.admit(Spent(), [sampled(0.01, 1.0, fitting)])
    with pytest.raises(BudgetExceeded):
        FILTER.admit(spent, [sampled(0.01, 1.0, 1)])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(0.8, 8.0), st.integers(1, 50)), min_size=1, max_size=4))
def test_the_order_and_the_splitting_of_charges_do_not_matter(steps):
    generous = RDPFilter(Budget(epsilon=1e5, delta=1e-6))
    charges = [sampled(*step) for step in steps]
    together = generous.admit(Spent(), charges)
    apart = Spent()
    for charge in reversed(charges):
        for _ in range(2):
            apart = generous.admit(apart, [Charge(charge.mechanism, charge.count // 2)])
        apart = generous.admit(apart, [Charge(charge.mechanism, charge.count % 2)])
    assert together == apart or dict(together.counts) == {p: n for p, n in apart.counts.items() if n}
    assert generous.units(together) == generous.units(apart)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-5, 0.9), st.floats(0.6, 9.0), st.integers(1, 10**6))
def test_integers_are_never_below_the_renyi_divergence_and_grow_with_the_count(rate, sigma, count):
    generous = RDPFilter(Budget(epsilon=1e6, delta=1e-6))
    charge = sampled(rate, sigma, count)
    pair = charge.mechanism.dominating_pair(Adjacency.ADD_REMOVE)
    units = generous.units(Spent({pair: count}))
    more = generous.units(Spent({pair: count + 1}))
    for order, total, next_total in zip(DEFAULT_ORDERS, units, more, strict=True):
        if total is None:
            continue
        # Sampling never costs more than its absence.
        assert total < next_total
        assert Fraction(total, UNITS) <= Fraction(order) * count / (2 * Fraction(sigma) ** 2) * (
            1 + Fraction(1, 10**12)
        )


def test_a_billion_tiny_steps_are_not_overcharged_by_rounding():
    pair = sampled(1e-7, 1.0, 1).mechanism.dominating_pair(Adjacency.ADD_REMOVE)
    one, many = FILTER.units(Spent({pair: 1})), FILTER.units(Spent({pair: 10**9}))
    for single, total in zip(one, many, strict=True):
        if single is not None and total is not None:
            assert 0 <= single * 10**9 - total < 1e-6 * total


def test_spending_more_or_granting_more_only_moves_one_way():
    larger = RDPFilter(Budget(epsilon=4.0, delta=1e-6))
    charge = sampled(0.02, 1.2, 1)
    assert most(larger, charge) > most(FILTER, charge)
    spent = FILTER.admit(Spent(), [sampled(0.02, 1.2, 100)])
    assert FILTER.epsilon(spent) < FILTER.epsilon(FILTER.admit(spent, [sampled(0.02, 1.2, 1)]))


def test_the_odometer_is_the_budget_that_would_have_sufficed():
    spent = FILTER.admit(Spent(), [sampled(0.02, 1.2, 100)])
    epsilon = FILTER.epsilon(spent)
    assert (
        RDPFilter(Budget(epsilon=epsilon * (1 + 1e-9), delta=1e-6)).admit(Spent(), [sampled(0.02, 1.2, 100)]) == spent
    )
    with pytest.raises(BudgetExceeded):
        RDPFilter(Budget(epsilon=epsilon * (1 - 1e-9), delta=1e-6)).admit(Spent(), [sampled(0.02, 1.2, 100)])
    truth = get_accountant("prv").curve([sampled(0.02, 1.2, 100)], Adjacency.ADD_REMOVE).epsilon(1e-6)
    assert truth.lower < epsilon < FILTER.running_epsilon(spent)
    assert FILTER.epsilon(Spent()) == FILTER.running_epsilon(Spent()) == 0.0


@pytest.mark.parametrize("delta", [0.2, 0.02])
def test_no_strategy_of_choosing_and_stopping_beats_the_ex_post_guarantee(delta):
    """Every adaptive strategy on two mechanisms, by dynamic programming: the largest E (1 - e^(epsilon - L))_+."""
    adjacency, sizes = Adjacency.REPLACE_ONE, (0.4, 1.5)
    rdp = RDPFilter(Budget(epsilon=9.0, delta=delta), adjacency, orders=(1.5, 3.0, 8.0))
    pairs = [RandomisedResponse(epsilon=size, categories=2).dominating_pair(adjacency) for size in sizes]
    truths = [1 / (1 + math.exp(-size)) for size in sizes]

    @cache
    def reported(counts):
        return rdp.epsilon(Spent(dict(zip(pairs, counts, strict=True))))

    @cache
    def worst(counts, net):  # net: true answers minus lies of each mechanism so far
        loss = sum(size * times for size, times in zip(sizes, net, strict=True))
        best = max(0.0, -math.expm1(reported(counts) - loss))
        for index in range(2) if sum(counts) < 7 else ():
            step = tuple(int(place == index) for place in range(2))
            more = tuple(map(operator.add, counts, step))
            true, lie = (worst(more, tuple(map(sign, net, step))) for sign in (operator.add, operator.sub))
            best = max(best, truths[index] * true + (1 - truths[index]) * lie)
        return best

    assert delta / 4 < worst((0, 0), (0, 0)) <= delta


def test_the_running_odometer_is_never_below_the_one_at_a_stopping_time():
    for count in (1, 10, 1000):
        spent = FILTER.admit(Spent(), [sampled(0.01, 1.0, count)])
        assert FILTER.running_epsilon(spent) > FILTER.epsilon(spent)


def test_a_loss_without_moments_fits_no_order():
    strict = RDPFilter(BUDGET, adjacency=Adjacency.REPLACE_ONE)
    spent = strict.admit(Spent(), [sampled(0.01, 2.0, 5)])
    assert strict.epsilon(spent) > FILTER.epsilon(FILTER.admit(Spent(), [sampled(0.01, 2.0, 5)]))


@pytest.mark.parametrize(
    "orders", [(), (1.0,), (0.5, 2.0), (2.0, 2.0), (4.0, 2.0), (math.nan,), (math.inf,), ("2",), (True,)]
)
def test_orders_that_are_none_are_refused(orders):
    with pytest.raises(InvalidParameter, match="Renyi orders"):
        RDPFilter(BUDGET, orders=orders)


@pytest.mark.parametrize(
    "weights", [(Fraction(1),), (Fraction(1), Fraction(1)), (0.5, 0.5), (Fraction(3, 2), Fraction(-1, 2))]
)
def test_weights_must_be_fractions_with_sum_one(weights):
    # All weights 1, "any order has room", has no proof.
    with pytest.raises(InvalidParameter, match="weights must be 2 positive fractions with sum 1"):
        RDPFilter(BUDGET, orders=(2.0, 4.0), weights=weights)


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_a_count_that_is_no_natural_number_is_refused(count):
    with pytest.raises(InvalidParameter):
        FILTER.admit(Spent(), [Charge(Gaussian(noise_multiplier=1.0), count)])


def test_the_package_names_its_filters():
    assert set(filters.__all__) == {"LedgerFilter", "PortfolioFilter", "RDPFilter", "Spent"}
