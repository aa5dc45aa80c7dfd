"""``dpbudget completion``: the script by which bash, zsh or fish completes commands, options and files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from dpbudget.errors import InvalidParameter
from dpbudget_cli import _output as out
from dpbudget_cli._options import JSON
from dpbudget_cli.main import COMPLETE_VAR, Leaf, app

#: Shell -> what to do once.
INSTALL = {
    "bash": "echo 'eval \"$(dpbudget completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(dpbudget completion zsh)\"' >> ~/.zshrc",
    "fish": "dpbudget completion fish > ~/.config/fish/completions/dpbudget.fish",
}


@click.command("completion", cls=Leaf)
@click.argument("shell", required=False)
@JSON
def command(shell: str | None, as_json: bool) -> None:
    """Print the script by which SHELL (bash, zsh or fish; yours, if not given) completes dpbudget.

    It calls dpbudget for every completion, so it stays true when dpbudget changes. bash must be 4.4 or newer; in
    .zshrc the line stands after compinit.

    Examples:
      dpbudget completion bash
      dpbudget completion fish --json
    """
    from click.shell_completion import ShellComplete, get_completion_class

    name = _shell(shell)
    made = get_completion_class(name)
    assert made is not None  # noqa: S101 - click has all of INSTALL
    script = ShellComplete.source(made(app, {}, "dpbudget", COMPLETE_VAR))  # that of bash would start a bash to ask it
    if as_json:
        out.emit_json({"shell": name, "script": script, "install": INSTALL[name]})
        return
    click.echo(script)
    if sys.stdout.isatty():  # a shell that evaluates it at every start wants no talk
        out.talk(f"To have it in every {name}: {INSTALL[name]}")


def _shell(given: str | None) -> str:
    """The shell that was named, else the user's.

    Raises:
        InvalidParameter: it is none of the three (DP060), or none was named and SHELL names none (DP064).
    """
    from dpbudget._checks import did_you_mean

    name = given or Path(os.environ.get("SHELL", "")).name
    if name in INSTALL:
        return name
    if given is None:
        raise InvalidParameter(
            "no shell is named, and SHELL names none that is known",
            code="DP064",
            hint=f"pass one of {', '.join(INSTALL)}, as in dpbudget completion bash",
        )
    close = did_you_mean(name, tuple(INSTALL))
    raise InvalidParameter(
        f"unknown shell {name[:40]!r}", code="DP060", hint=f"choose {', '.join(INSTALL)}. {close}".strip()
    )
