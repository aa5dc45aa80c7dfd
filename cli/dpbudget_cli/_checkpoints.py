"""Checkpoints of ``dpbudget train``: a folder beside the output, so that a killed process keeps its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dpbudget.errors import Unreadable

if TYPE_CHECKING:
    import torch

    from dpbudget.ledger.run import Run


class Checkpoints:
    """The newest checkpoint of one run, in the folder ``OUTPUT.checkpoint``.

    Nothing in it is private: weights and optimizer state are what the noisy steps made of them.

    Args:
        output: where the final weights will go.
        run: the run that trains them.
        every: steps between two checkpoints.
    """

    def __init__(self, output: str, run: Run, every: int) -> None:
        self._place = Path(f"{output}.checkpoint")
        self._run, self._every = run, every

    def resume(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
        """Load the newest checkpoint; the steps that its weights hold, or None where there is none.

        Raises:
            PrivacyViolation: it is of another run, or newer than the ledger (DP051).
            Unreadable: it is damaged or of another model (DP070, DP091).
        """
        from dptrainer.checkpoint import load_checkpoint

        folders = self._complete()
        if not folders:
            return None
        try:
            load_checkpoint(folders[-1], model, optimizer, run=self._run)
        except Unreadable as error:
            if error.code != "DP091":
                raise
            raise Unreadable(
                f"{folders[-1]} does not hold weights of this model",
                code="DP091",
                hint="pass the --model, --hidden and --momentum that it was made with, or another --output",
            ) from None
        return int(folders[-1].name)

    def keep(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Write a checkpoint after every so many steps of this call, and drop the one before it.

        Raises:
            Unreadable: it cannot be written (DP070); the step before it is taken and stays charged.
        """
        from dptrainer.checkpoint import save_checkpoint

        if steps % self._every:
            return
        taken = self._run.planned - self._run.remaining
        older = self._complete()
        try:
            self._place.mkdir(mode=0o700, exist_ok=True)
            save_checkpoint(self._place / f"{taken:012d}", model, optimizer, run=self._run)
        except OSError as error:
            raise Unreadable(
                f"{self._place} cannot be written: {error.strerror or error}", hint="make room, and start again"
            ) from None
        for folder in older:
            shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Drop the checkpoint once the output holds the weights."""
        shutil.rmtree(self._place, ignore_errors=True)

    def _complete(self) -> list[Path]:
        """Whole checkpoints, oldest first; a folder that is still being written has another name."""
        return sorted(path for path in self._place.glob("*") if path.name.isdecimal())
