"""Layers whose forward is one torch function over several parameters: that function is replaced by one that records.

A recurrent or attention layer uses several parameters in one call, so its input and output alone do not give their
gradients. While such a layer runs in an open private batch, its own ``forward`` is unchanged, but the torch function
that it calls (``torch.lstm``, ``F.multi_head_attention_forward``) is computed by the layer's rule, which taps values in
the middle. What the layer returns is the same up to rounding, dropout is drawn once, and nothing is computed twice.
Any other use of the layer's parameters is refused by the guard, so that no part of a gradient is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.guard import ParameterGuard, depends_on_position_alone, tensors
from dptrainer.clipping.layout import Layer
from dptrainer.clipping.recording import Answer, Call, Session, hooked


class Trace:
    """One forward call of a traced layer.

    Attributes:
        module: the layer.
        args: positional arguments of the layer (not of the function), as they were given.
        kwargs: keyword arguments, likewise.
        dtype: type in which gradients are summed; what an answer keeps of the forward pass is converted to it.
    """

    def __init__(
        self,
        session: Session,
        module: nn.Module,
        layer: Layer,
        inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
        *,
        keep: bool,
    ) -> None:
        self.module = module
        self.args, self.kwargs = inputs
        self._session, self._layer, self._keep = session, layer, keep
        self._names = {id(parameter): local for local, parameter in layer.parameters.items()}
        self.dtype = layer.sum_dtype

    def functions(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """For each torch function, what stands for it while the layer runs."""
        rule = self._layer.rule
        return {} if rule is None else {name: partial(self._run, stand_in) for name, stand_in in rule.traced.items()}

    def _run(self, stand_in: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The stand-in's result; the guard has not looked at the arguments.

        Raises:
            PrivacyViolation: (DP019) a parameter of another layer is among them.
        """
        others = {id(p): name for name, p in self._session.trainable.items() if id(p) not in self._names}
        for given in tensors((*args, *kwargs.values())):
            if id(given) in others:
                raise self.refuse(
                    f'parameter "{others[id(given)]}" is one of its inputs; that part of its gradient would be lost.',
                    hint="call the layer that owns the parameter, or name the module that uses it in replay=[module].",
                )
        return stand_in(self, *args, **kwargs)

    def site(self, inputs: Sequence[Tensor], rows: int) -> Site:
        """Opens the record of one use of parameters.

        Args:
            inputs: what the user gave; at least one of them has one row per example, in whatever dimension.
            rows: how many rows.

        Raises:
            PrivacyViolation: (DP030) all inputs are the same for all examples; (DP019) one is a parameter.
        """
        if any(id(given) in self._names for given in inputs):
            raise self.refuse(
                "one of its own parameters is its input, so that part of the gradient would be lost.",
                hint="name the module that does this in replay=[module].",
            )
        if rows != 1 and all(depends_on_position_alone(given) for given in inputs):
            raise PrivacyViolation(
                f'layer "{self._layer.name}" is given positions that all examples share, so its rows are not examples.',
                hint="name the module that does this in replay=[module].",
                code="DP030",
            )
        call = Call(self._session, self.module, self._layer, (self.args, self.kwargs), keep=self._keep)
        call.rows = rows
        if self._keep:
            self._session.calls.append(call)
        return Site(call)

    def name(self, parameter: Tensor | None) -> str | None:
        """The local name of a parameter that is trained now, None for any other.

        Raises:
            PrivacyViolation: (DP019) it requires grad although it was frozen when the batch began.
        """
        if parameter is None:
            return None
        if id(parameter) not in self._names and parameter.requires_grad:
            raise self.refuse(
                "one of its weights requires grad and is not one of its parameters, so its gradient would be lost.",
                hint="freeze and unfreeze parameters between steps; name a module that computes its weights in "
                "replay=[module].",
            )
        return self._names.get(id(parameter))

    def trains(self, *parameters: Tensor | None) -> bool:
        """Whether any of them is trained now."""
        names = [self.name(parameter) for parameter in parameters]  # each is looked at, so that none is lost
        return any(name is not None for name in names)

    def refuse(self, reason: str, hint: str, code: str = "DP019") -> PrivacyViolation:
        """An error that names the layer."""
        return PrivacyViolation(f'layer "{self._layer.name}": {reason}', hint=hint, code=code)

    def guard(self) -> ParameterGuard:
        """A guard for the recomputation of a checkpointed layer, in which the guard of the forward pass is gone."""
        names = {self._layer.names[local]: parameter for local, parameter in self._layer.parameters.items()}
        guard = ParameterGuard(names, ())
        guard.functions = self.functions()
        return guard


class Site:
    """The taps of one call of a traced function."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def tap(self, value: Tensor) -> Tensor:
        """The value, whose gradient is kept from now on; it starts a graph where it had none."""
        self._call.grads.append(None)
        return hooked(value, self._call.receiver(len(self._call.grads) - 1))

    def answer(self, answer: Answer) -> None:
        """Says how contributions follow from the gradients of the taps."""
        self._call.answer = answer
