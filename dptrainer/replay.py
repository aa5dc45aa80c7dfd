"""Replay of single steps by an auditor: the batch from its sampling key, the output from its noise key.

The step keys come from :meth:`dpbudget.RunReplay.step_key`, or from a file that ``dpbudget key replay`` wrote. Only
someone who is cleared for the raw data may have either of them. A replayed output is the one that was released: it
costs no budget, and nothing but a comparison should become of it.

Guarantee: :func:`output_matches` is True only if this clipped sum with the noise of this key is, bit for bit, what the
ledger has the hash of. The clipped sum must be computed as the trainer did: same code, types, device and physical
batches, since floating-point sums depend on them. Integer sums of ``exact`` plans depend on the records alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from dpbudget.errors import InvalidParameter, Unreadable
from dpbudget.ledger.replay import StepKey
from dpbudget.ledger.step_keys import Purpose
from dptrainer.noise.exact import add_exactly
from dptrainer.noise.gaussian import add_gaussians_
from dptrainer.noise.source import noise_scale
from dptrainer.own_draws import begin_batch, record_draws
from dptrainer.sampling import Indices, poisson_indices
from dptrainer.streams import lent_streams
from dptrainer.update import output_digest
from dptrainer.values import ClippedSum, NoisySum


def replayed_batch(step: StepKey, population: int) -> Indices:
    """The records that were in the batch, increasing int64 indices below ``population``.

    Args:
        step: a key of purpose ``sampling``.
        population: number of records of the dataset, which is private.

    Raises:
        InvalidParameter: the key is of another purpose (DP060).
    """
    _check_purpose(step, Purpose.SAMPLING)
    return poisson_indices(step.key, step.rate_k, population)


@contextmanager
def replayed_draws(
    step: StepKey, device: torch.device | str = "cpu", *, batch: int = 0, reading: bool = False
) -> Iterator[None]:
    """Within the block, dropout and augmentation draw what they drew for a batch of a plan of ``secure`` noise.

    Read the records in a block with ``reading``, then call the model in another without it.

    Args:
        step: a key of purpose ``record-draws``.
        device: of the model, of the kind that it was trained on.
        batch: which of the step's physical batches, or of a pass's steps; 0-based.
        reading: what the dataset and its collation drew, and not what the model did.

    Raises:
        InvalidParameter: the key is of another purpose (DP060).
    """
    _check_purpose(step, Purpose.RECORD_DRAWS)
    place = torch.device(device)
    with lent_streams(place):
        begin_batch(step.key, batch, place, reading=reading)
        yield


@contextmanager
def replayed_record_draws(
    step: StepKey, records: int, device: torch.device | str = "cpu"
) -> Iterator[Callable[[int], None]]:
    """The same for a plan of ``exact`` noise: each call with a record's place in the batch begins that record's draws.

    Args:
        step: a key of purpose ``record-draws``.
        records: how many :func:`replayed_batch` gave.
        device: of the model, of the kind that it was trained on.

    Raises:
        InvalidParameter: the key is of another purpose (DP060).
    """
    _check_purpose(step, Purpose.RECORD_DRAWS)
    with record_draws(step.key, records, torch.device(device)) as begin:
        yield begin


def replayed_output(step: StepKey, clipped: ClippedSum) -> NoisySum:
    """The clipped sum with the noise of the step; ``clipped`` stays as it is.

    Args:
        step: a key of purpose ``grad-noise``.
        clipped: what the clipping engine makes of the step's batch, at the weights that the step began with.

    Raises:
        InvalidParameter: the key is of another purpose (DP060).
    """
    _check_purpose(step, Purpose.GRAD_NOISE)
    grads = {name: total.detach().clone() for name, total in clipped.grads.items()}
    statistics = {name: total.detach().clone() for name, total in clipped.statistics.items()}
    if clipped.grid is not None:
        return add_exactly(replace(clipped, grads=grads, statistics=statistics), clipped.grid, step.key)
    std = noise_scale(step.noise_multiplier, step.clip_norm)
    add_gaussians_((*grads.values(), *statistics.values()), step.key, std)
    return NoisySum(grads, statistics)


def output_matches(step: StepKey, clipped: ClippedSum) -> bool:
    """Whether the clipped sum with the noise of the step is what was released.

    For a step of :class:`~dptrainer.PrivateTrainer` or ``make_private``; a pass of ``TreeTrainer`` records a hash of
    the hashes of its steps.

    Raises:
        InvalidParameter: the key is of another purpose (DP060).
        Unreadable: the settle record has no hash to compare with (DP085).
    """
    if step.output is None:
        raise Unreadable(
            f"step {step.step} of run {step.run_id} was settled without a hash of its output",
            code="DP085",
            hint="train with record_outputs=True, so that there is something to compare with",
        )
    return output_digest(replayed_output(step, clipped)) == step.output


def _check_purpose(step: StepKey, wanted: Purpose) -> None:
    if step.purpose is not wanted:
        raise InvalidParameter(
            f"a step key of {step.purpose}, where one of {wanted} is needed",
            code="DP060",
            hint=f"open the step for the purpose {wanted}",
        )
