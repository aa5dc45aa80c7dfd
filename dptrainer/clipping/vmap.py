"""The reference: per-example gradients by ``torch.func``, for any module and any loss.

Slow and memory-hungry, and right by construction: each example goes through the model as a batch of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.engine import (
    checked_batch_size,
    checked_clip_norm,
    clip_factors,
    full_precision,
    sum_dtype,
    trainable_parameters,
    zero_sums,
)
from dptrainer.clipping.per_example import Dense
from dptrainer.values import ClippedSum

#: (outputs of the model, targets) -> losses [B], one per example; called with B = 1.
LossFunction = Callable[..., Tensor]


class VmapEngine:
    """Clips per-example gradients that ``torch.func.vmap`` computes, ``chunk_size`` examples at a time.

    It needs the loss as a function, because it runs the forward pass itself. Random layers (dropout) draw once per
    example; buffers are read, never written.

    Args:
        model: any module; its parameters are read anew at every call.
        loss_fn: (outputs, *targets) for a batch of one -> [1] or scalar loss.
        clip_norm: C in [1e-6, 1e12].
        chunk_size: examples instantiated at a time.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, *, clip_norm: float, chunk_size: int = 32) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._clip_norm = checked_clip_norm(clip_norm)
        self._chunk_size = max(1, checked_batch_size(chunk_size))

    @property
    def clip_norm(self) -> float:
        """C: the largest Euclidean norm that one example may contribute."""
        return self._clip_norm

    def per_example(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Name -> [B, *shape] gradients of each example's own loss, for every trainable parameter."""
        parameters = trainable_parameters(self._model)
        fixed = {n: p.detach() for n, p in self._model.named_parameters() if n not in parameters}
        fixed |= {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()}

        def loss(chosen: dict[str, Tensor], *example: Tensor) -> Tensor:
            batch = [t.unsqueeze(0) for t in example]
            outputs = functional_call(self._model, {**fixed, **chosen}, tuple(batch[: len(inputs)]))
            return self._loss_fn(outputs, *batch[len(inputs) :]).sum()

        values = {name: p.detach() for name, p in parameters.items()}
        one_each = vmap(grad(loss), in_dims=(None, *[0] * (len(inputs) + len(targets))), randomness="different")
        with warnings.catch_warnings():  # a missing batching rule is slow, not wrong
            warnings.filterwarnings("ignore", "There is a performance drop")
            found: dict[str, Tensor] = one_each(values, *inputs, *targets)
        return found

    def __call__(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> ClippedSum:
        """The clipped sum of one physical batch.

        Args:
            inputs: positional arguments of the model, each [B, ...].
            targets: further arguments of the loss, each [B, ...].

        Raises:
            PrivacyViolation: (DP030) the tensors disagree on B.
        """
        sizes = {t.shape[0] if t.dim() else None for t in (*inputs, *targets)}
        if len(sizes) != 1 or None in sizes:
            raise PrivacyViolation(
                f"inputs and targets must have one row per example, got sizes {sorted(map(str, sizes))}.",
                hint="keep the examples in dimension 0.",
                code="DP030",
            )
        parameters = trainable_parameters(self._model)
        sums = zero_sums(parameters)
        for start in range(0, next(iter(inputs)).shape[0], self._chunk_size):
            rows = slice(start, start + self._chunk_size)
            found = self.per_example([t[rows] for t in inputs], [t[rows] for t in targets])
            dense = {name: Dense(g.detach().to(sum_dtype(g))) for name, g in found.items()}
            squared = torch.stack([d.squared_norms() for d in dense.values()]).sum(0)
            factors = clip_factors(squared, self._clip_norm)
            with full_precision():
                for name, gradients in dense.items():
                    sums[name] += gradients.weighted_sum(factors)
        return ClippedSum(grads=sums, sensitivity=self._clip_norm)
