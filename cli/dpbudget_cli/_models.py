"""The models of ``dpbudget train``: linear, MLP, CNN, or what a factory of the user returns."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dpbudget.errors import DPBudgetError, InvalidParameter, Unreadable

if TYPE_CHECKING:
    import torch

    from dpbudget_cli._job import Job

BUILT_IN = ("linear", "mlp", "cnn")


def make_model(job: Job, shape: tuple[int, ...]) -> torch.nn.Module:
    """The model with its initial weights, on the CPU and in train mode.

    Args:
        job: which model, how wide, its seed, and weights to begin with.
        shape: of one record's features.

    Raises:
        InvalidParameter: no such model, records that it does not take, or a factory that failed (DP060, DP091, DP093).
        Unreadable: the initial weights are of another model (DP091).
    """
    import torch

    torch.manual_seed(job.seed)  # initial weights only; sampling and noise have keys of their own
    if job.model in BUILT_IN:
        model = _built_in(job, shape)
    else:
        model = _from_factory(job, _values(shape))
        _try_out(model, job, shape)
    if job.init:
        _load(model, job.init)
    return model.train()


def _values(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _built_in(job: Job, shape: tuple[int, ...]) -> torch.nn.Module:
    from torch import nn

    features, classes = _values(shape), job.class_count
    if job.model == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))
    if job.model == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(features, job.hidden), nn.Tanh(), nn.Linear(job.hidden, classes)
        )  # fmt: skip
    return _cnn(_channels(job, shape), classes)


def _cnn(channels: int, classes: int) -> torch.nn.Module:
    """Two convolutions for images of any size, with bounded activations and norms within each image.

    Tanh, since clipping likes bounded activations (Papernot et al. 2021); GroupNorm, since batch statistics mix people.
    """
    from torch import nn

    return nn.Sequential(
        nn.Unflatten(1, (1, -1)) if channels == 0 else nn.Identity(),  # [B, H, W] has no channel
        nn.Conv2d(max(channels, 1), 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.Tanh(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * 16, classes),
    )


def _channels(job: Job, shape: tuple[int, ...]) -> int:
    """Channels of an image ``[C, H, W]``; 0 for ``[H, W]``, which has one and does not say so."""
    if len(shape) == 2:
        return 0
    if len(shape) == 3 and shape[0] <= min(shape[1:]):
        return shape[0]
    last = len(shape) == 3 and shape[2] < shape[0]
    raise InvalidParameter(
        f"cnn takes images of shape [H, W] or [C, H, W], and a record of {job.data} has the shape {list(shape)}",
        code="DP091",
        hint="move the channels before height and width: x.transpose(0, 3, 1, 2)"
        if last
        else "store images in an "
        ".npz file, as an array [records, H, W] or [records, C, H, W]; --model mlp takes any shape",
    )


def _from_factory(job: Job, features: int) -> torch.nn.Module:
    """What ``module:factory(features, classes)`` returns; its failures are reported as the user's (DP093)."""
    import torch

    module, colon, name = job.model.partition(":")
    if not colon or not module or not name:
        from dpbudget._checks import did_you_mean

        close = did_you_mean(job.model, BUILT_IN)
        raise InvalidParameter(
            f"unknown model {job.model!r}",
            code="DP060",
            hint=f"choose {', '.join(BUILT_IN)} or module:factory. {close}".strip(),
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        model = getattr(importlib.import_module(module), name)(features, job.class_count)
    except DPBudgetError:
        raise
    except Exception as error:  # noqa: BLE001 - code of the user: whatever it raises is reported, not shown as a trace
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InvalidParameter(
            f"the model factory {job.model} failed with {what}",
            code="DP093",
            hint="it is imported from this folder or PYTHONPATH, called as factory(features, classes), and returns a "
            "torch.nn.Module",
        ) from None
    finally:
        sys.path.pop(0)
    if not isinstance(model, torch.nn.Module):
        raise InvalidParameter(
            f"the model factory {job.model} returned {type(model).__name__}",
            code="DP093",
            hint="return a torch.nn.Module",
        )
    return model


def _try_out(model: torch.nn.Module, job: Job, shape: tuple[int, ...]) -> None:
    """Call a user's model on two records of zeros; what it says of those may be shown in full (DP093)."""
    import torch

    what = ""
    try:
        with torch.no_grad():
            scores = model.eval()(torch.zeros(2, *shape))
        if not isinstance(scores, torch.Tensor) or scores.shape != (2, job.class_count):
            what = f"returns {list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__}"
    except Exception as error:  # noqa: BLE001 - code of the user, as above
        what = "fails with " + " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if what:
        raise InvalidParameter(
            f"the model {job.model} {what} for two records of zeros, of shape {[2, *shape]}",
            code="DP093",
            hint=f"take float32 of shape [B, {', '.join(map(str, shape))}] and return [B, {job.class_count}]; nothing "
            "was charged",
        )


def _load(model: torch.nn.Module, path: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from dpbudget.ledger.store.files import check_path

    if not Path(path).exists():
        raise Unreadable(f"{path}: no such file", code="DP091", hint=check_path(path))
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError, ValueError):
        raise Unreadable(
            f"{path} does not hold weights of this model", code="DP091", hint="pass the --output of the same --model"
        ) from None
