"""Linear: product of norms on [B, d]; instantiated or by Gram matrices on [B, ..., d]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dptrainer.clipping.ghost import Ghost, sizes_of
from dptrainer.clipping.per_example import Outer, PerExample, chunks, finite, fits, instantiate, joined, kept
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
    if "weight" in call.wanted:
        found["weight"] = _over_positions(layer.weight.shape, activation, grad)
    if "bias" in call.wanted:
        found["bias"] = grad.sum(1)
    return found


def _over_positions(shape: torch.Size, activation: Tensor, grad: Tensor) -> PerExample:
    """dW_i = sum_t g_it a_it^T for [B, T, d].

    Instantiated where it fits in memory, since the norm and the sum then share the one product; else norms from Gram
    matrices if these take fewer operations than another instantiation (float64 counts twice), T being small.
    """
    batch, (terms, width) = len(grad), grad.shape[1:]
    operands = terms * (width + activation.shape[2])

    def rows(chosen: slice | Tensor) -> Tensor:
        return torch.bmm(grad[chosen].transpose(1, 2), activation[chosen])

    def norms() -> tuple[Tensor, Tensor]:
        found = [gram_norms(activation[part], grad[part]) for part in chunks(batch, torch.Size((terms, terms)))]
        return joined([squares for squares, _ in found]), joined([sizes for _, sizes in found])

    def total(weights: Tensor) -> Tensor:
        scaled = finite(grad).mul_(weights.to(grad.dtype).view(-1, 1, 1))
        return scaled.flatten(0, 1).t() @ finite(activation).flatten(0, 1)

    if not fits(shape, operands) and 4 * operands <= shape.numel():
        return Ghost(batch, shape, norms, total, rows, dtype=grad.dtype, depth=max(shape))
    if fits(shape, operands) and shape[0] > shape[1]:
        # Transposed, since the library is up to five times as fast where its rows are long.
        pieces = (torch.bmm(activation[part].transpose(1, 2), grad[part]) for part in chunks(batch, shape))
        return kept(pieces, lambda found: found.transpose(1, 2))
    return instantiate(batch, shape, rows, operands)


def gram_norms(activation: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """([B] squared norms of sum_t g_t a_t^T, [B, T] |a_t| |g_t|) of [B, T, d], float64 as the terms may cancel."""
    dtype, activation, grad = grad.dtype, activation.double(), grad.double()
    inputs = torch.bmm(activation, activation.transpose(1, 2))
    grads = torch.bmm(grad, grad.transpose(1, 2))
    sizes = sizes_of(inputs.diagonal(dim1=1, dim2=2), grads.diagonal(dim1=1, dim2=2), dtype)
    return torch.linalg.vecdot(inputs.flatten(1), grads.flatten(1)), sizes
