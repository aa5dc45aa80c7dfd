"""How per-example gradients are brought below the plan's clipping norm: flat, normalised, or layer by layer.

A policy is a value. It decides the factors and never the sensitivity: whatever it does, one example contributes at most
the plan's C, because the noise is scaled to that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping.engine import checked_clip_norm, clip_factors, plain, trainable_parameters
from dptrainer.values import NoisySum

if TYPE_CHECKING:
    from dpbudget.ledger.receipt import Receipt

#: Smallest and largest offset of normalised clipping: below, float32 norms that underflowed would count.
SMALLEST_GAMMA, LARGEST_GAMMA = 1e-6, 1e6


class Clipping:
    """Base of all policies, and the flat one: c_i = min(1, C / ||g_i||). Abadi et al. (2016), Algorithm 1.

    A subclass must keep this bound: for every example, the Euclidean norm over all parameters of factor times gradient,
    together with what it adds to :meth:`statistics`, is at most ``clip_norm``. Factors may depend on that example's
    norms alone. The engine holds the gradients to this bound by themselves; statistics it has to trust.
    """

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Name of a group -> the parameters that share a factor; together exactly ``names``. One group, "", for all."""
        return {"": list(names)}

    def check(self, names: Iterable[str], clip_norm: float) -> None:
        """Refuse what cannot hold for these parameters and this C; called whenever either changes."""

    def factors(self, squared: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
        """Group -> [B] float64 factors; 0 in all groups where an example's norm is not finite in one.

        Args:
            squared: group -> [B] float64 squared norms of the per-example gradients over its parameters.
            clip_norm: the plan's C.
        """
        return dict.fromkeys(squared, clip_factors(total(squared), clip_norm))

    def statistics(self, squared: Tensor, clip_norm: float) -> dict[str, Tensor]:
        """Further sums over the batch that are released together with the gradients; none for most policies.

        Args:
            squared: [B] float64 squared norms over all parameters; not finite where an example is broken.
            clip_norm: the plan's C.
        """
        return {}

    def unit(self, clip_norm: float) -> float:
        """What the noisy sum is multiplied by after the noise."""
        return 1.0

    def released(self, noisy: NoisySum, receipt: Receipt) -> None:
        """Learn from what was released; free post-processing."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the policy; released numbers only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""


class FlatClipping(Clipping):
    """One norm over all parameters, c_i = min(1, C / ||g_i||); what a trainer does unless told otherwise."""


@dataclass(frozen=True)
class NormalisedClipping(Clipping):
    """Automatic clipping: c_i = C / (||g_i|| + gamma), so that C and the learning rate are one parameter.

    Guarantee: factor times norm is C ||g|| / (||g|| + gamma) < C; small gradients are enlarged, never beyond C. Bu et
    al. (2023), "Automatic clipping: differentially private deep learning made easier and stronger", AUTO-S.

    Args:
        gamma: in [1e-6, 1e6], in the unit of a gradient's norm.

    Raises:
        InvalidParameter: gamma is out of range (DP007).
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float):
            raise InvalidParameter(f"gamma must be a number, got {self.gamma!r}", code="DP007", hint="gamma=0.01")
        if not SMALLEST_GAMMA <= self.gamma <= LARGEST_GAMMA:
            raise InvalidParameter(
                f"gamma must lie in [{SMALLEST_GAMMA:g}, {LARGEST_GAMMA:g}], got {self.gamma!r}",
                code="DP007",
                hint="gamma=0.01 is what the paper uses",
            )

    def factors(self, squared: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
        """See :class:`Clipping`."""
        return dict.fromkeys(squared, clip_factors(total(squared), clip_norm, offset=self.gamma))


@dataclass(frozen=True)
class PerLayerClipping(Clipping):
    """Each group of parameters has a threshold C_l of its own. McMahan et al. (2018), section 3.

    Guarantee: one example contributes at most sqrt(sum C_l^2) <= C, under noise that is common to all groups.

    Args:
        thresholds: name of a module or parameter -> C_l. A parameter belongs to the longest name that is its own or
            that of a module around it; "" stands for all that are left.
    """

    thresholds: Mapping[str, float]

    @classmethod
    def equal(cls, model: nn.Module, clip_norm: float) -> PerLayerClipping:
        """C / sqrt(L) for each of the L modules that have trainable parameters of their own.

        Args:
            model: with everything trainable that will ever be.
            clip_norm: the plan's, ``run.plan.clip_norm``.
        """
        layers = sorted({name.rpartition(".")[0] for name in trainable_parameters(plain(model))})
        share = checked_clip_norm(clip_norm) / math.sqrt(max(1, len(layers)))
        return cls(dict.fromkeys(layers, share))

    def check(self, names: Iterable[str], clip_norm: float) -> None:
        """Refuse thresholds that exceed C together, and parameters without one.

        Raises:
            InvalidParameter: a threshold is out of range, or sqrt(sum C_l^2) exceeds C by more than rounding (DP007).
            PrivacyViolation: a trainable parameter belongs to no group (DP019).
        """
        squares = sum((Fraction(checked_clip_norm(value)) ** 2 for value in self.thresholds.values()), Fraction(0))
        # Rounding of decimal thresholds, 2^-50 or so, is far inside what SHRINK keeps free below each of them.
        if squares > Fraction(clip_norm) ** 2 * (1 + Fraction(1, 1 << 30)):
            raise InvalidParameter(
                f"the thresholds are together sqrt(sum C_l^2) = {math.sqrt(squares):.9g}, above the plan's clipping "
                f"norm {clip_norm!r}",
                code="DP007",
                hint="lower them, or take PerLayerClipping.equal(model, run.plan.clip_norm)",
            )
        self.groups(names)

    def factors(self, squared: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
        """See :class:`Clipping`."""
        whole = torch.isfinite(total(squared))
        found = {group: clip_factors(values, self.thresholds[group]) for group, values in squared.items()}
        # An example that is broken in one layer contributes nothing anywhere.
        return {group: torch.where(whole, factor, torch.zeros_like(factor)) for group, factor in found.items()}

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The threshold's name -> the parameters that fall under it.

        Raises:
            PrivacyViolation: one falls under none (DP019).
        """
        groups: dict[str, list[str]] = {}
        for name in names:
            place = name
            while place not in self.thresholds and place:
                place = place.rpartition(".")[0]
            if place not in self.thresholds:
                raise PrivacyViolation(
                    f'parameter "{name}" trains, and per-layer clipping has no threshold for it',
                    code="DP019",
                    hint='name it or a module around it, or give "" a threshold for all that are left',
                )
            groups.setdefault(place, []).append(name)
        return groups


def total(squared: Mapping[str, Tensor]) -> Tensor:
    """[B] float64: the squared norms over all of these groups or parameters."""
    return torch.stack(list(squared.values())).sum(0)
