"""Exact noise: rounded Gaussians, added to integer sums. No receipt, no noise; one receipt, one release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dpbudget.errors import PrivacyViolation
from dpbudget.grid import Grid
from dpbudget.ledger.receipt import Receipt
from dpbudget.plan import NoiseMode
from dptrainer.noise.keys import Purpose, step_key
from dptrainer.noise.rounded import add_rounded_
from dptrainer.noise.source import check_form, check_mode, check_sensitivity, check_size
from dptrainer.values import ClippedSum, NoisySum


class ExactNoise:
    """Rounded Gaussian noise from the step key of a receipt (``exact`` in a plan).

    Guarantee: what is released is a function of ``round(S + N(0, s^2 I))`` alone, S being the sum of the integer
    vectors and s at least the noise multiplier times the length of the longest one. So the claim of the plan holds by
    post-processing, with no floating-point number in the argument, apart from the cipher (docs/exact.md). Parameter i
    of the sum, in order, takes the noise stream i; statistics come after the last parameter.
    """

    mode: ClassVar[NoiseMode] = "exact"

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        """Add the noise of ``receipt`` to ``clipped``, whose tensors are used up, and turn it into gradients.

        Returns:
            float64 sums: the noisy integers times the length of a unit.

        Raises:
            PrivacyViolation: the plan's noise is not exact (DP054), the sum is not one of integers on the grid of this
                step (DP019), its sensitivity is above the plan's clipping norm (DP031), or it has more elements than
                the plan allows (DP018). Nothing is released.
            ReceiptSpent: the receipt was used before (DP077) or in a forked process (DP076).
        """
        check_mode(receipt.noise, "exact")
        check_sensitivity(clipped, receipt)
        released = check_form(clipped)
        check_size(released.values(), receipt.max_parameters)
        check_integers(released, clipped.grid, receipt.grid)
        return add_exactly(clipped, receipt.grid, step_key(receipt, Purpose.GRAD_NOISE))


def add_exactly(clipped: ClippedSum, grid: Grid, key: bytes) -> NoisySum:
    """Integer sums with the noise of a step key, as gradients; the tensors of ``clipped`` are used up."""
    add_rounded_((*clipped.grads.values(), *clipped.statistics.values()), key, grid.log2_width)
    unit = grid.unit(clipped.sensitivity)
    both = (
        {name: one.double().mul_(unit) for name, one in part.items()} for part in (clipped.grads, clipped.statistics)
    )
    return NoisySum(*both)


def check_integers(sums: Mapping[str, Tensor], grid: Grid | None, wanted: Grid) -> None:
    """Refuse sums that are not the integer ones of the receipt's grid.

    Raises:
        PrivacyViolation: (DP019).
    """
    if grid != wanted or any(one.dtype != torch.int64 for one in sums.values()):
        raise PrivacyViolation(
            "exact noise is for integer sums on the grid of the step, and this sum is another",
            code="DP019",
            hint="let PrivateTrainer clip, or OneByOne.begin(receipt.grid)",
        )
