"""The user's own optimizer with what Opacus's wrapper shows: the same object, so that nothing is left to rebind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dpbudget.errors import InvalidParameter
from dpbudget.plan import Plan
from dptrainer.noise.source import noise_scale
from dptrainer.opacus._options import unsupported
from dptrainer.opacus.data_loader import DPDataLoader


@dataclass(eq=False)
class Private:
    """What a private optimizer knows of its plan.

    Attributes:
        plan: sigma, C and the rate come from it.
        loader: whose batches it steps.
        loss_reduction: ``mean`` divides the noisy sum by the expected batch size, ``sum`` does not.
        base: the class that the optimizer had.
        step_hook: called with the optimizer at every complete step.
        handles: hooks to take off.
    """

    plan: Plan
    loader: DPDataLoader
    loss_reduction: str
    base: type[torch.optim.Optimizer]
    step_hook: Callable[[Any], None] | None = None
    handles: list[RemovableHandle] = field(default_factory=list)


class DPOptimizer:
    """What ``make_private`` adds to an optimizer; ``isinstance(optimizer, DPOptimizer)`` holds from then on.

    ``optimizer.step()`` clips, adds noise and updates under the receipt of the batch, whoever kept a reference to it;
    learning rate schedules made before or after keep working.
    """

    _private: Private

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise unsupported(
            "a DPOptimizer of one's own would add noise that no ledger has charged",
            "PrivacyEngine().make_private(module=..., optimizer=..., data_loader=..., ...) returns one",
        )

    @property
    def original_optimizer(self) -> Any:
        """The optimizer itself."""
        return self

    @property
    def params(self) -> list[nn.Parameter]:
        """Every parameter that it steps."""
        groups: Any = self.param_groups  # type: ignore[attr-defined]  # of the class it is mixed into
        return [parameter for group in groups for parameter in group["params"]]

    @property
    def expected_batch_size(self) -> float:
        """The divisor of the noisy sum: sampling rate times public size, a fixed number."""
        plan = self._private.plan
        assert plan.nominal_size is not None  # noqa: S101 - no ledger admits a plan without it
        return plan.phases[0].rate * plan.nominal_size

    @property
    def loss_reduction(self) -> str:
        """``mean`` or ``sum``, as declared."""
        return self._private.loss_reduction

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise divided by the clipping norm, from the signed plan."""
        return self._private.plan.phases[0].noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: object) -> NoReturn:
        raise _signed("noise_multiplier", value)

    @property
    def max_grad_norm(self) -> float:
        """The clipping norm C, from the signed plan."""
        return self._private.plan.clip_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: object) -> NoReturn:
        raise _signed("max_grad_norm", value)

    @property
    def accumulated_iterations(self) -> int:
        """1: a step has one batch, in however many pieces."""
        return 1

    @property
    def step_hook(self) -> Callable[[Any], None] | None:
        """What is called at every complete step."""
        return self._private.step_hook

    def attach_step_hook(self, fn: Callable[[Any], None]) -> None:
        """Call ``fn(optimizer)`` at every complete step, after noise was added and before the parameters move."""
        self._private.step_hook = fn

    def signal_skip_step(self, do_skip: bool = True) -> NoReturn:
        """Refused: which piece ends a batch is not the user's to say (DP065)."""
        raise unsupported("signal_skip_step", "use BatchMemoryManager, which splits batches and ends their steps")

    @property
    def grad_samples(self) -> NoReturn:
        """Refused: they are private, and no step keeps them (DP065)."""
        raise unsupported(
            "grad_samples: no private step keeps per-example gradients", "GradSampleModule(model) computes them"
        )

    @property
    def _is_last_step_skipped(self) -> bool:
        return not self._private.loader.step_complete

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:
        return not self._private.loader.step_ends

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy, or a pickle, is an ordinary optimizer of its own parameters.
        return _empty, (self._private.base,), self.__getstate__()


def _empty(kind: type[Any]) -> Any:
    """An optimizer whose state is still to come."""
    return object.__new__(kind)


def make_dp(optimizer: torch.optim.Optimizer, plan: Plan, loader: DPDataLoader, loss_reduction: str) -> None:
    """Give a private optimizer the face of Opacus's."""
    make_plain(optimizer)
    base = type(optimizer)
    private = Private(plan, loader, loss_reduction, base)
    optimizer.__class__ = _dp_class(base)
    optimizer._private = private  # type: ignore[attr-defined]
    private.handles.append(optimizer.register_step_pre_hook(_after_noise))


def make_plain(optimizer: Any) -> None:
    """Undo :func:`make_dp`; idempotent."""
    if isinstance(optimizer, DPOptimizer):
        private = optimizer._private
        for handle in private.handles:
            handle.remove()
        optimizer.__class__ = private.base  # type: ignore[assignment]  # the class that it had
        del optimizer._private


_classes: dict[type[torch.optim.Optimizer], type[Any]] = {}


def _dp_class(base: type[torch.optim.Optimizer]) -> type[Any]:
    if base not in _classes:
        _classes[base] = type(f"DP{base.__name__}", (DPOptimizer, base), {"__doc__": DPOptimizer.__doc__})
    return _classes[base]


def _after_noise(optimizer: Any, args: object, kwargs: object) -> None:
    """Between noise and update: Opacus does not divide a sum, and calls its hook here."""
    private: Private = optimizer._private
    if not private.loader.step_complete:
        return
    if private.loss_reduction == "sum":
        _undo_division(optimizer)
    if private.step_hook is not None:
        private.step_hook(optimizer)


def _undo_division(optimizer: Any) -> None:
    """The noisy sum itself into ``.grad``; an optimizer that was told the noise of the mean is told that of the sum."""
    for parameter in optimizer.params:
        if isinstance(parameter.grad, Tensor):
            parameter.grad.mul_(optimizer.expected_batch_size)
    told = getattr(optimizer, "gradient_noise", None)
    if told is not None:
        told(noise_scale(optimizer.noise_multiplier, optimizer.max_grad_norm))


def _signed(name: str, value: object) -> InvalidParameter:
    return unsupported(
        f"{name} = {value!r}: it is part of the signed plan, for which the privacy was computed",
        "a schedule of noise is planned in phases, with dpbudget.calibrate and dptrainer.make_private",
    )
