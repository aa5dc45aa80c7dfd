"""How much is said, in which colour, under which heading, and what a shell completes: the same for every command."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from test_cli_manners import LEAVES

from dpbudget import _checks
from dpbudget.errors import InvalidParameter
from dpbudget_cli import _options
from dpbudget_cli import _output as out
from dpbudget_cli.completion import INSTALL
from dpbudget_cli.main import COMPLETE_VAR, LazyGroup, app

Cli = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-c", "from dpbudget_cli.main import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
CALIBRATE = ("calibrate", "--epsilon", "3", "--dataset-size", "1000")
#: A delta above 1 / n is warned of.
WARNED = (*CALIBRATE, "--delta", "0.1")


def at_a_terminal(words: str, folder: Path, **environment: str) -> tuple[int, str]:
    """Exit code and all output of a command whose three streams are a terminal."""
    inside, outside = pty.openpty()
    env = {**ENVIRONMENT, "TERM": "xterm", **environment}
    for name in ("NO_COLOR", "FORCE_COLOR"):
        if name not in environment:
            env.pop(name, None)
    process = subprocess.Popen(
        [*PROGRAM, *words.split()], stdin=outside, stdout=outside, stderr=outside, env=env, cwd=folder
    )
    os.close(outside)
    said = b""
    try:
        while part := os.read(inside, 4096):
            said += part
    except OSError:  # Linux: the other end is closed
        pass
    finally:
        os.close(inside)
    return process.wait(timeout=200), said.decode()


# ---------------------------------------------------------------------- quiet and verbose


@pytest.mark.parametrize("words", [words for words, _ in LEAVES], ids=" ".join)
def test_every_command_can_be_quiet_and_verbose(run_cli: Cli, empty: Path, words: tuple[str, ...]) -> None:
    for option in ("-q", "--quiet", "-v", "--verbose"):
        assert run_cli(*words, option, "-h").code == 0
        assert "unknown option" not in run_cli(*words, option).err
    contradiction = run_cli(*words, "-q", "-v")
    assert (contradiction.code, "error DP064: --quiet and --verbose" in contradiction.err) == (2, True)


def test_quiet_leaves_the_answer_and_the_warnings(run_cli: Cli, empty: Path) -> None:
    loud, quiet = run_cli(*WARNED), run_cli(*WARNED, "-q")
    assert "assumed batch-size" in loud.err
    assert quiet.out == loud.out
    assert [line[:13] for line in quiet.err.splitlines()] == ["warning DP003"]
    assert run_cli(*CALIBRATE, "--quiet").err == ""


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_option_may_stand_anywhere(run_cli: Cli, folder: Path, place: int) -> None:
    words = ["ledger", "note", "budget.ledger", "checked"]
    words.insert(place, "-q")
    assert run_cli(*words).err == ""


def test_quiet_keeps_errors_and_their_way_out(run_cli: Cli, empty: Path) -> None:
    answer = run_cli("calibrate", "--epsilon", "0", "-q")
    assert [line[:10] for line in answer.err.splitlines()] == ["error DP00", "Fix: pass "]


def test_verbose_says_which_files_are_used_and_what_a_code_means(run_cli: Cli, folder: Path) -> None:
    plan = ("plan", "new", "--ledger", "budget.ledger", "--epochs", "1")
    answer = run_cli("-v", *plan)
    assert "the owner's key is budget.ledger.owner.key" in answer.err
    assert "no settings file; documented defaults hold" in answer.err
    assert "DP064 means: Too much or too little was given" in answer.err
    assert "means:" not in run_cli(*plan).err
    (folder / "dpbudget.toml").write_text('accountant = "rdp"\n', encoding="utf-8")
    assert f"settings are those of {folder / 'dpbudget.toml'}" in run_cli(*CALIBRATE, "-v").err


def test_one_command_does_not_make_the_next_one_quiet(run_cli: Cli, empty: Path) -> None:
    assert run_cli(*CALIBRATE, "-q").err == ""
    assert "assumed" in run_cli(*CALIBRATE).err


def test_what_the_packages_log_is_told_when_asked_for(
    run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logging_table(*_: object, **__: object) -> None:
        logging.getLogger("dptrainer.native").info("noise: compiled")
        logging.getLogger("dptrainer").warning("something lacks")

    monkeypatch.setattr(out, "emit_table", logging_table)
    assert run_cli("explain", "DP008").err == "warning something lacks\n"
    assert run_cli("explain", "DP008", "-v").err == "noise: compiled\nwarning something lacks\n"
    assert logging.getLogger("dptrainer").handlers == []
    assert logging.getLogger("dptrainer").level == logging.NOTSET


def test_json_is_the_same_however_much_is_said(run_cli: Cli, empty: Path) -> None:
    answers = [run_cli(*WARNED, "--json", *more) for more in ((), ("-q",), ("-v",))]
    assert answers[0].json == answers[1].json == answers[2].json


# ---------------------------------------------------------------------- colour


def test_a_terminal_gets_colour_unless_no_color_is_set(tmp_path: Path) -> None:
    for words in ("doctor", "ledger show missing.ledger", "explain DP008"):
        coloured, plain = at_a_terminal(words, tmp_path)[1], at_a_terminal(words, tmp_path, NO_COLOR="1")[1]
        assert "\x1b" not in plain
        assert "\x1b" not in at_a_terminal(words, tmp_path, TERM="dumb")[1]
        if words == "doctor":
            assert "\x1b[32mok" in coloured


def test_a_pipe_gets_no_escape_bytes(tmp_path: Path) -> None:
    done = subprocess.run([*PROGRAM, "doctor"], capture_output=True, env=ENVIRONMENT, cwd=tmp_path, timeout=200)
    assert done.stdout.startswith(b"ok    python")
    assert b"\x1b" not in done.stdout + done.stderr


# ---------------------------------------------------------------------- headings


def test_every_command_stands_under_one_heading() -> None:
    found = app.in_sections()
    assert sorted(name for names in found.values() for name in names) == sorted(app.lazy)
    assert list(found)[:2] == ["Begin", "Plan"]


def test_a_new_command_is_listed_before_it_has_a_heading() -> None:
    group = LazyGroup(
        "g", lazy={"old": ("x:y", "Older."), "new": ("x:y", "Newer.")}, sections={"Some": ("old", "gone"), "None": ()}
    )
    assert group.in_sections() == {"Some": ["old"], "More": ["new"]}
    text = group.get_help(click.Context(group))
    assert text.endswith("Some:\n  old  Older.\nMore:\n  new  Newer.")
    assert "gone" not in text


@pytest.mark.parametrize("words", [(), ("key",), ("ledger",), ("plan",)], ids=" ".join)
def test_the_help_of_a_group_fits_a_screen_and_shows_examples_first(run_cli: Cli, words: tuple[str, ...]) -> None:
    text = run_cli(*words, "-h").out
    assert len(text.splitlines()) <= 45
    assert 0 < text.index("Examples:") < text.index("Options:")
    assert text.count("\n    dpbudget ") >= 2
    assert "Exit codes: 0 done, 1 invalid" in text
    assert "quiet" in text


# ---------------------------------------------------------------------- completion


def completed(words: str) -> list[str]:
    """What bash is told for a line whose last word is incomplete."""
    count = len(words.split()) - (0 if words.endswith(" ") else 1)
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(count), COMPLETE_VAR: "bash_complete"}
    done = subprocess.run(PROGRAM, capture_output=True, text=True, env={**ENVIRONMENT, **asked}, timeout=200)
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("dpbudget cal", ["plain,calibrate"]),
        ("dpbudget key ro", ["plain,rotate"]),
        ("dpbudget epsilon --acc", ["plain,--accountant"]),
        ("dpbudget epsilon --steps 10 --adjacency ", ["plain,add-remove", "plain,zero-out", "plain,replace-one"]),
        ("dpbudget epsilon --steps no --accountant p", ["plain,prv", "plain,pld"]),
        ("dpbudget ledger show b", ["file,b"]),
        ("dpbudget train --data ", ["file,"]),
        ("dpbudget train --classes ", []),
        ("dpbudget explain DP0", []),
        ("dpbudget epsilon --unknown 1 --delt", ["plain,--delta"]),
    ],
)
def test_a_shell_completes_commands_options_choices_and_files(line: str, told: list[str]) -> None:
    assert completed(line) == told


def test_completion_loads_nothing_that_takes_long() -> None:
    code = "import sys; from dpbudget_cli.main import main\ntry:\n main()\nexcept SystemExit:\n pass\n"
    code += "print(sorted({n.split('.')[0] for n in sys.modules} & {'pydantic', 'numpy', 'scipy', 'torch', 'rich'}))"
    asked = {"COMP_WORDS": "dpbudget plan new --ep", "COMP_CWORD": "3", COMPLETE_VAR: "bash_complete"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**ENVIRONMENT, **asked})
    assert done.stdout.splitlines() == ["plain,--epsilon", "plain,--epochs", "[]"]


@pytest.mark.parametrize("kind", [kind for kind in vars(_options).values() if getattr(kind, "choices", ())])
def test_every_choice_that_is_completed_is_accepted(kind: _options.Checked) -> None:
    assert [kind.convert(choice, None, None) for choice in kind.choices] == list(kind.choices)
    with pytest.raises(InvalidParameter) as caught:
        kind.convert("nothing of it", None, None)
    for choice in kind.choices:
        assert choice in f"{caught.value.hint} {caught.value.message}"


def test_all_accountants_are_completed() -> None:
    assert _options.ANY_ACCOUNTANT.choices == _checks.ACCOUNTANTS + _checks.FURTHER_ACCOUNTANTS
    assert _options.ACCOUNTANT.choices == _checks.ACCOUNTANTS


@pytest.mark.parametrize("shell", INSTALL)
def test_the_script_of_a_shell_asks_dpbudget(run_cli: Cli, shell: str) -> None:
    answer = run_cli("completion", shell)
    assert (answer.code, answer.err) == (0, "")
    assert f"{COMPLETE_VAR}={shell}_complete" in answer.out
    found = run_cli("completion", shell, "--json").json
    assert found == {"shell": shell, "script": answer.out.rstrip("\n") + "\n", "install": INSTALL[shell]}
    assert f"dpbudget completion {shell}" in found["install"]


def test_bash_takes_the_script_and_completes_by_it(tmp_path: Path) -> None:
    program = tmp_path / "dpbudget"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from dpbudget_cli.main import main; main()" "$@"\n')
    program.chmod(0o755)
    script = """
eval "$(dpbudget completion bash)" || exit 1
COMP_WORDS=(dpbudget ledger ver) COMP_CWORD=2
_dpbudget_completion dpbudget
printf '%s\\n' "${COMPREPLY[@]}"
"""
    env = {**ENVIRONMENT, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "verify\n", "")


def test_the_users_shell_is_taken_where_none_is_named(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert run_cli("completion", "--json").json["shell"] == "fish"
    monkeypatch.setenv("SHELL", "/bin/csh")
    answer = run_cli("completion")
    assert (answer.code, "error DP064" in answer.err, "pass one of bash, zsh, fish" in answer.err) == (2, True, True)
    typo = run_cli("completion", "bsh")
    assert (typo.code, "Did you mean bash?" in typo.err) == (2, True)


# ---------------------------------------------------------------------- standard output is the answer


@pytest.mark.parametrize("words", [CALIBRATE, ("explain", "DP008"), ("doctor",), WARNED], ids=" ".join)
def test_talk_never_stands_on_standard_output(run_cli: Cli, empty: Path, words: tuple[str, ...]) -> None:
    answer = run_cli(*words, "--json")
    assert answer.out.count("\n") == 1
    assert isinstance(json.loads(answer.out), dict)
