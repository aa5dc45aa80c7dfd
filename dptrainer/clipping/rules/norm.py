"""LayerNorm, RMSNorm, GroupNorm and InstanceNorm: their parameters are vectors, so [B, d] is instantiated."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dptrainer.clipping.per_example import PerExample
from dptrainer.clipping.rules import LayerCall, rule

_BATCHED_DIMS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


def _affine(call: LayerCall, normalised: Tensor, dims: tuple[int, ...]) -> dict[str, Tensor | PerExample]:
    """Gradients of y = normalised * weight + bias, summed over ``dims`` (never over examples)."""
    found: dict[str, Tensor | PerExample] = {}
    if "weight" in call.wanted:
        product = call.grad * normalised
        found["weight"] = product.sum(dims) if dims else product
    if "bias" in call.wanted:
        found["bias"] = call.grad.sum(dims) if dims else call.grad
    return found


def _outer_dims(call: LayerCall, inner: int) -> tuple[int, ...]:
    """The dimensions between the examples and the last ``inner`` ones."""
    if call.activation.dim() <= inner:
        raise call.refuse(
            f"it normalises over all {inner} dimensions of an input of shape {list(call.activation.shape)}, "
            "so it mixes examples.",
            hint="leave the examples in dimension 0 out of normalized_shape.",
            code="DP010",
        )
    return tuple(range(1, call.activation.dim() - inner))


@rule(nn.LayerNorm, parameters=("weight", "bias"))
def layer_norm(layer: nn.LayerNorm, call: LayerCall) -> dict[str, Tensor | PerExample]:
    """Normalises over the last dimensions, which the parameters cover."""
    dims = _outer_dims(call, len(layer.normalized_shape))
    return _affine(call, F.layer_norm(call.activation, layer.normalized_shape, eps=layer.eps), dims)


@rule(nn.RMSNorm, parameters=("weight",))
def rms_norm(layer: nn.RMSNorm, call: LayerCall) -> dict[str, Tensor | PerExample]:
    """As LayerNorm, without a mean and a bias."""
    dims = _outer_dims(call, len(layer.normalized_shape))
    return _affine(call, F.rms_norm(call.activation, list(layer.normalized_shape), eps=layer.eps), dims)


@rule(nn.GroupNorm, parameters=("weight", "bias"))
def group_norm(layer: nn.GroupNorm, call: LayerCall) -> dict[str, Tensor | PerExample]:
    """Normalises groups of channels within an example; the parameters run over dimension 1."""
    normalised = F.group_norm(call.activation, layer.num_groups, eps=layer.eps)
    return _affine(call, normalised, tuple(range(2, call.activation.dim())))


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, parameters=("weight", "bias"))
def instance_norm(layer: nn.modules.instancenorm._InstanceNorm, call: LayerCall) -> dict[str, Tensor | PerExample]:
    """One group a channel; running statistics would be a release of their own and are refused."""
    if layer.track_running_stats:
        raise call.refuse("it keeps running statistics.", hint="track_running_stats=False.", code="DP013")
    expected = next(dims for kind, dims in _BATCHED_DIMS.items() if isinstance(layer, kind))
    if call.activation.dim() != expected:
        raise call.refuse("its input has no batch dimension.", hint="pass [B, C, ...].", code="DP030")
    normalised = F.instance_norm(call.activation, eps=layer.eps)
    return _affine(call, normalised, tuple(range(2, call.activation.dim())))
