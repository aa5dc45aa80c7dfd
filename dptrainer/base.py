"""What the trainers share: a tested model with its records, the clipped sum of drawn ones, and how training is told."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dpbudget.curve import Bounds
from dpbudget.errors import PrivacyViolation
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import Run
from dptrainer.clipping import BookKeeping, Clipping, OneByOne, add_clipped, make_engine
from dptrainer.clipping.engine import plain
from dptrainer.data import Collate, Records, check_rows, check_unit, checked_fill, own_copy, split_batch, to_device
from dptrainer.loop import detach_earlier
from dptrainer.losses import Loss, PerExampleLoss
from dptrainer.memory import PhysicalSize, checked_size, physical_size
from dptrainer.outside import refuse_trainable_criterion, refuse_trainable_loss, trainable_outside
from dptrainer.own_draws import BatchDraws, own_draws
from dptrainer.probe import probe, probe_again, probe_loss
from dptrainer.repeats import check_repeatable, deterministic, refuse_compiled, refuse_static_shapes
from dptrainer.sampling import Indices, physical_batches
from dptrainer.streams import lent_streams
from dptrainer.untested import tell_untested, why_untested
from dptrainer.update import check_noise, check_run
from dptrainer.validation import check
from dptrainer.values import ClippedSum
from dptrainer.wrapped import entry_of

#: Called after each step with (steps released by this call, live epsilon or None); returning False stops the training.
Callback = Callable[[int, Bounds | None], object]


@dataclass(frozen=True)
class TrainingResult:
    """What a call of ``fit`` did; every field is public.

    The guarantee is that of the run's plan, however many steps were taken.

    Attributes:
        run_id: the run in the ledger.
        steps: steps released by this call.
        charged, planned: steps of the plan charged to the ledger for this run so far, and planned; of a
            :class:`~dptrainer.tree.TreeTrainer` a step of the plan is a whole pass.
        stopped: whether a callback ended it before the plan did.
        epsilon: live epsilon of the charged steps, *if stopping there had been planned*; None without a meter.
        claim: the plan's epsilon, which is what holds.
        delta: the delta of both.
    """

    run_id: str
    steps: int
    charged: int
    planned: int
    stopped: bool
    epsilon: Bounds | None
    claim: float
    delta: float


class TrainerBase:
    """Set-up and clipping of every trainer: tests the model on synthetic records, and clips the records it is given.

    It draws no record and adds no noise; the arguments are those of :class:`~dptrainer.trainer.PrivateTrainer`, and
    ``batches``: into how many steps the records that a receipt draws are divided; ``noise`` is only asked whether it
    can be made on the model's device.

    Raises:
        PrivacyViolation: model, optimizer or dataset cannot be trained privately; nothing was charged or changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Loss,
        dataset: Dataset[Any],
        run: Run,
        *,
        physical_batch_size: PhysicalSize = None,
        static_shapes: bool = False,
        collate_fn: Collate | None = None,
        callbacks: Sequence[Callback] = (),
        clipping: Clipping | None = None,
        views: int = 1,
        replay: Sequence[nn.Module] = (),
        record_outputs: bool = False,
        note: Callable[[str], None] | None = None,
        batches: int = 1,
        noise: object = None,
    ) -> None:
        checked_size(physical_batch_size)
        self._entry = entry_of(model)
        self._shown, model = model, plain(model)
        check(model, optimizer)
        check_run(model, run)
        check_noise(model, noise)
        check_unit(dataset, run)
        detach_earlier(model, optimizer)
        self._records = Records(dataset, collate_fn, views=views)
        refuse_trainable_criterion(loss_fn, model)
        self._loss = PerExampleLoss(loss_fn)
        test = partial(_test, model, self._loss, self._records.synthetic(), replay, note)
        test()
        self._model, self._optimizer, self._run = model, optimizer, run
        again = partial(probe_again, model, optimizer, test)
        self._engine: BookKeeping | OneByOne
        self._physical = self._fill_to = None
        if run.plan.noise == "exact":
            refuse_static_shapes(static_shapes)
            refuse_compiled(self._entry is not None)
            beside = [] if self._loss.module is None else [self._loss.module]
            self._engine = OneByOne(
                model, clip_norm=run.plan.clip_norm, clipping=clipping, beside=beside, test=again
            )  # fmt: skip
            check_repeatable(model, self._loss, self._records.synthetic(), note)
        else:
            forward = None if self._entry is None else self._entry.forward
            engine = self._engine = make_engine(
                model, run.plan.clip_norm, replay=replay, clipping=clipping, note=note, test=again, compiled=forward
            )
            self._physical = physical_size(physical_batch_size, model, self._records, run.plan, replay, batches=batches)
            self._fill_to = checked_fill(self._records, self._physical) if static_shapes else None
            if self._entry is not None:
                rows = None if self._fill_to is None else self._fill_to * self._records.most_rows
                call = split_batch(self._records.synthetic())[:2]
                self._entry.attach(engine, [call], rows, note)
        self._record_outputs = record_outputs
        self._callbacks = tuple(callbacks)
        self._stopped = False
        self._others: list[weakref.ref[Tensor]] = []
        self._draws = BatchDraws()

    def stop(self) -> None:
        """End :meth:`fit` after the step that is running; the rest of the plan stays charged or unspent as it is."""
        self._stopped = True

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """What surrounds the steps of a call of ``fit``.

        Raises:
            PlanExhausted: the run has nothing left; with an error, not with an empty loop (DP050).
        """
        self._stopped = False
        if not self._run.remaining:
            self._run.next_receipt()
        self._others = trainable_outside(self._model)
        try:
            yield
        finally:
            self._draws.close()
            self._engine.detach()
            self._optimizer.zero_grad(set_to_none=True)

    def _clip(self, indices: Indices, receipt: Receipt) -> ClippedSum:
        """The clipped sum of one drawn batch, a physical batch at a time; zeros for an empty one."""
        if isinstance(self._engine, OneByOne):
            return self._clip_each(indices, self._engine, receipt)
        total: ClippedSum | None = None
        for piece in physical_batches(indices, self._physical):
            with lent_streams(self._device):
                self._draws.begin(receipt, self._device, reading=self._records.may_draw)
                part = self._clip_piece(piece, self._engine)
            total = part if total is None else add_clipped(total, part)
        assert total is not None  # noqa: S101 - an empty draw is one empty piece
        return total

    def _clip_piece(self, indices: Indices, engine: BookKeeping) -> ClippedSum:
        size = len(indices)
        if size == 0 and self._fill_to is None:
            engine.begin(0)
            return engine.finish()
        self._require_training()
        batch, grouping = self._records.drawn(indices, self._fill_to)
        self._draws.go_on(self._device)
        rows = size if grouping is None else grouping.rows
        with torch.enable_grad(), engine.record(rows, grouping=grouping):
            losses = self._losses(batch, rows)
        return engine.backward(losses)

    def _clip_each(self, indices: Indices, engine: OneByOne, receipt: Receipt) -> ClippedSum:
        """The integer sum over the records of a drawn batch, each alone in the model."""
        self._require_training()
        engine.begin(receipt.grid)
        try:
            with own_draws(receipt, len(indices), self._device) as begin:
                for place in range(len(indices)):
                    begin(place)
                    batch, grouping = self._records.drawn(indices[place : place + 1])
                    rows, divisor = (1, 1) if grouping is None else (grouping.rows, grouping.divisor)
                    with torch.enable_grad(), deterministic():
                        engine.add(self._losses(own_copy(batch), rows), divisor)
            return engine.finish()
        finally:
            engine.abort()

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _losses(self, batch: Any, rows: int) -> Tensor:
        """One loss for each row of a batch."""
        check_rows(batch, rows)
        inputs, named, target = split_batch(to_device(batch, self._device))
        losses = self._loss(self._shown(*inputs, **named), target, rows)
        refuse_trainable_loss(losses, self._model, self._others)
        return losses

    def _require_training(self) -> None:
        if not self._model.training:
            raise PrivacyViolation(
                "the model is in eval mode", code="DP014", hint="call model.train() after evaluating in a callback"
            )

    def _tell(self, steps: int) -> None:
        if not self._callbacks:  # an answer that nobody reads costs time
            return
        epsilon = self._run.epsilon()
        for callback in self._callbacks:
            if callback(steps, epsilon) is False:
                self._stopped = True

    def _result(self, steps: int) -> TrainingResult:
        run, claim = self._run, self._run.plan.claim
        return TrainingResult(
            run.run_id, steps, run.charged, run.planned, self._stopped, run.epsilon(), claim.epsilon, claim.delta
        )


def _test(
    model: nn.Module, loss: PerExampleLoss, batch: Any, replay: Sequence[nn.Module], note: Callable[[str], None] | None
) -> None:
    """Model and loss on synthetic records, and a word where that was not possible."""
    inputs, named, target = split_batch(batch)
    if not (probe(model, inputs, replay, named=named, note=note) and probe_loss(model, loss, inputs, named, target)):
        what = "model and loss could not be run on synthetic records, so nobody tested for mixing."
        tell_untested(what + why_untested(model, loss, inputs, named, target), note)
