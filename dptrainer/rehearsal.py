"""A compiled forward pass is tried out on synthetic records before it is given private ones.

It is compiled meanwhile, for the sizes that private batches will have, so that no private batch waits for it and
whatever the compiler refuses is known before anything is charged. The clipped sums must be those of the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dptrainer.clipping.bookkeeping import BookKeeping
from dptrainer.clipping.compiled import CompiledForward, Settings
from dptrainer.clipping.factory import deterministic_copy, losses_like
from dptrainer.probe import Call, callable_with, passed_by_name
from dptrainer.untested import tell_untested

#: Largest accepted difference between two sums, relative to their norm.
_TOLERANCE = 1e-3
#: Rows of batches that stand for all sizes, the first of which is compiled for any; the last is the smallest compiled.
_ANY = (13, 2)


def rehearse(
    engine: BookKeeping,
    forward: CompiledForward,
    model: nn.Module,
    calls: Sequence[Call],
    rows: int | None,
    note: Callable[[str], None] | None,
) -> None:
    """Try the compiled forward pass of ``engine``; where that fails, the model runs uncompiled, and ``note`` is told.

    Args:
        engine: whose model will be trained.
        forward: its compiled forward pass.
        model: the model, in the state in which training will start.
        calls: ways in which the model may be called, with one collated synthetic record.
        rows: rows of every private batch; None where they vary.
        note: is told why the model will run uncompiled; a warning without it.
    """
    if forward.reason is None:
        try:
            _try(engine, forward, model, calls, rows)
        except Exception as error:  # noqa: BLE001  (whatever stops it here would stop a private batch)
            forward.give_up(f"on synthetic records it raised {type(error).__name__}: {error}")
    if forward.reason is not None:
        tell_untested(f"torch.compile: private batches run uncompiled, because {forward.reason}.", note)


def _try(
    engine: BookKeeping, forward: CompiledForward, model: nn.Module, calls: Sequence[Call], rows: int | None
) -> None:
    if rows is None and forward.sizes_are_fixed:
        forward.give_up("dynamic=False compiles for each size anew, and sizes vary without static_shapes=True")
        return
    found = next((found for found in (callable_with(model, *call) for call in calls) if found is not None), None)
    if found is None:
        forward.give_up("it could not be called with synthetic records")
        return
    example, positional, names = found
    gpus = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=gpus), torch.enable_grad(), passed_by_name(model, positional, names):
        for size in _ANY if rows is None else (rows,):
            inputs = _with_rows(example, size)
            with _uncompiled(forward):
                expected, again = _sums(engine, inputs), _sums(engine, inputs, seed=1)
            sums = _sums(engine, inputs, any_size=rows is None and forward.sizes_are_open)
            if _differ(expected, again) != 0:  # it draws random numbers, and the compiler others
                expected, sums = _without_draws(model, engine.clip_norm, inputs, positional, names)
            if forward.reason is not None:
                return
            if not _differ(sums, expected) <= _TOLERANCE:
                forward.give_up("it gave other gradients than the model itself")
                return


def _without_draws(
    model: nn.Module, clip_norm: float, inputs: Sequence[Tensor], positional: int, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of a copy with dropout off, as it is and recorded from its graph, which no backend works on."""
    twin = deterministic_copy(model)
    forward = CompiledForward(twin, Settings("aot_eager"))
    engine = BookKeeping(twin, clip_norm=clip_norm, compiled=forward)
    with passed_by_name(twin, positional, names):
        with _uncompiled(forward):
            expected = _sums(engine, inputs)
        return expected, _sums(engine, inputs)


def _with_rows(example: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Inputs with so many rows: normal ones in place of real numbers, integers repeated."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for tensor in example:
        repeated = tensor.detach()[torch.arange(rows, device=tensor.device) % len(tensor)]
        drawn = torch.randn(repeated.shape, generator=generator) if repeated.is_floating_point() else repeated
        made.append(drawn.to(repeated))
    return made


@contextmanager
def _uncompiled(forward: CompiledForward) -> Iterator[None]:
    forward.reason = "it is compared with"
    try:
        yield
    finally:
        forward.reason = None


def _sums(engine: BookKeeping, inputs: Sequence[Tensor], *, any_size: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Clipped sums of the model's own output, under a loss that is different for each entry."""
    torch.manual_seed(seed)
    given, batch = [tensor.clone() for tensor in inputs], len(inputs[0])
    if any_size:
        for tensor in given:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    with engine.record(batch):
        losses = losses_like(engine.call(*given), batch)
    return dict(engine.backward(losses).grads)


def _differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Norm of the difference, relative to that of the second."""

    def norm(sums: dict[str, Any]) -> float:
        return float(sum(float(value.double().square().sum()) for value in sums.values()) ** 0.5)

    return norm({name: first[name] - second[name] for name in first}) / max(norm(second), 1e-12)
