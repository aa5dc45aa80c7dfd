"""The training itself, as ``dpbudget train`` does it: SGD under a run, with checkpoints and public ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from dpbudget.errors import DPBudgetError, InvalidParameter, NotComputable
from dpbudget_cli import _output as out
from dpbudget_cli._progress import Interrupt, StopRule, progress

if TYPE_CHECKING:
    import torch

    from dpbudget.curve import Bounds
    from dpbudget.ledger.run import Run
    from dpbudget_cli._checkpoints import Checkpoints
    from dpbudget_cli._data import Table
    from dpbudget_cli._job import Job
    from dpbudget_cli._noise_keys import NoiseKeys
    from dptrainer.trainer import TrainingResult


def _resume(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, job: Job, run: Run, checkpoints: Checkpoints
) -> bool:
    """Go on from the newest checkpoint, and say where the weights come from; whether there was one."""
    steps = None if job.init else checkpoints.resume(model, optimizer)
    if steps is not None:
        out.talk(f"going on from the checkpoint of step {steps}")
    elif run.charged and run.remaining and job.init is None:
        out.talk(
            "the ledger has steps of this run already, and there is no checkpoint and no --init: weights begin anew"
        )
    return steps is not None


def train_private(
    model: torch.nn.Module,
    job: Job,
    table: Table,
    run: Run,
    noise: NoiseKeys,
    interrupt: Interrupt,
    checkpoints: Checkpoints,
) -> TrainingResult:
    """Take the steps that are left of the run, from the newest checkpoint, until the plan or something public ends it.

    Args:
        model: changed in place.
        job: what the options say.
        table: the records that train, before features are scaled.
        run: pays for the steps.
        noise: what becomes of the noise keys.
        interrupt: ends training after the running step.
        checkpoints: where weights are kept meanwhile.

    Raises:
        InvalidParameter: not even the next lease fits ``--stop-epsilon`` (DP009), or the user's model failed (DP093).
        PlanExhausted: nothing is left of the run (DP050).
        PrivacyViolation: the model cannot be trained privately.
    """
    import torch

    from dptrainer.trainer import PrivateTrainer, TrainingResult

    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad] or list(model.parameters()),
        lr=job.lr,
        momentum=job.momentum,
    )
    if _resume(model, optimizer, job, run, checkpoints) and not run.remaining:
        claim = run.plan.claim  # killed within the last lease: its steps are spent, and these are the weights
        return TrainingResult(run.run_id, 0, run.charged, run.planned, False, run.epsilon(), claim.epsilon, claim.delta)
    rule = StopRule(job.max_steps, job.stop_epsilon)
    rule.check(run)
    with progress(run) as show:

        def each(steps: int, epsilon: Bounds | None) -> bool:
            show(epsilon)
            checkpoints.keep(model, optimizer, steps)
            return not (interrupt.asked or rule.ends(run, steps))

        with blaming(job.model, "during training"):
            return PrivateTrainer(
                model,
                optimizer,
                torch.nn.CrossEntropyLoss(),
                _dataset(job, table),
                run,
                physical_batch_size=job.physical_batch_size,
                record_outputs=noise.replayable,
                callbacks=[each],
                note=out.talk,
            ).fit()


def _dataset(job: Job, table: Table) -> torch.utils.data.Dataset[Any]:
    """The records as units of privacy: rows, or users with theirs."""
    import torch

    from dptrainer.users import UserDataset

    scaled = table.scaled(job.feature_scale)
    rows = torch.utils.data.TensorDataset(torch.from_numpy(scaled.features), torch.from_numpy(scaled.labels))
    if table.users is None or job.max_examples is None:
        return rows
    return UserDataset(rows, table.users.tolist(), max_examples=job.max_examples)


@contextmanager
def blaming(model: str, when: str) -> Iterator[None]:
    """A failure of the user's model is told without what it says of the data, a batch size or a value."""
    try:
        yield
    except DPBudgetError:
        raise
    except Exception as error:
        if os.environ.get("DPBUDGET_TRACEBACK") or ":" not in model:
            raise
        raise InvalidParameter(
            f"the model {model} failed with {type(error).__name__} {when}", code="DP093", hint=_ON_OTHER_DATA
        ) from None


@contextmanager
def nothing_of_the_data() -> Iterator[None]:
    """Within the block a failure that nobody foresaw is told by its kind alone.

    Its message could hold the size of the data: NumPy's of too little memory has the shape of the array.
    """
    try:
        yield
    except (DPBudgetError, click.ClickException, click.Abort):
        raise
    except OSError as error:
        if error.errno is None:  # its words are somebody's, not the system's
            raise _failed(error) from None
        raise
    except Exception as error:
        if os.environ.get("DPBUDGET_TRACEBACK"):
            raise
        raise _failed(error) from None


_ON_OTHER_DATA = "set DPBUDGET_TRACEBACK=1 on data that are not private to see where"


def _failed(error: Exception) -> NotComputable:
    short = isinstance(error, MemoryError)
    return NotComputable(
        f"training failed with {type(error).__name__}; what it says is not shown, since it may be of the data",
        code="DP099",
        hint=f"there was too little memory; {_ON_OTHER_DATA}" if short else _ON_OTHER_DATA,
    )
