"""DP-FTRL on one screen: whole passes over the records, each one release with noise from a binary tree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import Run
from dptrainer.allocation import UniformAllocation
from dptrainer.base import Callback, TrainerBase, TrainingResult
from dptrainer.clipping import Clipping, ScheduledClipping
from dptrainer.clipping.engine import trainable_parameters
from dptrainer.data import Collate
from dptrainer.losses import Loss
from dptrainer.memory import PhysicalSize
from dptrainer.noise.choice import require_secure
from dptrainer.noise.tree import (
    PassNoise,
    SecureTreeNoise,
    TreeNoise,
    check_tree_size,
    check_unsampled,
)
from dptrainer.sampling import Indices
from dptrainer.update import check_is_run, check_parameters, hand_over, output_digest
from dptrainer.validation import check_step

#: Most steps of one pass: each is a batch, empty or not.
MAX_STEPS_PER_PASS = 1 << 24


class TreeTrainer(TrainerBase):
    """Trains a model by DP-FTRL: every receipt pays for one pass over all records, which is one release of many steps.

    Guarantee: as :class:`~dptrainer.trainer.PrivateTrainer`, with the claim of a plan *without sampling*: its rate is 1
    and its steps are passes. In a pass every record is in the batch of exactly one step, which it draws by itself and
    uniformly, so that the claim holds when a record is added or removed. No amplification is claimed. The sums of the
    first t steps of a pass get tree-aggregated noise, which together is one Gaussian release with the plan's noise
    multiplier (Kairouz et al. 2021, Theorem 4.1; docs/mechanisms.md, "Trees"). A pass is charged before its first
    step. One that is broken off stays charged and is not continued: the next one starts, with a new tree.

    ``.grad`` of step t is (clipped sum + N_t - N_{t-1}) / (nominal size / steps_per_pass), so that gradients add up to
    noisy prefix sums. ``SGD(lr)`` is then DP-FTRL (Algorithm 1 there, tree restarted with every pass),
    ``SGD(lr, momentum)`` its variant with momentum; any other optimizer is post-processing as well. The noise of a
    single gradient is large and most of it goes again in the next steps: keep the learning rate constant within a pass.

    Plan it with ``calibrate(epsilon=, delta=, dataset_size=n, batch_size=n, steps=passes)``.

    Args:
        model: in train mode; changed in place. What trains may change between two passes, not within one.
        optimizer: as for ``PrivateTrainer``.
        loss_fn: likewise.
        dataset: likewise.
        run: from ``dpbudget.start``, under a plan of rate 1; the caller closes it.
        steps_per_pass: T, public, 1 to 2^24: the expected batch is nominal size / T. A record is in up to
            L = floor(log2 T) + 1 nodes of noise sqrt(L) sigma C each, and the plan's ``max_parameters`` must be at
            least L times the model's.
        physical_batch_size: as for ``PrivateTrainer``.
        static_shapes: likewise.
        collate_fn: likewise.
        callbacks: each is called after every step with (steps so far, epsilon), epsilon being that of the passes that
            were begun; False stops and gives up the rest of the pass.
        clipping: a policy without statistics of its own, flat if None: quantile and scheduled clipping are refused.
        views: as for ``PrivateTrainer``.
        replay: likewise.
        record_outputs: settle every pass with a hash of the hashes of its noisy sums.
        noise: adds the noise; ``SecureTreeNoise(averaged=False)`` for the plain tree, with more of it and fewer draws.
        note: as for ``PrivateTrainer``.

    Raises:
        PrivacyViolation: the plan samples (DP026) or allows fewer values than a record moves (DP018), or as
            ``PrivateTrainer``; nothing was charged or changed.
        InvalidParameter: ``steps_per_pass`` is out of range (DP009).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Loss,
        dataset: Dataset[Any],
        run: Run,
        *,
        steps_per_pass: int,
        physical_batch_size: PhysicalSize = None,
        static_shapes: bool = False,
        collate_fn: Collate | None = None,
        callbacks: Sequence[Callback] = (),
        clipping: Clipping | None = None,
        views: int = 1,
        replay: Sequence[nn.Module] = (),
        record_outputs: bool = False,
        noise: TreeNoise | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        check_passes(model, run, steps_per_pass, clipping)
        super().__init__(
            model, optimizer, loss_fn, dataset, run, physical_batch_size=physical_batch_size,
            static_shapes=static_shapes, collate_fn=collate_fn, callbacks=callbacks, clipping=clipping, views=views,
            replay=replay, record_outputs=record_outputs, note=note, batches=steps_per_pass,
        )  # fmt: skip
        self._steps = steps_per_pass
        self._allocation: UniformAllocation = UniformAllocation()
        self._noise: TreeNoise = SecureTreeNoise() if noise is None else noise

    def fit(self) -> TrainingResult:
        """Take every pass that the run has left, or those until a callback stops.

        Returns:
            ``steps`` counts steps, ``charged`` and ``planned`` count passes.

        Raises:
            PlanExhausted: the run has no pass left; the model is unchanged (DP050).
            StorageFailed: a pass could not be charged; it was not begun (DP075).
            PrivacyViolation: the training code would break the guarantee; that step was not taken, its pass is over.
        """
        run, steps = self._run, 0
        with self._fitting():
            for receipt in run:
                steps = self._pass(receipt, steps)
                if self._stopped:
                    break
        return self._result(steps)

    def _pass(self, receipt: Receipt, steps: int) -> int:
        """The steps of one receipt after ``steps`` others; how many there are then."""
        check_unsampled(receipt.rate_k)
        outputs = hashlib.sha256()
        self._draws.open(receipt)
        noise = self._noise.open(receipt, self._steps)
        try:
            for indices in self._allocation.draw(receipt, self._steps, self._records.population):
                check_step(self._model, self._optimizer)  # a callback may have changed it
                outputs.update(self._release(indices, receipt, noise))
                self._optimizer.step()
                steps += 1
                self._tell(steps)
                if self._stopped:
                    break
        finally:
            noise.close()
        if self._record_outputs:
            self._run.settle(receipt, outputs.hexdigest())
        return steps

    def _release(self, indices: Indices, receipt: Receipt, noise: PassNoise) -> bytes:
        """Clip, add the step's share of the tree's noise, and hand over; the hash of the noisy sum if it is wanted."""
        clipped = self._clip(indices, receipt)
        check_parameters(self._model, clipped)
        noisy = noise.privatise(clipped)
        digest = bytes.fromhex(output_digest(noisy)) if self._record_outputs else b""
        divisor = receipt.nominal_size / self._steps / clipped.unit
        hand_over(self._model, noisy, divisor, noise.std, self._optimizer)
        return digest


