"""What every clipping engine shares: the contract, the clip factor (written here and nowhere else), the sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.values import ClippedSum

Reduction = Literal["mean", "sum", "none"]

#: Contributions are scaled to C * SHRINK, so that the rounding of float32 factors and products (relative error below
#: 2^-20) cannot lift one example above C. The reported sensitivity stays C.
SHRINK = 1.0 - 2.0**-16

#: Below this the squares of float32 gradients underflow and the computed norm could be smaller than the true one.
SMALLEST_CLIP_NORM = 1e-6
LARGEST_CLIP_NORM = 1e12

#: Far inside the normal range of float32, also after a batch size or loss scale was multiplied in.
SMALLEST_FACTOR = 2.0**-100


class ClippingEngine(Protocol):
    """Turns one physical batch into a :class:`ClippedSum`; it draws no noise and keeps nothing of the batch."""

    @property
    def clip_norm(self) -> float:
        """C: the largest Euclidean norm that one example may contribute."""

    def begin(self, batch_size: int) -> None:
        """Opens a physical batch of ``batch_size`` examples; 0 is a legal size. Drops an unfinished one."""

    def finish(self, loss_reduction: Reduction = "mean", *, loss_scale: float = 1.0) -> ClippedSum:
        """The clipped sum of the batch after its one backward pass, and closes the batch."""

    def abort(self) -> None:
        """Drops the batch with everything that was recorded of it; the model is as before."""


def checked_clip_norm(clip_norm: float) -> float:
    """``clip_norm`` as a float.

    Raises:
        InvalidParameter: (DP007) not a number in [1e-6, 1e12], the range in which float32 norms are trustworthy.
    """
    if isinstance(clip_norm, bool) or not isinstance(clip_norm, int | float):
        raise InvalidParameter(
            f"clip_norm must be a number, got {type(clip_norm).__name__} {clip_norm!r}.",
            hint="start with clip_norm=1.0.",
            code="DP007",
        )
    if not SMALLEST_CLIP_NORM <= clip_norm <= LARGEST_CLIP_NORM:
        raise InvalidParameter(
            f"clip_norm must lie in [{SMALLEST_CLIP_NORM:g}, {LARGEST_CLIP_NORM:g}], got {clip_norm!r}.",
            hint="start with clip_norm=1.0.",
            code="DP007",
        )
    return float(clip_norm)


def checked_batch_size(batch_size: int) -> int:
    """``batch_size`` if it is an integer of at least 0.

    Raises:
        InvalidParameter: (DP009) otherwise.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 0:
        raise InvalidParameter(
            f"batch_size must be an integer >= 0, got {batch_size!r}.",
            hint="pass the number of examples that were drawn.",
            code="DP009",
        )
    return batch_size


def clip_factors(squared_norms: Tensor, clip_norm: float, *, offset: float | None = None) -> Tensor:
    """c_i = min(1, C (1 - 2^-16) / ||g_i||), and exactly 0 where the norm is not finite. Abadi et al. (2016), Alg. 1.

    With an offset gamma, C (1 - 2^-16) / (||g_i|| + gamma) in its place: smaller than C as well. Bu et al. (2023).

    It is 0 too where it would be below 2^-100: float32 would round so small a factor too coarsely to keep the bound.
    The sums put zeros in place of what is not finite, since 0 * inf would be NaN. How many such examples there are is
    private: nothing here counts, logs or branches on it.

    Args:
        squared_norms: [B] float64, squared norms of the per-example gradients over all trainable parameters.
        clip_norm: C > 0.
        offset: gamma > 0, or None.

    Returns:
        [B] float64 factors in [0, 1], or below C / gamma with an offset.
    """
    norms = squared_norms.sqrt()
    if offset is None:
        return usable_factors((clip_norm * SHRINK / norms).clamp(max=1.0))
    return usable_factors(clip_norm * SHRINK / (norms + offset))


def usable_factors(factors: Tensor) -> Tensor:
    """The factors, with 0 in place of NaN and of what is too small for float32."""
    return torch.where(factors >= SMALLEST_FACTOR, factors, torch.zeros_like(factors))  # false for NaN


