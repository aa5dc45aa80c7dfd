"""The options that every command has beside its own: how much it says on standard error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import click

from dpbudget_cli._output import VOICE, detail, talk

#: What the line of --help says, so that two more options cost no line of any page.
HELP_LINE = "Show this; also -q (quiet) and -v (verbose)."


def voice_options(*, hidden: bool) -> list[click.Parameter]:
    """--quiet and --verbose: read before all others, and kept in :data:`VOICE`."""
    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            hidden=hidden,
            callback=_heard,
            help="Say no more than errors and warnings beside the answer.",
        ),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            hidden=hidden,
            callback=_heard,
            help="Say also what an error means, and which files are used.",
        ),
    ]


def _heard(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    setattr(VOICE, str(param.name), True)
    if VOICE.quiet and VOICE.verbose:
        from dpbudget.errors import InvalidParameter

        raise InvalidParameter(
            "--quiet and --verbose contradict each other", code="DP064", hint="leave --verbose out, or --quiet"
        )


class _Teller(logging.Handler):
    """Log records of the packages as lines of the talk."""

    def emit(self, record: logging.LogRecord) -> None:
        """Tell a warning always, the rest if details are asked for."""
        if record.levelno >= logging.WARNING:
            talk(f"warning {record.getMessage()}")
        else:
            detail(record.getMessage())


@contextmanager
def logs_told() -> Iterator[None]:
    """Within the block what the packages log is told, none of which depends on data."""
    teller, loggers = _Teller(logging.INFO), [logging.getLogger(name) for name in ("dpbudget", "dptrainer")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(teller)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(teller)
            logger.setLevel(level)
