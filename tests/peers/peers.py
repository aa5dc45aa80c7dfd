"""What other accountants answer: one function a peer, from (rate, noise multiplier, steps) phases and delta.

Each returns (lower, upper) bounds of epsilon as the peer claims them, None for an end it does not claim; a peer that
cannot answer raises whatever it raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

Step = tuple[float, float, int]
Claim = tuple[float | None, float | None]
Peer = Callable[[Sequence[Step], float], Claim]


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Peers warn of much that does not matter here."""

    @wraps(function)
    def run(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)

    return run


@quiet
def opacus_rdp(steps: Sequence[Step], delta: float) -> Claim:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, count) for rate, sigma, count in steps]
    return None, accountant.get_epsilon(delta)


@quiet
def opacus_prv(steps: Sequence[Step], delta: float) -> Claim:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, count) for rate, sigma, count in steps]
    return None, accountant.get_epsilon(delta)


@quiet
def opacus_gdp(steps: Sequence[Step], delta: float) -> Claim:
    from opacus.accountants import GaussianAccountant

    accountant = GaussianAccountant()
    accountant.history = [(sigma, rate, count) for rate, sigma, count in steps]
    return None, accountant.get_epsilon(delta)


def _event(steps: Sequence[Step]) -> Any:
    import dp_accounting

    return dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), count
            )
            for rate, sigma, count in steps
        ]
    )


@quiet
def dp_accounting_rdp(steps: Sequence[Step], delta: float) -> Claim:
    from dp_accounting import rdp

    return None, rdp.RdpAccountant().compose(_event(steps)).get_epsilon(delta)


@quiet
def dp_accounting_pld(steps: Sequence[Step], delta: float, interval: float = 1e-4) -> Claim:
    from dp_accounting import pld

    accountant = pld.PLDAccountant(value_discretization_interval=interval)
    return None, accountant.compose(_event(steps)).get_epsilon(delta)


@quiet
def dp_accounting_optimistic(steps: Sequence[Step], delta: float) -> Claim:
    from dp_accounting.pld import privacy_loss_distribution as pld

    total = None
    for rate, sigma, count in steps:
        one = pld.from_gaussian_mechanism(
            sigma,
            pessimistic_estimate=False,
            sampling_prob=rate,
            value_discretization_interval=1e-3,
            use_connect_dots=False,
        ).self_compose(count)
        total = one if total is None else total.compose(one)
    assert total is not None
    return total.get_epsilon_for_delta(delta), None


@quiet
def prv_accountant(steps: Sequence[Step], delta: float, error: float = 0.1) -> Claim:
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    mechanisms = [PoissonSubsampledGaussianMechanism(noise_multiplier=s, sampling_probability=q) for q, s, _ in steps]
    counts = [count for _, _, count in steps]
    accountant = PRVAccountant(prvs=mechanisms, max_self_compositions=counts, eps_error=error, delta_error=delta / 1000)
    lower, _, upper = accountant.compute_epsilon(delta=delta, num_self_compositions=counts)
    return lower, upper


#: Peers that claim bounds. opacus_gdp claims nothing that holds.
BOUNDS: dict[str, Peer] = {
    "opacus rdp": opacus_rdp,
    "opacus prv": opacus_prv,
    "dp-accounting rdp": dp_accounting_rdp,
    "dp-accounting pld": dp_accounting_pld,
    "prv_accountant": prv_accountant,
}


@quiet
def opacus_noise(rate: float, steps: int, epsilon: float, delta: float, accountant: str) -> float:
    """The noise multiplier that Opacus finds for a target, its defaults."""
    from opacus.accountants.utils import get_noise_multiplier

    return get_noise_multiplier(
        target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant=accountant
    )


@quiet
def dp_accounting_noise(rate: float, steps: int, epsilon: float, delta: float, accountant: str) -> float:
    """The noise multiplier that dp-accounting calibrates, its defaults."""
    import dp_accounting
    from dp_accounting import pld, rdp

    make = rdp.RdpAccountant if accountant == "rdp" else pld.PLDAccountant
    return dp_accounting.calibrate_dp_mechanism(
        make,
        lambda sigma: dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), steps
        ),
        epsilon,
        delta,
    )
