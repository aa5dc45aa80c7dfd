"""Options that several commands share, and how their text becomes a checked value."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # generic only in newer releases of click

_Command = TypeVar("_Command", bound=Callable[..., Any])
_DECIMAL = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?"
_NUMBER = re.compile(rf"\s*({_DECIMAL})\s*(?:/\s*({_DECIMAL})\s*)?", re.ASCII)
_MAX_TEXT = 64


def parse_number(text: str) -> Fraction | None:
    """The exact value of ``12``, ``1e-5`` or ``256/60000``; None for anything else, NaN and infinity included."""
    match = _NUMBER.fullmatch(text) if len(text) <= _MAX_TEXT else None
    if match is None:
        return None
    try:
        top, bottom = (Fraction(part) if part else Fraction(1) for part in match.groups())
        return top / bottom
    except (ValueError, ZeroDivisionError):
        return None


def to_float(text: str) -> float | str:
    """The nearest float of a number's text; the text itself where it is none, for the check to refuse by name."""
    number = parse_number(text)
    try:
        return text if number is None else float(number)
    except OverflowError:
        return text


def to_count(text: str) -> int | str:
    """The integer of a number's text (``60000``, ``6e4``); the text itself where it is none."""
    number = parse_number(text)
    return int(number) if number is not None and number.denominator == 1 else text


class Checked(_ParamType):
    """A parameter type made of a reader and a check from ``dpbudget._checks`` (imported when it is used)."""

    def __init__(self, name: str, read: Callable[[str], Any], check: str, choices: tuple[str, ...] = ()) -> None:
        self.name = name
        self.choices = choices
        self._read = read
        self._check = check

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The choices that begin so, where there are choices."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self.choices if name.startswith(incomplete)]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The checked value; raises InvalidParameter with the parameter's own code."""
        if not isinstance(value, str) or (ctx is not None and ctx.resilient_parsing):
            return value
        from dpbudget import _checks

        read = self._read(value)
        if self._check == "as_count":
            label = param.opts[0].lstrip("-") if param else self.name
            return _checks.as_count(label, read, 10**12)
        getattr(_checks, self._check)(read)
        return read


def to_positive(text: str) -> float | str:
    """A finite number above 0; the text itself otherwise."""
    number = to_float(text)
    return number if isinstance(number, float) and number > 0.0 else text


class Plain(_ParamType):
    """A public number without a privacy code of its own; raises InvalidParameter (DP009)."""

    def __init__(self, name: str, read: Callable[[str], Any], wanted: str) -> None:
        self.name = name
        self._read = read
        self._wanted = wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; raises InvalidParameter (DP009) that names the option."""
        if not isinstance(value, str):
            return value
        number = self._read(value)
        if isinstance(number, str):
            from dpbudget.errors import InvalidParameter

            label = param.opts[0] if param else self.name
            raise InvalidParameter(f"{label} must be {self._wanted}, got {value!r}", hint=f"pass {self._wanted}")
        return number


def to_seed(text: str) -> int | str:
    """A seed that torch takes; the text itself otherwise."""
    number = to_count(text)
    return number if isinstance(number, int) and 0 <= number < 2**63 else text


def to_share(text: str) -> float | str:
    """A number in [0, 1); the text itself otherwise."""
    number = to_float(text)
    return number if isinstance(number, float) and 0.0 <= number < 1.0 else text


def to_open_share(text: str) -> float | str:
    """A number in (0, 1); the text itself otherwise."""
    number = to_float(text)
    return number if isinstance(number, float) and 0.0 < number < 1.0 else text


def to_step(text: str) -> int | str:
    """A whole number from 0; the text itself otherwise."""
    number = to_count(text)
    return number if isinstance(number, int) and number >= 0 else text


STEP = Plain("step", to_step, "a whole number, counted from 0")
INSIDE = Plain("share", to_open_share, "a number strictly between 0 and 1")
POSITIVE = Plain("number", to_positive, "a number above 0")
SEED = Plain("seed", to_seed, "a whole number in [0, 2^63)")
SHARE = Plain("share", to_share, "a number in [0, 1)")
EPSILON = Checked("epsilon", to_float, "as_epsilon")
DELTA = Checked("delta", to_float, "as_delta")
RATE = Checked("rate", to_float, "as_rate")
NOISE = Checked("noise", to_float, "as_noise_multiplier")
CLIP = Checked("norm", to_float, "as_clip_norm")
COUNT = Checked("count", to_count, "as_count")
EPOCHS = Checked("epochs", lambda text: parse_number(text) if parse_number(text) is not None else text, "as_epochs")
# The choices are for completion; the check alone decides, and a test compares the two.
ACCOUNTANT = Checked("accountant", str, "as_accountant", ("prv", "rdp"))
ANY_ACCOUNTANT = Checked("accountant", str, "as_any_accountant", ("prv", "rdp", "pld"))
ADJACENCY = Checked("adjacency", str, "as_adjacency", ("add-remove", "zero-out", "replace-one"))
UNIT = Checked("unit", str, "as_unit", ("example", "user"))
NOISE_MODE = Checked("mode", str, "as_noise_mode", ("secure", "exact"))
MODE = click.option("--noise", type=NOISE_MODE, metavar="MODE", help="secure (default) or exact (integer sums).")


class PhaseType(_ParamType):
    """``Q,S,T``: sampling rate, noise multiplier and steps of one phase."""

    name = "q,s,t"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The checked triple; raises InvalidParameter (DP005 to DP009)."""
        from dpbudget import _checks
        from dpbudget.errors import InvalidParameter

        if not isinstance(value, str):
            return value
        parts = value.split(",")
        if len(parts) != 3:
            raise InvalidParameter(
                f"a phase is Q,S,T, got {value!r}", code="DP009", hint="write --phase 256/60000,1.1,14062"
            )
        rate, sigma, steps = to_float(parts[0]), to_float(parts[1]), to_count(parts[2])
        _checks.as_rate(rate)
        return rate, _checks.as_noise_multiplier(sigma), _checks.as_count("steps", steps, 10**9)


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


