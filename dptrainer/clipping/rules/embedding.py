"""Embedding and EmbeddingBag: equal indices are added within each example before the norm; [B, V, d] is never built."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dptrainer.clipping.per_example import PerExample, TableRows
from dptrainer.clipping.rules import LayerCall, rule


def _refuse_shared_state(layer: nn.Embedding | nn.EmbeddingBag, call: LayerCall) -> None:
    """max_norm rewrites rows during forward; scale_grad_by_freq divides by counts over the whole batch."""
    if layer.max_norm is not None:
        raise call.refuse("max_norm rewrites rows in forward.", hint="max_norm=None.", code="DP010")
    if layer.scale_grad_by_freq:
        raise call.refuse(
            "scale_grad_by_freq counts indices over all examples.",
            hint="scale_grad_by_freq=False.",
            code="DP010",
        )
    if layer.sparse:
        raise call.refuse("sparse gradients leave rows without noise.", hint="sparse=False.")


def _table(
    layer: nn.Embedding | nn.EmbeddingBag, call: LayerCall, lookups: tuple[Tensor, Tensor], grad: Tensor
) -> dict[str, Tensor | PerExample]:
    """Per-example rows of the table; the padding row gets nothing."""
    if layer.padding_idx is not None:
        # where and not a product: the gradient there may be infinite and must still be left out.
        padding = (lookups[1] == layer.padding_idx).unsqueeze(1)
        grad = torch.where(padding, torch.zeros_like(grad), grad)
    return {"weight": TableRows.accumulate(call.batch_size, layer.weight.shape, lookups, grad)}


def _examples(call: LayerCall, per_example: int) -> Tensor:
    """[B * per_example]: 0, ..., 0, 1, ..., 1, ..."""
    every = torch.arange(call.batch_size, device=call.grad.device)
    return every.repeat_interleave(per_example, output_size=call.batch_size * per_example)


@rule(nn.Embedding, parameters=("weight",))
def embedding(layer: nn.Embedding, call: LayerCall) -> dict[str, Tensor | PerExample]:
    """Row v of example i gets the sum of g_it over the positions t with index v."""
    _refuse_shared_state(layer, call)
    index = call.activation.reshape(-1)
    examples = _examples(call, index.shape[0] // call.batch_size)
    return _table(layer, call, (examples, index), call.grad.reshape(-1, layer.embedding_dim))


@rule(nn.EmbeddingBag, parameters=("weight",))
def embedding_bag(layer: nn.EmbeddingBag, call: LayerCall) -> dict[str, Tensor | PerExample]:
    """As Embedding, every index of a bag receiving the bag's gradient times its weight.

    In mode "max" each column of a bag comes from one index, which alone receives that column of the gradient.
    """
    _refuse_shared_state(layer, call)
    names = ("input", "offsets", "per_sample_weights")
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    offsets, weights = given.get("offsets"), given.get("per_sample_weights")
    if layer.mode == "max":
        return {"weight": _largest(layer, call, offsets)}
    index = call.activation.reshape(-1)
    if offsets is None:
        example = _examples(call, index.shape[0] // call.batch_size)
    else:
        starts = offsets[: call.batch_size].contiguous()
        positions = torch.arange(index.shape[0], device=index.device)
        example = torch.searchsorted(starts, positions, right=True) - 1
    grad = call.grad[example]
    if weights is not None:
        grad = grad * weights.reshape(-1, 1).to(grad.dtype)
    if layer.mode == "mean":
        counted = torch.ones_like(index) if layer.padding_idx is None else (index != layer.padding_idx).long()
        lengths = torch.zeros(call.batch_size, dtype=torch.long, device=index.device).index_add_(0, example, counted)
        grad = grad / lengths.clamp(min=1)[example].unsqueeze(1)
    return _table(layer, call, (example, index), grad)


def _largest(layer: nn.EmbeddingBag, call: LayerCall, offsets: Tensor | None) -> TableRows:
    """Element (largest_ij, j) of example i gets g_ij; the forward kernel is asked again which row that was."""
    index = call.activation.reshape(-1)
    if offsets is None:
        length = index.shape[0] // call.batch_size
        offsets = torch.arange(call.batch_size, device=index.device) * length
        last = False
    else:
        last = layer.include_last_offset
    _, _, sizes, rows = torch.embedding_bag(
        layer.weight.detach(), index, offsets.to(index.dtype), False, 2, False, None, last, layer.padding_idx
    )  # fmt: skip  (no padding is None: the kernel takes -1 for the last row)
    rows, width = rows[: call.batch_size], layer.embedding_dim
    # An empty bag is a zero that comes from no row.
    grad = torch.where((sizes[: call.batch_size] > 0).unsqueeze(1), call.grad, torch.zeros_like(call.grad))
    elements = rows.clamp(min=0) * width + torch.arange(width, device=rows.device)
    entries = (_examples(call, width), elements.reshape(-1), grad.reshape(-1, 1))
    return TableRows(call.batch_size, layer.weight.shape, entries)
