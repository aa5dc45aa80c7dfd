"""Every command that a page or an error names exists, with the options that it is named with.

What stands in the blocks of a page runs (test_docs.py); here is what stands between them and in the hints of errors,
which readers type all the same.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from dpbudget.errors import WAYS_OUT
from dpbudget_cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(path for name in ("dpbudget", "dptrainer", "cli") for path in (ROOT / name).rglob("*.py"))
#: What dpbudget is followed by where no command is meant.
PROSE = {"package", "made", "printed", "wrote", "train's"}


def named_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words begin with, as far down as they go, and the words after it."""
    command: click.Command = app
    while words and isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0])
        if found is None:
            break
        command, words = found, words[1:]
    return command, words


def problem_of(line: str) -> str | None:
    """What is wrong with ``dpbudget ...`` as it is written; None if nothing is."""
    words = re.sub(r"\s+", " ", line).split(" -- ")[0].split()[1:]
    command, rest = named_command([word.strip("`,;:.()[]'\"") for word in words])
    if isinstance(command, click.Group) and rest and re.fullmatch("[a-z][a-z-]*", rest[0]):
        return f"no command {rest[0]}"
    known = {name for param in command.get_params(click.Context(command)) for name in param.opts} | {"--help"}
    options = (re.match(r"--[a-z][a-z-]*", word) for word in rest)
    unknown = [option[0] for option in options if option is not None and option[0] not in known]
    return f"no option {', '.join(unknown)}" if unknown else None


def in_page(page: Path) -> Iterator[str]:
    """The commands of inline code and of blocks that do not run."""
    text = page.read_text(encoding="utf-8")
    for kind, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if kind != "console":
            yield from re.findall(r"^(dpbudget [^\n#]+)", body, re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (code for code in re.findall(r"`([^`]+)`", text) if code.startswith("dpbudget "))


def in_hints(source: Path) -> Iterator[str]:
    """The commands that the hints of errors name, up to the end of their clause."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg in ("hint", "way_out"):
            yield from _commands_in(_text(node.value))


def _text(node: ast.AST) -> str:
    """The constant parts of a string, with X for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)}; {_text(node.orelse)}"
    return str(node.value) if isinstance(node, ast.Constant) else "X"


def _commands_in(text: str) -> Iterator[str]:
    for clause in re.findall(r"\bdpbudget [a-z][^;.,:)]*", text):
        if clause.split()[1].strip("'") not in PROSE:
            yield clause


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_commands_and_options_that_exist(page: Path) -> None:
    assert [(line, wrong) for line in in_page(page) if (wrong := problem_of(line))] == []


def test_hints_name_commands_and_options_that_exist() -> None:
    named = [(path.name, line) for path in SOURCES for line in in_hints(path)]
    named += [(code, line) for code, text in WAYS_OUT.items() for line in _commands_in(text)]
    assert len(named) > 40
    assert [(name, line, wrong) for name, line in named if (wrong := problem_of(line))] == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("dpbudget ledger show LEDGER", None),
        ("dpbudget train --ledger L --help-all", None),
        ("dpbudget run --ledger L -- python train.py --lr 1", None),
        ("dpbudget ledger shwo L", "no command shwo"),
        ("dpbudget verfiy L", "no command verfiy"),
        ("dpbudget train --epochs 3", "no option --epochs"),
    ],
)
def test_what_does_not_exist_is_found(line: str, wrong: str | None) -> None:
    assert problem_of(line) == wrong
