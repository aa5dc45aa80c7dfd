"""Layer rules: how one layer's per-example gradients follow from its input and the gradient of its output.

A rule is one function, registered with :func:`rule`; a layer without one is replayed by the vmap reference, never
skipped. Extension is one file: see ``docs/extending.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping.per_example import PerExample


@dataclass(frozen=True)
class LayerCall:
    """One forward call of a layer, with the gradient that came back to its output.

    Attributes:
        name: the layer's name in the model, for messages.
        activation: [B, ...] the first tensor argument, detached, in the type in which gradients are summed.
        grad: [B, ...] gradient of the summed per-example losses with respect to the output, same type.
        batch_size: B, the declared number of examples; both tensors have this many rows.
        wanted: names of the layer's own parameters that are trainable now; others may be left out of the answer.
        args: all positional arguments of the call, detached.
        kwargs: all keyword arguments of the call, detached.
    """

    name: str
    activation: Tensor
    grad: Tensor
    batch_size: int
    wanted: frozenset[str]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def refuse(self, reason: str, hint: str, code: str = "DP019") -> PrivacyViolation:
        """An error that names the layer; raise it where the rule does not hold for this call."""
        return PrivacyViolation(f'layer "{self.name}": {reason}', hint=hint, code=code)


#: layer, call -> own parameter name -> per-example gradients, as a tensor [B, *shape] or a cheaper form.
RuleFunction = Callable[[Any, LayerCall], Mapping[str, Tensor | PerExample]]


@dataclass(frozen=True)
class Rule:
    """A registered rule.

    Attributes:
        function: answers from the layer's input and the gradient of its output; None where the layer is traced.
        parameters: names that it answers for, possibly by layer; None means all own parameters of the layer.
        traced: torch function that the layer's forward calls -> what computes it and records, see
            :mod:`dptrainer.clipping.trace`.
        whole: it answers for the parameters of everything inside the layer too.
    """

    function: RuleFunction | None
    parameters: Callable[[Any], Collection[str]] | None
    traced: Mapping[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict)
    whole: bool = False


_RULES: dict[type[nn.Module], Rule] = {}
#: Rules of classes in libraries that are not imported here, by qualified name.
_NAMED: dict[str, Rule] = {}


def rule(*layers: type[nn.Module], parameters: tuple[str, ...] | None = None) -> Callable[[RuleFunction], RuleFunction]:
    """Registers a function as the rule of one or more layer classes; the last registration of a class wins.

    The decorated function takes ``(layer, call)`` and returns, for every name in ``call.wanted``, the gradient of each
    example's loss with respect to that parameter, as a tensor [B, *parameter.shape]. Row i must depend on row i of
    ``call.activation`` and ``call.grad`` alone: that is what clipping relies on.

    Args:
        *layers: classes whose ``forward`` the rule describes. A subclass with its own ``forward`` does not inherit it.
        parameters: own parameter names that the rule covers; a layer with further ones is replayed instead.

    Raises:
        InvalidParameter: (DP019) something other than a module class was given.
    """
    for layer in layers:
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            raise InvalidParameter(
                f"@rule takes torch.nn.Module classes, got {layer!r}.",
                hint="write @rule(MyLayer).",
                code="DP019",
            )

    def register(function: RuleFunction) -> RuleFunction:
        for layer in layers:
            _RULES[layer] = Rule(function, None if parameters is None else lambda _: parameters)
        return function

    return register


def traced_rule(
    *layers: type[nn.Module] | str,
    functions: Collection[Callable[..., Any]],
    parameters: Callable[[Any], Collection[str]],
    whole: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what stands for a torch function while one of ``layers`` runs in a private batch.

    The decorated function takes a :class:`~dptrainer.clipping.trace.Trace` and the arguments of the torch function,
    computes the same result and records how the per-example gradients of all parameters among the arguments follow.

    Args:
        *layers: classes whose ``forward`` uses its parameters through ``functions`` alone; the guard refuses the rest.
            A class of a library that may not be installed is named, "package.module.Class".
        functions: the torch functions.
        parameters: layer -> names that it answers for; a layer with further ones is replayed instead.
        whole: the names are those of everything inside the layer.
    """

    def register(stand_in: Callable[..., Any]) -> Callable[..., Any]:
        made = Rule(None, parameters, dict.fromkeys(functions, stand_in), whole)
        _NAMED.update({layer: made for layer in layers if isinstance(layer, str)})
        _RULES.update({layer: made for layer in layers if not isinstance(layer, str)})
        return stand_in

    return register


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule that describes this very layer, or None: a rule holds only for the forward it was written for."""
    if "forward" in vars(layer):
        return None
    for base in type(layer).__mro__:
        found = _RULES.get(base) or _NAMED.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            if type(layer).forward is not getattr(base, "forward", None):
                return None
            own = {name for name, p in layer.named_parameters(recurse=found.whole) if p.requires_grad}
            return found if found.parameters is None or own <= set(found.parameters(layer)) else None
    return None


from dptrainer.clipping.rules import attention, conv, embedding, huggingface, linear, norm, rnn  # noqa: E402  (they register themselves)

__all__ = [
    "LayerCall",
    "Rule",
    "RuleFunction",
    "attention",
    "conv",
    "embedding",
    "huggingface",
    "linear",
    "norm",
    "rnn",
    "rule",
    "rule_for",
    "traced_rule",
]
