"""Where noise meets a clipped sum. No receipt, no noise; one receipt, one release."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from fractions import Fraction
from typing import ClassVar, Protocol

import torch

from dpbudget.errors import PrivacyViolation
from dpbudget.ledger.receipt import Receipt
from dpbudget.plan import NoiseMode
from dptrainer.noise import gpu
from dptrainer.noise.gaussian import add_gaussians_
from dptrainer.noise.keys import Purpose, step_key
from dptrainer.values import ClippedSum, NoisySum


class NoiseSource(Protocol):
    """Turns a clipped sum into something that may be released."""

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        """Spend ``receipt`` on ``clipped``."""


class SecureNoise:
    """Gaussian noise from the step key of a receipt: ChaCha20, 64 radius bits (``secure`` in a plan).

    Guarantee: the released vector is ``sum + N(0, (noise_multiplier C)^2 I)`` truncated as docs/adr/0002 charges, with
    randomness that no one without the step's key can tell from uniform (ChaCha20 and HKDF as pseudo-random functions),
    up to floating-point rounding. Parameter i of the sum, in order, takes the noise stream i; statistics come after the
    last parameter.

    On CUDA devices the noise is made by Triton kernels (docs/adr/0007). Where there is no Triton, and on other
    accelerators, it is refused before anything is charged.

    Args:
        generate_on_cpu: bring the sum to the CPU, add the noise there and take it back. Many times slower than kernels;
            the result is that of the CPU bit for bit.
    """

    mode: ClassVar[NoiseMode] = "secure"
    _generate_on_cpu = False  # also of a subclass that does not call this __init__

    def __init__(self, *, generate_on_cpu: bool = False) -> None:
        self._generate_on_cpu = generate_on_cpu

    def check_devices(self, devices: Iterable[torch.device]) -> None:
        """Refuse devices on which this source cannot make noise; called at set-up and before every release.

        Raises:
            PrivacyViolation: there are no kernels for one of them (DP016).
        """
        if not self._generate_on_cpu:
            gpu.check(devices)

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        """Add the noise of ``receipt``, in place, to ``clipped``, whose tensors become those of the result.

        Raises:
            PrivacyViolation: the plan's noise is exact (DP054), the sum is of a wrong type or not finite (DP019; in the
                second case the receipt is spent and the sum destroyed), its sensitivity is above the plan's clipping
                norm (DP031), it has more elements than the plan allows (DP018), or it is where no noise can be made
                (DP016). Nothing is released.
            ReceiptSpent: the receipt was used before (DP077) or in a forked process (DP076).
        """
        check_releasable(clipped, receipt)
        tensors = (*clipped.grads.values(), *clipped.statistics.values())
        self.check_devices(tensor.device for tensor in tensors)
        std = noise_scale(receipt.noise_multiplier, receipt.clip_norm)
        key = step_key(receipt, Purpose.GRAD_NOISE)
        if not add_gaussians_(tensors, key, std, generate_on_cpu=self._generate_on_cpu):
            raise PrivacyViolation(
                "the clipped sum is not finite; nothing was released",
                code="DP019",
                hint="a clipping engine gives examples with non-finite gradients the factor 0",
            )
        return NoisySum(clipped.grads, clipped.statistics)


def noise_scale(noise_multiplier: float, clip_norm: float) -> float:
    """``noise_multiplier * clip_norm`` rounded up to float64, so that it is never below the plan's.

    Raises:
        PrivacyViolation: the product is zero or not finite (DP005).
    """
    scale = noise_multiplier * clip_norm
    if not 0.0 < scale < math.inf:
        raise PrivacyViolation(
            f"noise scale {noise_multiplier!r} * {clip_norm!r} is not usable",
            code="DP005",
            hint="plan with a clipping norm near 1",
        )
    exact = Fraction(noise_multiplier) * Fraction(clip_norm)
    return scale if Fraction(scale) >= exact else math.nextafter(scale, math.inf)


def drawn_values(tensors: Iterable[torch.Tensor]) -> int:
    """How many values the noise of a sum draws: in pairs, for each tensor by itself."""
    return sum(tensor.numel() + tensor.numel() % 2 for tensor in tensors)


def check_size(tensors: Collection[torch.Tensor], max_parameters: int) -> None:
    """Refuse a sum whose noise has more pairs than the plan's tail is charged for, or none.

    Raises:
        PrivacyViolation: (DP018).
    """
    elements, drawn = sum(tensor.numel() for tensor in tensors), drawn_values(tensors)
    if not elements or drawn > max_parameters + max_parameters % 2:
        raise PrivacyViolation(
            f"{elements} trainable parameters take {drawn} values of noise, drawn in pairs for each tensor, but the "
            f"plan allows 1 to {max_parameters}",
            code="DP018",
            hint=f"plan with max_parameters={drawn} or more" if elements else "requires_grad_(True) on what to train",
        )


def check_releasable(clipped: ClippedSum, receipt: Receipt) -> None:
    """Refuse a sum that the receipt does not cover.

    Raises:
        PrivacyViolation: as :meth:`SecureNoise.privatise`.
    """
    check_mode(receipt.noise, "secure")
    check_sensitivity(clipped, receipt)
    released = check_form(clipped)
    check_size(released.values(), receipt.max_parameters)
    for name, grad in released.items():
        if grad.dtype not in (torch.float32, torch.float64) or grad.requires_grad:
            graph = " and part of a graph" if grad.requires_grad else ""
            raise PrivacyViolation(
                f"the clipped sum of {name} is {grad.dtype}{graph}; sums are detached float32 or float64",
                code="DP019",
                hint="accumulate clipped gradients in float32, under torch.no_grad()",
            )


def check_mode(planned: str, made: str) -> None:
    """Refuse to make noise of another mode than the plan's.

    Raises:
        PrivacyViolation: (DP054).
    """
    if planned != made:
        raise PrivacyViolation(
            f"the plan's noise is {planned}, and this would be {made} noise",
            code="DP054",
            hint="leave noise= out: it follows from the plan",
        )


def check_sensitivity(clipped: ClippedSum, receipt: Receipt) -> None:
    """Refuse a sum that is clipped to more than the plan's norm.

    Raises:
        PrivacyViolation: (DP031).
    """
    if not 0.0 < clipped.sensitivity <= receipt.clip_norm:
        raise PrivacyViolation(
            f"gradients were clipped to {clipped.sensitivity!r}, but the plan's clipping norm is {receipt.clip_norm!r}",
            code="DP031",
            hint="clip to receipt.clip_norm; noise is scaled to the plan",
        )


def check_form(clipped: ClippedSum) -> dict[str, torch.Tensor]:
    """Everything of a sum that would be released, by name.

    Raises:
        PrivacyViolation: a name stands for two things (DP019).
    """
    released = {**clipped.grads, **clipped.statistics}
    if len(released) != len(clipped.grads) + len(clipped.statistics):
        raise PrivacyViolation("a statistic has the name of a parameter", code="DP019", hint="rename the parameter")
    return released
