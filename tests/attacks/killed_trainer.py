"""Trains under a ledger and kills itself in every phase of a step, then resumes from a stale checkpoint; attack 25.

A process of its own, which forks a child for every training before any ledger is open; run by test_attacks_on_training.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
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

PHASES = ("before commit", "after commit", "sampled", "clipped", "noised", "updated", "settled")


@dataclass(frozen=True)
class Fate:
    """A plan of ``15 n`` steps, whose checkpoint is of step ``5 n``, and death in a phase of step ``10 n``."""

    phase: str
    n: int

    def meet(self, now: str, step: int) -> None:
        if self.phase == now and step == 10 * self.n - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Noise(SecureNoise):
    """The shipped noise; logs a step the moment that its noisy sum exists, since from then on anybody may have it."""

    def __init__(self, log: Path, fate: Fate) -> None:
        self._file, self._fate = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), fate

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        self._fate.meet("clipped", receipt.step)
        noisy = super().privatise(clipped, receipt)
        os.write(self._file, b"%d\n" % receipt.step)
        self._fate.meet("noised", receipt.step)
        return noisy


def arm(run: Run, fate: Fate) -> None:
    """Put the other fatal moments in place."""
    commit, draw, settle = SqliteStore._commit, PoissonSampler.draw, Run.settle

    def committing(store: SqliteStore) -> None:
        fate.meet("before commit", run.charged)
        step = run.charged
        commit(store)
        fate.meet("after commit", step)

    def drawing(sampler: PoissonSampler, receipt: Receipt, population: int) -> Indices:
        drawn = draw(sampler, receipt, population)
        fate.meet("sampled", receipt.step)
        return drawn

    def settling(self: Run, receipt: Receipt, digest: str | None = None) -> None:
        fate.meet("updated", receipt.step)
        settle(self, receipt, digest)
        fate.meet("settled", receipt.step)

    SqliteStore._commit, PoissonSampler.draw, Run.settle = committing, drawing, settling  # type: ignore[method-assign]


def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any, TensorDataset]:
    """Model, optimizer, loss and data."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    data = TensorDataset(torch.randn(40, 5), torch.randint(3, (40,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, data


def train(path: Path, log: Path, run_id: str, fate: Fate) -> None:
    """From the checkpoint beside the ledger, if there is one, to the end of the plan or to death."""
    model, optimizer, loss, data = fresh()
    kept = path.with_suffix(".checkpoint")
    with reopen(path) as ledger:
        run = ledger.start(run_id, lease_steps=1)
        arm(run, fate)
        if kept.exists():
            load_checkpoint(kept, model, optimizer, run=run)

        def keep(steps: int, epsilon: Any) -> None:
            if steps == 5 * fate.n and not kept.exists():
                save_checkpoint(kept, model, optimizer, run=run)

        noise = Noise(log, fate)
        PrivateTrainer(model, optimizer, loss, data, run, noise=noise, callbacks=[keep], record_outputs=True).fit()


def in_child(path: Path, log: Path, run_id: str, fate: Fate) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(path, log, run_id, fate)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    """For every phase a ledger, a log of released steps, and how the two trainings ended."""
    torch.set_num_threads(1)
    with make(folder / "warm.ledger") as ledger:
        # Imports what torch loads on first use, before any child is forked.
        run = ledger.start(ledger.sign_plan(plan(15, dataset_size=40, batch_size=40), owner=OWNER))
        model, optimizer, loss, data = fresh()
        PrivateTrainer(model, optimizer, loss, data, run, callbacks=[lambda *_: False]).fit()
        save_checkpoint(folder / "warm", model, optimizer, run=run)
        load_checkpoint(folder / "warm", model, optimizer, run=run)
    for number, phase in enumerate(PHASES):
        path, log = folder / f"{number}.ledger", folder / f"{number}.log"
        fate = Fate(phase, 10 if phase == "noised" else 1)
        run_id = signed(path, 15 * fate.n, dataset_size=40, batch_size=40)
        ends = in_child(path, log, run_id, fate), in_child(path, log, run_id, Fate("none", fate.n))
        print(*ends, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
