"""Does one example reach another's output? Tried out on synthetic inputs, before any private example is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.factory import deterministic_copy, synthetic_like
from dptrainer.clipping.guard import buffer_guard
from dptrainer.clipping.recording import nested_rows
from dptrainer.draws import without_dropout


def isolation_test(model: nn.Module, example: Sequence[Tensor], *, tolerance: float = 1e-5) -> None:
    """Perturbs one synthetic example at a time and watches the outputs of the others. Run it before private data.

    A test, not a proof: dependence that shows only for other values or shapes goes unseen. It runs a copy of the model
    with dropout off and leaves the model and the random streams as they were.

    Args:
        model: the model.
        example: positional inputs [B, ...] of which shapes, types and integer values are used; never private data.
        tolerance: largest accepted change, relative to the largest output.

    Raises:
        PrivacyViolation: (DP033) names the layer where one example first reaches another; (DP030) no output has one row
            per example; (DP013) a buffer changed.
    """
    # Enough that places which a few examples share are scarce: experts with a capacity, the largest of a batch.
    inputs = synthetic_like(example, at_least=7)
    batch = inputs[0].shape[0]
    twin = deterministic_copy(model)
    with torch.no_grad():
        with buffer_guard(twin):
            before = _trace(twin, inputs, batch)
        if not any(name == "" for name, _ in before):
            raise PrivacyViolation(
                f"no output of the model has one row per example ({batch} were given).",
                hint="return tensors with the examples in dimension 0.",
                code="DP030",
            )
        for changed in range(batch):
            after = _trace(twin, [_perturbed(t, changed) for t in inputs], batch)
            reached = _first_difference(before, after, changed, tolerance)
            if reached is not None:
                name, other = reached
                raise PrivacyViolation(
                    f"example {other}'s output changes when example {changed} changes "
                    f"({f'layer {name!r}' if name else 'in the model itself'}); clipping each gradient does not bound "
                    "one example's influence.",
                    hint="remove what mixes the examples of a batch (batch statistics, x.mean(0), attention over the "
                    "batch, layers that lack batch_first=True).",
                    code="DP033",
                )


def _perturbed(inputs: Tensor, index: int) -> Tensor:
    """The inputs with one row changed: other numbers; for indices another row, or its own reversed if equal."""
    changed = inputs.clone()
    row = changed[index]
    if row.is_floating_point():
        # Every other one becomes large, so that it is the largest of the batch wherever that counts.
        changed[index] = row * -1.5 + 1.0 if index % 2 else row * -6.0 + 4.0
    else:
        other = inputs[(index + 1) % inputs.shape[0]]
        changed[index] = row.flip(0) if row.dim() and torch.equal(other, row) else other
    return changed


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """Within the block torch draws the same random numbers every time, and dropout is off, as a function too.

    Afterwards its streams are as before.
    """
    gpus = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(0)
        with without_dropout():
            yield


def _trace(model: nn.Module, inputs: Sequence[Tensor], batch: int) -> list[tuple[str, Tensor]]:
    """(module name, output) in the order in which modules finish, for outputs with one row per example."""
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_nested:
                raise nested_rows(name)
            seen.extend(
                (name, leaf.detach().clone())
                for leaf in tree_leaves(output, is_leaf=_is_packed)  # whose rows are not examples
                if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch and leaf.is_floating_point()
            )

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with seeded(model):
            model(*[tensor.clone() for tensor in inputs])  # the model may write into them
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _is_packed(value: object) -> bool:
    return isinstance(value, nn.utils.rnn.PackedSequence)


def _first_difference(
    before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]], changed: int, tolerance: float
) -> tuple[str, int] | None:
    """The first module whose output moved for an example that was not changed, and that example."""
    if [name for name, _ in before] != [name for name, _ in after]:
        return "", changed  # which layers run depends on the batch
    for (name, old), (_, new) in zip(before, after, strict=True):
        moved = (new - old).abs().reshape(len(old), -1).amax(1) if old[0].numel() else torch.zeros(len(old))
        moved[changed] = 0.0
        if not float(moved.max()) <= tolerance * max(1.0, float(old.abs().max())):
            return name, int(moved.argmax())
    return None
