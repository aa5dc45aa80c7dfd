"""Records that are kept away from training, and an accuracy on them that is either free or paid for.

The split decides about every record by itself, by a keyed hash of the record. So adding or removing one record changes
one of the two parts by that record and leaves the other as it was, and whatever was proved for a part holds for the
whole. A split into a number of records, or by their order, would move others along.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpbudget.errors import InvalidParameter

if TYPE_CHECKING:
    import torch

    from dpbudget.ledger.run import Run
    from dpbudget.ledger.state import LedgerState
    from dpbudget_cli._data import Table
    from dpbudget_cli._job import Job

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Split:
    """What trains and what is held out; their sizes are private."""

    train: Table
    held_out: Table | None


def split_off(job: Job, table: Table, state: LedgerState) -> Split:
    """The parts that ``--hold-out`` or ``--validation`` asks for.

    The key of the hash is the ledger's id of the dataset, which its owner drew at random: every run of one ledger holds
    out the same records, and a larger share holds out those of a smaller one too.
    """
    if job.validation:
        return Split(table, job.read(job.validation))
    if job.hold_out is None:
        return Split(table, None)
    chosen = held_out_rows(table, bytes.fromhex(state.genesis.dataset), job.hold_out)
    return Split(table.rows(~chosen), table.rows(chosen))


def held_out_rows(table: Table, key: bytes, share: float) -> Any:
    """``[rows]`` truth values: each record, or each user with all rows, is held out with probability ``share``."""
    import numpy as np

    limit = int(share * 2.0**64)

    def chosen(record: bytes) -> bool:
        digest = hashlib.blake2b(record, digest_size=8, key=key, person=b"dpbudget-holdout").digest()
        return int.from_bytes(digest, "big") < limit

    if table.users is not None:
        kept = {name: chosen(f"user {name}".encode()) for name in np.unique(table.users).tolist()}
        return np.array([kept[name] for name in table.users.tolist()], dtype=bool)
    features = np.ascontiguousarray(table.features, dtype="<f4")
    rows = zip(features, table.labels.tolist(), strict=True)
    return np.array([chosen(row.tobytes() + label.to_bytes(8, "big")) for row, label in rows], dtype=bool)


@dataclass(frozen=True)
class Score:
    """An accuracy on held-out records.

    Attributes:
        accuracy: share of right answers; None where the noise leaves none to be told.
        noise: two standard deviations of the noise in it; 0 where it is exact, since the data are public.
        run: the run that paid for it; None where nothing had to be paid.
    """

    accuracy: float | None
    noise: float | None
    run: str | None


def check_score(job: Job, state: LedgerState, chosen: str, score_run: str | None) -> None:
    """Refuse held-out records without any way to tell how many answers are right, before anything is charged.

    Raises:
        InvalidParameter: an accuracy on them would be a release that nobody pays for (DP064), or the plan that pays is
            not one of one step (DP081).
    """
    if not job.hold_out and not job.validation:
        return
    if score_run is None and job.validation and not state.genesis.public_data:
        raise InvalidParameter(
            f"an accuracy on {job.validation} would be a release that is not charged: the ledger's data are private",
            code="DP064",
            hint="sign a plan of one step for it (plan new --sample-rate 1 --steps 1) and pass --score-plan RUN, or "
            "declare the file public with --public-eval; nothing was charged",
        )
    if score_run is None:
        return
    run = state.runs[score_run]
    if score_run == chosen or run.plan.steps != 1 or run.charged or run.plan.noise != "secure":
        raise InvalidParameter(
            f"run {score_run} cannot pay for a score: that takes a plan of its own, of one step, not yet charged, with "
            "secure noise",
            code="DP081",
            hint="sign one in before training begins: dpbudget plan new --sample-rate 1 --steps 1 --noise secure; "
            "nothing was charged",
        )


def public_score(model: torch.nn.Module, table: Table) -> Score:
    """The exact accuracy on data that somebody declared public."""
    right = _right_answers(model, table)
    return Score(float(right.mean()) if len(right) else None, 0.0, None)


def charged_score(model: torch.nn.Module, table: Table, run: Run, *, alone: bool = False) -> Score:
    """A noisy accuracy, for which the one step of ``run`` pays.

    Guarantee: that of the run's plan, for one unit of the held-out records. Each unit adds (right, wrong) with right +
    wrong = C, so at most C in the Euclidean norm; both sums get the noise of the receipt, and the accuracy is computed
    from the noisy sums.

    Args:
        model: whose answers are counted.
        table: the held-out records.
        run: pays.
        alone: give the model one record at a time. Training tests that a model keeps records apart, and not that it
            does so in eval mode: one that looks at its whole batch there lets a record change all answers.
    """
    import torch

    from dptrainer.noise.source import SecureNoise, noise_scale
    from dptrainer.sampling import PoissonSampler
    from dptrainer.values import ClippedSum

    units = _per_unit(_right_answers(model, table, 1 if alone else _ROWS_AT_ONCE), table)
    receipt = run.next_receipt()
    drawn = units[PoissonSampler().draw(receipt, len(units))]
    norm = receipt.clip_norm
    sums = {"right": norm * drawn.sum(), "wrong": norm * (1.0 - drawn).sum()}
    clipped = ClippedSum({name: torch.tensor([total], dtype=torch.float64) for name, total in sums.items()}, norm)
    noisy = {name: float(total) for name, total in SecureNoise().privatise(clipped, receipt).grads.items()}
    return _score(noisy["right"], noisy["wrong"], noise_scale(receipt.noise_multiplier, norm), run.run_id)


def _score(right: float, wrong: float, std: float, run: str) -> Score:
    """Accuracy and its noise from two noisy sums."""
    total = right + wrong
    if total <= 4.0 * std:
        return Score(None, None, run)
    accuracy = min(max(right / total, 0.0), 1.0)
    # To first order; right and wrong have independent noise.
    spread = std * (accuracy**2 + (1.0 - accuracy) ** 2) ** 0.5 / total
    return Score(accuracy, 2.0 * spread, run)


def _right_answers(model: torch.nn.Module, table: Table, at_once: int = _ROWS_AT_ONCE) -> Any:
    """``[rows]`` 1 where the largest score is that of the label, else 0. Private."""
    import numpy as np
    import torch

    model.eval()
    guesses = []
    with torch.no_grad():
        for first in range(0, len(table.labels), at_once):
            piece = torch.from_numpy(table.features[first : first + at_once])
            guesses.append(model(piece).argmax(dim=1).numpy())
    found = np.concatenate(guesses) if guesses else np.empty(0, dtype=np.int64)
    return (found == table.labels).astype(np.float64)


def _per_unit(right: Any, table: Table) -> Any:
    """``[units]`` the share of right answers of each example, or of each user."""
    import numpy as np

    if table.users is None:
        return right
    _, owner = np.unique(table.users, return_inverse=True)
    return np.bincount(owner, weights=right) / np.bincount(owner) if len(owner) else right
