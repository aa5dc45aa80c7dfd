"""What a profile means for an attacker: closed forms lie inside the bounds, and the bounds are close."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpbudget import risk
from dpbudget.accountants import get_accountant
from dpbudget.curve import Bounds, PrivacyCurve
from dpbudget.errors import InvalidParameter
from dpbudget.mechanisms import Adjacency, Charge, Gaussian, PoissonSampled

RATES = (1e-9, 1e-5, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999)


def curve_of(rate: float, sigma: float, steps: int, accountant: str = "prv") -> PrivacyCurve:
    mechanism = PoissonSampled(rate_k=round(rate * 2**64), inner=Gaussian(noise_multiplier=sigma))
    return get_accountant(accountant).curve([Charge(mechanism, steps)], Adjacency.ADD_REMOVE)


def phi(x: mpmath.mpf) -> mpmath.mpf:
    return mpmath.erfc(-x / mpmath.sqrt(2)) / 2


def gaussian_power(mu: float, alpha: float) -> mpmath.mpf:
    """TPR of the Neyman-Pearson test of N(0, 1) against N(mu, 1): 1 - G_mu(alpha)."""
    with mpmath.workdps(40):
        quantile = mpmath.findroot(lambda x: phi(-x) - mpmath.mpf(alpha), float(_start(alpha)))
        return phi(mu - quantile)


def _start(alpha: float) -> float:
    from statistics import NormalDist

    return -NormalDist().inv_cdf(alpha)


class Counting:
    """A profile that counts the questions."""

    def __init__(self, delta: Callable[[float], Bounds]) -> None:
        self.delta, self.count = delta, 0

    def __call__(self, epsilon: float) -> Bounds:
        self.count += 1
        return self.delta(epsilon)


@pytest.mark.parametrize("alpha", RATES)
@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (1.0, 9), (10.0, 4), (0.2, 1)])
def test_the_trade_off_of_the_gaussian_lies_inside_close_bounds(sigma: float, steps: int, alpha: float) -> None:
    mu = math.sqrt(steps) / sigma
    bounds = curve_of(1.0, sigma, steps).tpr_at(alpha)
    exact = gaussian_power(mu, alpha)
    assert bounds.lower <= exact <= bounds.upper
    assert bounds.width <= 1e-5 * bounds.upper
    assert bounds.kind == "certified"


def test_beta_is_the_other_side_of_the_true_positive_rate() -> None:
    curve = curve_of(0.01, 1.0, 100)
    alphas = [0.01, 0.2, 0.7]
    for alpha, beta in zip(alphas, curve.trade_off(alphas), strict=True):
        rate = curve.tpr_at(alpha)
        assert beta.lower <= 1.0 - rate.upper
        assert beta.upper >= 1.0 - rate.lower
        assert beta.width <= 1e-5


@given(
    epsilon=st.floats(0.0, 20.0),
    delta=st.floats(0.0, 0.5),
    alpha=st.floats(1e-6, 1.0),
)
@settings(deadline=None, max_examples=60)
def test_randomised_response_with_failure_is_bounded_by_its_own_trade_off(
    epsilon: float, delta: float, alpha: float
) -> None:
    """The worst (epsilon, delta)-DP pair has delta(e) = delta + (1 - delta) max(0, 1 - (1 + e^e)/(1 + e^epsilon))."""

    def profile(other: float) -> Bounds:
        rest = max(0.0, (math.exp(epsilon) - math.exp(min(other, 700.0))) / (1.0 + math.exp(epsilon)))
        value = delta + (1.0 - delta) * rest
        return Bounds(value * (1.0 - 1e-13), min(1.0, value * (1.0 + 1e-13)))

    # 1 - e^-eps (1 - delta - alpha), without cancellation at small epsilon
    other_line = -math.expm1(-epsilon) + math.exp(-epsilon) * (delta + alpha)
    exact = min(1.0, delta + math.exp(epsilon) * alpha, other_line if alpha < 1 else 1.0)
    bounds = risk.true_positive_rate(risk.Profile(profile), alpha)
    assert bounds.lower <= exact * (1.0 + 1e-12)
    assert bounds.upper >= exact * (1.0 - 1e-12)


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.1, 0.5])
def test_a_dense_search_over_epsilon_finds_nothing_below_the_lower_bound(alpha: float) -> None:
    curve = curve_of(0.02, 0.9, 200)
    grid = [0.1 * i for i in range(100)]
    best = 1.0
    for epsilon, delta in zip(grid, curve.profile(grid), strict=True):
        best = min(best, delta.upper + math.exp(epsilon) * alpha)
        best = min(best, 1.0 - math.exp(-epsilon) * (1.0 - delta.upper - alpha))
    bounds = curve.tpr_at(alpha)
    assert bounds.lower <= best
    assert bounds.upper <= best * (1.0 + 1e-6)
    assert bounds.width <= 1e-5 * bounds.upper


def test_the_advantage_of_the_gaussian_is_its_total_variation() -> None:
    bounds = curve_of(1.0, 2.0, 1).advantage()
    exact = 2 * phi(mpmath.mpf(1) / 4) - 1
    assert bounds.lower <= exact <= bounds.upper
    assert bounds.width < 1e-12


@pytest.mark.parametrize("prior", [0.1, 0.3, 0.5, 0.8])
def test_the_bayes_success_of_the_gaussian_has_a_closed_form(prior: float) -> None:
    mu = mpmath.mpf(1)
    bounds = curve_of(1.0, 1.0, 1).bayes_risk(prior)
    # The optimal threshold on x ~ N(0, 1) or N(mu, 1) is mu/2 + log((1 - prior)/prior)/mu.
    cut = mu / 2 + mpmath.log((1 - mpmath.mpf(prior)) / prior) / mu
    exact = prior * phi(mu - cut) + (1 - prior) * phi(cut)
    assert bounds.lower <= exact <= bounds.upper
    assert bounds.width < 1e-12


def test_certain_priors_and_the_whole_rate_say_nothing_new() -> None:
    curve = curve_of(1.0, 1.0, 1)
    assert curve.bayes_risk(0.0) == curve.bayes_risk(1.0) == Bounds(1.0, 1.0)
    assert curve.tpr_at(1.0) == Bounds(1.0, 1.0)
    assert curve.tpr_at(0.0).upper < 1e-300


def test_no_step_leaves_the_attacker_with_a_guess() -> None:
    curve = get_accountant("prv").curve([], Adjacency.ADD_REMOVE)
    assert curve.advantage() == Bounds(0.0, 0.0)
    bounds = curve.tpr_at(0.25)
    assert bounds.lower == 0.25
    assert bounds.upper == pytest.approx(0.25, rel=1e-12)
    assert bounds.upper >= 0.25


def test_renyi_bounds_are_looser_but_hold() -> None:
    tight, loose = curve_of(0.01, 1.0, 500), curve_of(0.01, 1.0, 500, "rdp")
    for alpha in (0.01, 0.3):
        assert tight.tpr_at(alpha).upper < loose.tpr_at(alpha).upper <= 1.0
        assert loose.tpr_at(alpha).lower <= tight.tpr_at(alpha).lower
    assert loose.tpr_at(0.01).lower == 0.01


def test_reconstruction_is_the_rate_at_the_baseline_and_grows_with_it() -> None:
    curve = curve_of(0.01, 1.0, 300)
    answers = [curve.reconstruction(baseline) for baseline in (1e-4, 0.01, 0.1, 0.5)]
    assert answers[1] == curve.tpr_at(0.01)
    assert all(one.upper < other.upper for one, other in itertools.pairwise(answers))


def test_a_numerical_profile_gives_a_numerical_answer() -> None:
    profile = risk.Profile(lambda epsilon: Bounds(0.1, 0.2, "numerical"))
    assert risk.true_positive_rate(profile, 0.1).kind == "numerical"
    assert risk.bayes_success(profile, 0.4).kind == "numerical"


def test_few_questions_are_asked() -> None:
    count = Counting(curve_of(256 / 60000, 1.1, 14062).delta)
    risk.true_positive_rate(risk.Profile(count), 0.01)
    assert count.count <= 20


def test_a_vacuous_profile_promises_nothing() -> None:
    bounds = risk.true_positive_rate(risk.Profile(lambda epsilon: Bounds(0.0, 1.0)), 0.1)
    assert (bounds.lower, bounds.upper) == (0.1, 1.0)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.1", True])
def test_what_is_no_probability_is_refused_by_name(value: object) -> None:
    curve = curve_of(1.0, 1.0, 1)
    for ask, name in ((curve.tpr_at, "fpr"), (curve.bayes_risk, "prior"), (curve.reconstruction, "baseline")):
        with pytest.raises(InvalidParameter, match=name):
            ask(value)  # type: ignore[operator]
