"""Noise of one pass of DP-FTRL: prefix sums from a binary tree of Gaussian values, see :mod:`dptrainer.noise.nodes`.

Step t hands out its clipped sum plus N_t - N_{t-1}. These sums add up to the noisy prefix sums, and are computed from
them. The noise of a node is drawn again wherever it is needed, so that nothing of the size of the model is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from dpbudget.errors import PrivacyViolation, ReceiptSpent
from dpbudget.ledger.receipt import Receipt
from dptrainer.noise.boxmuller import BLOCK_ELEMENTS
from dptrainer.noise.gaussian import add_gaussian_, all_finite
from dptrainer.noise.keys import Purpose, step_key
from dptrainer.noise.nodes import Weighted, averaged_nodes, levels, norm, plain_nodes
from dptrainer.noise.source import check_releasable, drawn_values, noise_scale
from dptrainer.values import ClippedSum, NoisySum


class PassNoise(Protocol):
    """The noise of one pass, from its first step to its last."""

    @property
    def std(self) -> float:
        """Standard deviation of the noise in every element of the sum that was handed out last."""

    def privatise(self, clipped: ClippedSum) -> NoisySum:
        """The next step's sum with its noise."""

    def close(self) -> None:
        """Forget the key; idempotent."""


class TreeNoise(Protocol):
    """Opens the noise of a pass, once for a receipt."""

    def open(self, receipt: Receipt, steps: int) -> PassNoise:
        """Spend ``receipt`` on a pass of ``steps`` steps."""


class SecureTreeNoise:
    """Tree-aggregated Gaussian noise from the step key of a receipt; what a :class:`~dptrainer.TreeTrainer` uses.

    Guarantee: if every record is in the sum of one step of the pass, with norm at most C, the sums that are handed out
    are one Gaussian release with the receipt's noise multiplier sigma, tail included: each node has noise of standard
    deviation sqrt(L) sigma C, and a record moves at most L nodes by at most C each, whatever was released before it
    (docs/mechanisms.md, "Trees"). Randomness as for :class:`~dptrainer.noise.source.SecureNoise`.

    Args:
        averaged: compute prefix sums from all nodes, with up to half of the variance at the same cost in privacy, at
            about L draws a step, up to 2 T in the last one. Without it 2 a step.
    """

    def __init__(self, *, averaged: bool = True) -> None:
        self._averaged = averaged

    def open(self, receipt: Receipt, steps: int) -> SecurePass:
        """The noise of a pass of ``steps`` steps.

        Raises:
            PrivacyViolation: the receipt samples records (DP026), or its noise has no usable scale (DP005).
            ReceiptSpent: the receipt was used before (DP077) or in a forked process (DP076).
        """
        check_unsampled(receipt.rate_k)
        return SecurePass(receipt, steps, averaged=self._averaged)


