"""Choosing an engine for a model, and testing it on synthetic examples before any private one is seen."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping.arguments import adopt, arguments_of, learn
from dptrainer.clipping.bookkeeping import BookKeeping
from dptrainer.clipping.compiled import CompiledForward
from dptrainer.clipping.engine import (
    LARGEST_CLIP_NORM,
    SMALLEST_CLIP_NORM,
    clip_factors,
    sum_dtype,
    trainable_parameters,
)
from dptrainer.clipping.per_example import row_squares
from dptrainer.clipping.policy import Clipping
from dptrainer.draws import without_dropout

#: Largest accepted relative difference between the engine and the reference, by type of the parameters.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


def make_engine(
    model: nn.Module,
    clip_norm: float,
    *,
    replay: Sequence[nn.Module] = (),
    clipping: Clipping | None = None,
    example: Sequence[Tensor] | None = None,
    note: Callable[[str], None] | None = None,
    test: Callable[[], object] | None = None,
    compiled: CompiledForward | None = None,
) -> BookKeeping:
    """The clipping engine for a model: book-keeping, with modules that have no rule replayed one example at a time.

    Args:
        model: the model; it must be called as ``model(...)`` with the examples in dimension 0.
        clip_norm: C in [1e-6, 1e12].
        replay: further modules to treat as a whole, see :class:`BookKeeping`.
        clipping: how gradients are brought below C; flat unless given.
        example: public or synthetic positional inputs [B, ...] of the model; with them :func:`self_test` is run.
        note: is told once which modules are replayed, because that is slower.
        test: see :class:`BookKeeping`.
        compiled: likewise.

    Raises:
        InvalidParameter: (DP007) clip_norm out of range.
        PrivacyViolation: (DP018, DP019) the model cannot be trained privately; (DP019) the self-test failed.
    """
    engine = BookKeeping(model, clip_norm=clip_norm, replay=replay, clipping=clipping, test=test, compiled=compiled)
    if note is not None and engine.replayed:
        names = ", ".join(f'"{name}"' if name else "the whole model" for name in engine.replayed)
        note(f"no rule for {names}: replayed one example at a time, which is slower (register one with @rule).")
    if example is not None:
        self_test(model, example, replay=replay)
    return engine


def synthetic_like(example: Sequence[Tensor], *, at_least: int = 3) -> tuple[Tensor, ...]:
    """Inputs with a number of examples that equals no other dimension, so that no layout can be taken for another.

    It is the smallest such number from ``at_least`` on.

    Floating-point inputs are replaced by standard normal ones; integers are kept (their range is not known), repeated.

    Raises:
        InvalidParameter: (DP009) no example, or inputs without a common dimension 0.
    """
    sizes = {t.shape[0] if t.dim() else 0 for t in example}
    if len(sizes) != 1 or 0 in sizes:
        raise InvalidParameter(
            f"example inputs must be tensors with one common, positive number of rows, got {sorted(sizes)}.",
            hint="pass a synthetic batch, for example (torch.randn(2, 3, 32, 32),).",
            code="DP009",
        )
    taken = {size for t in example for size in t.shape[1:]}
    batch = next(size for size in itertools.count(at_least) if size not in taken)
    generator = torch.Generator().manual_seed(0)
    made = []
    for tensor in example:
        rows = tensor.detach()[torch.arange(batch, device=tensor.device) % tensor.shape[0]]
        if rows.is_floating_point():
            rows = torch.randn(rows.shape, generator=generator).to(rows)
        made.append(rows)
    return tuple(made)


def self_test(model: nn.Module, example: Sequence[Tensor], *, replay: Sequence[nn.Module] = ()) -> None:
    """Compares the engine with a loop over single examples, on synthetic inputs and a copy of the model.

    It finds a wrong layer rule, a layout with the examples in another dimension, gradients that are booked on another
    example than their own, and cross-example dependence that changes gradients. Dropout is switched off, in the copy
    and where it is called as a function. The model, its gradients and random streams are as before.

    Args:
        model: the model.
        example: positional inputs [B, ...] of which shapes, types and integer values are used; never private data.
        replay: as for :class:`BookKeeping`.

    Raises:
        PrivacyViolation: (DP019) the two disagree, with the parameter that differs most; (DP030) a layer does not have
            one row per example.
    """
    inputs = synthetic_like(example)
    batch = inputs[0].shape[0]
    paths = {id(module): name for name, module in model.named_modules()}
    twin = deterministic_copy(model)
    twin_replay = [twin.get_submodule(paths[id(module)]) for module in replay]
    units = learn_arguments(model, twin, example, twin_replay)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), without_dropout():
        rows = _one_at_a_time(twin, inputs)
        norms = torch.stack([row_squares(grads) for grads in rows.values()]).sum(0).sqrt()
        # First a clip norm that no gradient reaches, so that the sums themselves are compared. Then one that half of
        # them exceed: the sum is then right only if every gradient was booked on its own example.
        for clip_norm in (LARGEST_CLIP_NORM, float(norms.median().clamp(min=SMALLEST_CLIP_NORM)) / 2):
            engine = BookKeeping(twin, clip_norm=max(clip_norm, SMALLEST_CLIP_NORM), replay=twin_replay)
            with engine.record(batch):
                losses = losses_like(twin(*[t.clone() for t in inputs]), batch) * _sizes(batch).to(inputs[0].device)
            found = engine.backward(losses).grads
            engine.detach()
            _compare(found, rows, clip_factors(norms.square(), engine.clip_norm))
    for unit in units:
        if _draws(model.get_submodule(unit)):
            # The copy has no dropout. Whether the module itself repeats, its first batch will tell.
            arguments_of(model.get_submodule(unit)).repeats = False


def learn_arguments(
    model: nn.Module, twin: nn.Module, example: Sequence[Tensor], twin_replay: Sequence[nn.Module] = ()
) -> tuple[str, ...]:
    """Finds out which arguments of the replayed modules carry examples, on synthetic batches of two sizes.

    No private batch then decides it by its size: see :mod:`dptrainer.clipping.arguments`.

    Args:
        model: whose modules are to know.
        twin: a copy in train mode that may be run.
        example: positional inputs [B, ...], as for :func:`self_test`.
        twin_replay: modules of the copy, as for :class:`BookKeeping`.

    Returns:
        The names of the replayed modules.
    """
    engine = BookKeeping(twin, clip_norm=1.0, replay=twin_replay)
    units = engine.replayed
    engine.detach()
    if units:
        first = synthetic_like(example)
        with torch.random.fork_rng(devices=[]):
            learn(twin, units, [first, synthetic_like(example, at_least=len(first[0]) + 1)])
        for unit in units:
            adopt(model.get_submodule(unit), twin.get_submodule(unit))
    return units


def _draws(unit: nn.Module) -> bool:
    """Whether a module has dropout that is on."""
    return any(
        float(getattr(module, "dropout", 0.0) if isinstance(module, nn.MultiheadAttention | nn.RNNBase) else module.p)
        > 0
        for module in unit.modules()
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention | nn.RNNBase)
    )


def _compare(found: Mapping[str, Tensor], rows: Mapping[str, Tensor], factors: Tensor) -> None:
    """Refuse a clipped sum that is not the sum of ``factors`` times the gradients of single examples."""
    expected = {name: torch.einsum("b,b...->...", factors.to(grads.dtype), grads) for name, grads in rows.items()}
    # The size of what was added, not of the sum, in which terms may cancel.
    scale = sum(float(factors.to(grads.dtype) @ grads.reshape(len(factors), -1).norm(dim=1)) for grads in rows.values())
    worst = max(found, key=lambda name: float((found[name] - expected[name]).norm()))
    error = float((found[worst] - expected[worst]).norm())
    if not error <= _TOLERANCE[sum_dtype(found[worst])] * max(scale, 1e-3 * float(factors.min())):
        raise PrivacyViolation(
            f'self-test: the per-example gradient of "{worst}" differs from the reference by {error:.3g} '
            f"(the whole gradient has norm {scale:.3g}).",
            hint="pass replay=[the module that owns it], or correct its @rule.",
            code="DP019",
        )


def deterministic_copy(model: nn.Module) -> nn.Module:
    """A copy in train mode with dropout off; layers that are kept in eval mode inside a training model stay there."""
    try:
        twin = copy.deepcopy(model).train()
    except Exception as error:  # whatever the attributes of a model raise that do not like to be copied
        raise PrivacyViolation(
            f"the model cannot be copied, and tests run on a copy: {error}",
            hint="keep activations, locks and scripted functions out of the attributes of modules.",
            code="DP019",
        ) from error
    for original, copied in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(copied, nn.modules.dropout._DropoutNd) or (model.training and not original.training):
            copied.eval()
        if isinstance(copied, nn.MultiheadAttention | nn.RNNBase):
            copied.dropout = 0.0
    return twin


def losses_like(output: object, batch: int) -> Tensor:
    """A different smooth loss for each example, from whatever tensors the model returns."""
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0]
    rows = [t.reshape(batch, -1) for t in leaves if t.shape[0] == batch]
    if not rows:
        raise PrivacyViolation(
            f"no output of the model has one row per example ({batch} were given).",
            hint="return tensors with the examples in dimension 0.",
            code="DP030",
        )
    total = torch.zeros(batch, dtype=rows[0].dtype, device=rows[0].device)
    for row in rows:
        weights = torch.linspace(0.5, 1.5, row.shape[1], dtype=row.dtype, device=row.device)
        total = total + (F.softplus(row) * weights).mean(1)
    return total


def _sizes(batch: int) -> Tensor:
    """[B] how much each example counts: so different that a gradient booked on another example is not clipped alike."""
    return 4.0 ** (torch.arange(batch) * 3 % 4).float()


def _one_at_a_time(twin: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The reference: name -> [B, *shape] plain autograd gradients, each from a batch of one."""
    parameters = trainable_parameters(twin)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for index in range(inputs[0].shape[0]):
        # backward() and not autograd.grad(), which reentrant checkpointing refuses.
        losses = losses_like(twin(*[t[index : index + 1].clone() for t in inputs]), 1)  # the model may write into them
        (losses * float(_sizes(len(inputs[0]))[index])).sum().backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        for name, parameter in parameters.items():
            one = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            rows[name].append(one.detach().to(sum_dtype(parameter)))
            parameter.grad = None
    return {name: torch.stack(gradients) for name, gradients in rows.items()}
