"""Watches for trainable modules outside a private model that its private batches train: nobody clips or noises them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.recording import Hook, backward_task


class OutsideWatch:
    """Between :meth:`start` and :meth:`stop`, notes gradients that reach parameters outside the model.

    A head, a projection or a loss with weights of its own, stepped by an optimizer of its own, would be trained on the
    private batch without clipping and noise, and through it the private model too. Only gradients of the backward pass
    that the private model took part in count: others may train whatever they like.

    It sees parameters of modules that are called, whenever they were made, and all others that were there at the last
    :meth:`look_around`. A backward pass that does not touch the private model (features detached, or a model of its own
    on the private batch) and ``autograd.grad`` go by it.
    """

    def __init__(self) -> None:
        self._own: set[int] = set()
        self._handles: dict[int, RemovableHandle] = {}
        self._reached: list[tuple[str, Tensor, int]] = []
        self._others: list[weakref.ref[Tensor]] = []

    def look_around(self, model: nn.Module) -> None:
        """Find the trainable parameters that exist outside ``model``; some 0.2 us for each object of the program."""
        own = {id(parameter) for parameter in model.parameters()}
        # By their type: isinstance would ask the stand-ins of lazily loaded modules what they are.
        kinds = _with_subclasses(nn.Parameter)
        found = (thing for thing in gc.get_objects() if type(thing) in kinds)
        self._others = [weakref.ref(parameter) for parameter in found if id(parameter) not in own]

    def start(self, model: nn.Module) -> None:
        """Begin to watch for one private batch of ``model``."""
        self.stop()
        self._own = {id(module) for module in model.modules()}
        self._handles[0] = register_module_forward_pre_hook(Hook(self._enter))
        own = {id(parameter) for parameter in model.parameters()}
        for other in self._others:
            parameter = other()
            if parameter is None or id(parameter) in own or _unmade(parameter):  # a lazy one has no gradient yet
                continue
            if parameter.is_leaf and parameter.requires_grad:
                self._listen("a parameter", parameter)

    def stop(self) -> None:
        """End; idempotent."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._reached.clear()

    def check(self, task: int | None) -> None:
        """Throw away what reached such parameters in backward pass ``task``, and say so.

        Raises:
            PrivacyViolation: a parameter outside the model got a gradient (DP031).
        """
        reached = [(name, parameter) for name, parameter, when in self._reached if when == task]
        for _, parameter in reached:
            parameter.grad = None
        if reached:
            raise PrivacyViolation(
                f"the private batch also trains {reached[0][0]}, which is not part of the private model; its gradient, "
                "neither clipped nor noised, was discarded",
                code="DP031",
                hint="put it into the model that make_private is given, or freeze it",
            )

    def _enter(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._own or not torch.is_grad_enabled():
            return
        for local, parameter in module.named_parameters(recurse=False):
            if _unmade(parameter):  # this very call makes it: look again when the call ends
                if id(module) not in self._handles:
                    self._handles[id(module)] = module.register_forward_hook(self._leave)
            elif parameter.requires_grad:
                self._listen(f"{local} of a {type(module).__name__}", parameter)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._enter(module, args)

    def _listen(self, name: str, parameter: Tensor) -> None:
        if id(parameter) in self._handles:
            self._handles.pop(id(parameter)).remove()  # a better name
        register: Callable[..., RemovableHandle] = parameter.register_post_accumulate_grad_hook
        self._handles[id(parameter)] = register(partial(self._note, name))

    def _note(self, name: str, parameter: Tensor) -> None:
        self._reached.append((name, parameter, backward_task()))


def _unmade(parameter: Tensor) -> bool:
    return bool(is_lazy(parameter))  # its type guard would tell mypy that no other parameter is a tensor


def _with_subclasses(kind: type) -> set[type]:
    kinds: list[type] = type.__subclasses__(kind)
    return {kind}.union(*(_with_subclasses(below) for below in kinds))


def refuse_trainable_criterion(criterion: object, model: nn.Module) -> None:
    """Refuse a criterion with trainable parameters of its own: whoever steps them trains on the private batch.

    Raises:
        PrivacyViolation: it has some that are not the model's (DP031).
    """
    if not isinstance(criterion, nn.Module):
        return
    own = {id(parameter) for parameter in model.parameters()}
    for name, parameter in criterion.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise _refusal(f'parameter "{name}" of the criterion')


def refuse_trainable_loss(losses: Tensor, model: nn.Module) -> None:
    """Refuse losses whose backward pass would reach a parameter that is not the model's, however it is used.

    Raises:
        PrivacyViolation: it would (DP031).
    """
    own = {id(parameter) for parameter in model.parameters()}
    ahead, seen = [losses.grad_fn], {None, losses.grad_fn}
    while ahead:
        node = ahead.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
            raise _refusal("a parameter that the loss uses")
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                ahead.append(following)


def _refusal(what: str) -> PrivacyViolation:
    return PrivacyViolation(
        f"{what} is trainable and not part of the private model; its gradient would be neither clipped nor noised",
        code="DP031",
        hint="put it into the model that is trained privately, or freeze it",
    )
