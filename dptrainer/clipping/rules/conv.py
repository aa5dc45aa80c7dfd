"""Conv1d to Conv3d and ConvTranspose1d to ConvTranspose3d.

A transposed convolution is a convolution read backwards: its weight gradient is that of a convolution whose input is
the output gradient and whose output gradient is the input.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dptrainer.clipping.ghost import Ghost
from dptrainer.clipping.per_example import (
    Dense,
    PerExample,
    chunks,
    fits,
    instantiate,
    joined,
    kept,
    over_positions,
)
from dptrainer.clipping.rules import LayerCall, rule
from dptrainer.clipping.rules.conv_choice import cheapest
from dptrainer.clipping.rules.conv_methods import (
    Geometry,
    Method,
    Norms,
    by_channels_last,
    by_loop,
    by_patches,
    compiled_rows,
)


def _padded(layer: nn.modules.conv._ConvNd, activation: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input padded as the layer pads it, and the zero padding that is left to the method."""
    if layer.padding_mode != "zeros":
        mode = layer.padding_mode
        return F.pad(activation, layer._reversed_padding_repeated_twice, mode=mode), (0,) * len(layer.stride)
    if isinstance(layer.padding, str):
        return F.pad(activation, layer._reversed_padding_repeated_twice), (0,) * len(layer.stride)
    return activation, tuple(layer.padding)


def _per_example(geometry: Geometry, activation: Tensor, grad: Tensor) -> PerExample:
    """The weight's gradients, in the cheapest form."""
    activation, grad = activation.contiguous(), grad.contiguous()
    batch, shape = len(grad), geometry.weight
    operands = activation.shape[1:].numel() + grad.shape[1:].numel()
    method = cheapest(geometry, activation, grad)
    if isinstance(method, Norms):
        return _ghost(method, geometry, activation, grad)
    if method is by_channels_last and fits(shape, operands):
        pieces = (by_channels_last(geometry, activation[part], grad[part]) for part in chunks(batch, shape))
        return kept(pieces, lambda rows: rows.movedim(-1, 2))
    if method is by_patches and fits(shape, operands):
        found = [compiled_rows(geometry, activation[part], grad[part]) for part in chunks(batch, shape)]
        return Dense([rows for rows, _ in found], owned=True, squares=joined([squares for _, squares in found]))
    return instantiate(batch, shape, lambda part: _rows(method, geometry, activation[part], grad[part]), operands)


def _rows(method: Method, geometry: Geometry, activation: Tensor, grad: Tensor) -> Tensor:
    """[b, *weight] by any method."""
    rows = method(geometry, activation, grad)
    return rows.movedim(-1, 2) if method is by_channels_last else rows


def _ghost(by: Norms, geometry: Geometry, activation: Tensor, grad: Tensor) -> PerExample:
    """Norms alone; the sum without rows."""

    def norms() -> tuple[Tensor, Tensor]:
        return by.of(geometry, activation, grad)

    def total(weights: Tensor) -> Tensor:
        return by.total(geometry, activation, grad, weights)

    def rows(chosen: Tensor) -> Tensor:
        return by_loop(geometry, activation[chosen], grad[chosen])

    depth = max(geometry.weight.numel() // geometry.weight[0], geometry.weight[0])
    return Ghost(len(grad), geometry.weight, norms, total, rows, dtype=grad.dtype, depth=depth, direct=by.direct)


def _bias(call: LayerCall) -> dict[str, Tensor | PerExample]:
    return {"bias": over_positions(call.grad)} if "bias" in call.wanted else {}


def _require_batch(layer: nn.modules.conv._ConvNd, call: LayerCall) -> None:
    if call.grad.dim() != layer.weight.dim():
        raise call.refuse(
            f"its input has shape {list(call.activation.shape)}, without a batch dimension.",
            hint="pass [B, C, ...].",
            code="DP030",
        )


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, parameters=("weight", "bias"))
def convolution(layer: nn.modules.conv._ConvNd, call: LayerCall) -> dict[str, Tensor | PerExample]:
    """dW_i = patches_i correlated with g_i; db_i = g_i summed over positions."""
    _require_batch(layer, call)
    found = _bias(call)
    if "weight" in call.wanted:
        activation, padding = _padded(layer, call.activation)
        geometry = Geometry(layer.weight.shape, tuple(layer.stride), padding, tuple(layer.dilation), layer.groups)
        found["weight"] = _per_example(geometry, activation, call.grad)
    return found


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, parameters=("weight", "bias"))
def transposed_convolution(layer: nn.modules.conv._ConvTransposeNd, call: LayerCall) -> dict[str, Tensor | PerExample]:
    """dW_i = patches of g_i correlated with a_i; db_i = g_i summed over positions. Any output padding or size."""
    _require_batch(layer, call)
    found = _bias(call)
    if "weight" in call.wanted:
        padding = tuple(int(size) for size in layer.padding)
        geometry = Geometry(layer.weight.shape, tuple(layer.stride), padding, tuple(layer.dilation), layer.groups)
        found["weight"] = _per_example(geometry, call.grad, _as_outputs(geometry, call.grad, call.activation))
    return found


def _as_outputs(geometry: Geometry, inputs: Tensor, outputs: Tensor) -> Tensor:
    """``outputs`` with zeros where the convolution of ``inputs`` has more places.

    An output padding of a stride or more makes it so; a transposed convolution spreads nothing from there.
    """
    sides: list[int] = []
    for size, count, kernel, stride, padding, dilation in zip(
        inputs.shape[2:], outputs.shape[2:], geometry.weight[2:], geometry.stride, geometry.padding, geometry.dilation,
        strict=True,
    ):  # fmt: skip
        places = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        sides = [0, places - count, *sides]
    return F.pad(outputs, sides) if any(sides) else outputs
