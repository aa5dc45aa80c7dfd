"""MultiheadAttention: its projections are linear layers, so the gradients at their outputs are enough.

Vaswani et al. (2017). The attention itself has no parameters; dropout is drawn once, in the forward pass.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptrainer.clipping.per_example import Dense, PerExample
from dptrainer.clipping.products import Products, Stacked
from dptrainer.clipping.rules import traced_rule

if TYPE_CHECKING:
    from dptrainer.clipping.trace import Site, Trace

_PARAMETERS = (
    "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "out_proj.weight", "out_proj.bias",
)  # fmt: skip
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_UNDERSTOOD = frozenset(
    {
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
        "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask",
        "need_weights", "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
        "average_attn_weights", "is_causal",
    }
)  # fmt: skip

#: Contributions by local parameter name.
Parts = Iterator[tuple[str, PerExample]]


@traced_rule(
    nn.MultiheadAttention, functions=(F.multi_head_attention_forward,), parameters=lambda _: _PARAMETERS, whole=True
)
def attention(trace: Trace, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` with the projections tapped; the same result up to rounding."""
    call = _arguments(trace, args, kwargs)
    batched = call.query.dim() == 3
    if not batched:  # one example
        call.query, call.key, call.value = (t.unsqueeze(1) for t in (call.query, call.key, call.value))
        if call.key_padding_mask is not None:
            call.key_padding_mask = call.key_padding_mask.unsqueeze(0)
    q, k, v = _projected(trace, call)
    mixed, weights = _attend(call, q, k, v, _masks(call))
    output = _linear(trace, call, mixed, call.out_proj_weight, call.out_proj_bias)
    if not batched:
        return output.squeeze(1), None if weights is None else weights.squeeze(0)
    return output, weights


