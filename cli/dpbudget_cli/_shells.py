"""What a shell completes: names of files where a file is wanted; commands, options and choices are click's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: Texts that name no file: arguments by their name, and options whose metavar is none of these.
_WORDS = frozenset({"code", "event", "role", "run", "shell"})
_FILES = frozenset({"FILE", "KEY", "OUT", "PATH"})


class FileName(type(click.STRING)):  # type: ignore[misc]  # the class of click's texts has no other public name
    """A text that names a file."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell look for files."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


_FILE = FileName()


def name_files(params: Iterable[click.Parameter]) -> None:
    """Give every plain text among ``params`` that names a file the type of one."""
    for param in params:
        if type(param.type) is type(click.STRING) and _names_a_file(param):
            param.type = _FILE


def _names_a_file(param: click.Parameter) -> bool:
    return param.name not in _WORDS if isinstance(param, click.Argument) else param.metavar in _FILES
