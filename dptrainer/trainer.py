"""DP-SGD on one screen: draw, clip, add noise, step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from dpbudget.curve import Bounds
from dpbudget.errors import PrivacyViolation
from dpbudget.ledger.run import Run
from dptrainer.clipping import BookKeeping, Clipping, add_clipped, make_engine
from dptrainer.data import Collate, Records, check_rows, check_unit, split_batch, to_device
from dptrainer.loop import detach_earlier
from dptrainer.losses import Loss, PerExampleLoss
from dptrainer.memory import PhysicalSize, checked_size, physical_size
from dptrainer.noise.source import NoiseSource, SecureNoise
from dptrainer.outside import refuse_trainable_criterion, refuse_trainable_loss
from dptrainer.probe import probe, probe_loss, tell_untested
from dptrainer.sampling import Indices, PoissonSampler, physical_batches
from dptrainer.update import check_run, release
from dptrainer.validation import check, check_step
from dptrainer.values import ClippedSum

#: Called after each step with (steps released by this call, live epsilon or None); returning False stops the training.
Callback = Callable[[int, Bounds | None], object]


@dataclass(frozen=True)
class TrainingResult:
    """What a call of :meth:`PrivateTrainer.fit` did; every field is public.

    The guarantee is that of the run's plan, however many steps were taken.

    Attributes:
        run_id: the run in the ledger.
        steps: steps released by this call.
        charged, planned: steps charged to the ledger for this run so far, and planned.
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


class PrivateTrainer:
    """Trains a model under a run: one charged receipt, one Poisson batch, one noisy update at a time.

    Guarantee: the model's parameters, and everything the callbacks see, are (epsilon, delta)-DP with the plan's claim,
    for one record of ``dataset``, provided that the model does not mix examples (tested on synthetic inputs at set-up).
    No loss, batch size or norm is computed for display. Noise multiplier, clipping norm, rate and steps come from the
    plan; there is nothing to repeat here.

    Args:
        model: in train mode; changed in place.
        optimizer: any ``torch.optim`` optimizer over the model's trainable parameters, without closure.
        loss_fn: criterion of (outputs, target), see :class:`~dptrainer.losses.PerExampleLoss`.
        dataset: map-style; an item is ``(input, ..., target)`` or a mapping with ``labels``. In a
            :class:`~dptrainer.users.UserDataset` one user is one record.
        run: from ``dpbudget.start``; the caller closes it.
        physical_batch_size: largest number of records in memory at once; None takes every drawn batch whole. A
            :class:`~dptrainer.memory.MemoryBound`, or "auto", is turned into a number at set-up on synthetic records.
        collate_fn: as for a ``DataLoader``. A record's row must not depend on the other records of the list: pad to a
            fixed length, not to the longest, unless the model gives the same output for any padding.
        callbacks: each is called after every step with (steps so far, epsilon); False stops.
        clipping: how gradients are brought below the plan's norm, see :mod:`dptrainer.clipping.policy`; flat if None.
        views: K: every drawn record is read K times, and the mean of the K gradients is clipped.
        replay: modules to differentiate as a whole, see :class:`~dptrainer.clipping.BookKeeping`.
        record_outputs: settle every step with a hash of its noisy sum (about 2 ns a parameter).
        noise: adds the noise.
        note: is told, once, about modules that are slow to clip, parameters that get no gradient, and tests that were
            not possible, which without it are a warning.

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
        collate_fn: Collate | None = None,
        callbacks: Sequence[Callback] = (),
        clipping: Clipping | None = None,
        views: int = 1,
        replay: Sequence[nn.Module] = (),
        record_outputs: bool = False,
        noise: NoiseSource | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        checked_size(physical_batch_size)
        check(model, optimizer)
        check_run(model, run)
        check_unit(dataset, run)
        detach_earlier(model, optimizer)
        self._records = Records(dataset, collate_fn, views=views)
        refuse_trainable_criterion(loss_fn, model)
        self._loss = PerExampleLoss(loss_fn)
        inputs, named, target = split_batch(self._records.synthetic())
        tested = probe(model, inputs, replay, named=named, note=note)
        tested = tested and probe_loss(model, self._loss, inputs, named, target)
        if not tested:
            tell_untested("model and loss could not be run on synthetic records, so nobody tested for mixing.", note)
        self._model, self._optimizer, self._run = model, optimizer, run
        self._engine: BookKeeping = make_engine(model, run.plan.clip_norm, replay=replay, clipping=clipping, note=note)
        self._sampler, self._noise = PoissonSampler(), SecureNoise() if noise is None else noise
        self._physical = physical_size(physical_batch_size, model, self._records, run.plan, replay)
        self._record_outputs = record_outputs
        self._callbacks = tuple(callbacks)
        self._stopped = False

    def stop(self) -> None:
        """End :meth:`fit` after the step that is running; the rest of the plan stays charged or unspent as it is."""
        self._stopped = True

    def fit(self) -> TrainingResult:
        """Take every step that the run has left, or those until a callback stops.

        Raises:
            PlanExhausted: the run has no step left; the model is unchanged (DP050).
            StorageFailed: a step could not be charged; it was not taken (DP075).
            PrivacyViolation: the training code would break the guarantee; that step was not taken.
        """
        run, self._stopped, steps = self._run, False, 0
        if not run.remaining:
            run.next_receipt()  # raises: a plan that is used up ends with an error, not with an empty loop
        try:
            for receipt in run:
                check_step(self._model, self._optimizer)  # a callback may have changed it
                clipped = self._clip(self._sampler.draw(receipt, self._records.population))
                digest = release(
                    self._model, clipped, receipt, self._noise, with_digest=self._record_outputs,
                    optimizer=self._optimizer, clipping=self._engine.clipping,
                )  # fmt: skip
                self._optimizer.step()
                if digest is not None:
                    run.settle(receipt, digest)
                steps += 1
                self._tell(steps)
                if self._stopped:
                    break
        finally:
            self._engine.detach()
            self._optimizer.zero_grad(set_to_none=True)
        return self._result(steps)

    def _clip(self, indices: Indices) -> ClippedSum:
        """The clipped sum of one drawn batch, a physical batch at a time; zeros for an empty one."""
        total: ClippedSum | None = None
        for piece in physical_batches(indices, self._physical):
            part = self._clip_piece(piece)
            total = part if total is None else add_clipped(total, part)
        assert total is not None  # noqa: S101 - an empty draw is one empty piece
        return total

    def _clip_piece(self, indices: Indices) -> ClippedSum:
        size = len(indices)
        if size == 0:
            self._engine.begin(0)
            return self._engine.finish()
        if not self._model.training:
            raise PrivacyViolation(
                "the model is in eval mode", code="DP014", hint="call model.train() after evaluating in a callback"
            )
        batch, grouping = self._records.drawn(indices)
        rows = size if grouping is None else grouping.rows
        check_rows(batch, rows)
        device = next(self._model.parameters()).device
        inputs, named, target = split_batch(to_device(batch, device))
        with torch.enable_grad(), self._engine.record(rows, grouping=grouping):
            losses = self._loss(self._model(*inputs, **named), target, rows)
            refuse_trainable_loss(losses, self._model)
        return self._engine.backward(losses)

    def _tell(self, steps: int) -> None:
        if not self._callbacks:
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