def _arguments(trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """All arguments by name.

    Raises:
        PrivacyViolation: (DP019) one is used that this rule does not know.
    """
    bound = _SIGNATURE.bind(*args, **kwargs)
    foreign = [name for name, given in bound.arguments.items() if name not in _UNDERSTOOD and given is not None]
    if foreign:
        raise trace.refuse(f"its rule does not know {foreign[0]!r}.", hint="name the layer in replay=[...].")
    bound.apply_defaults()
    call = SimpleNamespace(**bound.arguments)
    width = call.query.shape[-1]
    if width != call.embed_dim_to_check or width % call.num_heads:
        raise ValueError(f"expected {call.embed_dim_to_check} features, a multiple of the heads, got {width}")
    if call.is_causal and call.attn_mask is None:
        raise ValueError("is_causal is a hint about attn_mask, which must be given too")
    return call


# ---------------------------------------------------------------------- projections


def _site(trace: Trace, call: SimpleNamespace) -> Site:
    inputs = (call.query, call.key, call.value, call.key_padding_mask, call.attn_mask)
    return trace.site([given for given in inputs if given is not None], call.query.shape[1])


def _by_example(trace: Trace, values: Tensor) -> Tensor:
    """[L, N, d] -> [N, L, d] in the type of the sums."""
    return values.to(trace.dtype).transpose(0, 1)


def _product(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Of a transposed view torch takes a path whose rounding depends on the number of examples: for records with huge
    # values one more record would turn the gradients of all others.
    return F.linear(given.contiguous(), weight, bias)


def _linear(trace: Trace, call: SimpleNamespace, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of [L, N, d], tapped."""
    output = _product(given, weight, bias)
    if not trace.trains(weight, bias):
        return output
    site, seen = _site(trace, call), given.detach()
    output = site.tap(output)
    site.answer(lambda grads: _linear_parts(trace, (weight, bias), seen, grads[0]))
    return output


def _linear_parts(trace: Trace, uses: tuple[Tensor, Tensor | None], seen: Tensor, grad: Tensor | None) -> Parts:
    weight, bias = trace.name(uses[0]), trace.name(uses[1])
    if grad is None:
        return
    grad = grad.transpose(0, 1)
    if weight is not None:
        yield weight, Products(grad, _by_example(trace, seen))
    if bias is not None:
        yield bias, Dense(grad.sum(1))


def _projected(trace: Trace, call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of all heads, [L, N, E] each."""
    width, bias = call.embed_dim_to_check, call.in_proj_bias
    if call.use_separate_proj_weight:
        weights = [call.q_proj_weight, call.k_proj_weight, call.v_proj_weight]
        blocks = [(call.query, 1), (call.key, 1), (call.value, 1)]
    else:
        weights = list(call.in_proj_weight.split(width))
        if call.key is not call.value:
            blocks = [(call.query, 1), (call.key, 1), (call.value, 1)]
        else:
            blocks = [(call.query, 3)] if call.query is call.key else [(call.query, 1), (call.key, 2)]
            weights = list(call.in_proj_weight.split([width * size for _, size in blocks]))
    biases = [None] * len(blocks) if bias is None else bias.split([width * size for _, size in blocks])
    outputs = [_product(given, w, b) for (given, _), w, b in zip(blocks, weights, biases, strict=True)]
    names = (call.in_proj_weight, call.q_proj_weight, call.k_proj_weight, call.v_proj_weight, bias)
    if trace.trains(*names):
        site = _site(trace, call)
        outputs = [site.tap(output) for output in outputs]
        seen = [given.detach() for given, _ in blocks]
        sizes = [width * size for _, size in blocks]
        site.answer(lambda grads: _projection_parts(trace, call, seen, sizes, grads))
    found = [part for output, (_, size) in zip(outputs, blocks, strict=True) for part in output.chunk(size, -1)]
    q, k, v = found
    if call.bias_k is not None and call.bias_v is not None:
        k, v = (_appended(trace, call, rows, extra) for rows, extra in ((k, call.bias_k), (v, call.bias_v)))
    return q, k, v


def _projection_parts(
    trace: Trace,
    call: SimpleNamespace,
    seen: Sequence[Tensor],
    sizes: Sequence[int],
    grads: Sequence[Tensor | None],
) -> Parts:
    """Contributions of the three projections; in one weight they are blocks of its rows."""
    if all(grad is None for grad in grads):
        return
    # Where no gradient came (only the weights of the attention were used, not its values) it is zero.
    found = [
        given.new_zeros(given.shape[1], given.shape[0], size, dtype=trace.dtype)
        if grad is None
        else grad.transpose(0, 1)
        for grad, given, size in zip(grads, seen, sizes, strict=True)
    ]
    inputs = [_by_example(trace, given) for given in seen]
    bias = trace.name(call.in_proj_bias)
    if bias is not None:
        yield bias, Dense(torch.cat([grad.sum(1) for grad in found], 1))
    products = [Products(grad, given) for grad, given in zip(found, inputs, strict=True)]
    if call.use_separate_proj_weight:
        weights = (call.q_proj_weight, call.k_proj_weight, call.v_proj_weight)
        for parameter, product in zip(weights, products, strict=True):
            name = trace.name(parameter)
            if name is not None:
                yield name, product
        return
    name = trace.name(call.in_proj_weight)
    if name is not None:
        yield name, products[0] if len(products) == 1 else Stacked([product.settled() for product in products])


def _appended(trace: Trace, call: SimpleNamespace, rows: Tensor, extra: Tensor) -> Tensor:
    """One more key or value, the same parameter for every example."""
    shared = extra.expand(1, rows.shape[1], -1).clone()
    name = trace.name(extra)
    if name is not None:
        site = _site(trace, call)
        shared = site.tap(shared)
        site.answer(lambda grads: [] if grads[0] is None else [(name, Dense(grads[0].transpose(0, 1).unsqueeze(1)))])
    return torch.cat([rows, shared])


# ---------------------------------------------------------------------- attention, without parameters


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask to be added to the scores; where a boolean one is true, -inf."""
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(mask, -math.inf)


def _masks(call: SimpleNamespace) -> Tensor | None:
    """Both masks as one that broadcasts to [N, heads, L, S], before further keys are appended."""
    padding, mask = _additive(call.key_padding_mask, call.query), _additive(call.attn_mask, call.query)
    if padding is not None:
        padding = padding.view(call.query.shape[1], 1, 1, -1)
    if call.is_causal and padding is None and not call.need_weights:
        return None  # the hint stands for the mask
    call.is_causal = False
    if mask is not None:
        mask = mask if mask.dim() == 2 else mask.view(-1, call.num_heads, *mask.shape[1:])
        mask = mask.expand(1, 1, *mask.shape) if mask.dim() == 2 else mask
    if mask is None or padding is None:
        return padding if mask is None else mask
    return mask + padding


def _heads(values: Tensor, heads: int) -> Tensor:
    """[L, N, E] -> [N, heads, L, E / heads]."""
    return values.reshape(*values.shape[:2], heads, -1).permute(1, 2, 0, 3)


def _attend(
    call: SimpleNamespace, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """[L, N, E] what each query attends to, and the weights [N, (heads,) L, S] if they are wanted."""
    q, k, v = (_heads(values, call.num_heads) for values in (q, k, v))
    if call.add_zero_attn:
        k, v = (F.pad(values, (0, 0, 0, 1)) for values in (k, v))
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[3]))
    dropout = call.dropout_p if call.training else 0.0
    weights = None
    if call.need_weights:
        scores = (q * math.sqrt(1.0 / q.shape[3])) @ k.transpose(2, 3)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        if dropout > 0.0:
            weights = F.dropout(weights, dropout)
        mixed = weights @ v
        weights = weights.mean(1) if call.average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, call.is_causal)
    return mixed.permute(2, 0, 1, 3).flatten(2), weights
