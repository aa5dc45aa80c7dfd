"""Marks that the hooks of layers leave in a graph while a private forward pass is being compiled.

When the compiler traces a layer, our hooks are traced with it. In place of recording, which needs tensors, they put two
calls into the graph: one before the layer, one after it, each with the number of the layer. What the graph then says of
a layer, :mod:`dptrainer.clipping.graph` reads; neither call is left in what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.recording import Hook


def enter(index: int, given: Tensor) -> Tensor:
    """Layer ``index`` begins, with this as its first tensor. Stands in graphs, by its identity."""
    return given


def leave(index: int, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Layer ``index`` was given these arguments and returned ``output``. Stands in graphs, by its identity.

    What it returns requires a gradient where that of a recorded layer does, since code may ask: a hook on the gradient,
    or an ``autograd.Function``, whose own backward pass is left out where nothing requires one.
    """
    if torch.is_grad_enabled() and output.is_floating_point():
        return output.detach().requires_grad_().clone()
    return output.clone()


class Marks:
    """Whether hooks leave marks: only while the engine has its model compiled or calls it compiled.

    The value is read while a graph is traced, and is the same whenever that graph is run, so that nothing is traced
    anew because of it.
    """

    def __init__(self) -> None:
        self.on = False


class EnterHook(Hook):
    """Forward pre-hook of one layer: the engine's, or a mark."""

    def __init__(self, function: Callable[..., Any] | None = None, marks: Marks | None = None, index: int = -1) -> None:
        super().__init__(function)
        self._marks, self._index = marks, index

    def __call__(self, *args: Any) -> Any:
        """Called with (module, args, kwargs)."""
        if torch.compiler.is_dynamo_compiling() and self._marks is not None and self._marks.on:
            _, given, named = args
            for place, value in enumerate(given):
                if isinstance(value, Tensor):
                    return (*given[:place], enter(self._index, value), *given[place + 1 :]), named
            for name, value in named.items():
                if isinstance(value, Tensor):
                    return given, {**named, name: enter(self._index, value)}
            return None
        return super().__call__(*args)


class LeaveHook(EnterHook):
    """Forward hook of one layer, likewise."""

    def __call__(self, *args: Any) -> Any:
        """Called with (module, args, kwargs, output)."""
        if torch.compiler.is_dynamo_compiling() and self._marks is not None and self._marks.on:
            _, given, named, output = args
            return leave(self._index, output, given, named)
        return Hook.__call__(self, *args)


#: What compiles the frames that run now, in the versions of torch that tell.
_compiling: Callable[[], object] = getattr(eval_frame, "get_eval_frame_callback", lambda: None)


def refuse_compilers_around() -> None:
    """Refuses a private forward pass inside something that is being compiled, whose hooks would be compiled too.

    Raises:
        PrivacyViolation: (DP019) there is such a thing.
    """
    if torch.compiler.is_dynamo_compiling() or _compiling() not in (None, False):
        raise PrivacyViolation(
            "a private batch is given to the model by code that torch.compile was asked to compile.",
            hint="compile the model before its private training is set up, pass what torch.compile returned, and leave "
            "the training step itself uncompiled.",
            code="DP019",
        )
