"""DP-SGD on one screen: draw, clip, add noise, step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from dpbudget.ledger.run import Run
from dptrainer.base import Callback, TrainerBase, TrainingResult
from dptrainer.clipping import Clipping
from dptrainer.data import Collate
from dptrainer.losses import Loss
from dptrainer.memory import PhysicalSize
from dptrainer.noise.choice import source_for
from dptrainer.noise.source import NoiseSource
from dptrainer.sampling import PoissonSampler
from dptrainer.update import check_is_run, release
from dptrainer.validation import check_step

__all__ = ["Callback", "PrivateTrainer", "TrainingResult"]


class PrivateTrainer(TrainerBase):
    """Trains a model under a run: one charged receipt, one Poisson batch, one noisy update at a time.

    Guarantee: the model's parameters, and everything the callbacks see, are (epsilon, delta)-DP with the plan's claim,
    for one record of ``dataset``, provided that the model does not mix examples (tested on synthetic inputs at set-up).
    No loss, batch size or norm is computed for display. Noise multiplier, clipping norm, rate and steps come from the
    plan; there is nothing to repeat here. Under a plan with ``exact`` noise every record goes through the model alone,
    and that holds without any reservation about rounding (docs/exact.md).

    Args:
        model: in train mode; changed in place.
        optimizer: any ``torch.optim`` optimizer over the model's trainable parameters, without closure.
        loss_fn: criterion of (outputs, target), see :class:`~dptrainer.losses.PerExampleLoss`.
        dataset: map-style; an item is ``(input, ..., target)`` or a mapping with ``labels``. In a
            :class:`~dptrainer.users.UserDataset` one user is one record.
        run: from ``dpbudget.start``; the caller closes it.
        static_shapes: fill every physical batch up to ``physical_batch_size`` records with rows of zeros that count as
            nothing: shapes and times then tell less of how many were drawn, and compiled code meets one shape.
        physical_batch_size: largest number of records in memory at once; None takes every drawn batch whole, and with
            exact noise it is always one. A
            :class:`~dptrainer.memory.MemoryBound`, or "auto", is turned into a number at set-up on synthetic records.
        collate_fn: as for a ``DataLoader``. A record's row must not depend on the other records of the list: pad to a
            fixed length, not to the longest, unless the model gives the same output for any padding.
        callbacks: each is called after every step with (steps so far, epsilon); False stops.
        clipping: how gradients are brought below the plan's norm, see :mod:`dptrainer.clipping.policy`; flat if None.
        views: K: every drawn record is read K times, and the mean of the K gradients is clipped.
        replay: modules to differentiate as a whole, see :class:`~dptrainer.clipping.BookKeeping`.
        record_outputs: settle every step with a hash of its noisy sum (about 2 ns a parameter).
        noise: adds the noise; of the plan's mode.
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
        static_shapes: bool = False,
        collate_fn: Collate | None = None,
        callbacks: Sequence[Callback] = (),
        clipping: Clipping | None = None,
        views: int = 1,
        replay: Sequence[nn.Module] = (),
        record_outputs: bool = False,
        noise: NoiseSource | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        check_is_run(run)
        self._sampler, self._noise = PoissonSampler(), source_for(run.plan, noise)
        super().__init__(
            model, optimizer, loss_fn, dataset, run, physical_batch_size=physical_batch_size,
            static_shapes=static_shapes, collate_fn=collate_fn, callbacks=callbacks, clipping=clipping, views=views,
            replay=replay, record_outputs=record_outputs, note=note, noise=self._noise,
        )  # fmt: skip

    def fit(self) -> TrainingResult:
        """Take every step that the run has left, or those until a callback stops.

        Raises:
            PlanExhausted: the run has no step left; the model is unchanged (DP050).
            StorageFailed: a step could not be charged; it was not taken (DP075).
            PrivacyViolation: the training code would break the guarantee; that step was not taken.
        """
        run, steps = self._run, 0
        with self._fitting():
            for receipt in run:
                check_step(self._model, self._optimizer)  # a callback may have changed it
                clipped = self._clip(self._sampler.draw(receipt, self._records.population), receipt)
                self._draws.close()  # callbacks may look around
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
        return self._result(steps)
