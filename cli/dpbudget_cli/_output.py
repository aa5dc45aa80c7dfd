"""The two voices of every command: one JSON object or a table on standard output, talk on standard error.

``--quiet`` leaves of the talk what somebody has to know, errors and warnings; ``--verbose`` adds details.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

from dpbudget.errors import CODES, WAYS_OUT, DPBudgetError, DPBudgetWarning, NotComputable

if TYPE_CHECKING:
    from dpbudget._config import Assumed
    from dpbudget.curve import Bounds

WANTS_JSON = "--json"
#: Characters that could drive a terminal or forge a line; file names and messages are data.
_UNSAFE = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_PASSWORD = re.compile(r"(postgres(?:ql)?:/{1,2}[^\s/@:]*:)[^\s/@]*@")
_INTERNAL_EXIT = 6


@dataclass
class Voice:
    """How much is said on standard error; the answer on standard output is the same."""

    quiet: bool = False
    verbose: bool = False

    def reset(self) -> None:
        """As it is before any option was read."""
        self.quiet = self.verbose = False


#: Of the command that runs: a process runs one at a time, and every one begins with a reset.
VOICE = Voice()


def emit_json(answer: Mapping[str, Any]) -> None:
    """Print exactly one JSON object; infinities and NaN, which JSON has not, become null."""
    click.echo(json.dumps(_finite(answer), allow_nan=False))


def emit_table(rows: Iterable[tuple[str, object]], *, title: str = "") -> None:
    """Print ``name  value`` lines with aligned columns."""
    shown = [(name, clean(value)) for name, value in rows]
    width = max((len(name) for name, _ in shown), default=0)
    if title:
        click.secho(title, bold=True)
    for name, value in shown:
        click.echo(f"{name:<{width}}  {value}".rstrip())


def emit_columns(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table of several columns, each as wide as its widest cell."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    click.secho("  ".join(f"{text:<{width}}" for text, width in zip(headers, widths, strict=True)).rstrip(), bold=True)
    for line in cells:
        click.echo("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())


def talk(text: str) -> None:
    """A line for people, on standard error; with --quiet only if it begins with ``warning``."""
    if not VOICE.quiet or text.startswith("warning"):
        _say(text)


def detail(text: str) -> None:
    """A line for those who ask with --verbose; as public as everything else that is printed."""
    if VOICE.verbose:
        _say(text)


def _say(text: str) -> None:
    click.echo(clean(text), err=True)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Within the block a DPBudgetWarning is a line on standard error, each once; other warnings go where they went."""
    said: set[str] = set()
    with warnings.catch_warnings():
        before = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, DPBudgetWarning):
                before(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                talk(f"warning {message}")

        warnings.simplefilter("always", DPBudgetWarning)
        warnings.showwarning = tell
        yield


def talk_assumed(assumed: Iterable[Assumed]) -> None:
    """One line for every value that nobody stated."""
    for item in assumed:
        value = item.value
        whole = isinstance(value, float) and value.is_integer()
        talk(f"assumed {item.name.replace('_', '-')} = {int(value) if whole else value} ({item.why})")


def bounds_json(bounds: Bounds) -> dict[str, Any]:
    """The JSON form of a two-sided answer; ``upper`` is the guarantee, and there is none without an end."""
    if not math.isfinite(bounds.upper):
        raise NotComputable("no finite upper bound is known", hint="try the accountant rdp, or a larger delta")
    return {"lower": bounds.lower, "upper": bounds.upper, "kind": bounds.kind, "approximate": None}


def assumed_json(assumed: Iterable[Assumed]) -> list[dict[str, Any]]:
    """The JSON form of assumed values."""
    return [{"name": item.name, "value": item.value, "why": item.why} for item in assumed]


def floor_float(value: Fraction) -> float:
    """The largest float that is not above an exact value."""
    nearest = float(value)
    return nearest if nearest <= value else math.nextafter(nearest, -math.inf)


def ceil_float(value: Fraction) -> float:
    """The smallest float that is not below an exact value."""
    nearest = float(value)
    return nearest if nearest >= value else math.nextafter(nearest, math.inf)


def clean(value: object) -> str:
    """Text without control characters, and without passwords."""
    return _hide_password(str(value).translate(_UNSAFE))


def _hide_password(text: str) -> str:
    """Text in which a database that was named in a wrong place, such as a key's, shows no password."""
    return _PASSWORD.sub(r"\1***@", text)


def report_error(error: Exception, as_json: bool) -> int:
    """Print an error as ``error DPxxx: message`` and ``Fix: hint`` (or as JSON); returns the exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError) and not as_json:
        click.echo(error.format_message(), err=True)
        return 2
    code, message, hint, exit_code = _explain(error)
    if as_json:
        emit_json({"error": {"code": code, "message": _hide_password(message), "hint": _hide_password(hint)}})
    else:
        _say(f"error {code}: {message}")
        if hint:
            _say(f"Fix: {hint}")
        detail(f"{code} means: {CODES.get(code, '')}")
    return exit_code


def _explain(error: Exception) -> tuple[str, str, str, int]:
    if isinstance(error, DPBudgetError):
        way_out = error.hint or WAYS_OUT[error.code].rstrip(".")  # what helps in general, where nobody knows better
        return error.code, error.message, way_out, error.exit_code
    if isinstance(error, click.ClickException):
        return _explain_click(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return "DP070", f"{where}{error.strerror or error}", "check the path and its permissions", 4
    if os.environ.get("DPBUDGET_TRACEBACK"):
        raise error
    what = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return "DP099", f"internal failure: {what}", "report it, with DPBUDGET_TRACEBACK=1 set", _INTERNAL_EXIT


def _explain_click(error: click.ClickException) -> tuple[str, str, str, int]:
    """A usage error of the parser in our form: what is wrong, and the nearest thing that is right."""
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "dpbudget"
    hint = f"see {path} --help"
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return "DP060", f"{path} needs a command", hint, 2
    if isinstance(error, click.NoSuchOption):
        from dpbudget._checks import did_you_mean

        elsewhere: dict[str, str] = {} if error.ctx is None else getattr(error.ctx.command, "elsewhere", {})
        if error.option_name in elsewhere:
            return "DP060", f"unknown option {error.option_name}", elsewhere[error.option_name], 2
        known = [] if error.ctx is None else [name for p in error.ctx.command.get_params(error.ctx) for name in p.opts]
        longer = [name for name in known if name.startswith("--" + error.option_name.lstrip("-"))]
        if longer:  # the beginning of an option is not taken for it
            return "DP060", f"unknown option {error.option_name}", f"write {' or '.join(longer)}", 2
        close = did_you_mean(error.option_name, [name for name in known if name.startswith("--")])
        return "DP060", f"unknown option {error.option_name}", close or hint, 2
    if "unexpected extra argument" in error.format_message():
        hint = f"name the option of every value, as the examples do; {hint}"
    message, _, fix = error.format_message().rstrip(".").partition(". Fix: ")
    code = "DP064" if isinstance(error, click.MissingParameter) else "DP060"
    message = " ".join(message.split())
    return code, message[:1].lower() + message[1:], fix or _how_to_write(error) or hint, 2


def _how_to_write(error: click.ClickException) -> str:
    """The option or argument that is missing, as it is to be written; empty for other errors."""
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    if ctx is None:
        return ""
    wanted = error.param if isinstance(error, click.MissingParameter) else None
    if isinstance(error, click.BadOptionUsage):
        wanted = next((p for p in ctx.command.get_params(ctx) if error.option_name in p.opts), None)
    if isinstance(wanted, click.Option):
        return f"pass {wanted.opts[0]} {wanted.make_metavar(ctx)}: {wanted.help}"
    if isinstance(wanted, click.Argument):
        usage = " ".join([ctx.command_path, *ctx.command.collect_usage_pieces(ctx)])
        return f"write {usage}; see {ctx.command_path} --help"
    return ""


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