class SecurePass:
    """The noise of one pass of :class:`SecureTreeNoise`. Whatever fails ends it: its receipt pays for nothing more."""

    def __init__(self, receipt: Receipt, steps: int, *, averaged: bool) -> None:
        self._receipt, self._steps, self._taken, self._over = receipt, steps, 0, False
        self._nodes = averaged_nodes if averaged else plain_nodes
        self._last: list[Weighted] = []
        self._node_std = node_scale(receipt.noise_multiplier, receipt.clip_norm, steps)
        self._layout: list[tuple[str, torch.Size]] | None = None
        # Derived once, since a receipt works once; kept no longer than the pass and the run last.
        self._key = receipt.key.beside(step_key(receipt, Purpose.GRAD_NOISE))

    @property
    def std(self) -> float:
        """Standard deviation of the noise in every element of the sum that was handed out last; 0 before the first."""
        return self._node_std * norm(self._last)

    def privatise(self, clipped: ClippedSum) -> NoisySum:
        """Add the next step's noise, in place, to ``clipped``, whose tensors become those of the result.

        Raises:
            PrivacyViolation: the sum is not finite or of a wrong type (DP019), its sensitivity is above the plan's
                clipping norm or it is not over the parameters of the steps before (DP031), or the tree has more values
                than the plan allows (DP018).
            ReceiptSpent: the pass has no step left or was ended (DP077); the run was closed, or this is a forked
                process (DP076).
        """
        try:
            key = self._usable_key()
            self._check(clipped)
            self._taken += 1  # before its noise is drawn, so that no node meets two sums
            self._add(clipped.grads, key)
        except BaseException:
            self.close()
            raise
        return NoisySum(clipped.grads)

    def close(self) -> None:
        """Overwrite and drop the key (best effort, since Python may have copied it); idempotent."""
        self._over = True
        self._key.wipe()

    def __reduce__(self) -> NoReturn:
        raise TypeError("the noise of a pass is never pickled or copied: a second holder would repeat it")

    def _usable_key(self) -> bytes:
        self._key.check_process()
        if self._over or self._taken == self._steps:
            raise ReceiptSpent(
                f"the pass that step {self._receipt.step} of run {self._receipt.run_id} pays for is over, after "
                f"{self._taken} of {self._steps} steps",
                hint="take a new receipt; a pass that was broken off stays charged and is not continued",
            )
        return self._key.reveal()

    def _check(self, clipped: ClippedSum) -> None:
        check_releasable(clipped, self._receipt)
        if clipped.statistics:
            raise PrivacyViolation(
                "a pass has noise for gradients alone, and this clipping policy releases statistics as well",
                code="DP019",
                hint="use a clipping policy with fixed thresholds",
            )
        if not all(map(all_finite, clipped.grads.values())):
            raise PrivacyViolation(
                "the clipped sum is not finite; nothing was released",
                code="DP019",
                hint="a clipping engine gives examples with non-finite gradients the factor 0",
            )
        check_tree_size(clipped.grads, self._steps, self._receipt.max_parameters)
        layout = [(name, grad.shape) for name, grad in clipped.grads.items()]
        if self._layout is not None and layout != self._layout:
            raise PrivacyViolation(
                "parameters were frozen, unfrozen or renamed within a pass, and the noise of its earlier steps belongs "
                "to those of before; the pass ends here and stays charged",
                code="DP031",
                hint="change requires_grad between two passes",
            )
        self._layout = layout

    def _add(self, grads: Mapping[str, Tensor], key: bytes) -> None:
        """N_t - N_{t-1}, summed in float64 and rounded once to the type of each sum."""
        self._last = list(self._nodes(self._taken))
        for param_id, grad in enumerate(grads.values()):
            noise = torch.zeros(grad.numel(), dtype=torch.float64, device="cpu")
            room = -(-grad.numel() // BLOCK_ELEMENTS) * BLOCK_ELEMENTS  # every node begins a block of its own
            for sign in (-1.0, 1.0):
                for number, weight in self._last:
                    if sign * weight > 0.0:
                        add_gaussian_(noise, key, param_id, sign * weight * self._node_std, offset=number * room)
                if sign < 0.0:
                    noise.neg_()
            grad.copy_(grad.double() + noise.to(grad.device).view(grad.shape))


def node_scale(noise_multiplier: float, clip_norm: float, steps: int) -> float:
    """``sqrt(L) * noise_multiplier * clip_norm`` of a pass, rounded up to float64.

    Raises:
        PrivacyViolation: it is zero or not finite (DP005).
    """
    base = noise_scale(noise_multiplier, clip_norm)
    scale = math.sqrt(levels(steps)) * base
    if not scale < math.inf:
        raise PrivacyViolation(
            f"noise scale sqrt({levels(steps)}) * {base!r} is not usable",
            code="DP005",
            hint="plan with a clipping norm near 1",
        )
    square = levels(steps) * Fraction(base) ** 2
    while Fraction(scale) ** 2 < square:
        scale = math.nextafter(scale, math.inf)
    return scale


def check_unsampled(rate_k: int) -> None:
    """Refuse a plan that counts on sampling: in a pass every record is used.

    Raises:
        PrivacyViolation: the rate is below 1 (DP026).
    """
    if rate_k != 1 << 64:
        raise PrivacyViolation(
            f"the plan samples records at rate {rate_k / 2**64:.6g}, and a pass gives every record to one of its steps",
            code="DP026",
            hint="calibrate with batch_size=dataset_size and steps=passes, or train with PrivateTrainer",
        )


def check_tree_size(tensors: Mapping[str, Tensor], steps: int, max_parameters: int) -> None:
    """Refuse a model of which one record moves more values of noise than the plan's tail is charged for.

    A record is in at most L nodes. Each draws an even number of values for every parameter, in pairs.

    Raises:
        PrivacyViolation: L times that number is above ``max_parameters``, or a parameter has more values in all nodes
            than a keystream (DP018).
    """
    values = drawn_values(tensors.values())
    for name, tensor in tensors.items():
        if (2 * steps - 1) * -(-tensor.numel() // BLOCK_ELEMENTS) > 1 << 64:  # as many blocks as SecurePass addresses
            raise PrivacyViolation(
                f"{name} has {tensor.numel()} values, and noise for {2 * steps - 1} nodes of a pass of {steps} steps; "
                f"a keystream ends after {BLOCK_ELEMENTS} * 2^64 values",
                code="DP018",
                hint="divide the parameter into several, or plan with fewer steps a pass",
            )
    if levels(steps) * values > max_parameters:
        raise PrivacyViolation(
            f"one record is in {levels(steps)} nodes of {values} values in a pass of {steps} steps, but the plan "
            f"allows {max_parameters} values",
            code="DP018",
            hint=f"plan with max_parameters={levels(steps) * values} or more, or with fewer steps a pass",
        )
