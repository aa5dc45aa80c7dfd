"""The ``pld`` accountant against known truths: workloads, closed forms, binomial sums, quadrature, and ``prv``."""

from __future__ import annotations

import math
import random

import mpmath
import numpy as np
import pytest
from accounting_cases import WORKLOADS, sampled
from pld_pairs import FinitePair, LaplacePair, NormalPair, response, uses

from dpbudget.accountants import exact, get_accountant
from dpbudget.accountants.pld import PLDAccountant
from dpbudget.errors import InvalidParameter
from dpbudget.mechanisms import Adjacency

ADD_REMOVE = Adjacency.ADD_REMOVE
PLD = get_accountant("pld")
# Relative widths on W1 ... W12 with the default arguments; W4's bulk is as narrow as a step of the longest transform.
WIDTHS = {"W4": 6e-4, "W6": 4e-4}


def curve(*charges, accountant=PLD):
    return accountant.curve([uses(pair, count) for pair, count in charges], ADD_REMOVE)


def holds(bounds, truth, digits=0.0):
    return bounds.lower - digits <= float(truth) <= bounds.upper + digits


@pytest.mark.parametrize("work", [w for w in WORKLOADS if w.name != "W11"], ids=lambda w: w.name)
def test_the_bracket_holds_the_true_epsilon_of_every_workload(work):
    bounds = curve(*((NormalPair(q, s), n) for q, s, n in work.steps)).epsilon(work.delta)
    assert bounds.kind == "certified"
    assert holds(bounds, work.epsilon, work.digits)
    assert bounds.width <= WIDTHS.get(work.name, 2e-4) * work.epsilon


def test_a_billion_steps_get_a_wide_and_valid_answer():
    work = next(w for w in WORKLOADS if w.name == "W11")
    bounds = curve(*((NormalPair(q, s), n) for q, s, n in work.steps)).epsilon(work.delta)
    assert holds(bounds, work.epsilon, work.digits)
    assert bounds.upper <= 1.01 * work.epsilon


def test_a_narrower_bracket_can_be_asked_for():
    fine = PLDAccountant(relative_width=1e-6, largest_transform=1 << 20)
    work = WORKLOADS[1]
    bounds = curve((NormalPair(*work.steps[0][:2]), work.steps[0][2]), accountant=fine).epsilon(work.delta)
    assert holds(bounds, work.epsilon, work.digits)
    assert bounds.width <= 3e-6 * work.epsilon


@pytest.mark.parametrize(("sigma", "count"), [(1.0, 2), (30.0, 500), (200.0, 10**6)])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 4.0])
def test_gaussians_agree_with_their_closed_form(sigma, count, epsilon):
    truth = exact.delta_gaussian(math.sqrt(count) / sigma, epsilon)
    bounds = curve((NormalPair(1.0, sigma), count)).delta(epsilon)
    assert holds(bounds, truth)
    assert bounds.width <= 2e-3 * truth


@pytest.mark.parametrize("log10", [-15, -30, -100, -200])
def test_tiny_deltas_keep_their_relative_accuracy(log10):
    pair, count = NormalPair(1.0, 20.0), 100
    epsilon = curve((pair, count)).epsilon(10.0**log10)
    for end, side in ((epsilon.lower, 1.0), (epsilon.upper, -1.0)):
        assert side * (exact.delta_gaussian(0.5, end) / mpmath.mpf(10) ** log10 - 1) >= 0
    assert epsilon.width <= 3e-4 * epsilon.upper


def binomial_delta(epsilon0: float, count: int, epsilon: float, infinite: float = 0.0):
    """Randomised response with an output that tells everything: an exact sum over the number of truthful answers."""
    with mpmath.workdps(60):
        single = mpmath.mpf(epsilon0)
        p = 1 / (1 + mpmath.exp(-single))
        total = mpmath.mpf(0)
        for k in range(count + 1):
            loss = (2 * k - count) * single
            if loss > epsilon:
                weight = mpmath.binomial(count, k) * p**k * (1 - p) ** (count - k)
                total += weight * (1 - mpmath.exp(epsilon - loss))
        finite = (1 - mpmath.mpf(infinite)) ** count
        return finite * total + 1 - finite


