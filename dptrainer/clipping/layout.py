"""Which layer answers for which trainable parameter: by a rule, or as a unit that is replayed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.rules import Rule, rule_for

#: Never called themselves, or not with a batch: the module that holds them is the unit.
_CONTAINERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict, ParametrizationList)
#: Their forward reads the weights of their children directly: where no rule fits them, they are one unit.
_WHOLE = (nn.MultiheadAttention,)


@dataclass(frozen=True)
class Layer:
    """One module that answers for parameters.

    Attributes:
        name: its first name in the model ("" for the model itself).
        rule: how; None means by replay, as a unit with everything inside it.
        names: local parameter name -> name in the model.
        parameters: local parameter name -> parameter.
        ids: identities of those parameters.
    """

    name: str
    rule: Rule | None
    names: Mapping[str, str]
    parameters: Mapping[str, nn.Parameter]
    ids: frozenset[int]

    @property
    def sum_dtype(self) -> torch.dtype:
        """Contributions are computed in float32 at least, in float64 if a parameter of the layer is."""
        double = any(parameter.dtype == torch.float64 for parameter in self.parameters.values())
        return torch.float64 if double else torch.float32


def layout(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], replay: Iterable[nn.Module] = ()
) -> dict[nn.Module, Layer]:
    """The layers that answer for the trainable parameters of ``model``; none of those is left without one.

    Args:
        model: the whole model.
        trainable: name -> parameter, as :func:`dptrainer.clipping.engine.trainable_parameters` gives it.
        replay: modules that are treated as units although their parts have rules.

    Raises:
        PrivacyViolation: (DP019) a module in ``replay`` is not part of the model.
    """
    global_names = {id(parameter): name for name, parameter in trainable.items()}
    modules = dict(model.named_modules())
    units = _units(modules, global_names, list(replay))
    layers: dict[nn.Module, Layer] = {}
    for name, module in modules.items():
        rule = None if module in units else rule_for(module)
        recurse = module in units or (rule is not None and rule.whole)
        own = {
            local: parameter
            for local, parameter in module.named_parameters(recurse=recurse)
            if id(parameter) in global_names
        }
        if own and (recurse or rule is not None):
            names = {local: global_names[id(parameter)] for local, parameter in own.items()}
            layers[module] = Layer(name, rule, names, own, frozenset(map(id, own.values())))
    return layers


def _units(modules: Mapping[str, nn.Module], trainable: Mapping[int, str], replay: list[nn.Module]) -> set[nn.Module]:
    """Modules that are replayed as a whole."""
    known = set(modules.values())
    for module in replay:
        if module not in known:
            raise PrivacyViolation(
                f"replay=[...] names a {type(module).__name__} that is not part of the model.",
                hint="name modules of this very model, replay=[model.block].",
                code="DP019",
            )
    units = set(replay)
    for name, module in modules.items():
        if isinstance(module, _WHOLE) and any(id(p) in trainable for p in module.parameters()):
            if rule_for(module) is None:
                units.add(module)
        elif any(id(p) in trainable for p in module.parameters(recurse=False)) and rule_for(module) is None:
            units.add(_holder(modules, name))
    return units


def _holder(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The nearest module at or above ``name`` that is called with a batch."""
    while name and isinstance(modules[name], _CONTAINERS):
        name = name.rpartition(".")[0]
    return modules[name]
