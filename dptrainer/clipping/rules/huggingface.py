"""The linear layer of GPT-2 in Hugging Face transformers, whose weight is [in, out]; that library is not imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dptrainer.clipping.per_example import Dense, PerExample
from dptrainer.clipping.products import Products
from dptrainer.clipping.rules import traced_rule

if TYPE_CHECKING:
    from dptrainer.clipping.trace import Trace


@traced_rule("transformers.pytorch_utils.Conv1D", functions=(torch.addmm,), parameters=lambda _: ("weight", "bias"))
def conv1d(trace: Trace, bias: Tensor, rows: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """Gives bias + rows @ weight; rows are the layer's input [B, ..., in] flattened to [B * ..., in].

    Raises:
        PrivacyViolation: (DP019) the product is another one, as it might be in another version of the library.
    """
    given = next(leaf for leaf in (*trace.args, *trace.kwargs.values()) if isinstance(leaf, Tensor))
    if options or given.dim() < 2 or given.shape[-1:] != rows.shape[-1:] or given.numel() != rows.numel():
        raise trace.refuse("its forward is not the one that its rule knows.", hint="name it in replay=[...].")
    batch, seen = given.shape[0], rows.detach()
    site = trace.site((given,), batch)
    output = site.tap(torch.addmm(bias, rows, weight))

    def answer(grads: Sequence[Tensor | None]) -> Iterator[tuple[str, PerExample]]:
        if grads[0] is None:
            return
        grad = grads[0].reshape(batch, -1, weight.shape[1])
        for parameter, is_weight in ((weight, True), (bias, False)):
            name = trace.name(parameter)
            if name is not None:
                inputs = seen.to(trace.dtype).view(batch, -1, weight.shape[0])
                yield name, Products(inputs, grad) if is_weight else Dense(grad.sum(1))

    site.answer(answer)
    return output