def gradient_scale(loss_reduction: Reduction, batch_size: int, loss_scale: float) -> float:
    """The number that turns recorded output gradients into per-example ones.

    The gradient of a mean is 1/B of the per-example gradient; a scaled loss (mixed precision) is unscaled before the
    norm is taken.

    Raises:
        InvalidParameter: (DP030) unknown reduction; (DP009) loss_scale is not a finite number > 0.
    """
    if loss_reduction not in get_args(Reduction):
        raise InvalidParameter(
            f'unknown loss reduction {loss_reduction!r}; choose "mean", "sum" or "none".',
            hint='declare what the criterion does, for example loss_reduction="mean".',
            code="DP030",
        )
    if not (math.isfinite(loss_scale) and loss_scale > 0):
        raise InvalidParameter(
            f"loss_scale must be a finite number > 0, got {loss_scale!r}.",
            hint="pass the factor that the loss was multiplied by.",
            code="DP009",
        )
    return (batch_size if loss_reduction == "mean" else 1) / loss_scale


def check_losses(losses: Tensor, batch_size: int) -> None:
    """Refuses a loss that is not one value per example.

    Raises:
        PrivacyViolation: (DP030) the shape is not [batch_size].
    """
    if tuple(losses.shape) != (batch_size,):
        raise PrivacyViolation(
            # Sizes are not named: that of a drawn batch is private.
            f"the loss has {losses.dim()} dimensions; it must be a vector with one value per example.",
            hint='use reduction="none" and average over everything except the examples.',
            code="DP030",
        )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that requires grad now, tied parameters once, in model order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plain(model: nn.Module) -> nn.Module:
    """The model itself: what is inside the wrapper that ``torch.compile`` puts around a module."""
    while type(model).__module__.startswith("torch._dynamo"):
        model = model._orig_mod  # type: ignore[assignment]  # a module
    return model


def _precision_switches() -> tuple[Any, ...]:
    """What decides the precision of float32 products and convolutions in this build; none before torch 2.9."""
    libraries = [torch.backends.mkldnn]
    places: list[Any] = []
    if torch.version.cuda is not None or torch.version.hip is not None:
        libraries.append(torch.backends.cudnn)
        places.append(torch.backends.cuda.matmul)
    places += [getattr(library, kind, None) for library in libraries for kind in ("matmul", "conv", "rnn")]
    return tuple(place for place in places if hasattr(place, "fp32_precision"))


_SWITCHES = _precision_switches()


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block, float32 products and convolutions are in float32, whatever the program allows elsewhere.

    With TF32 or bfloat16 products a clipped sum could exceed the sum of its clipped terms by up to 2^-8, relatively,
    which is far more than :data:`SHRINK` leaves room for.
    """
    if not _SWITCHES:  # before torch 2.9 there is one switch for all
        known = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(known)
        return
    before = [switch.fp32_precision for switch in _SWITCHES]
    for switch in _SWITCHES:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(_SWITCHES, before, strict=True):
            switch.fp32_precision = precision


def sum_dtype(parameter: Tensor) -> torch.dtype:
    """Type in which contributions are summed: float32, also for half precision; float64 for float64 parameters."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def zero_sums(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The clipped sum of an empty batch: a zero for every parameter, because the noise must still reach all of them."""
    return {
        name: torch.zeros_like(p, dtype=sum_dtype(p), requires_grad=False, memory_format=torch.contiguous_format)
        for name, p in parameters.items()
    }


def add_clipped(first: ClippedSum, second: ClippedSum) -> ClippedSum:
    """The clipped sum of two physical batches of one logical batch.

    The tensors of ``first`` become those of the result. The sensitivity does not grow, because each example lies in
    exactly one physical batch.

    Raises:
        PrivacyViolation: (DP031) the two disagree on the parameters or on the clipping norm.
    """
    same_form = (first.unit, first.grid, *first.statistics) == (second.unit, second.grid, *second.statistics)
    if first.sensitivity != second.sensitivity or list(first.grads) != list(second.grads) or not same_form:
        raise PrivacyViolation(
            f"physical batches of one step must agree: clipping norms {first.sensitivity!r} and "
            f"{second.sensitivity!r}, {len(first.grads)} and {len(second.grads)} parameters.",
            hint="freeze parameters and change the clipping norm between steps, not within one.",
            code="DP031",
        )
    for name, value in first.grads.items():
        value += second.grads[name]
    statistics = {name: value + second.statistics[name] for name, value in first.statistics.items()}
    return replace(first, statistics=statistics)
