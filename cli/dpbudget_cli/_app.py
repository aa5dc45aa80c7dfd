"""What every command and group of commands does: its help, its lazy import, and what becomes of every error."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from dpbudget_cli._output import VOICE, WANTS_JSON, report_error, warnings_told
from dpbudget_cli._shells import name_files
from dpbudget_cli._voice import HELP_LINE, logs_told, voice_options

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: Exit codes, as every page of help states them.
EXIT_CODES = (
    "Exit codes: 0 done, 1 invalid, 2 wrong usage, 3 over budget, 4 unreadable, 5 unanchored, 6 not computable, "
    "130 interrupted, 141 broken pipe."
)
#: The variable by which a shell asks for completions; click's name for a command called dpbudget.
COMPLETE_VAR = "_DPBUDGET_COMPLETE"
#: What a shell reports for a command that SIGPIPE ended.
_BROKEN_PIPE = 141
#: Of every group; a command has the names of its own.
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Leaf(click.Command):
    """A command whose help keeps the lines of its examples and ends with the exit codes.

    Attributes:
        elsewhere: option that the command does not have, but one could look for, to where it is to be found.
    """

    def __init__(
        self, name: str | None, help: str | None = None, *, elsewhere: dict[str, str] | None = None, **kwargs: Any
    ) -> None:
        self.elsewhere = elsewhere or {}
        # \b is click's mark for a paragraph that must not be wrapped.
        text = inspect.cleandoc(help or "").replace("Examples:\n", "\b\nExamples:\n")
        kwargs.setdefault("epilog", EXIT_CODES)
        kwargs["params"] = [*(kwargs.get("params") or ()), *voice_options(hidden=True)]
        super().__init__(name, help=text, **kwargs)
        name_files(self.params)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; an error of the parser learns whose they are."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """-h and --help, whoever made the context."""
        return ["-h", "--help"]

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Its line says what else every command has."""
        return _telling(super().get_help_option(ctx))


def _telling(option: click.Option | None) -> click.Option | None:
    if option is not None:
        option.help = HELP_LINE
    return option


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one only when it runs.

    Attributes:
        lazy: command name to (``module:attribute``, one line of help).
        sections: heading to the commands under it, for a group with many; those under none come last.
    """

    def __init__(
        self,
        *args: Any,
        lazy: dict[str, tuple[str, str]],
        sections: dict[str, tuple[str, ...]] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["params"] = [*kwargs.get("params", ()), *voice_options(hidden=sections is None)]
        super().__init__(*args, **kwargs)
        self.lazy = lazy
        self.sections = sections or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of the work, not of the alphabet."""
        return list(self.lazy)

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Its line says what else every command has."""
        option = super().get_help_option(ctx)
        return option if self.sections else _telling(option)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None for an unknown name."""
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)  # noqa: S101 - the table above is ours
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing any."""
        formatter.write_paragraph()
        width = max(map(len, self.lazy))
        for heading, names in self.in_sections().items():
            formatter.write(f"{heading}:\n")  # no empty lines between: all of it fits a screen
            with formatter.indentation():
                formatter.write_dl([(f"{name:<{width}}", self.lazy[name][1]) for name in names])

    def in_sections(self) -> dict[str, list[str]]:
        """Every command once, by heading; under More what no heading names."""
        found = {heading: [name for name in names if name in self.lazy] for heading, names in self.sections.items()}
        listed = {name for names in found.values() for name in names}
        found["More" if self.sections else "Commands"] = [name for name in self.lazy if name not in listed]
        return {heading: names for heading, names in found.items() if names}

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands and options that begin so, without importing any command."""
        from click.shell_completion import CompletionItem

        names = [CompletionItem(n, help=text) for n, (_, text) in self.lazy.items() if n.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown name is refused with the nearest known one."""
        name = args[0]
        if name not in self.lazy and not name.startswith("-") and not ctx.resilient_parsing:
            from dpbudget._checks import did_you_mean  # here, for it loads much that a right name needs not

            hint = (
                self.way_to(name, ctx.command_path)
                or did_you_mean(name, tuple(self.lazy))
                or f"the commands are {', '.join(self.lazy)}"
            )
            raise click.UsageError(f"unknown command {name!r}. Fix: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def way_to(self, name: str, path: str) -> str:
        """Where a word that is no command here has its place: ``--help``, or a command of one of the groups."""
        if name == "help":
            return f"write {path} --help"
        module = import_module("dpbudget_cli.main")
        groups = {word: getattr(module, word, None) for word in self.lazy}
        owners = [word for word, group in groups.items() if isinstance(group, LazyGroup) and name in group.lazy]
        return f"write {' or '.join(f'{path} {word} {name}' for word in owners)}" if owners else ""


class _ReaderGone(Exception):
    """The pipe on standard output or standard error is closed at its other end."""


class Root(LazyGroup):
    """The root group, whose :meth:`main` turns every error into one line, a way out and an exit code."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the arguments, and print help where they ask for it."""
        try:
            return super().make_context(*args, **kwargs)
        except BrokenPipeError:
            raise _ReaderGone from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and say what dpbudget warns of meanwhile."""
        try:
            with warnings_told(), logs_told():
                return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGone from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run one command and exit with its code; nothing but an interrupt ends in a traceback."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        words = list(sys.argv[1:] if args is None else args)
        as_json = WANTS_JSON in words
        VOICE.reset()
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            extra.setdefault("color", False)
        try:
            code = super().main(words, prog_name or "dpbudget", complete_var, standalone_mode=False, **extra)
        except _ReaderGone:
            code = _BROKEN_PIPE
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            code = 130
        except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback for any input
            code = _report(error, as_json)
        if code == _BROKEN_PIPE:
            _drop_output()
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception, as_json: bool) -> int:
    """Tell the error, if anybody still listens; returns the exit code."""
    try:
        return report_error(error, as_json)
    except BrokenPipeError:
        return _BROKEN_PIPE


def _drop_output() -> None:
    """Let what is still buffered for the closed pipe go nowhere, or the interpreter complains of it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except ValueError:  # closed
            pass
