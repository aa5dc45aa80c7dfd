"""Random numbers of a forward pass, switched off or made the same for every example, so that two passes compare.

A test at set-up compares a batch with its examples alone. Draws would differ between the two, whatever the model does.
First dropout is switched off wherever it is called as a function (:func:`without_dropout`). What is still drawn can be
replaced, operation by operation, by a constant that is the same for every example and every batch size
(:class:`ConstantDraws`); that reaches also into TorchScript, and needs more of the model, so it is the second resort.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Function -> its argument that draws, where that stands, and what it is set to.
_OFF: dict[Any, tuple[str, int, object]] = {
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        ("training", 2, False),
    ),
    **dict.fromkeys(
        (
            torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.alpha_dropout,
            torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_, torch.native_dropout,
        ),
        ("train", 2, False),
    ),
    F.rrelu: ("training", 3, False),
    torch.rrelu: ("training", 3, False),
    torch.rrelu_: ("training", 3, False),
    F.scaled_dot_product_attention: ("dropout_p", 4, 0.0),
    F.multi_head_attention_forward: ("dropout_p", 10, 0.0),
}  # fmt: skip


class _WithoutDropout(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        off = _OFF.get(func)
        if off is not None:
            name, place, value = off
            if len(args) > place:
                args = (*args[:place], value, *args[place + 1 :])
            else:
                kwargs = {**kwargs, name: value}
        return func(*args, **kwargs)


def without_dropout() -> TorchFunctionMode:
    """Within this context dropout, also of attention, and the random slope of rrelu are off, whoever calls them."""
    return _WithoutDropout()


class ConstantDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Within this context the draws of torch are constants that depend on neither place, batch size nor stream.

    Every draw is a value that its distribution may give, dropout and dropped paths keep everything, permutations
    reverse. Distributions that are not known here draw as ever.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        if name in _SPECIAL:
            return _SPECIAL[name](given)
        for argument in ("dropout_p", "dropout"):
            if argument in given:
                return func(**{**given, argument: 0.0})
        result = func(*args, **kwargs)  # draws, for shape and type; then the values are replaced
        constant = _constant(name.removesuffix("_like").removesuffix("_"), given)
        if constant is not None and isinstance(result, Tensor):
            result.copy_(constant.expand_as(result)) if isinstance(constant, Tensor) else result.fill_(constant)
        return result


def _constant(name: str, given: dict[str, Any]) -> Tensor | float | None:
    """What a draw is replaced by; None where that is not known."""
    if name in ("rand", "randn"):
        return 0.5
    if name == "uniform":
        return 0.5 * (float(given.get("from", 0.0)) + float(given.get("to", 1.0)))
    if name == "normal":
        mean, std = given.get("mean", 0.0), given.get("std", 1.0)
        moved: Tensor | float = mean + 0.5 * std
        return moved
    if name in ("exponential", "geometric"):
        return 1.0
    if name == "cauchy":
        return float(given.get("median", 0.0))
    if name == "log_normal":
        return 1.0
    if name == "randint":
        return float(given.get("low", 0))
    if name == "random":
        return float(given.get("from", 0) or 0)
    return None


def _bernoulli(given: dict[str, Any]) -> Tensor:
    """One wherever one is possible: a place that is kept stays, whatever the probability."""
    p = given.get("p", given["self"])
    keep: Tensor = (p > 0).to(given["self"].dtype) if isinstance(p, Tensor) else torch.as_tensor(float(p > 0))
    return keep.to(given["self"]).expand_as(given["self"]).clone()


def _bernoulli_(given: dict[str, Any]) -> Tensor:
    filled: Tensor = given["self"].copy_(_bernoulli({"p": 0.5, **given}))
    return filled


def _native_dropout(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Keeps everything, with the scale that the backward pass will use."""
    x, p = given["input"], float(given["p"])
    train = given.get("train") is not False and 0.0 < p < 1.0
    return x / (1.0 - p) if train else x.clone(), torch.ones_like(x, dtype=torch.bool)


def _rrelu(given: dict[str, Any]) -> Tensor:
    """The slope in the middle, noted for the backward pass."""
    x, noise = given["self"], given["noise"]
    slope = 0.5 * (float(given.get("lower", 0.125)) + float(given.get("upper", 1 / 3)))
    noise.copy_(torch.where(x <= 0, slope, 1.0))
    scaled: Tensor = x * noise
    return scaled


def _rrelu_(given: dict[str, Any]) -> Tensor:
    filled: Tensor = given["self"].copy_(_rrelu(given))
    return filled


def _multinomial(given: dict[str, Any]) -> Tensor:
    """The most likely ones, the most likely one again and again where it is put back."""
    count = int(given["num_samples"])
    most: Tensor = given["self"].topk(1 if given.get("replacement") else count, dim=-1).indices
    return most.expand(*most.shape[:-1], count).contiguous()


def _randperm(given: dict[str, Any]) -> Tensor:
    options = {k: v for k, v in given.items() if k in ("device", "dtype") and v is not None}
    return torch.arange(int(given["n"]) - 1, -1, -1, **options)


def _poisson(given: dict[str, Any]) -> Tensor:
    rounded: Tensor = given["self"].round()
    return rounded


_SPECIAL: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bernoulli": _bernoulli,
    "bernoulli_": _bernoulli_,
    "native_dropout": _native_dropout,
    "rrelu_with_noise": _rrelu,
    "rrelu_with_noise_": _rrelu_,
    "multinomial": _multinomial,
    "randperm": _randperm,
    "poisson": _poisson,
}
