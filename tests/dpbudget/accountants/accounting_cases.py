"""Workloads W1 to W12 with their true epsilon, and how to charge them."""

from __future__ import annotations

from dataclasses import dataclass

from dpbudget.mechanisms import Charge, Gaussian, PoissonSampled

Step = tuple[float, float, int]


def sampled(rate: float, sigma: float, count: int) -> Charge:
    """``count`` steps at the float ``rate`` exactly (rates below 2^-11 may need more than 64 bits and are cut)."""
    rate_k = int(rate * 2.0**64) if rate < 1.0 else 1 << 64
    mechanism = PoissonSampled(rate_k=rate_k, inner=Gaussian(noise_multiplier=float(sigma)))
    return Charge(mechanism, count)


@dataclass(frozen=True)
class Workload:
    """A composition and its true epsilon, from a contour sum in 40-digit arithmetic (W7, W12: closed form)."""

    name: str
    steps: tuple[Step, ...]
    delta: float
    epsilon: float
    digits: float  # absolute accuracy of ``epsilon`` as printed

    @property
    def charges(self) -> list[Charge]:
        return [sampled(*step) for step in self.steps]


_RAMP = tuple((0.005 + 0.015 * k / 19, 0.8 + 0.7 * k / 19, 500) for k in range(20))

WORKLOADS = (
    Workload("W1", ((256 / 60000, 1.1, 14062),), 1e-5, 2.381596921424, 1e-12),
    Workload("W2", ((4096 / 50000, 3.0, 2500),), 1e-5, 6.578895850577, 1e-12),
    Workload("W3", ((16384 / 1281167, 2.5, 71000),), 8e-7, 7.404473863808, 1e-12),
    Workload("W4", ((1e-4, 0.6, 100000),), 1e-8, 1.95356343129, 1e-11),
    Workload("W5", ((0.01, 1.0, 1000),), 1e-15, 4.854537750605, 1e-12),
    Workload("W6", ((0.01, 1.0, 1000),), 1e-30, 9.341895632705, 1e-12),
    Workload("W7", ((1.0, 20.0, 1000),), 1e-6, 8.3062250499547, 1e-13),
    Workload("W8", ((0.05, 0.4, 2000),), 1e-5, 183.2424776543, 1e-10),
    Workload("W9", ((1e-3, 1.0, 10**6),), 1e-6, 6.694272659721, 1e-12),
    Workload("W10", _RAMP, 1e-5, 6.116508692724, 1e-12),
    Workload("W11", ((1e-3, 0.7, 10**9),), 1e-9, 3775.48333054, 1e-8),
    Workload("W12", ((0.01, 1.0, 1),), 1e-10, 1.438645954554, 1e-12),
)
