"""Watches for trainable modules outside a private model that its private batches train: nobody clips or noises them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.recording import backward_task


class OutsideWatch:
    """Between :meth:`start` and :meth:`stop`, notes gradients that reach parameters of modules outside the model.

    A head, a projection or a loss with weights of its own, stepped by an optimizer of its own, would be trained on the
    private batch without clipping and noise, and through it the private model too. Only gradients of the backward pass
    that the private model took part in count: others may train whatever they like.
    """

    def __init__(self) -> None:
        self._own: set[int] = set()
        self._handles: dict[int, RemovableHandle] = {}
        self._reached: list[tuple[str, Tensor, int]] = []

    def start(self, model: nn.Module) -> None:
        """Begin to watch for one private batch of ``model``."""
        self.stop()
        self._own = {id(module) for module in model.modules()}
        self._handles[0] = register_module_forward_pre_hook(self._enter)

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
            if parameter.requires_grad and id(parameter) not in self._handles:
                note = partial(self._note, f"{local} of a {type(module).__name__}")
                register: Callable[..., RemovableHandle] = parameter.register_post_accumulate_grad_hook
                self._handles[id(parameter)] = register(note)

    def _note(self, name: str, parameter: Tensor) -> None:
        self._reached.append((name, parameter, backward_task()))
