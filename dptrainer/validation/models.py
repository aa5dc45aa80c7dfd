"""Problems of a model as a whole: what wraps it, its parameters, its mode, and parts that are replayed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.engine import trainable_parameters
from dptrainer.clipping.layout import layout
from dptrainer.validation.problem import Problem, a_few, layer_title

_REPLICATES = {
    "DistributedDataParallel": "every rank would add whole noise to a step that all of them share, and charge it",
    "FullyShardedDataParallel": "each rank holds a part of every parameter, and per-example norms need the whole",
    "FSDPModule": "each rank holds a part of every parameter, and per-example norms need the whole",
    "DataParallel": "it runs copies of the layers, which the clipping engine does not see",
}


def wrapper_problems(name: str, module: nn.Module) -> Iterator[Problem]:
    """What stands between the engine and the layers: compiled or scripted code, replicas on other devices."""
    title = layer_title(name, module)
    # Wrapped by torch.compile, or in place by module.compile(). A model compiled as a whole is taken apart before.
    if name and (hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None):
        reason = f"{title} is the result of torch.compile, whose layers cannot be hooked."
        yield Problem(name, "DP019", reason, "compile the model as a whole, or not this part of it.")
    if isinstance(module, torch.jit.ScriptModule):
        reason = f"{title} is TorchScript, whose layers cannot be hooked."
        yield Problem(name, "DP019", reason, "pass the module that was scripted or traced.")
    for kind in type(module).__mro__:
        if kind.__name__ in _REPLICATES and kind.__module__.startswith(("torch.nn.parallel", "torch.distributed")):
            reason = f"{title} is not supported: {_REPLICATES[kind.__name__]}."
            yield Problem(name, "DP019", reason, "pass the module inside it, and train in one process on one device.")
            return


def parameter_problems(model: nn.Module) -> Iterator[Problem]:
    """Nothing trainable, or values that cannot be clipped and noised in float32 on one device."""
    trainable = trainable_parameters(model)
    if not trainable:
        yield Problem("", "DP018", "the model has no trainable parameter.", "requires_grad_(True) on what to train.")
    for name, parameter in trainable.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            continue  # said of its layer
        if parameter.dtype not in (torch.float32, torch.float64):
            fix = "keep trainable parameters in float32 and use torch.autocast for speed."
            yield Problem(name, "DP018", f'parameter "{name}" has type {parameter.dtype}.', fix)
        if parameter.layout != torch.strided:
            yield Problem(name, "DP018", f'parameter "{name}" is {parameter.layout}.', "make it a dense tensor.")
        if parameter.is_meta:
            reason = f'parameter "{name}" is on the meta device and has no values.'
            yield Problem(name, "DP018", reason, "model.to_empty(device=...) and load or initialise its weights.")
    devices = sorted({str(parameter.device) for parameter in trainable.values()})
    if len(devices) > 1:
        reason = f"trainable parameters lie on several devices ({a_few(devices)}), and one norm is taken over all."
        yield Problem("", "DP018", reason, "move what trains to one device.")


def mode_problems(model: nn.Module) -> Iterator[Problem]:
    """Nothing is recorded in eval mode."""
    if not model.training:
        fix = "call model.train() before the loop, and after validation."
        yield Problem("", "DP014", "the model is in eval mode.", fix)


def replay_problems(model: nn.Module) -> Iterator[Problem]:
    """Modules that are differentiated by a second run, and would draw other random numbers in it."""
    names = {module: name for name, module in model.named_modules()}
    for unit, part in _dropouts_by_unit(model):
        own = a_few([name for name, parameter in unit.named_parameters(recurse=False) if parameter.requires_grad])
        where = "" if part is unit else f" inside {layer_title(names[unit], unit)}"
        reason = f"{layer_title(names[part], part)} draws dropout{where}, which has no rule and is run twice"
        fix = "set its dropout to 0, move the dropout out, or model = dptrainer.fix(model)."
        if own:
            reason += f" for the parameters of its own: {own}"
            fix = f"give {own} a module that uses them and draws nothing; or {fix}" if part is not unit else fix
        yield Problem(names[part], "DP019", f"{reason}.", fix)


def dropouts_in_replays(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of active dropout in units without a rule, each module once."""
    names = {module: name for name, module in model.named_modules()}
    return [(names[part], part) for _, part in _dropouts_by_unit(model)]


def _dropouts_by_unit(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(unit without a rule, active dropout in it), each dropout once."""
    try:
        layers = layout(model, trainable_parameters(model))
    except PrivacyViolation:
        return []  # the engine says what it is
    unit_of: dict[nn.Module, nn.Module] = {}
    for unit, layer in layers.items():
        if layer.rule is None:
            for part in unit.modules():
                unit_of.setdefault(part, unit)
    return [(unit, part) for part, unit in unit_of.items() if part.training and _dropout_rate(part) > 0]


def _dropout_rate(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, nn.RNNBase):
        return module.dropout if module.num_layers > 1 else 0.0
    return module.dropout if isinstance(module, nn.MultiheadAttention) else 0.0
