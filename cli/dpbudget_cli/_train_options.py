"""The options of ``dpbudget train``; those that few calls need are hidden from ``-h``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dpbudget_cli._keys import PASSPHRASE_FD
from dpbudget_cli._noise_keys import committed_options, keep_options
from dpbudget_cli._options import (
    COUNT,
    EPSILON,
    INSIDE,
    JSON,
    POSITIVE,
    SEED,
    SHARE,
    Plain,
    TwoNames,
    to_count,
    to_float,
)

if TYPE_CHECKING:
    from dpbudget_cli._job import Classes

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # generic only in newer releases of click

_Command = TypeVar("_Command", bound=Callable[..., Any])
_MAX_CLASSES = 10**12


class ClassesType(_ParamType):
    """``K``, a number of classes, or their names in the order of their numbers, ``no,yes``."""

    name = "classes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Classes:
        """Number and names; raises InvalidParameter (DP009) for neither."""
        from dpbudget import _checks
        from dpbudget.errors import InvalidParameter

        if "," not in str(value):
            return _checks.as_count("classes", to_count(str(value)), _MAX_CLASSES), ()
        names = tuple(part.strip() for part in str(value).split(","))
        if len(set(names)) < len(names) or "" in names:
            raise InvalidParameter(
                f"--classes names a class twice or not at all: {value!r:.80}",
                code="DP009",
                hint="write every name once, as in --classes no,yes",
            )
        return len(names), names


FINITE = Plain("number", to_float, "a finite number")


def _shown(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, **settings)


def _hidden(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, hidden=True, **settings)


_OPTIONS = (
    _shown("--ledger", "path", required=True, metavar="PATH", help="The ledger that holds the plan."),
    _shown("--plan", "run_id", metavar="RUN", help="The run, if several have steps left."),
    _shown("--data", required=True, metavar="FILE", help="Private data: .csv, .npz or .parquet."),
    _shown(
        "--target", "--label", cls=TwoNames, default="y", metavar="COL", help="Column or array with the labels (y)."
    ),
    _shown("--classes", type=ClassesType(), required=True, metavar="K", help="Number of classes, or names: no,yes."),
    _shown("--model", default="linear", metavar="M", help="linear, mlp, cnn or module:factory."),
    _shown(
        "--lr",
        "--learning-rate",
        "lr",
        cls=TwoNames,
        type=POSITIVE,
        default=0.5,
        metavar="R",
        help="Learning rate of SGD (0.5).",
    ),
    _shown("--feature-scale", type=POSITIVE, default=1.0, metavar="F", help="Public factor for all features (1)."),
    _shown("--user-column", metavar="COL", help="Whose each row is, in a ledger for users."),
    _hidden("--max-examples", type=COUNT, metavar="K", help="Most rows of a user in a step: public."),
    _shown("--output", metavar="FILE", help="New file for weights; FILE.md is their card."),
    _shown("--max-steps", type=COUNT, metavar="T", help="End after so many steps."),
    _shown("--public-eval", metavar="FILE", help="File that you declare public, for an accuracy."),
    _shown("--hold-out", type=INSIDE, metavar="SHARE", help="Keep this share of records from training."),
    _shown("--score-plan", metavar="RUN", help="One-step plan that pays for their accuracy."),
    _hidden("--writer-key", metavar="FILE", help="PATH.writer.key or writer.key beside it if not given."),
    _hidden("--hidden", type=COUNT, default=64, metavar="H", help="Width of the mlp (64)."),
    _hidden("--momentum", type=SHARE, default=0.0, metavar="M", help="Momentum (0)."),
    _hidden("--fill-missing", type=FINITE, metavar="V", help="Public value in the place of missing features."),
    _hidden("--validation", metavar="FILE", help="Private held-out records in a file of their own."),
    _hidden("--seed", type=SEED, default=0, metavar="N", help="Seed of the initial weights alone (0)."),
    _hidden("--init", metavar="FILE", help="Begin with these weights: public, or an --output."),
    _hidden("--stop-epsilon", type=EPSILON, metavar="E", help="End before live epsilon exceeds this."),
    _hidden("--physical-batch-size", type=COUNT, metavar="B", help="Most records in memory at once."),
    _hidden("--checkpoint-every", type=COUNT, default=100, metavar="T", help="Steps between checkpoints (100)."),
    keep_options,
    committed_options,
    PASSPHRASE_FD,
    JSON,
)


def train_options(command: _Command) -> _Command:
    """Every option of ``dpbudget train``, in the order in which help lists them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
