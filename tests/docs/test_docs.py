"""Every code block and command of README and docs runs as written, in order, one page a folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.typed import COMMON, TRAINING

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "adr").glob("*.md")])
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[tuple[str, str]]:
    return [(kind, body) for kind, body in BLOCK.findall(page.read_text(encoding="utf-8"))]


#: Before the first block; a line of a console block is given to ``run``.
PRELUDE = """import warnings
from functools import partial
from tests.docs.typed import in_a_shell, loaded, typed
_typed = partial(typed, {run})
warnings.simplefilter('error')
"""
#: The page that is typed into a shell. The others are not, because a command that starts anew takes half a second.
IN_A_SHELL = ROOT / "README.md"


def modules_of(page: Path) -> list[str]:
    """What is loaded before the page is run: PyTorch only where its blocks or commands train."""
    trains = re.search(r"dptrainer|dpbudget train", page.read_text(encoding="utf-8"))
    return [*COMMON, *(TRAINING if trains else ())]


def steps_of(page: Path) -> list[str]:
    """One Python program for a page: python blocks share a namespace, console commands run in between.

    ``$ dpbudget ... # exits 2`` is expected to fail so. Lines below a command are lines that it says, with ``…`` for
    what differs from time to time; lines above the first command are for readers alone.
    """
    lines = []
    for kind, body in blocks_of(page):
        if kind == "python":
            lines.append(body)
            continue
        for command in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            line, *shown = command.rstrip().splitlines()
            code = re.search(r"# exits ([0-9]+)$", line)
            if line.startswith("dpbudget "):
                lines.append(f"_typed({line!r}, {int(code[1]) if code else 0}, {shown!r})")
    return lines


def script_of(page: Path) -> str:
    """The program with what comes before it."""
    run = "in_a_shell" if page == IN_A_SHELL else f"loaded({modules_of(page)!r})"
    return "\n".join([PRELUDE.format(run=run), *steps_of(page)])


def run_script(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The blocks of a page in a folder, one after the other."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script_of(page)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")])},
    )


#: Pages that say how to begin again; the test of that runs their blocks too.
BEGIN_AGAIN = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]
ONCE = [page for page in PAGES if steps_of(page) and page not in BEGIN_AGAIN]


@pytest.mark.parametrize("page", ONCE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_as_written(page: Path, tmp_path: Path) -> None:
    done = run_script(page, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("$ dpbudget explain DP999  # exits 2", ""),
        ("$ dpbudget explain DP999", "ended with 2"),
        ("$ dpbudget explain DP008  # exits 2", "ended with 0"),
        ("$ dpbudget explain DP999  # exits 2\nerror DP060: there is no …\nFix: … lists all of them", ""),
        ("$ dpbudget explain DP999  # exits 2\nerror DP060: there is no", "did not say"),
        ("made up\n$ dpbudget explain DP008\nDP008  The … lies in (0, 1].\n$ echo not run", ""),
    ],
)
def test_a_block_is_held_to_what_it_shows(line: str, wrong: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```console\n{line}\n```\n", encoding="utf-8")
    done = run_script(page, tmp_path)
    assert (done.returncode == 0) == (not wrong), done.stderr
    assert wrong in done.stderr


@pytest.mark.parametrize("page", BEGIN_AGAIN, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_runs_as_written_is_told_what_is_there_and_begins_again_as_it_says(page: Path, tmp_path: Path) -> None:
    (remove,) = re.findall(r"`(rm -f [^`]+)`", page.read_text(encoding="utf-8"))
    first = run_script(page, tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    second = run_script(page, tmp_path)
    assert second.returncode != 0
    assert "DP074" in second.stderr
    assert "exists" in second.stderr
    subprocess.run(remove, shell=True, check=True, cwd=tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.name in second.stderr]
    if page == IN_A_SHELL:
        third = run_script(page, tmp_path)
        assert third.returncode == 0, third.stderr


def commands(group: object, prefix: str = "") -> list[str]:
    import click

    assert isinstance(group, click.Group)
    context = click.Context(group)
    names = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        full = f"{prefix}{name}"
        names += commands(command, full + " ") if isinstance(command, click.Group) else [full]
    return names


def test_every_command_is_documented() -> None:
    from dpbudget_cli.main import app

    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name in commands(app):
        assert f"dpbudget {name}" in text, f"docs/commands.md does not show dpbudget {name}"


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_can_be_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, f"docs/index.md does not link {page.name}"
