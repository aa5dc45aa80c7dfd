"""Checkpoints: weights, optimizer state and where the ledger stood. The ledger decides what was spent, never a file.

A checkpoint is a folder: ``model.safetensors``, ``optimizer.pt`` (read with ``weights_only``) and ``checkpoint.json``,
which names the run, the steps charged when it was written, and the SHA-256 of the others. What else is asked for (an
average of the weights, a learning rate schedule, an adaptive clipping threshold) is in ``extras.pt``. The folder
holds no key, no sampler state and no privacy number: going back to an older checkpoint gives no budget back, and new
steps draw new batches and new noise.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, StringConstraints
from safetensors.torch import load_model, save_model
from torch import nn

from dpbudget._record import Record
from dpbudget.errors import InvalidParameter, PrivacyViolation, Tampered, Unreadable
from dpbudget.ledger.run import Run
from dpbudget.plan import Digest
from dptrainer.clipping.engine import plain

_WEIGHTS, _OPTIMIZER, _SIDECAR = "model.safetensors", "optimizer.pt", "checkpoint.json"
_EXTRAS = "extras.pt"

Head = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,16}:[0-9a-f]{64}$")]


class Stateful(Protocol):
    """Whatever has a state of its own: :class:`~dptrainer.ema.WeightAverage`, a schedule, a clipping policy."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors, numbers and strings, in mappings and lists."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Inverse of :meth:`state_dict`."""


class Checkpoint(Record):
    """The sidecar of a checkpoint.

    Attributes:
        format: version of this layout.
        run_id: the run that trained the weights.
        plan_digest: SHA-256 of its plan.
        steps: steps charged to the run when the checkpoint was written; the weights hold at most so many.
        head: size and root of the ledger then, if given: an outside anchor for verification.
        weights, optimizer: SHA-256 of the two files.
        extras: SHA-256 of the third, if there is one.
    """

    format: Literal["dptrainer/checkpoint/1"] = "dptrainer/checkpoint/1"
    run_id: str
    plan_digest: Digest
    steps: int = Field(ge=0)
    head: Head | None = None
    weights: Digest
    optimizer: Digest
    extras: Digest | None = None


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: Run,
    head: str | None = None,
    extras: Mapping[str, Stateful] | None = None,
) -> Checkpoint:
    """Write a checkpoint between two steps. The files appear together or not at all, in a new folder.

    Args:
        folder: must not exist.
        model: its state dict is saved, with tied tensors once.
        optimizer: its state dict is saved.
        run: the run that trains them.
        head: ``str(ledger.head)``, kept as an outside anchor.
        extras: further objects with a ``state_dict``, by name. Their state must be computed from what was released.

    Raises:
        InvalidParameter: the folder exists (DP074).
    """
    target = Path(folder)
    if target.exists():
        raise InvalidParameter(f"{target} exists", code="DP074", hint="choose another folder, or remove it")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    draft.mkdir(mode=0o700)
    save_model(plain(model), str(draft / _WEIGHTS))
    torch.save(optimizer.state_dict(), draft / _OPTIMIZER)
    if extras:
        torch.save({name: dict(part.state_dict()) for name, part in extras.items()}, draft / _EXTRAS)
    sidecar = Checkpoint(
        run_id=run.run_id,
        plan_digest=run.plan.digest(),
        steps=run.charged,
        head=head,
        weights=_sha256(draft / _WEIGHTS),
        optimizer=_sha256(draft / _OPTIMIZER),
        extras=_sha256(draft / _EXTRAS) if extras else None,
    )
    (draft / _SIDECAR).write_bytes(sidecar.encode())
    draft.rename(target)
    return sidecar


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    run: Run,
    extras: Mapping[str, Stateful] | None = None,
) -> Checkpoint:
    """Load a checkpoint of ``run`` into model, optimizer and extras; what was spent stays as the ledger says.

    Raises:
        PrivacyViolation: the weights are of another run, or claim more steps than the ledger has charged (DP051).
        Unreadable: a file is missing or of another form (DP070), or does not fit model and optimizer (DP091).
        Tampered: a file is not the one that was saved (DP071).
    """
    place = Path(folder)
    sidecar = _read_sidecar(place)
    if (sidecar.run_id, sidecar.plan_digest) != (run.run_id, run.plan.digest()):
        raise PrivacyViolation(
            f"the weights were trained by run {sidecar.run_id}, and this is run {run.run_id}",
            code="DP051",
            hint="resume the run that trained them, or declare the weights public by loading them yourself",
        )
    if sidecar.steps > run.charged:
        raise PrivacyViolation(
            f"the weights were saved after {sidecar.steps} charged steps, but this ledger has {run.charged}",
            code="DP051",
            hint="this ledger is an older copy: open the one that was written last",
        )
    files = {_WEIGHTS: sidecar.weights, _OPTIMIZER: sidecar.optimizer, _EXTRAS: sidecar.extras}
    for name, expected in files.items():
        if expected is not None and _sha256(place / name) != expected:
            raise Tampered(f"{place / name} is not the file that was saved", hint="restore the folder as a whole")
    saved = _read_extras(place, sidecar, extras or {})
    try:
        load_model(plain(model), str(place / _WEIGHTS))
        if optimizer is not None:
            # weights_only: no code of the file is run.
            optimizer.load_state_dict(torch.load(place / _OPTIMIZER, weights_only=True))
        for name, part in (extras or {}).items():
            part.load_state_dict(saved[name])
    except Exception as error:  # noqa: BLE001 - two libraries, with errors of many kinds for files that are none
        raise Unreadable(
            f"{place} cannot be loaded into this model and optimizer: {type(error).__name__}",
            code="DP091",
            hint="pass the model and optimizer that were saved; no code of the files was run",
        ) from None
    return sidecar


def _read_extras(place: Path, sidecar: Checkpoint, wanted: Mapping[str, Stateful]) -> dict[str, dict[str, Any]]:
    """What was saved for each of the wanted extras; every one of them must be there."""
    if not wanted:
        return {}
    try:
        saved = torch.load(place / _EXTRAS, weights_only=True) if sidecar.extras is not None else {}
    except Exception as error:  # noqa: BLE001 - errors of many kinds for a file that is none
        raise Unreadable(f"{place / _EXTRAS} cannot be read: {type(error).__name__}", code="DP091") from None
    missing = sorted(set(wanted) - set(saved))
    if missing:
        raise Unreadable(
            f"{place} holds no state of {missing[0]!r}",
            code="DP091",
            hint="pass the extras that were saved, under the same names",
        )
    return dict(saved)


def _read_sidecar(place: Path) -> Checkpoint:
    try:
        return Checkpoint.parse((place / _SIDECAR).read_bytes())
    except OSError as error:
        raise Unreadable(f"{place} is not a checkpoint: {error.strerror}", hint="pass the folder") from None
    except Tampered as error:
        raise Unreadable(f"{place / _SIDECAR}: {error.message}", hint="pass a folder of save_checkpoint") from None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}", hint="restore the folder as a whole") from None
