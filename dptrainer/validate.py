"""What cannot be trained privately, and the fix: checked before any private example is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.engine import trainable_parameters
from dptrainer.clipping.factory import deterministic_copy, synthetic_like
from dptrainer.clipping.guard import buffer_guard

__all__ = ["Problem", "buffer_guard", "check", "isolation_test", "validate"]

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Problem:
    """One reason why the model or optimizer cannot be trained privately.

    Attributes:
        module_name: the layer's or parameter's name in the model; "" for the model as a whole or the optimizer.
        code: stable code, a key of ``dpbudget.errors.CODES``.
        reason: what is wrong, with names and values.
        fix: the way out.
    """

    module_name: str
    code: str
    reason: str
    fix: str


def validate(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Problem]:
    """Every problem that can be seen without running the model, worst first within each kind; empty means none.

    Args:
        model: in the state in which training will start.
        optimizer: the optimizer that will step it, if it exists already.
    """
    found = [problem for name, module in model.named_modules() for problem in _layer(name, module)]
    found += _parameters(model)
    if not model.training:
        found.append(
            Problem(
                "", "DP014", "the model is in eval mode.", "call model.train() before the loop, and after validation."
            )
        )
    if optimizer is not None:
        found += _optimizer(model, optimizer)
    return found


def check(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raises if :func:`validate` finds anything.

    Raises:
        PrivacyViolation: with the code and fix of the first problem, and all problems in the message.
    """
    found = validate(model, optimizer)
    if not found:
        return
    message = found[0].reason
    if len(found) > 1:
        others = "".join(f"\n  {p.code} {p.reason} Fix: {p.fix}" for p in found[1:])
        message += f" ({len(found) - 1} more below.)"
        raise PrivacyViolation(message, hint=found[0].fix + others, code=found[0].code)
    raise PrivacyViolation(message, hint=found[0].fix, code=found[0].code)


def _layer(name: str, module: nn.Module) -> Iterator[Problem]:
    """Problems of one module, its children apart."""
    kind = f'layer "{name}" ({type(module).__name__})'
    if isinstance(module, _BATCH_NORM):
        yield from _batch_norm(name, kind, module)
    elif isinstance(module, _INSTANCE_NORM) and module.track_running_stats:
        fix = "build it with track_running_stats=False."
        yield Problem(name, "DP013", f"{kind} keeps running statistics of private data without noise.", fix)
    elif isinstance(module, _LOOKUPS):
        if module.max_norm is not None:
            reason = f"{kind} has max_norm={module.max_norm}, which rewrites rows during forward."
            yield Problem(name, "DP010", reason, "set max_norm=None.")
        if module.scale_grad_by_freq:
            reason = f"{kind} has scale_grad_by_freq, which counts indices over all examples of the batch."
            yield Problem(name, "DP010", reason, "set scale_grad_by_freq=False.")
        if module.sparse and module.weight.requires_grad:
            reason = f"{kind} has sparse gradients; noise on the touched rows alone would show which were touched."
            yield Problem(name, "DP019", reason, "set sparse=False.")


def _batch_norm(name: str, kind: str, module: nn.modules.batchnorm._BatchNorm) -> Iterator[Problem]:
    """Batch statistics mix examples; in eval mode with fixed statistics the layer is an affine map per example."""
    fixed = not module.training and module.track_running_stats
    trains = any(p.requires_grad for p in module.parameters(recurse=False))
    channels = module.num_features
    if not fixed:
        fix = f"replace it by GroupNorm({_groups(channels)}, {channels}), or freeze it and call .eval() on it."
        yield Problem(name, "DP010", f"{kind} mixes examples.", fix)
    elif trains:
        fix = f"requires_grad_(False) on its parameters, or replace it by GroupNorm({_groups(channels)}, {channels})."
        yield Problem(name, "DP010", f"{kind} is in eval mode but its weights still train.", fix)


def _groups(channels: int) -> int:
    """The largest divisor of the number of channels up to 32 that leaves at least four channels to a group.

    A group of one channel without further positions is its own mean, so that the layer would be constant.
    """
    return max(groups for groups in range(1, 33) if channels % groups == 0 and (groups == 1 or channels >= 4 * groups))


def _parameters(model: nn.Module) -> Iterator[Problem]:
    """Nothing trainable, or values that cannot be clipped and noised in float32."""
    trainable = trainable_parameters(model)
    if not trainable:
        yield Problem("", "DP018", "the model has no trainable parameter.", "requires_grad_(True) on what to train.")
    for name, parameter in trainable.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            fix = "keep trainable parameters in float32 and use torch.autocast for speed."
            yield Problem(name, "DP018", f'parameter "{name}" has type {parameter.dtype}.', fix)
        if parameter.layout != torch.strided:
            yield Problem(name, "DP018", f'parameter "{name}" is {parameter.layout}.', "make it a dense tensor.")


def _optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    """The optimizer must step exactly the trainable parameters, once per receipt."""
    yield from _foreign(model, optimizer)
    held, own = _held(optimizer), {id(p) for p in model.parameters()}
    left_out = [name for name, p in trainable_parameters(model).items() if id(p) not in held]
    if left_out and held & own:
        reason = f"the optimizer omits {_few(left_out)}, which still require grad."
        yield Problem("", "DP012", reason, "freeze them with requires_grad_(False), or pass them to the optimizer.")
    if isinstance(optimizer, torch.optim.LBFGS):
        reason = "LBFGS evaluates the loss several times per step, and each evaluation is a release."
        yield Problem("", "DP017", reason, "use SGD or Adam.")


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _foreign(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    """Parameters that the optimizer would step with gradients that nobody clipped."""
    held, own = _held(optimizer), {id(p) for p in model.parameters()}
    foreign = len(held - own)
    if foreign:
        none = ", none belong to this model (was it built before the model was changed?)" if not held & own else ""
        reason = f"the optimizer holds {len(held)} tensors, {foreign} of them foreign{none}."
        yield Problem("", "DP011", reason, "build the optimizer from model.parameters() after the last change.")


def check_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that was given foreign parameters since it was checked; cheap enough for every step.

    Raises:
        PrivacyViolation: it holds parameters that are not the model's (DP011).
    """
    for problem in _foreign(model, optimizer):
        raise PrivacyViolation(problem.reason, hint=problem.fix, code=problem.code)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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
    inputs = synthetic_like(example)
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
                    "batch).",
                    code="DP033",
                )


def _perturbed(inputs: Tensor, index: int) -> Tensor:
    """The inputs with one row changed: other numbers; for indices another row, or its own reversed if equal."""
    changed = inputs.clone()
    row = changed[index]
    if row.is_floating_point():
        changed[index] = row * -1.5 + 1.0
    else:
        other = inputs[(index + 1) % inputs.shape[0]]
        changed[index] = row.flip(0) if row.dim() and torch.equal(other, row) else other
    return changed


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """Within the block torch draws the same random numbers every time; afterwards its streams are as before."""
    gpus = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(0)
        yield


def _trace(model: nn.Module, inputs: Sequence[Tensor], batch: int) -> list[tuple[str, Tensor]]:
    """(module name, output) in the order in which modules finish, for outputs with one row per example."""
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.extend(
                (name, leaf.detach().clone())
                for leaf in tree_leaves(output)
                if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch and leaf.is_floating_point()
            )

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with seeded(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


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