@pytest.mark.parametrize(("epsilon0", "count"), [(0.5, 2), (0.37, 50), (0.1, 1000), (1.0 / 3.0, 300)])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_randomised_response_agrees_with_the_binomial_sum(epsilon0, count, share):
    epsilon = share * epsilon0 * count
    truth = binomial_delta(epsilon0, count, epsilon)
    bounds = curve((response(epsilon0), count)).delta(epsilon)
    assert holds(bounds, truth)
    assert bounds.width <= 1e-4 * truth


@pytest.mark.parametrize("epsilon", [0.0, 2.0, 5.0, 100.0])
def test_outputs_that_tell_everything_are_added_to_delta(epsilon):
    truth = binomial_delta(0.1, 100, epsilon, 1e-6)
    bounds = curve((response(0.1, 1e-6), 100)).delta(epsilon)
    assert holds(bounds, truth)
    assert bounds.width <= 1e-4 * truth


def test_no_epsilon_reaches_a_delta_below_the_mass_that_tells_everything():
    black_box = curve((response(0.1, 1e-6), 100))
    assert (black_box.epsilon(5e-5).lower, black_box.epsilon(5e-5).upper) == (math.inf, math.inf)
    assert black_box.epsilon(2e-4).upper < 10.0
    single = curve((response(0.1, 1e-6), 1))
    assert single.epsilon(1e-7).lower == math.inf
    assert holds(single.epsilon(1e-6), 0.1, 1e-9)


@pytest.mark.parametrize("epsilon", [0.0, 0.2, 0.39])
def test_two_laplace_steps_agree_with_quadrature(epsilon):
    scale = 5.0
    with mpmath.workdps(30):
        b, e = mpmath.mpf(scale), mpmath.mpf(epsilon)

        def loss(x):
            return (abs(x) - abs(x - 1)) / b

        def one(rest):  # hockey stick of a single step at any rest
            if rest >= 1 / b:
                return mpmath.mpf(0)
            if rest <= -1 / b:
                return 1 - mpmath.exp(rest)
            x = (1 + b * rest) / 2
            return 1 - mpmath.exp((x - 1) / b) / 2 - mpmath.exp(rest) * mpmath.exp(-x / b) / 2

        corner = (b * (e - 1 / b) + 1) / 2  # where the second step's loss must be 1/b
        cuts = sorted({mpmath.mpf(-60 * scale), mpmath.mpf(0), min(max(corner, 0), 1), mpmath.mpf(1), 60 * b})
        truth = mpmath.quad(lambda x: mpmath.exp(-abs(x - 1) / b) / (2 * b) * one(e - loss(x)), cuts)
    bounds = curve((LaplacePair(scale), 2)).delta(epsilon)
    assert holds(bounds, truth, 1e-18)
    assert bounds.width <= 1e-4 * truth


@pytest.mark.parametrize(("rate", "sigma", "epsilon"), [(0.3, 0.8, 1.0), (0.05, 1.0, 0.5)])
def test_two_sampled_steps_agree_with_the_oracle(rate, sigma, epsilon):
    truth = max(exact.delta_two_steps(rate, sigma, epsilon, d, digits=12) for d in ("remove", "add"))
    bounds = curve((NormalPair(rate, sigma), 2)).delta(epsilon)
    assert holds(bounds, truth, 1e-12 * float(truth))
    assert bounds.width <= 2e-3 * truth


def test_mechanisms_of_different_kinds_compose():
    mixed = curve((response(0.2), 3), (NormalPair(1.0, 2.0), 4))
    with mpmath.workdps(30):
        p = 1 / (1 + mpmath.exp(mpmath.mpf(-0.2)))
        for epsilon in (0.0, 1.0, 3.0):
            truth = mpmath.mpf(0)
            for k in range(4):
                loss = (2 * k - 3) * mpmath.mpf(0.2)
                truth += mpmath.binomial(3, k) * p**k * (1 - p) ** (3 - k) * exact.delta_gaussian(1.0, epsilon - loss)
            bounds = mixed.delta(epsilon)
            assert holds(bounds, truth)
            assert bounds.width <= 2e-3 * truth


def test_the_order_and_grouping_of_charges_does_not_matter():
    first = curve((response(0.2), 30), (NormalPair(0.1, 1.0), 70)).epsilon(1e-6)
    second = curve((NormalPair(0.1, 1.0), 30), (response(0.2), 30), (NormalPair(0.1, 1.0), 40)).epsilon(1e-6)
    assert first.upper == pytest.approx(second.upper, rel=1e-9)
    assert first.lower == pytest.approx(second.lower, rel=1e-9)


