"""Opacus's grad samplers as layer rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dptrainer.clipping import LayerCall, rule

#: layer, [positional tensors of its call], [B, ...] gradient of its output -> parameter -> [B, *shape] gradients.
GradSampler = Callable[[Any, list[Tensor], Tensor], Mapping[nn.Parameter, Tensor]]


def register_grad_sampler(
    target_class_or_classes: type[nn.Module] | Sequence[type[nn.Module]],
) -> Callable[[GradSampler], GradSampler]:
    """Registers a function of (layer, activations, backprops) for one or more layer classes, as in Opacus.

    It serves every way of clipping here, through :func:`dptrainer.rule`. Row i of what it returns must follow from row
    i of activations and backprops alone. A layer without one is differentiated as a whole, one example at a time.
    """
    targets = target_class_or_classes
    classes = tuple(targets) if isinstance(targets, Sequence) else (targets,)

    def register(sampler: GradSampler) -> GradSampler:
        @rule(*classes)
        def _(layer: nn.Module, call: LayerCall) -> dict[str, Tensor]:
            found = sampler(layer, _activations(call), call.grad)
            own = dict(layer.named_parameters(recurse=False))
            missing = [name for name in call.wanted if own[name] not in found]
            if missing:
                raise call.refuse(
                    f"its grad sampler gives no gradient for {', '.join(sorted(missing))}",
                    "return one for every parameter that requires grad",
                )
            return {name: found[own[name]] for name in call.wanted}

        return sampler

    return register


def register_norm_sampler(
    target_class_or_classes: type[nn.Module] | Sequence[type[nn.Module]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Accepted and not used: norm and sum are taken from the same numbers here, those of the grad sampler."""

    def register(sampler: Callable[..., Any]) -> Callable[..., Any]:
        return sampler

    return register


def _activations(call: LayerCall) -> list[Tensor]:
    """The positional tensors of the call, the first in the type in which gradients are summed."""
    tensors = [value for value in call.args if isinstance(value, Tensor)]
    rest = [t.to(call.grad.dtype) if t.is_floating_point() else t for t in tensors[1:]]
    return [call.activation, *rest]
