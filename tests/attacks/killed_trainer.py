"""Trains under a ledger and kills itself in every phase of a step, then resumes from a stale checkpoint; attack 25.

A process of its own, which forks a child for every training before any ledger is open; run by test_attacks_on_training.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attackkit import OWNER, make, plan, reopen, signed
from torch.utils.data import TensorDataset

from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import Run
from dpbudget.ledger.store.sqlite import SqliteStore
from dptrainer import PoissonSampler, PrivateTrainer, SecureNoise, load_checkpoint, save_checkpoint
from dptrainer.sampling import Indices
from dptrainer.values import ClippedSum, NoisySum

STEPS, KEPT, KILLED = 150, 50, 100
PHASES = ("before commit", "after commit", "sampled", "clipped", "noised", "updated", "settled")


def die_in(phase: str, now: str, step: int) -> None:
    if phase == now and step == KILLED - 1:
        os.kill(os.getpid(), signal.SIGKILL)


class Noise(SecureNoise):
    """The shipped noise; logs a step the moment that its noisy sum exists, since from then on anybody may have it."""

    def __init__(self, log: Path, phase: str) -> None:
        self._file, self._phase = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), phase

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        die_in(self._phase, "clipped", receipt.step)
        noisy = super().privatise(clipped, receipt)
        os.write(self._file, b"%d\n" % receipt.step)
        die_in(self._phase, "noised", receipt.step)
        return noisy


def arm(phase: str, run: Run) -> None:
    """Put the other fatal moments in place."""
    commit, draw, settle = SqliteStore._commit, PoissonSampler.draw, Run.settle

    def committing(store: SqliteStore) -> None:
        die_in(phase, "before commit", run.charged)
        step = run.charged
        commit(store)
        die_in(phase, "after commit", step)

    def drawing(sampler: PoissonSampler, receipt: Receipt, population: int) -> Indices:
        drawn = draw(sampler, receipt, population)
        die_in(phase, "sampled", receipt.step)
        return drawn

    def settling(self: Run, receipt: Receipt, digest: str | None = None) -> None:
        die_in(phase, "updated", receipt.step)
        settle(self, receipt, digest)
        die_in(phase, "settled", receipt.step)

    SqliteStore._commit, PoissonSampler.draw, Run.settle = committing, drawing, settling  # type: ignore[method-assign]


def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any, TensorDataset]:
    """Model, optimizer, loss and data."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    data = TensorDataset(torch.randn(40, 5), torch.randint(3, (40,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, data


def train(path: Path, log: Path, run_id: str, phase: str) -> None:
    """From the checkpoint beside the ledger, if there is one, to the end of the plan or to death."""
    model, optimizer, loss, data = fresh()
    kept = path.with_suffix(".checkpoint")
    with reopen(path) as ledger:
        run = ledger.start(run_id, lease_steps=1)
        arm(phase, run)
        if kept.exists():
            load_checkpoint(kept, model, optimizer, run=run)

        def keep(steps: int, epsilon: Any) -> None:
            if steps == KEPT and not kept.exists():
                save_checkpoint(kept, model, optimizer, run=run)

        noise = Noise(log, phase)
        PrivateTrainer(model, optimizer, loss, data, run, noise=noise, callbacks=[keep], record_outputs=True).fit()


def in_child(path: Path, log: Path, run_id: str, phase: str) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(path, log, run_id, phase)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    """For every phase a ledger, a log of released steps, and how the two trainings ended."""
    torch.set_num_threads(1)
    with make(folder / "warm.ledger") as ledger:
        # Imports what torch loads on first use, before any child is forked.
        run = ledger.start(ledger.sign_plan(plan(STEPS, dataset_size=40, batch_size=40), owner=OWNER))
        model, optimizer, loss, data = fresh()
        PrivateTrainer(model, optimizer, loss, data, run, callbacks=[lambda *_: False]).fit()
        save_checkpoint(folder / "warm", model, optimizer, run=run)
        load_checkpoint(folder / "warm", model, optimizer, run=run)
    for number, phase in enumerate(PHASES):
        path, log = folder / f"{number}.ledger", folder / f"{number}.log"
        run_id = signed(path, STEPS, dataset_size=40, batch_size=40)
        print(in_child(path, log, run_id, phase), in_child(path, log, run_id, "none"), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
