"""Checkpoints in one file, and the mark in a private model's state dict; the ledger decides what was spent."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import IO, Any, BinaryIO

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dpbudget.errors import PrivacyViolation, Unreadable
from dptrainer.clipping.recording import Hook
from dptrainer.opacus._options import unsupported
from dptrainer.opacus._spending import Spending

PathOrFile = str | os.PathLike[str] | BinaryIO | IO[bytes]

#: Where a state dict says by how many charged steps of which run its weights were trained.
MARK = "dptrainer.run"
_WEIGHTS, _SPENT, _OPTIMIZER = "module_state_dict", "privacy_accountant_state_dict", "optimizer_state_dict"


_marks: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()


def mark(module: nn.Module, spending: Spending, run_id: str) -> None:
    """From now on the state dict of ``module`` says what trained it, and it refuses weights that nobody paid for.

    The mark lies in the metadata of the state dict: its keys are those of the plain model.
    """

    def write(module: nn.Module, state: object, prefix: str, metadata: dict[str, Any]) -> None:
        metadata[MARK] = {run_id: charged_of(spending).get(run_id, 0)}

    def check(module: nn.Module, state: object, prefix: str, metadata: Mapping[str, Any], *_: object) -> None:
        refuse_unpaid(spending, metadata.get(MARK, {}))

    # Inert in copies of the module.
    _marks[module] = [
        module.register_state_dict_post_hook(Hook(write)),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(Hook(check)),  # type: ignore[no-untyped-call]
    ]


def unmark(module: nn.Module) -> None:
    """Undo :func:`mark`; idempotent."""
    for handle in _marks.pop(module, []):
        handle.remove()


def charged_of(spending: Spending) -> dict[str, int]:
    """Run id -> steps charged."""
    return {} if spending.state is None else {run_id: run.charged for run_id, run in spending.state.runs.items()}


def refuse_unpaid(spending: Spending, steps: Mapping[str, int]) -> None:
    """Refuse weights of runs that this ledger does not know, or has charged fewer steps of.

    Raises:
        PrivacyViolation: DP051.
    """
    charged = charged_of(spending)
    for run_id, count in steps.items():
        if count > charged.get(run_id, 0):
            raise PrivacyViolation(
                f"the weights were trained with {count} private steps of run {run_id}, but this ledger has "
                f"{charged.get(run_id, 0)} of them",
                code="DP051",
                hint='keep the ledger in a file, PrivacyEngine(ledger="training.ledger"), and open the same one when '
                "you resume; weights that may count as public are loaded before make_private",
            )


def save(
    path: PathOrFile,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    spending: Spending,
    extra: Mapping[str, Any] | None,
    module_kwargs: Mapping[str, Any] | None,
    save_kwargs: Mapping[str, Any] | None,
) -> None:
    """Weights, optimizer state, and which steps of which ledger trained them. No key, no batch, no noise."""
    ledger = spending.ledger
    content = dict(extra or {})
    content[_WEIGHTS] = module.state_dict(**dict(module_kwargs or {}))
    content[_SPENT] = {
        "mechanism": "ledger",
        "history": spending.history(),
        "charged": charged_of(spending),
        "head": None if ledger is None else str(ledger.head),
    }
    if optimizer is not None:
        content[_OPTIMIZER] = optimizer.state_dict()
    torch.save(content, path, **dict(save_kwargs or {}))


def load(
    path: PathOrFile,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    spending: Spending,
    module_kwargs: Mapping[str, Any] | None,
    load_kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Load what :func:`save` wrote, after the ledger was asked; what was spent stays as the ledger says.

    Raises:
        PrivacyViolation: the ledger has not charged the steps that trained these weights (DP051).
        Unreadable: no such checkpoint, or one with code in it (DP091).
    """
    options = dict(load_kwargs or {})
    if options.pop("weights_only", True) is not True:
        raise unsupported("weights_only=False would run code from the file", "load such a file yourself")
    try:
        content = torch.load(path, weights_only=True, **options)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - torch raises errors of many kinds for files that are none
        raise Unreadable(
            f"the checkpoint cannot be read as weights only: {type(error).__name__}",
            code="DP091",
            hint="pass a file of save_checkpoint; no code of the file was run",
        ) from None
    spent = content.get(_SPENT) if isinstance(content, dict) else None
    if not isinstance(spent, dict) or _WEIGHTS not in content:
        raise Unreadable("the file is no checkpoint of an engine", code="DP091", hint="pass a file of save_checkpoint")
    if spent.get("mechanism") != "ledger":
        raise PrivacyViolation(
            "the weights were trained by Opacus, with steps that no ledger holds",
            code="DP051",
            hint="load the weights yourself before make_private; what was spent on them comes on top",
        )
    charged = spent.get("charged")
    if not isinstance(charged, dict) or not all(isinstance(count, int) for count in charged.values()):
        raise Unreadable("the file does not say what was spent", code="DP091", hint="pass a file of save_checkpoint")
    refuse_unpaid(spending, charged)
    module.load_state_dict(content[_WEIGHTS], **dict(module_kwargs or {}))
    if optimizer is not None and content.get(_OPTIMIZER):
        optimizer.load_state_dict(content.pop(_OPTIMIZER))
    return dict(content)
