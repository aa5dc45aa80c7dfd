"""What Opacus's functions are called with: names that exist, and values that can be kept with a guarantee."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping import Reduction

P = ParamSpec("P")
R = TypeVar("R")

#: One engine serves all of these: hooks on the layers, exact norms, one backward pass.
_SAME_ENGINE = ("hooks", "functorch", "ew", "ghost")


def known_options(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse, instead of swallowing, an option that the function does not have.

    Raises:
        InvalidParameter: with the nearest name (DP060).
    """
    names = list(inspect.signature(function).parameters)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                raise InvalidParameter(f"unknown option {name!r}", code="DP060", hint=_nearest(name, names[1:]))
        return function(*args, **kwargs)

    return checked


def _nearest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {found[0]}?" if found else f"the options are {', '.join(names)}"


def unsupported(message: str, hint: str) -> InvalidParameter:
    """The refusal of an option that Opacus has (DP065)."""
    return InvalidParameter(message, code="DP065", hint=hint)


def check_options(
    *, batch_first: bool, poisson_sampling: bool, clipping: str, noise_generator: object, max_grad_norm: object
) -> None:
    """Refuse options that have another meaning for privacy than this engine gives.

    Raises:
        PrivacyViolation: sampling is not Poisson (DP020).
        InvalidParameter: another option cannot be kept (DP065), or the clipping norm is no number (DP007).
    """
    if poisson_sampling is not True:
        raise PrivacyViolation(
            "poisson_sampling=False: shuffled batches do not have the epsilon of Poisson sampling, which the plan "
            "claims; the true one is often ten times as large",
            code="DP020",
            hint="leave poisson_sampling=True: the private loader draws Poisson batches whatever your DataLoader does",
        )
    if batch_first is not True:
        raise unsupported(
            "batch_first=False: examples in dimension 1",
            "put the examples in dimension 0, with batch_first=True in recurrent layers and attention",
        )
    if clipping != "flat":
        raise unsupported(
            f"clipping={clipping!r}: the plan has one clipping norm over all parameters", 'use clipping="flat"'
        )
    if noise_generator is not None:
        raise unsupported(
            "noise_generator: whoever knows its seed can subtract the noise",
            "leave it out; noise comes from a secret key of the ledger's lease, and every step has its own",
        )
    if isinstance(max_grad_norm, list | tuple):
        raise unsupported("max_grad_norm is a list: one norm for each layer", "give one number, the norm over all")
    if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, int | float):
        raise InvalidParameter(
            f"max_grad_norm must be a number > 0, got {max_grad_norm!r}", code="DP007", hint="a typical start is 1.0"
        )


def check_mode(grad_sample_mode: str) -> None:
    """Refuse modes of Opacus that leave clipping to somebody else (DP065)."""
    if grad_sample_mode in _SAME_ENGINE:
        return
    known = ", ".join(_SAME_ENGINE)
    found = difflib.get_close_matches(grad_sample_mode, _SAME_ENGINE, n=1) if isinstance(grad_sample_mode, str) else []
    meant = f"did you mean {found[0]}? " if found else ""
    raise unsupported(f"grad_sample_mode={grad_sample_mode!r}", f"{meant}{known} all name the one engine there is here")


def check_reduction(loss_reduction: str) -> Reduction:
    """``mean`` or ``sum``, as Opacus has them.

    Raises:
        InvalidParameter: neither (DP030).
    """
    if loss_reduction == "mean":
        return "mean"
    if loss_reduction == "sum":
        return "sum"
    raise InvalidParameter(
        f"unknown loss reduction {loss_reduction!r}", code="DP030", hint='declare "mean" or "sum", as your criterion is'
    )


def check_module(module: Any) -> None:
    """Refuse modules that spread over several processes, whose sums this facade does not put together (DP065)."""
    if not isinstance(module, nn.Module):
        raise InvalidParameter(f"module is {type(module).__name__}, not a torch.nn.Module", code="DP018")
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise unsupported(
            f"the module is wrapped in {type(module).__name__}",
            "pass the module inside; the facade trains in one process",
        )
