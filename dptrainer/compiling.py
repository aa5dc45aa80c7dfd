"""``torch.compile`` for the parts of a private model that train nothing: activations, attention scores, frozen bodies.

Where the model runs uncompiled, tracing cannot pass through the guard that watches every operation of a private
forward. A function without trainable parameters needs no guard: it runs compiled, outside it, once it is certain that
it holds none. Models that are compiled as a whole are the matter of :mod:`dptrainer.clipping.compiled`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

from dpbudget.errors import InvalidParameter
from dptrainer.clipping.guard import ParameterGuard, buffer_guard, depends_on_position_alone
from dptrainer.clipping.recording import refuse_batch_norm


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile(function, **options)``, to be called inside the forward of a private model.

    ::

        self.activation = dptrainer.compiled(lambda h: F.gelu(h) * torch.sigmoid(h), dynamic=True)
        self.body = dptrainer.compiled(frozen_body, dynamic=True)   # a module that does not train

    Drawn batches differ in size; ``dynamic=True`` compiles once for all of them. The test at set-up on synthetic
    records runs through it, and finds mixed examples and lost gradients as everywhere else.

    Args:
        function: a function or module that uses no trainable parameter, neither as an argument nor from outside.
        **options: as for ``torch.compile``.

    Returns:
        A function. In a private forward it raises PrivacyViolation where ``function`` holds or is given a parameter
        that trains (DP019), or moves a buffer (DP010, DP013).

    Raises:
        InvalidParameter: not callable (DP009).
    """
    if not callable(function):
        raise InvalidParameter(f"{type(function).__name__} cannot be called", code="DP009", hint="pass a function")
    fast: Callable[..., Any] = torch.compile(function, **options)
    modules, tensors = _held(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # torch does not annotate it
        guard = next((mode for mode in modes if isinstance(mode, ParameterGuard)), None)
        if guard is None:
            return fast(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        guard.refuse_trainable([*given, *tensors, *parameters])
        if given and all(depends_on_position_alone(tensor) for tensor in given):
            return function(*args, **kwargs)  # the guard must see that positions come out
        with ExitStack() as stack:
            for module in modules:
                refuse_batch_norm(module)
                stack.enter_context(buffer_guard(module))
            stack.enter_context(torch._C.DisableTorchFunction())
            return fast(*args, **kwargs)

    if not isinstance(function, nn.Module):
        functools.update_wrapper(call, function, updated=())
        del call.__wrapped__  # type: ignore[attr-defined]  # whoever unwraps it would go around the check
    return call


def _held(function: Callable[..., Any]) -> tuple[list[nn.Module], list[Tensor]]:
    """Modules and tensors that a function can reach from outside its arguments."""
    found: list[object] = [function, getattr(function, "__self__", None)]
    if isinstance(function, functools.partial):
        found += [function.func, getattr(function.func, "__self__", None), *function.args, *function.keywords.values()]
    for part in (function, getattr(function, "func", None)):
        if inspect.isfunction(part) or inspect.ismethod(part):
            outside = inspect.getclosurevars(part)
            found += [*outside.nonlocals.values(), *outside.globals.values()]
    leaves = list(_opened(found))
    return [leaf for leaf in leaves if isinstance(leaf, nn.Module)], [x for x in leaves if isinstance(x, Tensor)]


def _opened(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        if isinstance(value, list | tuple | set):
            yield from _opened(value)
        elif isinstance(value, dict):
            yield from _opened(value.values())
        else:
            yield value
