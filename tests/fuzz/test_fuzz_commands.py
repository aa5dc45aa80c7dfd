"""Whatever is typed: no traceback, no hang, no epsilon below zero, a documented exit code, one JSON object with --json.

By default 500 lines; ``make test-slow`` types 10,000 others.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dpbudget_cli.main import app
from tests.fuzz.command_lines import COMMANDS, FILES, SECRET, Line, random_line

LINES = 500
#: After so many lines the folder is as it was, so that most files named are there.
FRESH_AFTER = 20
#: Seconds of the processor: ten of an idle machine, and what a busy one makes of them. The timeout of the test ends a
#: wait that uses none.
LONGEST = 30.0
EXIT_CODES = range(7)


class TookTooLong(BaseException):
    """Not an Exception, which the command line would report as its own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise within the block once it used so much processor time."""

    def stop(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with one plan, its keys, private data, and files that are none of these."""
    folder = tmp_path_factory.mktemp("kept")
    for words in (
        "ledger init {0}/budget.ledger --epsilon 3 --delta 1e-5",
        "plan new --ledger {0}/budget.ledger --epsilon 1 --dataset-size 99 --batch-size 9 --epochs 3",
        "key new {0}/owner.key",
        "ledger export {0}/budget.ledger {0}/budget.jsonl",
        "plan new --ledger {0}/budget.ledger --epsilon 1 --dataset-size 100 --epochs 1 --request {0}/plan.request",
    ):
        done = CliRunner().invoke(app, shlex.split(words.format(folder)))
        assert done.exit_code == 0, done.output
    draw = random.Random(1)
    rows = [f"{draw.gauss(0, 1):.5f},{draw.gauss(0, 1):.5f},{row % 2}" for row in range(40)]
    (folder / "train.csv").write_text("\n".join(["a,b,y", *rows]) + "\n", encoding="utf-8")
    (folder / "text.csv").write_text(f"a,y\n{SECRET},1\n", encoding="utf-8")
    (folder / "random.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "empty.bin").touch()
    return folder


def type_in(line: Line) -> Result:
    with at_most(LONGEST):
        return CliRunner().invoke(app, list(line.words), catch_exceptions=False)


def numbers_called_epsilon(value: Any, name: str = "") -> Iterator[float]:
    """Every number under a key that speaks of epsilon."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers_called_epsilon(item, f"{name} {key}")
    elif isinstance(value, list):
        for item in value:
            yield from numbers_called_epsilon(item, name)
    elif isinstance(value, int | float) and "epsilon" in name:
        yield value


def check(line: Line, result: Result) -> None:
    said = result.stdout + result.stderr
    assert result.exit_code in EXIT_CODES
    assert "Traceback" not in said
    assert "DP099" not in said or "explain" in line.words, said  # explain lists all codes
    assert SECRET not in said
    assert "\x1b" not in said
    assert not re.search(r"epsilon +-[0-9.]", result.stdout)
    if line.as_json:
        assert result.stdout.count("\n") == 1
        answer = json.loads(result.stdout)
        assert isinstance(answer, dict)
        assert all(number >= 0 for number in numbers_called_epsilon(answer)), answer
        assert "error" in answer or result.exit_code in (0, 1, 5), answer
    elif result.exit_code in (2, 3, 4, 6) and "Usage: " not in said:  # a group without a command shows its help
        assert re.search(r"^error DP\d{3}: \S.*\nFix: \S", result.stderr, re.MULTILINE), said


@pytest.mark.parametrize("part", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, 21))])
def test_no_line_whatever_breaks_the_command_line(
    part: int, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.fail.Keyring")
    draw, typed = random.Random(f"command lines {part}"), []
    for number in range(LINES):
        if number % FRESH_AFTER == 0:
            typed.clear()
            folder = tmp_path / str(number)
            shutil.copytree(kept, folder)
            monkeypatch.chdir(folder)
        line = random_line(draw)
        typed.append(f"dpbudget {shlex.join(line.words)}")
        try:
            check(line, type_in(line))
        except BaseException as error:
            told = "\n".join(typed)
            raise AssertionError(f"{type(error).__name__} {error}\nafter, in a fresh folder:\n{told}") from error


def test_the_lines_reach_every_command_and_all_ways_to_end(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar that only ever meets its first refusal would find nothing."""
    draw = random.Random("reach")
    lines = [random_line(draw) for _ in range(3000)]
    for words, command in COMMANDS:
        meant = [line for line in lines if line.words[: len(words)] == words]
        assert len(meant) > 20, words
        for param in command.params:
            if param.opts[0].startswith("--") and param.name != "as_json":
                assert any(word.split("=")[0] in param.opts for line in meant for word in line.words), (words, param)
    assert sum(line.as_json for line in lines) > 1000
    assert {name for name in FILES if name[:2] not in ("", "--")} <= {word for line in lines for word in line.words}
    shutil.copytree(kept, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    quick = [line for line in lines if line.words[0] in ("ledger", "verify", "key", "explain", "completion")][:150]
    ends = [type_in(line).exit_code for line in quick]
    assert ends.count(0) > 10
    assert {0, 2, 4} <= set(ends)


def test_a_command_that_never_ends_is_found() -> None:
    def never_ends() -> None:
        while True:
            pass

    with pytest.raises(TookTooLong), at_most(0.05):
        never_ends()