def test_an_asymmetric_pair_is_judged_by_its_worse_direction():
    skew = FinitePair((0.9, 0.1), (0.5, 0.5))
    turned = FinitePair((0.5, 0.5), (0.9, 0.1))
    for epsilon in (0.0, 0.5, 1.5):
        assert curve((skew, 5)).delta(epsilon).upper == pytest.approx(curve((turned, 5)).delta(epsilon).upper, rel=1e-3)
    # Under the second law the rare output has a loss of log 5, more than any under the first.
    assert curve((skew, 1)).delta(1.0).lower == pytest.approx(0.5 - math.e * 0.1, rel=1e-9)


def _agree(cases):
    rng = random.Random(20240607)
    prv = get_accountant("prv")
    for _ in range(cases):
        rate = 10.0 ** rng.uniform(-4, 0) if rng.random() < 0.9 else 1.0
        sigma, count = 10.0 ** rng.uniform(-0.3, 1.5), int(10.0 ** rng.uniform(0, 5.5))
        delta = 10.0 ** rng.uniform(-14, -2)
        charge = sampled(rate, sigma, count)
        pair = NormalPair(charge.mechanism.rate, sigma)
        other = prv.curve([charge], ADD_REMOVE).epsilon(delta)
        own = curve((pair, count)).epsilon(delta)
        assert own.lower <= other.upper * (1 + 1e-11), (rate, sigma, count, delta)
        assert other.lower <= own.upper * (1 + 1e-11), (rate, sigma, count, delta)


def test_brackets_meet_those_of_prv_on_random_questions():
    _agree(8)


@pytest.mark.slow
def test_brackets_meet_those_of_prv_on_many_random_questions():
    _agree(150)


@pytest.mark.parametrize("count", [2, 10**4, 10**9])
@pytest.mark.parametrize("pair", [NormalPair(1e-7, 0.5), NormalPair(0.5, 0.01), NormalPair(0.1, 1e6), response(20.0)])
def test_every_corner_gets_an_answer(pair, count):
    corner = curve((pair, count))
    for delta in (1e-300, 1e-5, 0.5):
        bounds = corner.epsilon(delta)
        assert 0.0 <= bounds.lower <= bounds.upper
    for epsilon in (0.0, 1.0, 1e6, 1e300):
        bounds = corner.delta(epsilon)
        assert 0.0 <= bounds.lower <= bounds.upper <= 1.0


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("name", ["pld", "prv"])
def test_noise_that_hides_nothing_is_answered_where_losses_begin_far_below_zero(name, epsilon):
    """A record that was in any batch is as good as named: delta is 1 - (1 - q)^T but for what epsilon covers."""
    answer = get_accountant(name).curve([sampled(0.5, 1e-3, 10)], Adjacency.ADD_REMOVE).delta(epsilon)
    seen = -math.expm1(epsilon + 10 * math.log(0.5))
    assert answer.lower <= seen + 1e-9
    assert seen <= answer.upper
    assert answer.lower == pytest.approx(seen, rel=1e-3)


def test_nothing_charged_is_nothing_spent():
    empty = curve()
    assert (empty.epsilon(1e-5).upper, empty.delta(0.0).upper) == (0.0, 0.0)
    assert curve((response(1.0), 0)).epsilon(1e-5).upper == 0.0


@pytest.mark.parametrize("arguments", [{"relative_width": 0.0}, {"largest_transform": 1000}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(InvalidParameter) as caught:
        PLDAccountant(**arguments)
    assert caught.value.code == "DP009"


def test_bad_questions_are_refused():
    with pytest.raises(InvalidParameter):
        curve((response(1.0), 2)).epsilon(1.0)
    with pytest.raises(InvalidParameter):
        curve((response(1.0), 2)).delta(math.inf)


def test_delta_falls_along_epsilon():
    profile = curve((NormalPair(0.02, 0.9), 800))
    uppers = [profile.delta(float(e)).upper for e in np.linspace(0.0, 4.0, 9)]
    assert uppers == sorted(uppers, reverse=True)


@pytest.mark.parametrize(("work", "truth"), [(0, 4.221296734379), (1, 14.711200061352)])
def test_replacing_a_record_is_answered_from_the_pairs_own_tails(work, truth):
    work = WORKLOADS[work]
    bounds = PLD.curve(work.charges, Adjacency.REPLACE_ONE).epsilon(work.delta)
    assert holds(bounds, truth, 1e-12)
    assert bounds.width <= 2e-4 * truth
