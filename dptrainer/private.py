"""``make_private``: the ordinary loop, with a receipt for every batch and noise before every step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from dpbudget.curve import Bounds
from dpbudget.errors import DPBudgetError, DPBudgetWarning, InvalidParameter, PlanExhausted
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import Run
from dptrainer.clipping import Clipping, Reduction
from dptrainer.clipping.engine import plain
from dptrainer.data import Collate, Records, checked_fill
from dptrainer.loop import PrivateLoop
from dptrainer.loss_probe import probe_criterion, why_untested_criterion
from dptrainer.losses import Loss
from dptrainer.memory import PhysicalSize, checked_size, physical_size
from dptrainer.noise.source import NoiseSource
from dptrainer.outside import refuse_trainable_criterion
from dptrainer.own_draws import BatchDraws
from dptrainer.sampling import PoissonSampler, physical_batches
from dptrainer.untested import callers_level, tell_untested

Model = TypeVar("Model", bound=nn.Module)
AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)

#: Said once, to ``note``, where the loop's criterion was not given.
_NO_LOSS = (
    'loss_fn was not given, so nobody tested that the loop\'s criterion does loss_reduction="{reduction}" over the '
    "examples of a batch and keeps them apart. Pass loss_fn=criterion (in an Opacus script criterion=criterion)."
)


class PrivateLoader:
    """Private Poisson batches, one charged receipt each, in the form in which a ``DataLoader`` would give them.

    A batch that drew no record is stood in for by one example of zeros whose gradient is dropped, so that the loop runs
    the same code and its length does not tell; the step that follows is noise alone. With physical batches, several
    items belong to one step and the optimizer moves on the last of them. A batch that is left without
    ``optimizer.step()`` is dropped; its receipt stays charged, and a warning says so where its gradient was computed.
    """

    def __init__(
        self,
        loop: PrivateLoop,
        records: Records,
        physical_batch_size: int | None,
        steps_per_epoch: int | None,
        loss_tested: bool = False,
        static_shapes: bool = False,
    ) -> None:
        self._loop, self._records = loop, records
        self._physical, self._epoch = physical_batch_size, steps_per_epoch
        self._loss_tested, self._static = loss_tested, static_shapes
        self._sampler = PoissonSampler()
        self._told = self._begun = False

    def __repr__(self) -> str:
        run, loss = self._loop.run, "tested" if self._loss_tested else "not tested"
        return f"<PrivateLoader of run {run.run_id}: {run.remaining} of {run.planned} steps left, loss {loss}>"

    def __len__(self) -> int:
        """Steps that the next iteration will take; with physical batches it has more items than steps."""
        remaining = self._loop.run.remaining
        return remaining if self._epoch is None else min(self._epoch, remaining)

    def __iter__(self) -> Iterator[Any]:
        """Batches until the plan, or one epoch of it, ends.

        Raises:
            PlanExhausted: the plan was used up before (DP050); the model is unchanged.
            StorageFailed: a step could not be charged (DP075).
        """
        steps = 0
        self._loop.look_around()
        while self._epoch is None or steps < self._epoch:
            receipt = self._next_receipt(first=steps == 0)
            if receipt is None:
                return
            yield from self._step(receipt)
            steps += 1

    @property
    def epsilon(self) -> Bounds | None:
        """Live epsilon of the charged steps, *if stopping there had been planned*; the plan's claim is what holds."""
        return self._loop.run.epsilon()

    @property
    def loss_tested(self) -> bool:
        """Whether the criterion was tested at set-up; False where it was not given or could not be called.

        A script that must not run on a declaration alone asserts it before its loop.
        """
        return self._loss_tested

    @property
    def compiled(self) -> bool:
        """Whether the forward pass of private batches runs compiled; ``note`` was told at set-up if it does not."""
        return self._loop.compiled

    @property
    def step_complete(self) -> bool:
        """Whether the last ``optimizer.step()`` ended a step, and was not one of several physical batches.

        Learning rate schedules advance only then.
        """
        return self._loop.step_complete

    def in_pieces(self, physical_batch_size: int) -> PrivateLoader:
        """A loader of the same run that gives every batch in pieces of at most ``physical_batch_size`` examples.

        Raises:
            InvalidParameter: not a positive integer (DP009).
        """
        checked_size(physical_batch_size)
        return PrivateLoader(
            self._loop, self._records, physical_batch_size, self._epoch, self._loss_tested, self._static
        )

    @property
    def step_ends(self) -> bool:
        """Whether the batch that was given out last is the last of its step."""
        return self._loop.step_ends

    def detach(self) -> None:
        """Take every guard off model and optimizer, for example to go on with public data; this loader is then dead."""
        self._loop.detach()

    def _next_receipt(self, *, first: bool) -> Receipt | None:
        self._loop.require_attached()
        try:
            receipt = self._loop.run.next_receipt()
        except PlanExhausted as ended:
            if first and self._begun and self._epoch is None:
                raise PlanExhausted(
                    ended.message,
                    hint="iterate once: an iteration over the loader takes every step that the plan has left; for "
                    "epochs pass steps_per_epoch to make_private",
                ) from None
            if first:
                raise
            return None
        self._begun = True
        return receipt

    def _step(self, receipt: Receipt) -> Iterator[Any]:
        step, draws = self._loop.begin(receipt), BatchDraws()
        draws.open(receipt)
        pieces = list(physical_batches(self._sampler.draw(receipt, self._records.population), self._physical))
        try:
            for number, piece in enumerate(pieces):
                self._loop.borrow_streams()
                draws.begin(receipt, self._loop.device, reading=self._records.may_draw)
                batch, groups = self._records.drawn(piece, self._physical if self._static else None)
                size = len(piece) if groups is None else groups.units  # rows of padding go the way of ordinary ones
                self._loop.open(step, batch, size, last=number + 1 == len(pieces), grouping=groups)
                draws.go_on(self._loop.device)
                yield batch
                self._loop.check_outside()
                if not step.took(number):
                    self._tell_of_drop()
                    return
        finally:
            self._loop.end(step)

    def _tell_of_drop(self) -> None:
        """A word, once, to a loop that accumulates by hand; a batch without a backward pass was left on purpose."""
        if self._loop.holds_gradient and not self._told:
            self._told = True
            warnings.warn(
                "a batch was left without optimizer.step() after backward(): its gradient is dropped, its step stays "
                "charged, and gradients of several batches are not added up. To accumulate, plan a larger batch size "
                "and pass physical_batch_size.",
                DPBudgetWarning,
                stacklevel=callers_level(),
            )


