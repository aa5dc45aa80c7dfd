"""Watches for trainable modules outside a private model that its private batches train: nobody clips or noises them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.recording import Hook, backward_task
from dptrainer.given import GivenBatch


class Reached(NamedTuple):
    """A gradient that reached a parameter outside the model."""

    name: str
    parameter: Tensor
    task: int
    at: float


class OutsideWatch:
    """Between :meth:`start` and :meth:`stop`, notes gradients that reach parameters outside the model.

    A head, a projection or a loss with weights of its own, stepped by an optimizer of its own, would be trained on the
    private batch without clipping and noise, and through it the private model too. Two kinds of gradients count: those
    of the backward pass that the private model took part in; and any, also of ``autograd.grad``, for a module that was
    called with tensors of the private batch, with outputs of the private model, detached or not, or with what another
    module made of them. Others may train whatever they like.

    It sees parameters of modules that are called, whenever they were made, and all others, also plain tensors that
    require a gradient, that were there at the last :meth:`look_around`. What functions made of a batch (a copy on
    another device, ``x / 255``) is not recognised.
    """

    def __init__(self) -> None:
        self._own: set[int] = set()
        self._root = 0
        self._handles: dict[int, RemovableHandle] = {}
        self._reached: list[Reached] = []
        self._others: list[weakref.ref[Tensor]] = []
        self._given, self._fed, self._open = GivenBatch(), set[int](), False

    def look_around(self, model: nn.Module) -> None:
        """Find the trainable parameters that exist outside ``model``; some 0.2 us for each object of the program."""
        self._others = trainable_outside(model)

    def start(self, model: nn.Module, batch: object) -> None:
        """Begin to watch for one private batch of ``model``."""
        self.stop()
        self._own, self._root, self._open = {id(module) for module in model.modules()}, id(model), True
        self._given.remember(batch)
        self._handles[0] = register_module_forward_pre_hook(Hook(self._enter))
        self._handles[1] = register_module_forward_hook(Hook(self._done), with_kwargs=True)
        own = {id(parameter) for parameter in model.parameters()}
        for other in self._others:
            parameter = other()
            if parameter is None or id(parameter) in own or _unmade(parameter):  # a lazy one has no gradient yet
                continue
            if parameter.is_leaf and parameter.requires_grad:
                self._listen(_called(parameter), parameter)

    def stop(self) -> None:
        """End; idempotent."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._reached.clear()
        self._given.remember(())
        self._fed.clear()

    def close(self) -> None:
        """The step was taken; only what was given the batch before is watched until :meth:`stop`."""
        self._open = False

    def check(self, task: int | None, latest: float) -> None:
        """Throw away what reached such parameters, and say so.

        Args:
            task: the backward pass that the private model took part in.
            latest: when its last gradient came. What came in a later pass before that was nested in it (reentrant
                checkpointing), since passes are numbered as they begin.

        Raises:
            PrivacyViolation: a parameter outside the model got a gradient (DP031).
        """
        self._refuse(
            [
                found
                for found in self._reached
                if id(found.parameter) in self._fed
                or (task is not None and (found.task == task or (found.task > task and found.at <= latest)))
            ]
        )

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that is about to step what was given the private batch and got a gradient since.

        Raises:
            PrivacyViolation: it is (DP031).
        """
        if self._fed and self._reached:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self._refuse([found for found in self._reached if id(found.parameter) in self._fed & held])

    @staticmethod
    def _refuse(reached: list[Reached]) -> None:
        for found in reached:
            found.parameter.grad = None
        if reached:
            raise PrivacyViolation(
                f"the private batch also trains {reached[0].name}, which is not part of the private model; its "
                "gradient, neither clipped nor noised, was discarded",
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

    def _done(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Follows what modules make of the batch, and listens to those that were given it."""
        if id(module) in self._own:
            if id(module) == self._root and self._open:
                self._given.add(output)
            return
        if not self._given.is_among((args, kwargs)):
            return
        self._given.add(output)
        if torch.is_grad_enabled():
            for local, parameter in module.named_parameters():
                if parameter.requires_grad and not _unmade(parameter):
                    self._listen(f"{local} of a {type(module).__name__}", parameter)
                    self._fed.add(id(parameter))

    def _listen(self, name: str, parameter: Tensor) -> None:
        if id(parameter) in self._handles:
            self._handles.pop(id(parameter)).remove()  # a better name
        # Unlike one that runs after the gradient was accumulated, this hook is also called by autograd.grad.
        register: Callable[..., RemovableHandle] = parameter.register_hook
        self._handles[id(parameter)] = register(partial(self._note, name, weakref.ref(parameter)))

    def _note(self, name: str, reference: weakref.ref[Tensor], grad: Tensor) -> None:
        parameter = reference()
        if parameter is not None:
            self._reached.append(Reached(name, parameter, backward_task(), perf_counter()))


def trainable_outside(model: nn.Module) -> list[weakref.ref[Tensor]]:
    """The parameters that are there now and not in ``model``, and the plain tensors that a gradient would reach.

    A tensor that is made while the model or the loss is computed is no concern: whoever holds it from one step to the
    next, to train it, holds it now.
    """
    own = {id(parameter) for parameter in model.parameters()}
    # By their type: isinstance would ask the stand-ins of lazily loaded modules what they are.
    kinds = _with_subclasses(nn.Parameter)
    found = (
        thing
        for thing in gc.get_objects()
        if type(thing) in kinds or (type(thing) is Tensor and thing.requires_grad and thing.is_leaf)
    )
    return [weakref.ref(tensor) for tensor in found if id(tensor) not in own]


def _called(tensor: Tensor) -> str:
    return "a parameter" if isinstance(tensor, nn.Parameter) else "a tensor that requires a gradient"


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


def refuse_trainable_loss(losses: Tensor, model: nn.Module, others: Iterable[weakref.ref[Tensor]] = ()) -> None:
    """Refuse losses whose backward pass would reach a parameter that is not the model's, however it is used.

    Args:
        losses: with their graph.
        model: the private model.
        others: :func:`trainable_outside`, for plain tensors.

    Raises:
        PrivacyViolation: it would (DP031).
    """
    own = {id(parameter) for parameter in model.parameters()}
    known = {id(other()) for other in others}
    ahead, seen = [losses.grad_fn], {None, losses.grad_fn}
    while ahead:
        node = ahead.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own and (isinstance(leaf, nn.Parameter) or id(leaf) in known):
            raise _refusal(f"{_called(leaf)} that the loss uses")
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
