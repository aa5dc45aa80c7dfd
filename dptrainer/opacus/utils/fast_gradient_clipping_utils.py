"""The criterion that ghost mode returns: one loss per example, then the declared reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dpbudget.errors import InvalidParameter
from dptrainer.losses import PerExampleLoss
from dptrainer.opacus._options import check_reduction


class DPLossFastGradientClipping:
    """A criterion that returns an ordinary loss tensor: ``loss.backward()``, ``loss.item()``, sums of losses.

    The guarantee does not rest on it: every backward pass of a private batch is clipped, through whatever criterion.
    It takes the mean within an example before the mean over examples, so that no example weighs on another.

    Args:
        module, optimizer: as Opacus has them; not used.
        criterion: a loss module or function of (outputs, target).
        loss_reduction: ``mean`` or ``sum`` over the examples.

    Raises:
        InvalidParameter: an unknown reduction, or another than the criterion's (DP030).
    """

    def __init__(
        self, module: object, optimizer: object, criterion: Callable[..., Tensor], loss_reduction: str = "mean"
    ) -> None:
        self.module, self.optimizer, self.criterion = module, optimizer, criterion
        self.loss_reduction = check_reduction(loss_reduction)
        own = getattr(criterion, "reduction", loss_reduction)
        if own not in (loss_reduction, "none"):
            raise InvalidParameter(
                f"the criterion has reduction={own!r}, and loss_reduction is {loss_reduction!r}",
                code="DP030",
                hint=f"declare loss_reduction={own!r}, or build the criterion with {loss_reduction!r}",
            )
        self.reduction = self.loss_reduction
        self._per_example = PerExampleLoss(criterion)

    def __call__(self, outputs: Any, target: Any, *, shape: Sequence[int] | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            outputs: what the model returned, one row an example.
            target: what to compare with.
            shape: for outputs [B * T, V] of sequences, the shape (B, T, V) that they had: privacy is for a sequence.

        Raises:
            PrivacyViolation: there is not one row of losses per example (DP030).
        """
        if shape is None:
            losses = self._per_example(outputs, target, len(target))
        else:
            losses = self._of_sequences(outputs, target, shape[0], shape[1])
        return losses.mean() if self.loss_reduction == "mean" else losses.sum()

    def _of_sequences(self, outputs: Tensor, target: Tensor, batch: int, length: int) -> Tensor:
        """[B]: over the tokens of a sequence, without those that the criterion ignores."""
        tokens = self._per_example.unreduced(outputs, target).reshape(batch, length)
        if self.loss_reduction == "sum":
            return tokens.sum(1)
        ignored = getattr(self.criterion, "ignore_index", None)
        counted = tokens.new_ones(batch, length) if ignored is None else (target.reshape(batch, length) != ignored)
        return tokens.sum(1) / counted.sum(1).clamp(min=1)