def meaning_options(command: _Command) -> _Command:
    """--explain and --plot."""
    for option in (
        click.option("--plot", "plot", metavar="FILE", help="Draw the profile into a .png, .svg or .pdf file."),
        click.option("--explain", "explain", is_flag=True, help="Say in plain words what the numbers mean."),
    ):
        command = option(command)
    return command


def question_options(command: _Command) -> _Command:
    """--accountant and --adjacency of a question that nothing claims."""
    return _adjacency_and(ANY_ACCOUNTANT, "prv (default, tight), rdp (looser) or pld (a check).", command)


def accounting_options(command: _Command) -> _Command:
    """--accountant and --adjacency."""
    return _adjacency_and(ACCOUNTANT, "prv (default, tight) or rdp (looser).", command)


def _adjacency_and(accountant: Checked, choices: str, command: _Command) -> _Command:
    for option in (
        click.option("--adjacency", type=ADJACENCY, help="add-remove (default), zero-out or replace-one."),
        click.option("--accountant", type=accountant, help=choices),
    ):
        command = option(command)
    return command


#: What decides about no budget, and where it is said.
NO_PRIVACY = dict.fromkeys(
    ("--lr", "--learning-rate", "--momentum"), "leave it out: privacy does not depend on it; dpbudget train takes it"
)


class TwoNames(click.Option):
    """An option with a second name, by which newcomers look for it; help shows the first as usual."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The line of the first name."""
        record = super().get_help_record(ctx)
        return None if record is None else (record[0].replace(f", {self.opts[1]}", ""), record[1])


#: The option's name, and what newcomers call it.
SIZE, BATCH = ("--dataset-size", "--examples"), ("--batch-size", "--batch")
ADVANTAGE = click.option(
    "--advantage",
    "--max-attack-advantage",
    cls=TwoNames,
    type=INSIDE,
    metavar="A",
    help="Instead of epsilon: largest TPR - FPR of an attack.",
)


def schedule_options(command: _Command) -> _Command:
    """The options that say how often each record is used."""
    for option in (
        click.option("--epochs", type=EPOCHS, metavar="K", help="Expected uses of each record."),
        click.option("--steps", type=COUNT, metavar="T", help="Number of steps."),
        click.option(*BATCH, cls=TwoNames, type=COUNT, metavar="B", help="Expected batch size."),
        click.option(*SIZE, cls=TwoNames, type=COUNT, metavar="N", help="Public nominal size of the dataset."),
        click.option("--sample-rate", type=RATE, metavar="Q", help="Probability that a record enters a batch."),
    ):
        command = option(command)
    return command


def mechanism_options(command: _Command) -> _Command:
    """The options that describe a schedule with its noise: Q, S and T, or phases."""
    for option in (
        click.option(
            "--phase", "phases", type=PhaseType(), multiple=True, metavar="Q,S,T", help="One phase; may be repeated."
        ),
        click.option("--epochs", type=EPOCHS, metavar="K", help="Expected uses of each record, instead of --steps."),
        click.option("--steps", type=COUNT, metavar="T", help="Number of steps."),
        click.option(*BATCH, cls=TwoNames, type=COUNT, metavar="B", help="Expected batch size."),
        click.option(*SIZE, cls=TwoNames, type=COUNT, metavar="N", help="Public nominal size, with --batch-size."),
        click.option("--noise-multiplier", type=NOISE, metavar="S", help="Noise standard deviation / clipping norm."),
        click.option("--sample-rate", type=RATE, metavar="Q", help="Probability that a record enters a batch."),
    ):
        command = option(command)
    return command
