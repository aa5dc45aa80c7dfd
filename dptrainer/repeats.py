"""Does a record always have the same gradient, to the bit? What exact noise rests on, tried out at set-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping.engine import trainable_parameters
from dptrainer.clipping.factory import deterministic_copy
from dptrainer.clipping.standing import Standing
from dptrainer.data import own_copy, split_batch, to_device
from dptrainer.draws import without_dropout
from dptrainer.losses import PerExampleLoss
from dptrainer.streams import begin_short_streams, lent_streams
from dptrainer.untested import NOT_MY_CALL, tell_untested

#: How often the record comes back, each time after another one.
_TIMES = 3


def check_repeatable(
    model: nn.Module, loss: PerExampleLoss, record: Any, note: Callable[[str], None] | None = None
) -> None:
    """Compare the gradients of one synthetic record before and after others went through a copy of the model.

    Dropout is off, and what else is drawn is the same every time. Numbers are random ones, or those of ``record``
    where model or loss does not take others. A test, not a proof.

    Args:
        model: in the state in which training will start.
        loss: of the training.
        record: one collated synthetic record.
        note: is told where the test was not possible, which without it is a warning.

    Raises:
        PrivacyViolation: they differ in a bit (DP054), or the model keeps something of them (DP013, DP031).
    """
    record = to_device(record, next(model.parameters()).device)
    for values in (_other(record, _TIMES), record):  # of zeros, many operations show nothing
        twin = deterministic_copy(model)
        standing = Standing(twin)
        try:
            _compare(twin, loss, values)
        except NOT_MY_CALL as error:
            if "deterministic" in str(error):
                raise PrivacyViolation(
                    f"the model has an operation that adds in another order every time: {error}"[:300],
                    code="DP054",
                    hint="replace it, train on the CPU, or plan secure noise",
                ) from None
            continue
        standing.put_back()
        standing.check()
        return
    tell_untested("nobody tested that a record alone always has the same gradient, to the bit.", note)


def _compare(twin: nn.Module, loss: PerExampleLoss, record: Any) -> None:
    first: list[Tensor | None] | None = None
    for turn in range(_TIMES):
        found = _gradients(twin, loss, record)
        _gradients(twin, loss, _other(record, turn))
        if first is not None and not all(map(_same, first, found)):
            raise PrivacyViolation(
                "a record's gradient depends on which records went through the model before it, or is another every "
                "time; exact noise is for a sum of what each record contributes by itself",
                code="DP054",
                hint="let the model and the loss keep nothing, and draw from torch, random or NumPy's global stream; "
                "or plan secure noise",
            )
        first = found


@contextmanager
def deterministic() -> Iterator[None]:
    """Within the block torch takes the ways of operations that always add in the same order.

    Some on the CPU and more on a GPU have others that are faster. An operation without such a way raises RuntimeError.
    Nor does cuDNN choose them by what it timed.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    timed = torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # not annotated
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # takes time, no order
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = timed
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def refuse_compiled(compiled: bool) -> None:
    """Refuse a model that was compiled: what the compiler makes of a sum is not the same for every record.

    Raises:
        PrivacyViolation: it was (DP019).
    """
    if compiled:
        raise PrivacyViolation(
            "the model is the result of torch.compile, and exact noise rests on the same operations for every record",
            code="DP019",
            hint="pass the module that was compiled, as it was before",
        )


def refuse_static_shapes(static_shapes: bool) -> None:
    """Refuse to fill up batches of one record.

    Raises:
        InvalidParameter: (DP060).
    """
    if static_shapes:
        raise InvalidParameter(
            "static_shapes fills batches up, and with exact noise every record goes through the model alone",
            code="DP060",
            hint="leave static_shapes out; how many records were drawn shows in the time of a step",
        )


def _gradients(twin: nn.Module, loss: PerExampleLoss, batch: Any) -> list[Tensor | None]:
    inputs, named, target = split_batch(own_copy(batch))
    device = next(twin.parameters()).device
    with lent_streams(device), without_dropout(), torch.enable_grad(), deterministic():
        begin_short_streams(device, 0)
        losses = loss(twin(*inputs, **named), target, 1)
        return list(torch.autograd.grad(losses.sum(), [*trainable_parameters(twin).values()], allow_unused=True))


def _other(record: Any, turn: int) -> Any:
    """A record with other numbers where there are real ones: from 0 to 1, so that targets may be probabilities."""

    def replaced(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        generator = torch.Generator().manual_seed(turn)
        return torch.rand(leaf.shape, generator=generator, device="cpu").to(leaf)

    return tree_map(replaced, record)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    # Bits and not values: NaN is equal to itself.
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
