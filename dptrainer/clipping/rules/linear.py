"""Linear: product of norms on [B, d]; instantiated by one batched product on [B, ..., d]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dptrainer.clipping.per_example import Outer, PerExample, instantiate
from dptrainer.clipping.rules import LayerCall, rule


@rule(nn.Linear, parameters=("weight", "bias"))
def linear(layer: nn.Linear, call: LayerCall) -> dict[str, Tensor | PerExample]:
    """dW_i = sum_t g_it a_it^T, db_i = sum_t g_it. Goodfellow (2015); Bu et al. (2022)."""
    activation, grad = call.activation, call.grad
    if grad.dim() < 2:
        raise call.refuse(
            f"its input has shape {list(activation.shape)}, without a batch dimension.",
            hint="keep the examples in dimension 0: [B, d].",
            code="DP030",
        )
    found: dict[str, Tensor | PerExample] = {}
    if grad.dim() == 2:
        if "weight" in call.wanted:
            found["weight"] = Outer(grad, activation)
        found["bias"] = grad
        return found
    activation, grad = activation.flatten(1, -2), grad.flatten(1, -2)

    def rows(chunk: slice) -> Tensor:
        return torch.bmm(grad[chunk].transpose(1, 2), activation[chunk])

    if "weight" in call.wanted:
        operands = activation.numel() + grad.numel()
        found["weight"] = instantiate(call.batch_size, layer.weight.shape, rows, operands)
    if "bias" in call.wanted:
        found["bias"] = grad.sum(1)
    return found
