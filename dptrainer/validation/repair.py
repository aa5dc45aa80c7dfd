"""``fix``: changes a model into one that can be trained privately, and says what it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn
from torch.nn.utils import parametrizations, remove_weight_norm

from dptrainer.validation.layers import (
    BATCH_NORM,
    INSTANCE_NORM,
    LOOKUPS,
    batch_norm_mixes,
    group_count,
    not_materialised,
    old_weight_norms,
    plain_batch_norm,
)
from dptrainer.validation.models import dropouts_in_replays

Model = TypeVar("Model", bound=nn.Module)

#: Where a module keeps the hooks of users; a replacement takes the very dictionaries, so that handles stay valid.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Change:
    """One change that :func:`fix` made.

    Attributes:
        module_name: the layer's first name in the model; "" for the model itself.
        before: what it was.
        after: what it is now.
        outputs_change: whether the model computes something else in train mode than before, with the same weights.
        remark: what to do about it; "" for nothing.
    """

    module_name: str
    before: str
    after: str
    outputs_change: bool
    remark: str = ""

    def __str__(self) -> str:
        name = f'layer "{self.module_name}"' if self.module_name else "the model"
        effect = "outputs change" if self.outputs_change else "outputs stay"
        return f"{name}: {self.before} -> {self.after} ({effect})" + (f". {self.remark}" if self.remark else "")


def fix(model: Model, *, note: Callable[[Change], object] | None = None) -> Model:
    """Repair in place what :func:`~dptrainer.validate` would refuse and what has an obvious repair; returns the model.

    ::

        model = dptrainer.fix(model, note=print)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    ======================================  ==============================================================
    batch norm, in train mode               GroupNorm with the same weight and bias
    batch norm, frozen, in train mode       ``.eval()``; ``model.train()`` undoes it, so call it again then
    batch norm in eval mode, trainable      frozen
    instance norm with running statistics   none are kept
    embedding ``max_norm``                  rows shrunk once, and not in every forward pass
    embedding ``sparse``, ``by_freq``       off
    weight_norm as a hook                   the parametrisation
    dropout in a module without a rule      off
    ======================================  ==============================================================

    Everything else stays, and :func:`~dptrainer.validate` lists it: a model in eval mode (whether to train is not for
    this function to say), spectral norm, quantised, compiled, lazy or wrapped modules, and subclasses of batch norm
    with a forward of their own, whose other work a GroupNorm would not do. In-place activations need no repair.

    In place, not on a copy: a new layer takes over the parameters themselves, so that an optimizer that holds them,
    weights that are tied, their types, devices and ``requires_grad`` stay as they are, and nothing is held twice.
    A module in several places is replaced in all of them. Calling it again changes nothing.

    Args:
        model: changed; nothing is charged, and no data is needed.
        note: is told every change, for example ``print`` or ``changes.append``.

    Returns:
        ``model`` itself; the replacement, where the model itself is a batch norm.
    """
    tell = (lambda change: None) if note is None else note
    places, root = _places(model), cast(nn.Module, model)
    for module, name in [(module, name) for name, module in model.named_modules()]:
        if not_materialised(module):
            continue
        if isinstance(module, BATCH_NORM):
            replacement, changes = _batch_norm(name, module, deliberate=root.training)
            for parent, local in places.get(module, []):
                parent._modules[local] = replacement
            root = replacement if module is root else root
        else:
            changes = list(_in_place(name, module))
        for change in changes:
            tell(change)
    for name, module in dropouts_in_replays(root):
        tell(_without_dropout(name, module))
    return cast(Model, root)


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Where each module hangs: (parent, local name), all of them."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for local, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((parent, local))
    return found


# ---------------------------------------------------------------------- batch norm


def _batch_norm(
    name: str, module: nn.modules.batchnorm._BatchNorm, *, deliberate: bool
) -> tuple[nn.Module, list[Change]]:
    """What stands in the place of a batch norm, which may be itself, and what changed.

    Args:
        name: its first name.
        module: the batch norm.
        deliberate: whether eval mode is a choice for this layer, and not the mode of the whole model.
    """
    before, own = type(module).__name__, list(module.parameters(recurse=False))
    if not batch_norm_mixes(module) and not any(parameter.requires_grad for parameter in own):
        return module, []
    if not batch_norm_mixes(module) and deliberate:
        for parameter in own:
            parameter.requires_grad_(False)
        return module, [Change(name, f"{before} in eval mode that trains", "frozen", outputs_change=False)]
    if module.track_running_stats and own and not any(parameter.requires_grad for parameter in own):
        module.eval()
        remark = "model.train() puts it back into train mode: call .eval() on it after that."
        change = Change(name, f"frozen {before} in train mode", f"{before} in eval mode", True, remark)
        return module, [change]
    if not plain_batch_norm(module):
        return module, []
    replacement = _group_norm(module)
    after = f"GroupNorm({replacement.num_groups}, {replacement.num_channels})"
    remark = "Weights stay, but were trained for other statistics."
    return replacement, [Change(name, before, after, True, remark if module.affine else "")]


def _group_norm(module: nn.modules.batchnorm._BatchNorm) -> nn.GroupNorm:
    """GroupNorm over the same channels with the very same parameters, hooks and mode."""
    channels = module.num_features
    made = nn.GroupNorm(group_count(channels), channels, eps=module.eps, affine=False)
    made.affine = module.affine
    # Both keep weight and bias as [channels]; handing them over keeps ties and optimizers.
    made.weight, made.bias = module.weight, module.bias
    for place in _HOOKS:
        setattr(made, place, getattr(module, place))
    return made.train(module.training)


# ---------------------------------------------------------------------- settings


def _in_place(name: str, module: nn.Module) -> Iterator[Change]:
    """Repairs that leave the module where it is."""
    if isinstance(module, INSTANCE_NORM) and module.track_running_stats:
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None
        remark = "In eval mode each example is now normalised by its own statistics, as in training."
        outputs_change = not module.training
        yield Change(name, "running statistics", "none", outputs_change, remark)
    if isinstance(module, LOOKUPS):
        yield from _lookup(name, module)
    for hook in old_weight_norms(module):
        trains = [getattr(module, hook.name + part).requires_grad for part in ("_g", "_v")]
        remove_weight_norm(module, hook.name)
        parametrizations.weight_norm(module, hook.name, hook.dim)
        originals = module.parametrizations[hook.name].parameters()  # type: ignore[index,union-attr]  # made just now
        for parameter, wanted in zip(originals, trains, strict=True):
            parameter.requires_grad_(wanted)
        yield Change(name, "weight_norm as a hook", "parametrizations.weight_norm", False, _REBUILD)


_REBUILD = "Its parameters are new and have other names: build the optimizer after this."


def _lookup(name: str, module: nn.Embedding | nn.EmbeddingBag) -> Iterator[Change]:
    if module.max_norm is not None:
        with torch.no_grad():
            # What forward does to the rows that it meets, for all of them: now, and never again.
            module.weight.renorm_(module.norm_type, 0, module.max_norm)
        before, module.max_norm = f"max_norm={module.max_norm}", None
        yield Change(name, before, "max_norm=None", False, "Rows were shrunk once; training may let them grow again.")
    if module.scale_grad_by_freq:
        module.scale_grad_by_freq = False
        yield Change(name, "scale_grad_by_freq=True", "scale_grad_by_freq=False", False, "Gradients change.")
    if module.sparse:
        module.sparse = False
        yield Change(name, "sparse=True", "sparse=False", False)


def _without_dropout(name: str, module: nn.Module) -> Change:
    attribute = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout"
    before = f"{attribute}={getattr(module, attribute)}"
    setattr(module, attribute, 0.0)
    return Change(name, before, f"{attribute}=0.0", True, "The noise of private training regularises too.")
