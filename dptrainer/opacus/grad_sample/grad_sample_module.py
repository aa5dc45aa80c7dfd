"""A model whose backward pass leaves per-example gradients in ``p.grad_sample``: for looking, not for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping import BookKeeping
from dptrainer.clipping.engine import LARGEST_CLIP_NORM, gradient_scale
from dptrainer.opacus._options import check_module, check_reduction, known_options, unsupported


class _Recorder(BookKeeping):
    """The clipping engine, asked for the gradients themselves."""

    def gradients(self, reduction: Any) -> dict[str, Tensor]:
        """Name -> [B, *shape]: the gradient of each example's own loss; closes the batch."""
        session = self._session
        if session is None:
            raise PrivacyViolation(
                "backward() without a forward pass of the GradSampleModule",
                hint="call the wrapped model, then backward() on its loss",
                code="DP031",
            )
        scale = gradient_scale(reduction, session.batch_size, 1.0)
        try:
            session.refuse_bypass(training=True)
            with self._computing(next(iter(session.trainable.values())).device):
                whole = slice(0, session.batch_size)
                return {name: form.dense(whole) * scale for name, form in self._units(session).items()}
        finally:
            self.abort()


class GradSampleModule(nn.Module):
    """Wraps a model; after ``loss.backward()`` every trainable parameter has ``grad_sample`` [B, ...] and ``grad``.

    The gradients are unclipped and private. ``make_private`` needs no such wrapper; given one, it takes the model
    inside.

    Args:
        m: the model, in train mode, with the examples in dimension 0.
        batch_first: only True.
        loss_reduction: what the criterion does over the examples: ``mean`` or ``sum``.
        strict: refuse, at once, models that cannot be trained privately.
        force_functorch: has no effect.
    """

    @known_options
    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
    ) -> None:
        super().__init__()
        check_module(m)
        if batch_first is not True:
            raise unsupported("batch_first=False", "put the examples in dimension 0")
        if strict:
            from dptrainer.opacus.validators import ModuleValidator

            ModuleValidator.validate(m, strict=True)
        self._module = m
        self.batch_first, self.loss_reduction = batch_first, check_reduction(loss_reduction)
        self._recorder: _Recorder | None = _Recorder(m, clip_norm=LARGEST_CLIP_NORM)
        self._queued = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; with gradients enabled, the backward pass through it leaves per-example gradients.

        Raises:
            InvalidParameter: no tensor was given, whose rows are the examples.
        """
        if self._recorder is None or not torch.is_grad_enabled() or not self.training:
            return self._module(*args, **kwargs)
        first = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0), None)
        if first is None:
            raise InvalidParameter("no tensor with a batch dimension was given", code="DP009")
        self._recorder.begin(first.shape[0])
        outputs = self._module(*args, **kwargs)
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._queue)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return outputs

    def _queue(self, grad: Tensor) -> None:
        """The first gradient of a backward pass: ask to be called when it is over."""
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._collect)

    def _collect(self) -> None:
        self._queued = False
        if self._recorder is None:
            return
        found = self._recorder.gradients(self.loss_reduction)
        for name, parameter in self._module.named_parameters():
            if name not in found:
                continue
            rows = found[name].to(parameter.dtype)
            whole = rows.mean(0) if self.loss_reduction == "mean" else rows.sum(0)
            parameter.grad_sample = rows  # type: ignore[attr-defined]  # Opacus's name for it
            parameter.grad = whole if parameter.grad is None else parameter.grad + whole

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, per-example ones too."""
        self.set_grad_sample_to_none()
        super().zero_grad(set_to_none)

    def set_grad_sample_to_none(self) -> None:
        """Forget per-example gradients."""
        for parameter in self._module.parameters():
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def del_grad_sample(self) -> None:
        """Remove the attribute ``grad_sample`` from every parameter."""
        for parameter in self._module.parameters():
            if hasattr(parameter, "grad_sample"):
                del parameter.grad_sample

    def remove_hooks(self) -> None:
        """Take the hooks off; the wrapped model is an ordinary one again."""
        if self._recorder is not None:
            self._recorder.detach()
            self._recorder = None

    def cleanup(self) -> None:
        """Hooks and per-example gradients away."""
        self.remove_hooks()
        self.del_grad_sample()

    def to_standard_module(self) -> nn.Module:
        """The model inside, without hooks."""
        self.cleanup()
        return self._module

    def __getattr__(self, item: str) -> Any:
        try:
            return super().__getattr__(item)
        except AttributeError:
            if item == "_module":
                raise
            return getattr(super().__getattr__("_module"), item)
