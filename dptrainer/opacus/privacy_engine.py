"""``PrivacyEngine`` with Opacus's arguments; each call signs a plan and binds loader, model and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpbudget import Budget, Ledger
from dpbudget.errors import DPBudgetError, InvalidParameter
from dpbudget.ledger.run import Run
from dptrainer.opacus import _checkpoint
from dptrainer.opacus._options import (
    check_mode,
    check_module,
    check_options,
    check_reduction,
    known_options,
    unsupported,
)
from dptrainer.opacus._spending import Draws, Place, Spending, log
from dptrainer.opacus._validation import check
from dptrainer.opacus.accountants.accountant import check_accountant
from dptrainer.opacus.data_loader import DPDataLoader, draws_of, private_collate
from dptrainer.opacus.grad_sample import GradSampleModule
from dptrainer.opacus.ledger_accountant import LedgerAccountant
from dptrainer.opacus.optimizers.optimizer import make_dp, make_plain
from dptrainer.opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from dptrainer.opacus.validators import ModuleValidator
from dptrainer.private import make_private

_UNTOLD = nn.CrossEntropyLoss()  # Opacus's default; a loop that names no criterion is not tested with this one


class PrivateHandle:
    """What ``wrap_model=False`` returns in the model's place; the model itself is used as it was.

    Args:
        loader: the private loader.
    """

    def __init__(self, loader: DPDataLoader) -> None:
        self._loader = loader

    def cleanup(self) -> None:
        """Take every guard off model and optimizer."""
        self._loader.detach()


class PrivacyEngine:
    """Makes a PyTorch training loop private with the calls of Opacus, under a ledger that has the last word.

    ::

        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=model, optimizer=optimizer, data_loader=loader,
            target_epsilon=3.0, target_delta=1e-5, epochs=10, max_grad_norm=1.0,
        )

    Guarantee: what ``optimizer.step()`` does to the parameters is (epsilon, delta)-DP for one record of the dataset,
    whose size is public, within the budget of the engine's ledger; see :func:`dptrainer.make_private` for what the loop
    must not do. One engine stands for one dataset: the budgets of two engines on the same data add up.

    Args:
        accountant: ``prv`` or ``rdp``, which certifies the plans. ``gdp`` may understate and is refused.
        secure_mode: has no effect; noise and batches always come from a cryptographic stream, at no loss of speed.
        ledger: file of the ledger, opened if it exists, with its keys beside it; None keeps it in memory, where it ends
            with the process.
        budget: what ``make_private`` may spend in all; epsilon 8 at delta 1 / n^1.1 if not given.

    Raises:
        InvalidParameter: unknown option (DP060) or accountant (DP061).
    """

    @known_options
    def __init__(
        self,
        *,
        accountant: str = "prv",
        secure_mode: bool = False,
        ledger: Place | None = None,
        budget: Budget | None = None,
    ) -> None:
        if budget is not None and not isinstance(budget, Budget):
            raise InvalidParameter(
                f"budget is {type(budget).__name__}", code="DP060", hint="pass dpbudget.Budget(epsilon=3.0, delta=1e-5)"
            )
        self.secure_mode = secure_mode
        self._spending = Spending(check_accountant(accountant), ledger, budget)
        self.accountant = LedgerAccountant(self._spending)

    @property
    def ledger(self) -> Ledger | None:
        """The ledger that every step is charged to; None before the first ``make_private``."""
        return self._spending.ledger

    @known_options
    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[..., Any] = _UNTOLD,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: object = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
    ) -> Any:
        """Model, optimizer and loader for private training with a noise multiplier of one's own.

        No number of steps is given, so training may go on until the engine's budget is used up. Model and optimizer are
        changed in place, and are what comes back: nothing is left to rebind.

        Args:
            module: in train mode.
            optimizer: any ``torch.optim`` optimizer over its trainable parameters.
            criterion: if given, tested on synthetic records for mixing examples; returned wrapped in ghost mode.
            data_loader: its dataset, batch size and ``collate_fn`` are used; sampling is Poisson at the rate batch size
                / dataset size, and an epoch has as many steps as the loader has batches.
            noise_multiplier: noise standard deviation / clipping norm.
            max_grad_norm: clipping norm of every example's gradient.
            batch_first: only True.
            poisson_sampling: only True.
            loss_reduction: what the criterion does over the examples: ``mean``, or ``sum`` (then the noisy sum is not
                divided).
            clipping: only ``flat``.
            noise_generator: only None.
            grad_sample_mode: ``hooks``, ``functorch``, ``ew`` and ``ghost`` name the same engine; ``ghost`` returns the
                criterion too.
            wrap_model: False returns a handle with ``cleanup()`` in place of the model.
            rand_on_empty: has no effect; an empty batch is stood in for by a synthetic example either way.

        Returns:
            (module, optimizer, data_loader), in ghost mode (module, optimizer, criterion, data_loader).

        Raises:
            PrivacyViolation: something cannot be trained privately; nothing was charged or changed.
            InvalidParameter: unknown option (DP060), or one that cannot be kept (DP065).
            BudgetExceeded: not one step fits the budget (DP052).
        """
        check_options(
            batch_first=batch_first,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            max_grad_norm=max_grad_norm,
        )
        draws = self._checked(module, optimizer, data_loader, grad_sample_mode, loss_reduction)
        run = self._spending.open_run(draws, noise_multiplier=noise_multiplier, clip_norm=float(max_grad_norm))
        return self._bind(run, module, optimizer, criterion, data_loader, loss_reduction, grad_sample_mode, wrap_model)

    @known_options
    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[..., Any] = _UNTOLD,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: object = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
    ) -> Any:
        """As :meth:`make_private`, with the least noise that trains ``epochs`` within (target_epsilon, target_delta).

        The plan has ``epochs * len(data_loader)`` steps, and a further one raises PlanExhausted (DP050). With a ledger
        in a file, the same call in a later process goes on with the same plan.

        Raises:
            NotComputable: no noise reaches the target (DP004).
            BudgetExceeded: the ledger has promised its budget before (DP052).
        """
        check_options(
            batch_first=batch_first,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            max_grad_norm=max_grad_norm,
        )
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise InvalidParameter(f"epochs must be a positive integer, got {epochs!r}", code="DP009")
        draws = self._checked(module, optimizer, data_loader, grad_sample_mode, loss_reduction)
        run = self._spending.fixed_run(
            draws, epsilon=target_epsilon, delta=target_delta, epochs=epochs, clip_norm=float(max_grad_norm)
        )
        return self._bind(run, module, optimizer, criterion, data_loader, loss_reduction, grad_sample_mode, wrap_model)

    def get_epsilon(self, delta: float | None = None) -> float:
        """Epsilon at ``delta`` of all steps charged to the engine's ledger; 0 before the first.

        After ``make_private_with_epsilon`` a certified upper bound, if stopping here had been planned. After
        ``make_private`` the least epsilon of a budget whose filter would have admitted these steps, however their
        number was chosen: more than Opacus says, which presumes that it was chosen in advance. It is a guarantee for
        the moment at which training ends, not for every moment at once.

        Args:
            delta: in (0, 1); that of the budget if not given.
        """
        return self._spending.epsilon(delta)

    @known_options
    def is_compatible(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        data_loader: DataLoader[Any] | None = None,
    ) -> bool:
        """Whether :meth:`validate` finds nothing."""
        try:
            self.validate(module=module, optimizer=optimizer, data_loader=data_loader)
        except DPBudgetError:
            return False
        return True

    @known_options
    def validate(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        data_loader: DataLoader[Any] | None = None,
    ) -> None:
        """Check module, optimizer and loader without running or changing anything.

        Raises:
            UnsupportedModuleError: the module cannot be trained privately.
            PrivacyViolation: the optimizer or the loader does not fit.
        """
        check_module(module)
        ModuleValidator.validate(module, strict=True)
        if optimizer is not None:
            check(module, optimizer)
        if data_loader is not None:
            draws_of(data_loader)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """A copy in which layers that mix examples are replaced.

        Raises:
            UnsupportedModuleError: something is left that cannot be replaced.
        """
        return ModuleValidator.fix_and_validate(module)

    @known_options
    def save_checkpoint(
        self,
        *,
        path: _checkpoint.PathOrFile,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        noise_scheduler: None = None,
        grad_clip_scheduler: None = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Weights, optimizer state and ``checkpoint_dict`` in one file, with the charged steps that trained them."""
        _no_schedules(noise_scheduler, grad_clip_scheduler)
        _checkpoint.save(
            path, module, optimizer, self._spending, checkpoint_dict, module_state_dict_kwargs, torch_save_kwargs
        )

    @known_options
    def load_checkpoint(
        self,
        *,
        path: _checkpoint.PathOrFile,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        noise_scheduler: None = None,
        grad_clip_scheduler: None = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Load weights and optimizer state; what was spent stays as the ledger says, also on the way back.

        Returns:
            The rest of the file, ``checkpoint_dict`` among it.

        Raises:
            PrivacyViolation: the ledger has not charged the steps that trained the weights (DP051).
            Unreadable: not a checkpoint of an engine (DP091).
        """
        _no_schedules(noise_scheduler, grad_clip_scheduler)
        return _checkpoint.load(path, module, optimizer, self._spending, module_load_dict_kwargs, torch_load_kwargs)

    # ------------------------------------------------------------------ set-up

    def _checked(
        self, module: Any, optimizer: Any, data_loader: Any, grad_sample_mode: str, loss_reduction: str
    ) -> Draws:
        """Everything that can be refused before a plan is signed."""
        check_mode(grad_sample_mode)
        check_reduction(loss_reduction)
        plain = _inside(module)
        self.validate(module=plain, optimizer=optimizer, data_loader=data_loader)
        if getattr(data_loader, "num_workers", 0):
            log.info("num_workers is not used: items are read when their step is charged, in this process.")
        return draws_of(data_loader)

    def _bind(
        self,
        run: Run,
        module: nn.Module,
        optimizer: Any,
        criterion: Callable[..., Any],
        data_loader: DataLoader[Any],
        loss_reduction: str,
        grad_sample_mode: str,
        wrap_model: bool,
    ) -> Any:
        reduction: Literal["mean", "sum"] = "mean" if loss_reduction == "mean" else "sum"
        plain = _inside(module)
        _released(plain, optimizer)
        ghost = grad_sample_mode == "ghost"
        try:
            private_loss = DPLossFastGradientClipping(plain, optimizer, criterion, reduction) if ghost else criterion
            _, _, batches = make_private(
                plain,
                optimizer,
                data_loader.dataset,
                run=run,
                loss_reduction=reduction,
                loss_fn=None if criterion is _UNTOLD and not ghost else private_loss,
                steps_per_epoch=draws_of(data_loader).steps,
                collate_fn=private_collate(data_loader),
                discard_outside=True,
                note=log.info,
            )
        except BaseException:
            self._spending.withdraw(run)
            raise
        loader = DPDataLoader.from_data_loader(data_loader)
        loader.bind(batches, keep=self._spending, on_detach=lambda: _released(plain, optimizer))
        make_dp(optimizer, run.plan, loader, loss_reduction)
        _checkpoint.mark(plain, self._spending, run.run_id)
        plain.__dict__["_module"] = plain  # where Opacus's wrapper has the model; no submodule, no key of a state dict
        returned = plain if wrap_model else PrivateHandle(loader)
        return (returned, optimizer, private_loss, loader) if ghost else (returned, optimizer, loader)


def _inside(module: nn.Module) -> nn.Module:
    """The model of a GradSampleModule, which clipping of its own must not watch any more."""
    return module.to_standard_module() if isinstance(module, GradSampleModule) else module


def _no_schedules(*schedulers: object) -> None:
    if any(scheduler is not None for scheduler in schedulers):
        raise unsupported("a schedule of noise or clipping norm has no state here", "leave it out; the plan is signed")


def _released(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take off what an earlier ``make_private`` of the facade put on."""
    make_plain(optimizer)
    _checkpoint.unmark(module)
    module.__dict__.pop("_module", None)
