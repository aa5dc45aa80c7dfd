"""Optimizers that know how much noise is in their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dpbudget.errors import InvalidParameter, PrivacyViolation


class DPAdamBC(torch.optim.Optimizer):
    """Adam whose second moment has the variance of the privacy noise taken out. Tang and Lecuyer (2023), Algorithm 1.

    Adam divides by the root of the mean squared gradient. Under differential privacy that is mostly the noise, equal
    for every parameter, so that Adam turns into momentum with a small step. The variance of the noise is public,
    Phi = (sigma C / expected batch size)^2, and subtracting it is free:

        theta <- theta - lr  m_hat / sqrt(max(v_hat - Phi_hat, floor)),

    with Phi_hat averaged over the steps as v_hat is, so that plans whose noise changes by phases are right as well.
    ``make_private`` and ``PrivateTrainer`` tell it the noise of every step from the receipt; there is nothing to state.

    Args:
        params: as for ``torch.optim.Adam``.
        lr: learning rate.
        betas: decay of the two moments.
        floor: smallest corrected second moment, gamma' in the paper; it plays the role of eps^2.
        weight_decay: decoupled, as in AdamW: lr times weight_decay times the parameter.

    Raises:
        InvalidParameter: a setting is out of range (DP009).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        in_range = lr >= 0.0 and all(0.0 <= beta < 1.0 for beta in betas) and floor > 0.0 and weight_decay >= 0.0
        if not in_range or not all(map(math.isfinite, (lr, floor, weight_decay))):
            raise InvalidParameter(
                f"DPAdamBC got lr={lr!r}, betas={betas!r}, floor={floor!r}, weight_decay={weight_decay!r}",
                code="DP009",
                hint="lr and weight_decay are at least 0, betas in [0, 1), floor above 0",
            )
        super().__init__(params, {"lr": lr, "betas": betas, "floor": floor, "weight_decay": weight_decay})
        self._noise: float | None = None

    def gradient_noise(self, std: float) -> None:
        """Called before each step: the standard deviation of the noise in every element of ``.grad``."""
        self._noise = std

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the released gradients; nothing where no parameter has one.

        Raises:
            PrivacyViolation: a closure was given (DP017), or nobody told the noise of these gradients (DP021).
        """
        if closure is not None:
            raise PrivacyViolation("DPAdamBC takes no closure", code="DP017", hint="call backward() yourself")
        given = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not given:
            return
        if self._noise is None:
            raise PrivacyViolation(
                "DPAdamBC does not know the noise of these gradients; they are not of a private step",
                code="DP021",
                hint="train with make_private or PrivateTrainer; use Adam for gradients without noise",
            )
        for group, parameter in given:
            self._update(group, parameter, self._noise**2)
        self._noise = None

    def _update(self, group: dict[str, Any], parameter: Tensor, variance: float) -> None:
        grad, (first, second) = parameter.grad, group["betas"]
        assert grad is not None  # noqa: S101 - chosen by that
        state = self.state[parameter]
        if not state:
            state["step"], state["noise_sq"] = 0, 0.0  # plain numbers: loading a state would round a tensor to float32
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["noise_sq"] = second * state["noise_sq"] + (1.0 - second) * variance
        state["exp_avg"].lerp_(grad, 1.0 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1.0 - second)
        step = state["step"]
        corrected = state["exp_avg_sq"].sub(state["noise_sq"]).div_(1.0 - second**step)
        if group["weight_decay"]:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        scale = -group["lr"] / (1.0 - first**step)
        parameter.addcdiv_(state["exp_avg"], corrected.clamp_(min=group["floor"]).sqrt_(), value=scale)
