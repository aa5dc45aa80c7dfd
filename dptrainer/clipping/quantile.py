"""Adaptive clipping: the threshold follows a quantile of the gradient norms, learned inside the same Gaussian.

Each example contributes one vector: its gradient, clipped to the threshold C_t in use and rescaled, and one bit, namely
whether its norm was at most C_t (a little smoothed), centred to +-1/2 and rescaled. Together the vector has norm at
most the plan's C, and the noise of the receipt covers all of it: one Gaussian a batch, one charge, nothing to add up.
With beta the share of the bit,

    v_i = C ( sqrt(1 - beta^2) g_i / C_t ,  2 beta (b_i - 1/2) ),     ||v_i|| <= C,

so with the plan's noise multiplier sigma the gradient sum has noise multiplier s = sigma / sqrt(1 - beta^2) relative to
C_t, the sum of centred bits has standard deviation s_b = sigma / (2 beta), and (1/s^2 + (1/2)^2 / s_b^2)^(-1/2) = sigma
(Andrew et al. 2021, Theorem 1, read backwards). What is learned is a function of what was released.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpbudget.errors import InvalidParameter, PrivacyViolation, Unreadable
from dptrainer.clipping.engine import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM, clip_factors, usable_factors
from dptrainer.clipping.policy import Clipping, total
from dptrainer.values import NoisySum

if TYPE_CHECKING:
    from dpbudget.ledger.receipt import Receipt

#: Half of the relative width over which a bit falls.
_WIDTH = 2.0**-6
#: Name of the statistic; no parameter name has a space.
_BITS = "centred quantile bits"


class QuantileClipping(Clipping):
    """Clips to a threshold that moves towards a quantile of the norms. Andrew et al. (2021), Algorithm 1.

    Guarantee: that of the plan, whatever the threshold does: gradient and bit of one example together have norm at most
    C, and take the receipt's noise together. The plan's clip_norm is the unit of that vector and the first threshold.

    Args:
        quantile: share of examples that shall not be clipped, in (0, 1).
        rate: eta of the update C_t exp(-eta (share - quantile)), in (0, 1].
        share: beta in [0.001, 0.9]: the part of the sensitivity that the bit takes. 0.1 makes the noise on gradients
            0.5 % larger and gives the share of a batch of B a standard deviation of 5 sigma / B.
        initial: first threshold; the plan's clip_norm unless given.

    Raises:
        InvalidParameter: a value is out of range (DP007).
    """

    def __init__(
        self, quantile: float = 0.5, *, rate: float = 0.2, share: float = 0.1, initial: float | None = None
    ) -> None:
        for name, value, low, high in (
            ("quantile", quantile, 0.0, 1.0), ("rate", rate, 0.0, 1.0 + 2**-52), ("share", share, 0.00099, 0.90001),
            ("initial", 1.0 if initial is None else initial, SMALLEST_CLIP_NORM / 2, LARGEST_CLIP_NORM * 2),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                raise InvalidParameter(
                    f"{name} of quantile clipping is out of range: {value!r}",
                    code="DP007",
                    hint="quantile in (0, 1), rate in (0, 1], share in [0.001, 0.9], initial as a clipping norm",
                )
        self._quantile, self._rate, self._share = float(quantile), float(rate), float(share)
        self._threshold = None if initial is None else float(initial)

    @property
    def threshold(self) -> float | None:
        """C_t, the threshold of the next step: public. None before the first step, unless an initial one was given."""
        return self._threshold

    def factors(self, squared: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
        """See :class:`~dptrainer.clipping.policy.Clipping`; the factors carry the rescaling to the plan's C."""
        inside = clip_factors(total(squared), self._now(clip_norm)) / self.unit(clip_norm)
        return dict.fromkeys(squared, usable_factors(inside))

    def statistics(self, squared: Tensor, clip_norm: float) -> dict[str, Tensor]:
        """The sum of the centred bits, in the unit in which one example contributes beta C.

        The bit falls from 1/2 to -1/2 over a thirty-second of the threshold and does not jump: rounding that changes
        with the batch would otherwise flip the bits of all examples whose norms lie at the threshold.
        """
        now = self._now(clip_norm)
        bits = ((now - squared.sqrt()) / (2.0 * _WIDTH * now)).clamp(-0.5, 0.5)
        # A broken example counts as clipped.
        centred = torch.where(torch.isnan(bits), torch.full_like(bits, -0.5), bits).sum().reshape(1)
        return {_BITS: centred * self._bit(clip_norm)}

    def unit(self, clip_norm: float) -> float:
        """C_t / (C sqrt(1 - beta^2)): from the released unit to that of the gradients."""
        return self._now(clip_norm) / (clip_norm * math.sqrt(1.0 - self._share**2))

    def released(self, noisy: NoisySum, receipt: Receipt) -> None:
        """Move the threshold: C_t exp(-eta (noisy share - quantile)), the share over the *expected* batch size.

        Raises:
            PrivacyViolation: the noise source released no bits (DP031).
        """
        bits = noisy.statistics.get(_BITS)
        if bits is None:
            raise PrivacyViolation(
                "the noise source released the gradients without the quantile bits",
                code="DP031",
                hint="return NoisySum(grads, statistics) from privatise, each with its noise",
            )
        clip_norm = receipt.clip_norm
        share = float(bits) / self._bit(clip_norm) / receipt.expected_batch_size + 0.5
        # Noise may leave [0, 1] far; a share cannot.
        move = min(max(share, 0.0), 1.0) - self._quantile
        self._threshold = self._clamped(self._now(clip_norm) * math.exp(-self._rate * move), clip_norm)

    def state_dict(self) -> dict[str, Any]:
        """The threshold, which is public."""
        return {"threshold": self._threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved threshold.

        Raises:
            Unreadable: it is not one (DP091).
        """
        value = state.get("threshold")
        if value is not None and not (isinstance(value, float) and SMALLEST_CLIP_NORM <= value <= LARGEST_CLIP_NORM):
            raise Unreadable("no clipping threshold is saved here", code="DP091", hint="load what state_dict() gave")
        self._threshold = value

    def _now(self, clip_norm: float) -> float:
        return self._clamped(clip_norm if self._threshold is None else self._threshold, clip_norm)

    def _bit(self, clip_norm: float) -> float:
        return 2.0 * clip_norm * self._share

    @staticmethod
    def _clamped(threshold: float, clip_norm: float) -> float:
        # Far from the plan's C, products of factor and unit would leave the normal range of float32.
        low, high = clip_norm * 2.0**-16, clip_norm * 2.0**16
        return min(max(threshold, low, SMALLEST_CLIP_NORM), high, LARGEST_CLIP_NORM)
