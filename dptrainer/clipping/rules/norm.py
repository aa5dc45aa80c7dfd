"""LayerNorm, RMSNorm, GroupNorm and InstanceNorm: their parameters are vectors, so [B, d] is instantiated."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dptrainer.clipping.per_example import PerExample, chunks, joined
from dptrainer.clipping.rules import LayerCall, rule

Answer = dict[str, Tensor | PerExample]
#: Elements that are normalised at a time.
_PIECE = 1 << 18
_BATCHED_DIMS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


def _affine(call: LayerCall, normalise: Callable[[Tensor], Tensor], dims: tuple[int, ...]) -> Answer:
    """Gradients of y = normalise(x) * weight + bias, summed over ``dims`` (never over examples).

    A few examples at a time, so that the normalised values stay in the cache and take no memory of the batch's size.
    """
    found: Answer = {}
    if "weight" in call.wanted:
        products = (
            normalise(call.activation[part]).mul_(call.grad[part])
            for part in chunks(call.batch_size, call.activation.shape[1:], _PIECE)
        )
        found["weight"] = joined([product.sum(dims) if dims else product for product in products])
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
def layer_norm(layer: nn.LayerNorm, call: LayerCall) -> Answer:
    """Normalises over the last dimensions, which the parameters cover."""
    dims = _outer_dims(call, len(layer.normalized_shape))
    return _affine(call, lambda x: F.layer_norm(x, layer.normalized_shape, eps=layer.eps), dims)


@rule(nn.RMSNorm, parameters=("weight",))
def rms_norm(layer: nn.RMSNorm, call: LayerCall) -> Answer:
    """As LayerNorm, without a mean and a bias."""
    dims = _outer_dims(call, len(layer.normalized_shape))
    return _affine(call, lambda x: F.rms_norm(x, list(layer.normalized_shape), eps=layer.eps), dims)


@rule(nn.GroupNorm, parameters=("weight", "bias"))
def group_norm(layer: nn.GroupNorm, call: LayerCall) -> Answer:
    """Normalises groups of channels within an example; the parameters run over dimension 1."""
    dims = tuple(range(2, call.activation.dim()))
    return _affine(call, lambda x: F.group_norm(x, layer.num_groups, eps=layer.eps), dims)


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, parameters=("weight", "bias"))
def instance_norm(layer: nn.modules.instancenorm._InstanceNorm, call: LayerCall) -> Answer:
    """One group a channel; running statistics would be a release of their own and are refused."""
    if layer.track_running_stats:
        raise call.refuse("it keeps running statistics.", hint="track_running_stats=False.", code="DP013")
    expected = next(dims for kind, dims in _BATCHED_DIMS.items() if isinstance(layer, kind))
    if call.activation.dim() != expected:
        raise call.refuse("its input has no batch dimension.", hint="pass [B, C, ...].", code="DP030")
    return _affine(call, lambda x: F.instance_norm(x, eps=layer.eps), tuple(range(2, call.activation.dim())))