def make_private(
    model: Model,
    optimizer: AnyOptimizer,
    dataset: Dataset[Any],
    *,
    run: Run,
    loss_reduction: Reduction = "mean",
    loss_fn: Loss | None = None,
    physical_batch_size: PhysicalSize = None,
    static_shapes: bool = False,
    steps_per_epoch: int | None = None,
    collate_fn: Collate | None = None,
    clipping: Clipping | None = None,
    views: int = 1,
    replay: Sequence[nn.Module] = (),
    record_outputs: bool = False,
    discard_outside: bool = False,
    noise: NoiseSource | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[Model, AnyOptimizer, PrivateLoader]:
    """Make an existing training loop private. Model and optimizer are changed in place; the same objects come back.

    ::

        model, optimizer, loader = make_private(model, optimizer, dataset, run=run)
        for x, y in loader:
            loss_fn(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    What no test at set-up can see, and the loop must not do: mix records (mixup, in-batch negatives, ``x[perm]``), give
    the model the batch in another order a second time, or pad records to the longest one of a batch for a model whose
    output changes with padding. Each lets one record move the sum by several times the clipping norm.

    Guarantee: what ``optimizer.step()`` does to the parameters is (epsilon, delta)-DP with the claim of the run's plan,
    for one record of ``dataset``, provided that model and loss do not mix examples (the model is tested on synthetic
    inputs) and that nothing else in the loop depends on the data: a loss or batch size that is printed, or that decides
    when to stop, is a release that is not counted. Noise, clipping norm, rate, divisor and steps come from the plan.

    Args:
        model: in train mode, called as ``model(...)`` with the examples in dimension 0.
        optimizer: any ``torch.optim`` optimizer over exactly the trainable parameters.
        dataset: map-style; one item is one record. In a :class:`~dptrainer.users.UserDataset` one user is.
        run: from ``dpbudget.start``; the caller closes it.
        loss_reduction: what the loop's criterion does over the examples of a batch: ``mean``, ``sum`` or ``none`` (then
            the loop sums). Its weights must not depend on other examples of the batch: class weights and ignored
            targets in a mean do, and so does a target [B] against an output [B, 1].
        loss_fn: the criterion of the loop, which goes on calling it. Here it is tested on synthetic records for what is
            said above; without it, that rests on the declaration alone, which ``note`` is told and
            ``loader.loss_tested`` answers.
        physical_batch_size: largest number of records in one item; None gives every drawn batch whole. A
            :class:`~dptrainer.memory.MemoryBound`, or "auto", is turned into a number at set-up on synthetic records.
        static_shapes: fill every item up to ``physical_batch_size`` records with rows of zeros, which count as nothing
            (but are in what your loop computes). Shapes and times then tell less of how many records were drawn, and
            code that is compiled for one shape is compiled once.
        steps_per_epoch: an iteration ends after so many steps; None runs to the end of the plan.
        collate_fn: as for a ``DataLoader``.
        clipping: how gradients are brought below the plan's norm, see :mod:`dptrainer.clipping.policy`; flat if None.
        views: K: every drawn record is read K times, each time with the dataset's random augmentation. K rows of the
            batch are then one example, and the mean of their gradients is clipped. De et al. (2022), section 3.2.
        replay: modules to differentiate as a whole, see :class:`~dptrainer.clipping.BookKeeping`.
        record_outputs: settle every step with a hash of its noisy sum.
        discard_outside: gradients that reach the model between two private batches are thrown away instead of refused,
            so that another model can be trained through this one (a generator through its discriminator).
        noise: adds the noise.
        note: is told, once, about modules that are slow to clip, parameters that get no gradient, a criterion that was
            not given, and tests that were not possible; only the last are a warning without it.

    Raises:
        PrivacyViolation: model, optimizer or dataset cannot be trained privately, or the plan's noise is exact (DP054);
            nothing was charged or changed.
        InvalidParameter: an argument is out of range, or the dataset is empty.
    """
    if loss_reduction not in ("mean", "sum", "none"):
        raise InvalidParameter(
            f"unknown loss reduction {loss_reduction!r}", code="DP030", hint="declare mean, sum or none"
        )
    if steps_per_epoch is not None and (type(steps_per_epoch) is not int or steps_per_epoch < 1):
        raise InvalidParameter(
            f"steps_per_epoch must be a positive integer, got {steps_per_epoch!r}",
            code="DP009",
            hint="leave it out to run to the end of the plan",
        )
    if loss_fn is not None and not callable(loss_fn):
        raise InvalidParameter(
            f"loss_fn is {loss_fn!r:.60}, which cannot be called",
            code="DP060",
            hint="pass the criterion itself, such as torch.nn.CrossEntropyLoss()",
        )
    checked_size(physical_batch_size)
    refuse_trainable_criterion(loss_fn, model)
    records = Records(dataset, collate_fn, views=views)
    synthetic = records.synthetic()
    inside = plain(model)
    loop = PrivateLoop(
        model,
        optimizer,
        run,
        reduction=loss_reduction,
        replay=replay,
        record_outputs=record_outputs,
        noise=noise,
        note=note,
        synthetic=synthetic,
        clipping=clipping,
        dataset=dataset,
        discard_outside=discard_outside,
    )
    try:
        tested = loss_fn is not None and probe_criterion(inside, loss_fn, loss_reduction, synthetic)
        size = physical_size(physical_batch_size, inside, records, run.plan, replay)
        if static_shapes:
            loop.compile(synthetic, checked_fill(records, size) * records.most_rows, note)
        else:
            loop.compile(synthetic, None, note)
    except DPBudgetError:
        loop.detach()
        raise
    if note is not None and run.charged:
        note(f"{run.charged} steps of this run are charged already; load the checkpoint of their weights.")
    if loss_fn is not None and not tested:
        what = "loss_fn could not be called with synthetic outputs and targets, so it was not tested."
        tell_untested(what + why_untested_criterion(inside, loss_fn, synthetic), note)
    elif note is not None and not tested:
        note(_NO_LOSS.format(reduction=loss_reduction))
    return model, optimizer, PrivateLoader(loop, records, size, steps_per_epoch, tested, static_shapes)