def check_passes(model: nn.Module, run: Run, steps_per_pass: int, clipping: Clipping | None) -> None:
    """Refuse a plan, a model or a policy with which no pass can be taken; nothing is charged or changed.

    Raises:
        InvalidParameter: ``steps_per_pass`` is no integer in [1, 2^24] (DP009).
        PrivacyViolation: ``run`` is not a run (DP081), its plan samples (DP026), is too small for the tree (DP018)
            or has exact noise (DP054), or the policy releases statistics or follows a schedule (DP019).
    """
    if type(steps_per_pass) is not int or not 1 <= steps_per_pass <= MAX_STEPS_PER_PASS:
        raise InvalidParameter(
            f"steps_per_pass must be an integer in [1, {MAX_STEPS_PER_PASS}], got {steps_per_pass!r}",
            code="DP009",
            hint="dataset size / steps_per_pass is the expected batch size",
        )
    check_is_run(run)
    require_secure(run.plan, "TreeTrainer")
    for phase in run.plan.phases:
        check_unsampled(phase.rate_k)
    check_tree_size(trainable_parameters(model), steps_per_pass, run.plan.max_parameters)
    clip_norm = run.plan.clip_norm
    if isinstance(clipping, ScheduledClipping):
        raise PrivacyViolation(
            "a scheduled threshold moves between steps whose noise cancels only at one threshold",
            code="DP019",
            hint="plan with the clipping norm that you want, and schedule the learning rate between passes",
        )
    if clipping is not None and clipping.statistics(torch.zeros(1, dtype=torch.float64), clip_norm):
        raise PrivacyViolation(
            f"{type(clipping).__name__} releases statistics of every batch; in a pass its threshold would move between "
            "steps whose noise cancels only at one threshold",
            code="DP019",
            hint="use a clipping policy with fixed thresholds, or train with PrivateTrainer",
        )
