"""What a model computes with besides its numbers: its modules, the code that they run, and the hooks of others."""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType
from typing import cast

from torch import nn
from torch.nn.modules import module as torch_module

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.guard import every_module
from dptrainer.clipping.recording import Hook

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(
    hooks
    for name in ("forward_pre", "forward", "backward_pre", "backward")
    if (hooks := getattr(torch_module, f"_global_{name}_hooks", None)) is not None
)


class Form:
    """Modules, their class, ``forward`` and hooks, as they are now; equal while none of a model was exchanged.

    What was tested at set-up was the model in one form. A hook, a module or a ``forward`` that comes later may mix
    examples, or make what a rule says of a layer untrue. Looked up anew for each batch, at some 0.4 us a module.
    """

    def __init__(self, model: nn.Module) -> None:
        #: Referred to, so that nothing else can take the identity of what is gone.
        self._parts = _parts(model)
        self._ids = [*map(id, self._parts)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self._ids == other._ids

    __hash__ = None  # type: ignore[assignment]  # compared, never looked up


def _parts(model: nn.Module) -> list[object]:
    modules = every_module(model)
    parts: list[object] = [*modules]
    for module in modules:
        own, forward = module.__dict__, type(module).forward
        parts.append(type(module))
        parts.append(forward)
        # Libraries that wrap a forward for one call leave the plain method behind, bound to its module.
        if "forward" in own and own["forward"] != MethodType(forward, module):
            parts.append(own["forward"])
        if own.get("_compiled_call_impl") is not None:
            parts.append(getattr(own["_compiled_call_impl"], "original", own["_compiled_call_impl"]))  # behind an entry
        for name in _HOOKS:
            if name in own:  # a module from an old pickle may lack some
                for hook in own[name].values():
                    if not isinstance(hook, Hook):
                        parts.append(hook)  # noqa: PERF401  (a list of its own for each dict takes twice as long)
    for hooks in _GLOBAL_HOOKS:
        parts += [hook for hook in hooks.values() if not isinstance(hook, Hook)]
    return parts


def in_place(module: nn.Module, enter: int, leave: int) -> bool:
    """Moves our two hooks next to the forward of ``module``; false if they were taken off."""
    # Torch annotates them as plain dicts.
    before = cast("OrderedDict[int, object]", module._forward_pre_hooks)
    after = cast("OrderedDict[int, object]", module._forward_hooks)
    if enter not in before or leave not in after:
        return False
    if next(reversed(before)) != enter:
        before.move_to_end(enter)
    if next(iter(after)) != leave:
        after.move_to_end(leave, last=False)
    return True


def frozen(name: str) -> PrivacyViolation:
    """What is said of a parameter that was frozen too late."""
    return PrivacyViolation(
        f'parameter "{name}" was frozen while a private batch is open.',
        hint="change requires_grad between steps, before the next batch is taken from the loader.",
        code="DP031",
    )


def exchanged() -> PrivacyViolation:
    """What is said of a model that has another form than when its batch was opened."""
    return PrivacyViolation(
        "a module, forward or hook of the model was exchanged while a private batch is open, so nobody tested what "
        "runs now.",
        hint="change the model between steps, before the next batch is taken from the loader; it is then tested again.",
        code="DP019",
    )
