"""The root command: which commands exist, and what becomes of every error."""

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
    "Exit codes: 0 done, 1 invalid or tampered, 2 wrong usage, 3 budget refused, 4 unreadable input, "
    "5 valid but unanchored, 6 not computable, 130 interrupted, 141 broken pipe."
)
#: The variable by which a shell asks for completions; click's name for a command called dpbudget.
COMPLETE_VAR = "_DPBUDGET_COMPLETE"
#: What a shell reports for a command that SIGPIPE ended.
_BROKEN_PIPE = 141
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


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

            hint = did_you_mean(name, tuple(self.lazy)) or f"the commands are {', '.join(self.lazy)}"
            raise click.UsageError(f"unknown command {name!r}. Fix: {hint}", ctx)
        return super().resolve_command(ctx, args)


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


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from dpbudget import __version__

        click.echo(f"dpbudget {__version__}")
        ctx.exit()


def _leaf(name: str) -> str:
    return f"dpbudget_cli.{name}:command"


app = Root(
    "dpbudget",
    context_settings=_CONTEXT,
    help="Privacy budgets that are certified before, enforced during and proved after training.\n\n"
    "\b\nExamples:\n  dpbudget calibrate --epsilon 3\n  dpbudget epsilon --sample-rate 256/60000 "
    "--noise-multiplier 1.1 --steps 14062 --delta 1e-5\n  dpbudget explain DP050",
    epilog=EXIT_CODES,
    params=[
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
        )
    ],
    sections={
        "Begin": ("init", "doctor"),
        "Plan": ("calibrate", "epsilon", "delta", "plan"),
        "Budget and ledger": ("ledger", "verify", "report", "plot"),
        "Train": ("train", "run"),
        "Keys": ("key",),
        "Help": ("explain", "completion"),
    },
    lazy={
        "init": (_leaf("init"), "A few questions, and a ledger, its keys and settings from them."),
        "doctor": (_leaf("doctor"), "Whether everything here is in order, and what to do if not."),
        "calibrate": (_leaf("calibrate"), "The smallest noise (or the most steps) for a budget."),
        "epsilon": (_leaf("epsilon"), "The epsilon of a schedule at a delta."),
        "delta": (_leaf("delta"), "The delta of a schedule at an epsilon."),
        "key": ("dpbudget_cli.main:key", "Make, show and rotate signing keys."),
        "ledger": ("dpbudget_cli.main:ledger", "Grant a budget; show, export, prove and verify its ledger."),
        "plan": ("dpbudget_cli.main:plan", "Sign a training plan into a ledger."),
        "train": (_leaf("train"), "Train a model on a file under a signed plan."),
        "run": (_leaf("run"), "Run a script of yours under a signed plan."),
        "verify": (_leaf("ledger_verify"), "Check a ledger, recompute its epsilon (ledger verify)."),
        "report": (_leaf("report"), "What a ledger guarantees, as one page (or JSON, Markdown, PDF)."),
        "plot": (_leaf("plot"), "Figures of ledgers, plans and schedules for a paper."),
        "explain": (_leaf("explain"), "What an error code means."),
        "completion": (_leaf("completion"), "A script by which your shell completes commands."),
    },
)

key = LazyGroup(
    "key",
    context_settings=_CONTEXT,
    help="Make, show and rotate signing keys. The owner's key grants budget, the writer's key spends it; an auditor's "
    "opens noise keys that were kept.\n\n"
    "\b\nExamples:\n  dpbudget key new owner.key\n  dpbudget key show owner.key",
    epilog=EXIT_CODES,
    lazy={
        "new": (_leaf("key_new"), "Make a new key file."),
        "show": (_leaf("key_show"), "Show the public half of a key."),
        "sign": (_leaf("key_sign"), "Sign a request away from the ledger."),
        "rotate": (_leaf("key_rotate"), "Hand a role of a ledger to a new key."),
        "replay": (_leaf("key_replay"), "Open the noise key of one step, for an auditor."),
    },
)

ledger = LazyGroup(
    "ledger",
    context_settings=_CONTEXT,
    help="Grant a budget in a signed ledger; show, export and verify it.\n\n"
    "\b\nExamples:\n  dpbudget ledger init budget.ledger --epsilon 3 --delta 1e-5\n"
    "  dpbudget ledger verify budget.ledger",
    epilog=EXIT_CODES,
    lazy={
        "init": (_leaf("ledger_init"), "Make a ledger for one dataset."),
        "grant": ("dpbudget_cli.ledger_grant:grant", "Raise the total."),
        "lower": ("dpbudget_cli.ledger_grant:lower", "Take back what is not in use."),
        "apply": (_leaf("ledger_apply"), "Write what the owner signed elsewhere."),
        "show": (_leaf("ledger_show"), "What was granted, planned and spent."),
        "plans": ("dpbudget_cli.ledger_runs:plans", "The signed plans."),
        "runs": ("dpbudget_cli.ledger_runs:runs", "What became of every plan."),
        "watch": (_leaf("ledger_watch"), "Show steps and epsilon as they are charged."),
        "commit": ("dpbudget_cli.ledger_commit:commit", "Fix the noise of a run, for a replay."),
        "entropy": ("dpbudget_cli.ledger_commit:entropy", "Write an auditor's part of that noise."),
        "note": (_leaf("ledger_note"), "Record that something happened."),
        "verify": (_leaf("ledger_verify"), "Check every record and recompute epsilon."),
        "prove": (_leaf("ledger_prove"), "Prove a run, or a head, without the ledger."),
        "attest": (_leaf("ledger_attest"), "Verify, and sign the verdict."),
        "head": (_leaf("ledger_head"), "The signed head, to keep elsewhere."),
        "export": (_leaf("ledger_export"), "Write the ledger as JSON lines."),
        "import": (_leaf("ledger_import"), "Make a ledger from an export."),
    },
)

plan = LazyGroup(
    "plan",
    context_settings=_CONTEXT,
    help="Sign a training plan into a ledger.\n\n"
    "\b\nExamples:\n  dpbudget plan new --ledger budget.ledger --epochs 10\n"
    "  dpbudget plan show --ledger budget.ledger",
    epilog=EXIT_CODES,
    lazy={
        "new": (_leaf("plan_new"), "Calibrate a plan and sign it in."),
        "show": (_leaf("plan_show"), "Show the plans of a ledger."),
    },
)

#: The script and the tests' name of the same command.
main = app
