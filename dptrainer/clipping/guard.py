"""Watches the forward pass: trainable parameters used outside their layer, positions taken for examples, moved buffers.

Book-keeping freezes the trainable parameters while the graph is built and obtains their gradients from the layers. A
parameter used anywhere else, ``F.linear(x, emb.weight)``, would silently lose that part of its gradient. The guard sees
every torch operation of every private forward, not only of the first: control flow may take another path later. It
costs one Python call an operation, about two microseconds, and holds no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpbudget.errors import PrivacyViolation

#: Reading these of a parameter gives a tensor through which no gradient was ever meant to flow.
_CUT = {torch.Tensor.detach, torch.detach, vars(torch._C.TensorBase)["data"].__get__}
#: Values of these depend on the position alone; an embedding of them has positions, not examples, in dimension 0.
_POSITIONS = {torch.arange, torch.linspace, torch.range}
#: One row of these (or a number) is the same for all examples; several rows may well be examples.
_CONSTANTS = {torch.zeros, torch.ones, torch.full, torch.tensor}
_MARK = "_dptrainer_positions"
_SET_GRAD_MODE = torch._C._set_grad_enabled
_FREEZE = vars(torch._C.TensorBase)["requires_grad"].__set__
#: With these a kernel of one's own reads a parameter; what it computes is no torch operation.
_READS = {torch.Tensor.data_ptr, torch.Tensor.numpy, torch.Tensor.__dlpack__, torch.Tensor.untyped_storage}
_HOLDERS = (Tensor, list, tuple)
#: Copies of one row for all examples. Were they for positions, there would hardly ever be as many as examples, and the
#: number of rows is checked.
_COPIES = {torch.Tensor.expand, torch.Tensor.expand_as, torch.Tensor.repeat}


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, also inside lists, tuples and dicts of arguments."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):  # a union would be built anew at each operation
            yield from tensors(value)
        elif isinstance(value, dict):
            yield from tensors(value.values())


def _one_row(before: Tensor, after: Tensor) -> bool:
    """Whether dimension 0 of ``after`` counts copies of one row of ``before``, which had this dimension already."""
    return before.dim() == after.dim() and before.shape[0] == 1


def depends_on_position_alone(tensor: object) -> bool:
    """Whether the guard saw this tensor come from ``arange`` and the like, buffers or parameters alone."""
    return bool(getattr(tensor, _MARK, False))


def shared_by_all(tensor: Tensor, buffers: Iterable[Tensor]) -> bool:
    """Whether one row is the same for all examples: a buffer or parameter, or made from these and positions alone."""
    return (
        depends_on_position_alone(tensor)
        or isinstance(tensor, nn.Parameter)
        or any(tensor is buffer for buffer in buffers)
    )


def now_examples(tensor: Tensor) -> Tensor:
    """The tensor, from now on with one row per example."""
    if hasattr(tensor, _MARK):
        delattr(tensor, _MARK)
    return tensor


def same_mark(before: Tensor, after: Tensor) -> Tensor:
    """``after``, which is ``before`` for all that the guard knows."""
    if depends_on_position_alone(before):
        setattr(after, _MARK, True)
        return after
    return now_examples(after)


def compiled_part() -> None:
    """Names, in refusals, what runs outside the guard."""


class ParameterGuard(TorchFunctionMode):
    """Names any use of a trainable parameter outside the forward of a layer that answers for it.

    Attributes:
        allowed: ids of the parameters whose layer is running now; kept by the engine.
        functions: torch function -> what stands for it while a traced layer runs; kept by the engine.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], buffers: Iterable[Tensor]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._fixed = {id(buffer) for buffer in buffers}
        self._off, self._before_on = False, list[bool]()
        self.allowed: frozenset[int] = frozenset()
        self.functions: Mapping[Callable[..., Any], Callable[..., Any]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operation, then looks at what went in and what came out.

        Raises:
            PrivacyViolation: (DP019) a trainable parameter was used directly.
        """
        kwargs = kwargs or {}
        if self.functions and func in self.functions:
            return self.functions[func](*args, **kwargs)  # answers for the parameters among its arguments itself
        if func is _SET_GRAD_MODE:
            self._note_grad_mode(*args, **kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, _HOLDERS):
            if func is torch.Tensor.__setitem__:  # data may be what was written
                now_examples(args[0])
            elif func == _FREEZE or (func in _READS and self._in_function()):
                self._refuse_outside(args[0], func)
            return result  # shapes, types and numbers of elements carry no gradient
        inputs = list(tensors(args))
        if kwargs:
            inputs.extend(tensors(kwargs.values()))
        fixed, frozen = True, False
        for tensor in inputs:
            key = id(tensor)
            if key in self._names:
                if key not in self.allowed and self._recorded() and self._carries(func, result):
                    raise self._refusal(self._names[key], func)
            elif key not in self._fixed and not hasattr(tensor, _MARK):
                frozen = frozen or isinstance(tensor, nn.Parameter)
                fixed = fixed and isinstance(tensor, nn.Parameter)
        if fixed and (frozen or (not inputs and func in _CONSTANTS)):
            self._mark_one_row(func, result)
        else:
            self._mark(func, bool(inputs), fixed, inputs, result)
        return result

    def refuse_trainable(self, tensors: Iterable[Tensor]) -> None:
        """Refuse, for operations that run outside the guard, any of these that trains.

        Raises:
            PrivacyViolation: (DP019) names the parameter.
        """
        for tensor in tensors:
            if id(tensor) in self._names:
                raise self._refusal(self._names[id(tensor)], compiled_part)

    def _note_grad_mode(self, enabled: bool) -> None:
        """Follows what the program asks for, to tell ``no_grad`` from the forward of an ``autograd.Function``."""
        before = torch.is_grad_enabled()
        if before and not enabled:
            self._off = self._before_on.pop() if self._before_on else True
        elif enabled and not before:
            self._before_on.append(self._off)
            self._off = False

    def _in_function(self) -> bool:
        """Whether grad mode is off although the program did not turn it off: in an ``autograd.Function``, that is."""
        return not (torch.is_grad_enabled() or self._off or torch.is_inference_mode_enabled())

    def _recorded(self) -> bool:
        return torch.is_grad_enabled() or self._in_function()

    def _refuse_outside(self, tensor: Tensor, func: Callable[..., Any]) -> None:
        if id(tensor) in self._names and id(tensor) not in self.allowed:
            raise self._refusal(self._names[id(tensor)], func)

    @staticmethod
    def _carries(func: Callable[..., Any], result: Any) -> bool:
        """Whether a gradient could have flowed from the parameter into the result."""
        return func not in _CUT and any(t.is_floating_point() or t.is_complex() for t in tensors([result]))

    @staticmethod
    def _mark_one_row(func: Callable[..., Any], result: Any) -> None:
        """Marks constants that nobody could take for examples; a batch of one is as good either way."""
        for tensor in tensors([result]):
            if tensor.dim() == 0 or (tensor.shape[0] == 1 and func is not torch.tensor):
                setattr(tensor, _MARK, True)

    @staticmethod
    def _mark(func: Callable[..., Any], given: bool, fixed: bool, inputs: list[Tensor], result: Any) -> None:
        copied = func in _COPIES and result.dim() > 0 and _one_row(inputs[0], result) and result.shape[0] != 1
        if fixed and not copied and (given or func in _POSITIONS):
            for tensor in tensors([result]):
                setattr(tensor, _MARK, True)
        elif given and not fixed:
            for tensor in tensors([result]):  # an in-place operation may have written data into a marked tensor
                now_examples(tensor)

    @staticmethod
    def _refusal(name: str, func: Callable[..., Any]) -> PrivacyViolation:
        operation = getattr(func, "__name__", repr(func))
        return PrivacyViolation(
            f'parameter "{name}" is used outside its layer ({operation}); that part of its gradient would be lost.',
            hint="call the layer that owns it, tie a second layer to it, or name the module that uses it in "
            "replay=[module] so that it is differentiated as a whole.",
            code="DP019",
        )


class Entered(NamedTuple):
    """A layer that is running, and the guard as it was before."""

    module: nn.Module
    active: bool
    allowed: frozenset[int]
    functions: Mapping[Callable[..., Any], Callable[..., Any]]


def every_module(model: nn.Module) -> list[nn.Module]:
    """The model and all modules inside it, each once: ``model.modules()`` at a quarter of its time, without order.

    Walked anew whenever it is asked for: what a step must not overlook cannot be looked up in a list of earlier steps.
    """
    found, seen = [model], {model}
    for module in found:  # grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


class BufferWatch:
    """Notices buffers and parameters that a forward pass replaced or wrote, trained ones too: a release without noise.

    It goes by identity and version, which writing through ``.data`` or NumPy leaves as they are; set-up tests see that.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        #: Referred to, so that no other tensor can take the identity of one that is replaced.
        self._alive = [held for module in every_module(model) for _, held in _held(module)]
        self._before = self._state()

    def _state(self) -> dict[tuple[int, str], tuple[int, int]]:
        return {
            (id(module), name): (id(held), 0 if held.is_inference() else held._version)
            for module in every_module(self._model)
            for name, held in _held(module)
        }

    def _full_name(self, module: int, local: str) -> str:
        names = (name for name, found in self._model.named_modules() if id(found) == module)
        return ".".join(part for part in (next(names, ""), local) if part)

    def check(self) -> None:
        """Compares with the state at construction.

        Raises:
            PrivacyViolation: one changed, appeared or vanished (DP013; DP031 where it is trained).
        """
        after = self._state()
        if after == self._before:
            return
        changed = [place for place in {**self._before, **after} if self._before.get(place) != after.get(place)]
        if changed:
            name = self._full_name(*changed[0])
            parameter = dict(self._model.named_parameters()).get(name)
            if parameter is not None and parameter.requires_grad:
                raise PrivacyViolation(
                    f'parameter "{name}" was changed during forward, from private data and without noise.',
                    hint="let only the optimizer change parameters; F.embedding without max_norm.",
                    code="DP031",
                )
            kind = "buffer" if parameter is None else "frozen parameter"
            raise PrivacyViolation(
                f'{kind} "{name}" was updated during forward, from private data and without '
                "noise" + (f" (and {len(changed) - 1} more)." if len(changed) > 1 else "."),
                hint="call .eval() on that layer, or replace it by one that keeps no statistics.",
                code="DP013",
            )


def _held(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers and parameters of its own."""
    found = [(name, held) for name, held in module._buffers.items() if held is not None] if module._buffers else []
    if module._parameters:
        found += [(name, p) for name, p in module._parameters.items() if p is not None]
    return found


@contextmanager
def buffer_guard(model: nn.Module) -> Iterator[None]:
    """Refuses, at the end of the block, any buffer of ``model`` that changed within it.

    Raises:
        PrivacyViolation: (DP013) names the buffer.
    """
    watch = BufferWatch(model)
    yield
    watch.check()
