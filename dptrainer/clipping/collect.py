"""From recorded calls to the per-example gradients of each parameter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.per_example import Dense, PerExample
from dptrainer.clipping.recording import Answer, Call
from dptrainer.clipping.replay import UnitCall, replay
from dptrainer.clipping.rules import LayerCall


def parts_of(call: Call, batch_size: int) -> Iterable[tuple[str, PerExample | None]]:
    """Contributions by local name; a rule must answer for every parameter, a traced call for those it used."""
    if call.answer is not None:
        return _traced(call, call.answer, batch_size)
    answered = ruled(call, batch_size) if call.layer.rule else _replayed(call, batch_size)
    return [(local, answered.get(local)) for local in call.layer.names]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def ruled(call: Call, batch_size: int) -> dict[str, PerExample]:
    """What the layer's rule answers, with tensors wrapped."""
    function, (grad,) = None if call.layer.rule is None else call.layer.rule.function, call.grads
    activation = next((t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)), None)
    if function is None or grad is None or activation is None:
        raise PrivacyViolation(
            f'layer "{call.layer.name}" was called without a tensor.',
            hint="give it its input as a tensor, or name the module that calls it in replay=[module].",
            code="DP019",
        )
    _check_rows(call, grad.shape[0] if grad.dim() else 0, batch_size)
    if call.expanded:
        activation = activation.expand(batch_size, *activation.shape[1:])
    dtype = call.layer.sum_dtype
    layer_call = LayerCall(
        name=call.layer.name,
        activation=_as(activation, dtype),
        grad=_as(grad, dtype),
        batch_size=batch_size,
        wanted=frozenset(call.layer.names),
        args=call.args,
        kwargs=call.kwargs,
    )
    answer = function(call.module, layer_call)
    return {name: part if isinstance(part, PerExample) else Dense(part) for name, part in answer.items()}


def _traced(call: Call, answer: Answer, batch_size: int) -> Iterable[tuple[str, PerExample]]:
    """What a traced call answers; only now, since a forward pass without backward may have any number of rows."""
    _check_rows(call, call.rows, batch_size)
    return answer([None if grad is None else _as(grad, call.layer.sum_dtype) for grad in call.grads])


def _check_rows(call: Call, rows: int, batch_size: int) -> None:
    if rows != batch_size:
        raise PrivacyViolation(
            # Neither number is named: the size of a drawn batch is private.
            f'layer "{call.layer.name}" has another number of rows than the batch has examples; what would be clipped '
            "is a row, not an example.",
            hint="keep the examples in dimension 0 (no flatten(0, 1), batch_first=True), and give the model the whole "
            "batch: physical_batch_size splits it.",
            code="DP030",
        )


def _replayed(call: Call, batch_size: int) -> dict[str, PerExample]:
    """The unit run again, one example at a time."""
    unit = UnitCall(
        call.layer.name, call.args, call.kwargs, call.outputs, call.grads, batch_size, call.ordinal, call.autocast
    )
    rows = replay(call.module, unit, call.layer.parameters)
    return {name: Dense(_as(grads, call.layer.sum_dtype)) for name, grads in rows.items()}
