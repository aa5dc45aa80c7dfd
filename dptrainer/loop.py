"""The state of a private loop that the user writes: which batch is open, and what guards it.

Between ``loader`` and ``optimizer.step()`` a batch is open. The step finishes it with noise or not at all; parameters
have no gradient before that, so an optimizer or a backward pass that goes around finds nothing, and is refused.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dpbudget.errors import PrivacyViolation
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import Run
from dptrainer.clipping import Clipping, Grouping, Reduction, add_clipped, make_engine
from dptrainer.clipping.engine import plain, trainable_parameters
from dptrainer.clipping.recording import Hook
from dptrainer.data import check_rows, check_unit
from dptrainer.given import GivenBatch
from dptrainer.noise.choice import require_secure, source_for
from dptrainer.noise.source import NoiseSource
from dptrainer.outside import OutsideWatch
from dptrainer.probe import calls_with, probe_again, probe_batch
from dptrainer.streams import lent_streams
from dptrainer.update import check_noise, check_run, release
from dptrainer.validation import check, check_step
from dptrainer.values import ClippedSum
from dptrainer.wrapped import entry_of

_attached: weakref.WeakSet[PrivateLoop] = weakref.WeakSet()
_global_hook: list[RemovableHandle] = []


@dataclass(eq=False)
class Step:
    """One receipt's step, as far as it has got.

    Attributes:
        receipt: pays for it.
        total: clipped sum of the physical batches that ``optimizer.step()`` took.
        taken: how many it took.
        settings: the optimizer's settings at the first of them.
        open: whether a physical batch was given out and not taken yet.
        empty: whether a synthetic example stands in for that batch.
        last: whether the step ends with that batch.
    """

    receipt: Receipt
    total: ClippedSum | None = None
    taken: int = 0
    settings: object = None
    open: bool = False
    empty: bool = False
    last: bool = False

    def took(self, number: int) -> bool:
        """Whether physical batch ``number`` was taken; where one was not, the whole step is dropped."""
        return self.taken == number + 1


class PrivateLoop:
    """Model, optimizer and run of one ``make_private``.

    Attributes:
        run: where receipts come from.
        step_complete: whether the last ``optimizer.step()`` released a step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        run: Run,
        *,
        reduction: Reduction,
        replay: Sequence[nn.Module],
        record_outputs: bool,
        noise: NoiseSource | None,
        note: Callable[[str], None] | None,
        synthetic: Any,
        clipping: Clipping | None = None,
        dataset: object = None,
        discard_outside: bool = False,
    ) -> None:
        self._entry = entry_of(model)
        self._shown, model = model, plain(model)
        check(model, optimizer)
        check_run(model, run)
        require_secure(run.plan, "make_private")
        self._noise = source_for(run.plan, noise)
        check_noise(model, self._noise)
        check_unit(dataset, run)
        detach_earlier(model, optimizer)
        probe_batch(model, synthetic, replay, note=note)
        self.run, self.step_complete = run, True
        self._model, self._optimizer = model, optimizer
        again = partial(probe_again, model, optimizer, partial(probe_batch, model, synthetic, replay, note=note))
        self._engine = make_engine(
            model, run.plan.clip_norm, replay=replay, clipping=clipping, note=note, test=again,
            compiled=None if self._entry is None else self._entry.forward,
        )  # fmt: skip
        self._reduction: Reduction = reduction
        self._discard_outside, self._given, self._reused = discard_outside, GivenBatch(), False
        self._record_outputs = record_outputs
        self._step: Step | None = None
        self._borrowed = ExitStack()
        self._outside = OutsideWatch()
        self._watched: dict[int, RemovableHandle] = {}
        self._handle: RemovableHandle | None = optimizer.register_step_pre_hook(self._before_step)
        self._inputs = model.register_forward_pre_hook(Hook(self._note_inputs), with_kwargs=True)
        self._watch_parameters()
        _attached.add(self)
        if not _global_hook:
            _global_hook.append(register_optimizer_step_pre_hook(_refuse_other_optimizers))

    # ------------------------------------------------------------------ batches

    @property
    def step_ends(self) -> bool:
        """Whether the physical batch that was opened last ends its step."""
        return self._step is not None and self._step.last

    def compile(self, synthetic: Any, rows: int | None, note: Callable[[str], None] | None) -> None:
        """Have the forward pass of private batches compiled, if the program gave a compiled model.

        Args:
            synthetic: one collated synthetic record.
            rows: rows of every batch; None where they vary.
            note: is told if the model will run uncompiled.
        """
        if self._entry is not None:
            self._entry.attach(self._engine, list(calls_with(synthetic)), rows, note)

    @property
    def compiled(self) -> bool:
        """Whether the forward pass of private batches runs compiled."""
        return self._entry is not None and self._entry.forward.reason is None

    def look_around(self) -> None:
        """Find what is trained beside the model, so that private batches do not train it too."""
        self._outside.look_around(self._model)

    def begin(self, receipt: Receipt) -> Step:
        """Begin the step of a receipt; an unfinished one is dropped, its partial sum never released."""
        self.drop()
        self._step = Step(receipt)
        return self._step

    def borrow_streams(self) -> None:
        """Have the program's random streams for the next batch, until it is taken or dropped."""
        self._borrowed.close()
        self._borrowed.enter_context(lent_streams(self.device))

    def open(self, step: Step, batch: Any, size: int, *, last: bool, grouping: Grouping | None = None) -> None:
        """Open the next physical batch of ``step``, of ``size`` records (0: a synthetic example stands in).

        With a grouping, several rows are one record.

        Raises:
            PrivacyViolation: another step was begun meanwhile, or the batch has not one row a record (DP023).
        """
        if step is not self._step:
            raise PrivacyViolation(
                "another iteration of the private loader began before this step was complete",
                code="DP023",
                hint="use one iteration of the loader at a time",
            )
        rows = max(size, 1) if grouping is None else grouping.rows
        check_rows(batch, rows)
        self._given.remember(batch)
        self._reused = False
        self._watch_parameters()
        for parameter in self._model.parameters():
            parameter.grad = None
        self._engine.begin(rows, grouping=grouping)
        self._outside.start(self._shown, batch)
        step.open, step.empty, step.last = True, size == 0, last

    def end(self, step: Step) -> None:
        """Drop ``step`` if it is not complete; its receipt stays charged."""
        if step is self._step:
            self.drop()

    def drop(self) -> None:
        """Forget the step that is not complete, whichever it is."""
        self._engine.abort()
        self._outside.stop()
        self._step = None
        self._borrowed.close()

    @property
    def holds_gradient(self) -> bool:
        """Whether a backward pass of the open batch ran that no step has taken."""
        return self._engine.task is not None

    def require_attached(self) -> None:
        """Refuse to go on after :meth:`detach` (DP021)."""
        if self._handle is None:
            raise PrivacyViolation(
                "this loader was detached from its model",
                code="DP021",
                hint="use the loader of the newest make_private",
            )

    def detach(self) -> None:
        """Take all hooks off; idempotent."""
        self.drop()
        self._engine.detach()
        if self._entry is not None:
            self._entry.release()
        for handle in self._watched.values():
            handle.remove()
        self._watched.clear()
        self._inputs.remove()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        _attached.discard(self)

    @property
    def model(self) -> nn.Module:
        """The model that it guards."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self._model.parameters()).device

    def holds(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this loop guards the model or the optimizer."""
        return model is self._model or optimizer is self._optimizer

    @property
    def batch_is_open(self) -> bool:
        """Whether a private batch was given out and not taken yet."""
        return self._step is not None and self._step.open

    def guards(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether ``optimizer``, another than this loop's, would step parameters of this loop's model."""
        if optimizer is self._optimizer:
            return False
        own = {id(parameter) for parameter in self._model.parameters()}
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])

    # ------------------------------------------------------------------ the step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the optimizer moves: finish the open batch, and give noise to the step that it ends.

        Raises:
            PrivacyViolation: there is no open batch (DP021), a closure was given (DP017), no backward pass ran (DP031),
                the optimizer changed within the step (DP034) or was given other parameters (DP011), or what engine and
                noise refuse. The parameters stay as they were.
        """
        step = self._step
        if step is None or not step.open:
            raise PrivacyViolation(
                "optimizer.step() without an open batch of the private loader",
                code="DP021",
                hint="iterate over the loader that make_private returned, and step once for each of its batches",
            )
        try:
            # The first of the arguments is the optimizer itself.
            if kwargs.get("closure") is not None or any(callable(value) for value in args[1:]):
                raise PrivacyViolation(
                    "optimizer.step() was given a closure, which evaluates the loss again",
                    code="DP017",
                    hint="call backward() yourself, then optimizer.step() without arguments",
                )
            check_step(self._model, self._optimizer)
            self._outside.check(self._engine.task, self._engine.latest)
            self._outside.close()
            self._finish(step)
            self._borrowed.close()
        except BaseException:
            self.drop()
            raise

    def _finish(self, step: Step) -> None:
        if step.empty:
            self._engine.begin(0)  # drops what the synthetic example left
            part = self._engine.finish()
        else:
            part = self._engine.finish(self._reduction)
        # Copies: a scheduler fills a learning rate that is a tensor in place.
        settings = [
            {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            for group in self._optimizer.param_groups
        ]
        if step.total is not None and not _same(settings, step.settings):
            raise PrivacyViolation(
                "the optimizer's settings changed between two physical batches of one step",
                code="DP034",
                hint="advance the learning rate schedule only where loader.step_complete is true",
            )
        step.total = part if step.total is None else add_clipped(step.total, part)
        step.settings, step.open, step.taken = settings, False, step.taken + 1
        self.step_complete = step.last
        if not step.last:
            for parameter in self._model.parameters():
                parameter.grad = None  # an optimizer passes over parameters without a gradient
            return
        digest = release(
            self._model, step.total, step.receipt, self._noise, with_digest=self._record_outputs,
            optimizer=self._optimizer, clipping=self._engine.clipping,
        )  # fmt: skip
        step.total = None
        if digest is not None:
            self.run.settle(step.receipt, digest)

    # ------------------------------------------------------------------ guards

    def check_other(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer, another than this loop's, that would train something else on the open batch (DP031)."""
        if optimizer is not self._optimizer:
            self._outside.check_optimizer(optimizer)

    def check_outside(self) -> None:
        """Refuse to go on where something else was trained on the batch that was given out last (DP031)."""
        self._outside.check(None, 0.0)

    def _watch_parameters(self) -> None:
        """Hook every trainable parameter: under the engine no gradient ever accumulates in one."""
        for name, parameter in trainable_parameters(self._model).items():
            if id(parameter) not in self._watched:
                hook = partial(_refuse_gradient, weakref.ref(self), name)
                self._watched[id(parameter)] = _watch(parameter, hook)

    def _note_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Notice a forward pass of a private batch after its step: what is trained through it would see no noise."""
        if (self._step is None or not self._step.open) and torch.is_grad_enabled():
            self._reused = self._reused or self._given.is_among((args, kwargs))

    def refuse_gradient(self, name: str, parameter: Tensor) -> None:
        """Throw away a gradient that went past the engine, and say why it did.

        Raises:
            PrivacyViolation: always: DP021 without an open batch (unless such gradients are to be
                discarded and did not come from the batch that was given out last), DP014 in eval mode, DP031 otherwise.
        """
        parameter.grad = None
        if self._step is None or not self._step.open:
            if self._discard_outside and not self._reused:
                return
            if self._reused:
                raise PrivacyViolation(
                    f'a gradient reached parameter "{name}" from the private batch after its step; one batch is one '
                    "release",
                    code="DP021",
                    hint="add the losses of a batch, and call backward() and optimizer.step() once",
                )
            raise PrivacyViolation(
                f'a gradient reached parameter "{name}" from a batch that is not one of the private loader',
                code="DP021",
                hint="iterate over the loader that make_private returned; evaluate under torch.no_grad()",
            )
        if not self._model.training:
            raise PrivacyViolation(
                "backward() ran while the model is in eval mode",
                code="DP014",
                hint="call model.train() before the training step",
            )
        raise PrivacyViolation(
            f'an unclipped gradient reached parameter "{name}"; it was discarded',
            code="DP031",
            hint="call the layers through model(...), and leave weight decay to the optimizer",
        )


def _watch(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    register: Callable[..., RemovableHandle] = parameter.register_post_accumulate_grad_hook
    return register(hook)


def _refuse_gradient(loop: weakref.ref[PrivateLoop], name: str, parameter: Tensor) -> None:
    owner = loop()
    if owner is not None:
        owner.refuse_gradient(name, parameter)


def _refuse_other_optimizers(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Hook of every optimizer of the process.

    Raises:
        PrivacyViolation: it is about to step parameters of a private model that is not its own (DP032), or what was
            trained on a private batch beside the private model (DP031).
    """
    for loop in list(_attached):
        loop.check_other(optimizer)
    if any(loop.guards(optimizer) for loop in _attached):
        raise PrivacyViolation(
            f"this {type(optimizer).__name__} holds parameters of a private model, but is not the optimizer that "
            "make_private was given; nothing was updated",
            code="DP032",
            hint="step the optimizer that make_private returned; after the run, loader.detach() frees the model",
        )


def detach_earlier(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Detach the loops that guard this model or this optimizer: the newest set-up holds."""
    for loop in list(_attached):
        if loop.holds(model, optimizer):
            loop.detach()


def refuse_open_batch(model: nn.Module) -> None:
    """Refuse while a private batch of this model is open: whatever is computed now is likely computed from it.

    Raises:
        PrivacyViolation: a batch is open (DP031).
    """
    if any(loop.batch_is_open and loop.model is plain(model) for loop in _attached):
        raise PrivacyViolation(
            "per-example gradients were asked for while a private batch is open; they would be unclipped and unnoised",
            code="DP031",
            hint="ask outside the private loop, with public or synthetic data",
        )


def _same(first: object, second: object) -> bool:
    """Equality of nested settings, tensors included."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)
