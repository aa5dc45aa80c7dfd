"""Conv1d, Conv2d, Conv3d: per-example weight gradients by the cheapest of three exact methods.

Which is cheapest differs up to 45-fold with the shape, so the candidates are timed once per shape on synthetic tensors,
never on data, in processor time; the choice is cached.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptrainer.clipping.per_example import PerExample, instantiate
from dptrainer.clipping.rules import LayerCall, rule

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
#: Examples of the synthetic batch on which the methods are timed.
_PROBE = 8


@dataclass(frozen=True)
class Geometry:
    """What a weight gradient depends on beside the two tensors; hashable, so that choices can be cached by it."""

    weight: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


Method = Callable[[Geometry, Tensor, Tensor], Tensor]


def by_loop(geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[B, *weight]: the library's own weight gradient, one example at a time. Best where each example is much work."""
    zeros = [0] * len(geometry.stride)
    weight = activation.new_empty(0).expand(0).new_empty(geometry.weight)
    return torch.stack(
        [
            torch.ops.aten.convolution_backward(
                grad[i : i + 1], activation[i : i + 1], weight, None, geometry.stride, geometry.padding,
                geometry.dilation, False, zeros, geometry.groups, (False, True, False),
            )[1]
            for i in range(grad.shape[0])
        ]
    )  # fmt: skip


def by_groups(geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[B, *weight]: one grouped convolution in which input channels are the batch and examples are the groups.

    Rochette et al. (2019); stride and dilation change places.
    """
    batch, groups, (out, inner, *kernel) = grad.shape[0], geometry.groups, geometry.weight
    stacked = activation.reshape(batch * groups, inner, *activation.shape[2:]).transpose(0, 1)
    filters = grad.reshape(batch * out, 1, *grad.shape[2:])
    found: Tensor = _CONVOLUTIONS[grad.dim()](
        stacked, filters, None, geometry.dilation, geometry.padding, geometry.stride, batch * groups
    )
    for dim, size in enumerate(kernel, start=2):  # positions that a stride left over are not part of the kernel
        found = found.narrow(dim, 0, size)
    return found.reshape(inner, batch, out, *kernel).movedim(0, 2)


def by_unfolding(geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[B, *weight]: patches times output gradients, one batched product. One and two spatial dimensions only."""
    if grad.dim() == 3:
        flat = Geometry(
            torch.Size((*geometry.weight[:2], 1, geometry.weight[2])),
            (1, *geometry.stride), (0, *geometry.padding), (1, *geometry.dilation), geometry.groups,
        )  # fmt: skip
        return by_unfolding(flat, activation.unsqueeze(2), grad.unsqueeze(2)).squeeze(3)
    batch, groups, (out, inner, *kernel) = grad.shape[0], geometry.groups, geometry.weight
    patches = F.unfold(activation, tuple(kernel), geometry.dilation, geometry.padding, geometry.stride)
    patches = patches.view(batch * groups, -1, patches.shape[2])
    found = torch.bmm(grad.reshape(batch * groups, out // groups, -1), patches.transpose(1, 2))
    return found.view(batch, out, inner, *kernel)


_CHOICES: dict[tuple[object, ...], Method] = {}


def _seconds(method: Method, geometry: Geometry, activation: Tensor, grad: Tensor) -> float:
    """Best processor time of three runs after a warm-up."""
    best = float("inf")
    for attempt in range(4):
        if activation.is_cuda:
            torch.cuda.synchronize(activation.device)
        start = time.perf_counter() if activation.is_cuda else time.process_time()
        method(geometry, activation, grad)
        if activation.is_cuda:
            torch.cuda.synchronize(activation.device)
        spent = (time.perf_counter() if activation.is_cuda else time.process_time()) - start
        best = min(best, spent) if attempt else best
    return best


def cheapest(geometry: Geometry, activation: Tensor, grad: Tensor) -> Method:
    """The fastest method for this geometry and per-example shape, measured on zeros-free synthetic tensors, cached."""
    key = (geometry, activation.shape[1:], grad.shape[1:], activation.dtype, activation.device, torch.get_num_threads())
    if key not in _CHOICES:
        methods = [by_loop, by_groups] if grad.dim() == 5 else [by_loop, by_groups, by_unfolding]
        # linspace and not randn: the probe must not move the random streams of the training program.
        probe = [
            torch.linspace(-1, 1, _PROBE * t[0].numel(), dtype=t.dtype, device=t.device).view(_PROBE, *t.shape[1:])
            for t in (activation, grad)
        ]
        _CHOICES[key] = min(methods, key=lambda method: _seconds(method, geometry, *probe))
    return _CHOICES[key]


def _padded(layer: nn.modules.conv._ConvNd, activation: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input padded as the layer pads it, and the zero padding that is left to the method."""
    if layer.padding_mode != "zeros":
        mode = layer.padding_mode
        return F.pad(activation, layer._reversed_padding_repeated_twice, mode=mode), (0,) * len(layer.stride)
    if isinstance(layer.padding, str):
        return F.pad(activation, layer._reversed_padding_repeated_twice), (0,) * len(layer.stride)
    return activation, tuple(layer.padding)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, parameters=("weight", "bias"))
def convolution(layer: nn.modules.conv._ConvNd, call: LayerCall) -> dict[str, Tensor | PerExample]:
    """dW_i = patches_i correlated with g_i; db_i = g_i summed over positions."""
    if call.grad.dim() != layer.weight.dim():
        raise call.refuse(
            f"its input has shape {list(call.activation.shape)}, without a batch dimension.",
            hint="pass [B, C, ...].",
            code="DP030",
        )
    found: dict[str, Tensor | PerExample] = {}
    if "bias" in call.wanted:
        found["bias"] = call.grad.flatten(2).sum(2)
    if "weight" in call.wanted:
        activation, padding = _padded(layer, call.activation)
        grad = call.grad.contiguous()
        geometry = Geometry(layer.weight.shape, tuple(layer.stride), padding, tuple(layer.dilation), layer.groups)
        method = cheapest(geometry, activation, grad)
        operands = activation.numel() + grad.numel()
        found["weight"] = instantiate(
            call.batch_size, layer.weight.shape,
            lambda rows: method(geometry, activation[rows], grad[rows]), operands,
        )  # fmt: skip
    return found
