"""One loss value per example, from the criteria that people use."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from dpbudget.errors import InvalidParameter, PrivacyViolation

Loss = Callable[[Any, Any], Tensor]
#: How the values of one example are put together, by the reduction that the criterion declares.
_WITHIN = {"sum": "sum", "batchmean": "sum"}


class PerExampleLoss:
    """``loss_fn(outputs, target)`` as a vector with one value per example.

    A criterion with a ``reduction`` (every loss module of torch, every loss in ``torch.nn.functional``) is asked for
    its unreduced values, and what is left of them is averaged (``mean``) or summed (``sum``) within each example. So a
    weighted mean cannot let one example's weight act on another's gradient. Any other function must return one value
    per example itself.

    Args:
        loss_fn: module or function of (outputs, target).
    """

    def __init__(self, loss_fn: Loss) -> None:
        if not callable(loss_fn):
            raise InvalidParameter(
                f"loss_fn is {type(loss_fn).__name__}, not a function",
                code="DP030",
                hint="pass a criterion, for example torch.nn.CrossEntropyLoss()",
            )
        self._within, self._call = _unreduced(loss_fn)

    @property
    def module(self) -> nn.Module | None:
        """The criterion as it is called, if it is a module."""
        return self._call if isinstance(self._call, nn.Module) else None

    def unreduced(self, outputs: Any, target: Any) -> Tensor:
        """What the criterion returns without its own reduction, of whatever shape."""
        return self._call(outputs, target)

    def __call__(self, outputs: Any, target: Any, batch_size: int) -> Tensor:
        """[batch_size] losses.

        Raises:
            PrivacyViolation: the loss does not have one row per example (DP030).
        """
        losses = self._call(outputs, target)
        if not isinstance(losses, Tensor) or losses.dim() == 0 or losses.shape[0] != batch_size:
            vector = isinstance(losses, Tensor) and losses.dim() > 0
            kind = "has rows that are not the examples of the batch" if vector else "is not a vector"
            raise PrivacyViolation(
                f"the loss {kind}; clipping needs one value per example",
                code="DP030",
                hint="return one value per example, for example with reduction='none'",
            )
        rows = losses.reshape(batch_size, -1)
        return rows.sum(1) if self._within == "sum" else rows.mean(1)


def _unreduced(loss_fn: Loss) -> tuple[str, Loss]:
    """How to reduce within an example, and the criterion without its own reduction over the batch."""
    if isinstance(loss_fn, nn.Module):
        reduction = getattr(loss_fn, "reduction", None)
        if reduction is None:
            return "mean", loss_fn
        plain: Any = copy.copy(loss_fn)
        plain.reduction = "none"
        return _WITHIN.get(reduction, "mean"), plain
    try:
        parameter = inspect.signature(loss_fn).parameters.get("reduction")
    except (TypeError, ValueError):
        parameter = None
    if parameter is None:
        return "mean", loss_fn
    function: Callable[..., Tensor] = loss_fn
    return _WITHIN.get(parameter.default, "mean"), partial(function, reduction="none")
