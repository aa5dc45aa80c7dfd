"""Whatever is typed: one clear line with a code and a way out, a documented exit code, nothing changed on disk."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpbudget.errors import CODES
from dpbudget_cli.main import app

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
ROOT = Path(__file__).resolve().parents[2]


def leaves(group: click.Group, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it."""
    context, found = click.Context(group), []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        here = (*words, name)
        found += leaves(command, here) if isinstance(command, click.Group) else [(here, command)]
    return found


LEAVES = leaves(app)
EPSILON = "epsilon --sample-rate 0.01 --noise-multiplier 1 --steps 10 --delta 1e-5"
CALIBRATE = "calibrate --epsilon 3 --sample-rate 0.01 --steps 10 --delta 1e-5"
INIT = "ledger init new.ledger --epsilon 3 --delta 1e-5"
PLAN = "plan new --ledger budget.ledger --dataset-size 100 --batch-size 20 --steps 20"
TRAIN = "train --ledger budget.ledger --data train.npz --classes 2"

#: command line, code, exit code
REFUSED = [
    (f"{EPSILON} --delta 0", "DP002", 2),
    (f"{EPSILON} --delta 1", "DP002", 2),
    (f"{EPSILON} --delta nan", "DP002", 2),
    (f"{EPSILON} --delta -1e-5", "DP002", 2),
    (f"{EPSILON} --sample-rate 1.5", "DP008", 2),
    (f"{EPSILON} --sample-rate 256", "DP008", 2),
    (f"{EPSILON} --sample-rate 0", "DP008", 2),
    (f"{EPSILON} --sample-rate -0.1", "DP008", 2),
    (f"{EPSILON} --sample-rate 1/0", "DP008", 2),
    (f"{EPSILON} --noise-multiplier 0", "DP006", 2),
    (f"{EPSILON} --noise-multiplier -1", "DP005", 2),
    (f"{EPSILON} --noise-multiplier inf", "DP005", 2),
    (f"{EPSILON} --noise-multiplier abc", "DP005", 2),
    (f"{EPSILON} --steps 0", "DP009", 2),
    (f"{EPSILON} --steps 1.5", "DP009", 2),
    (f"{EPSILON} --steps 1e30", "DP009", 2),
    (f"{EPSILON} --accountant renyi", "DP061", 2),
    (f"{EPSILON} --adjacency swap", "DP062", 2),
    (f"{EPSILON} --phase 0.1,1,10", "DP064", 2),
    (f"{EPSILON} surplus", "DP060", 2),
    ("epsilon --phase 0.1,1 --delta 1e-5", "DP009", 2),
    ("epsilon --phase 0.1,1,x --delta 1e-5", "DP009", 2),
    ("epsilon --sample-rate 0.1 --delta 1e-5", "DP064", 2),
    ("epsilon --phase 0.1,1,10", "DP064", 2),
    ("delta --phase 0.1,1,10 --epsilon -1", "DP001", 2),
    ("delta --phase 0.1,1,10 --epsilon 0", "DP001", 2),
    ("calibrate", "DP064", 2),
    ("calibrate --epsilon", "DP060", 2),
    ("calibrate --epsilon nan", "DP001", 2),
    ("calibrate --epsilon inf", "DP001", 2),
    ("calibrate --epsilon -3", "DP001", 2),
    ("calibrate --epsilon 3 --batch-size 60000 --dataset-size 256", "DP008", 2),
    ("calibrate --epsilon 3 --epochs 0", "DP009", 2),
    ("calibrate --epsilon 3 --epochs nan", "DP009", 2),
    ("calibrate --epsilon 3 --dataset-size -5", "DP009", 2),
    ("calibrate --epsilon 3 --clip-norm 0", "DP007", 2),
    (f"{CALIBRATE} --epochs 3", "DP064", 2),
    (f"{CALIBRATE} --batch-size 3", "DP064", 2),
    (f"{CALIBRATE} --noise-multiplier 1", "DP064", 2),
    (f"{CALIBRATE} --epsilon 1e-9", "DP004", 6),
    (f"{CALIBRATE} --delta 1e-60", "DP053", 2),
    ("calibrate --epsilonn 3", "DP060", 2),
    ("calibratee --epsilon 3", "DP060", 2),
    ("ledger shwo budget.ledger", "DP060", 2),
    ("explain DP999", "DP060", 2),
    ("key show missing.key", "DP070", 4),
    ("key show train.csv", "DP070", 4),
    ("key show world.key", "DP073", 4),
    ("key show link.key", "DP073", 4),
    ("key new owner.key", "DP074", 2),
    ("key new x.key --passphrase-fd 99", "DP070", 2),
    ("key new x.key --passphrase", "DP073", 2),
    ("ledger init budget.ledger --epsilon 3 --delta 1e-5", "DP074", 2),
    ("ledger init no/where.ledger --epsilon 3 --delta 1e-5", "DP070", 4),
    (f"{INIT} --epsilon 0", "DP001", 2),
    (f"{INIT} --delta 1", "DP002", 2),
    (f"{INIT} --owner-key missing.key", "DP070", 4),
    (f"{INIT} --owner-key world.key", "DP073", 4),
    (f"{INIT} --writer-key random.bin", "DP073", 4),
    (f"{INIT} --adjacency none", "DP062", 2),
    ("ledger show missing.ledger", "DP070", 4),
    ("ledger show random.bin", "DP070", 4),
    ("ledger show empty.bin", "DP070", 4),
    ("ledger show cut.ledger", None, None),
    ("ledger show .", "DP083", 4),
    ("ledger show link.ledger", "DP083", 4),
    ("ledger export budget.ledger train.csv", "DP074", 2),
    ("ledger export budget.ledger no/where.jsonl", None, 4),
    ("ledger verify missing.ledger", "DP070", 4),
    ("ledger verify random.bin", "DP070", 4),
    ("ledger verify budget.ledger --trust missing.pub", "DP070", 4),
    ("ledger verify budget.ledger --trust owner.key", "DP070", 4),
    ("ledger verify budget.ledger --expect-head 12", "DP082", 2),
    ("verify --json", "DP064", 2),
    (f"{PLAN} --owner-key owner.key", "DP080", 2),
    (f"{PLAN} --writer-key owner.key", "DP080", 2),
    (f"{PLAN} --epsilon 50", "DP052", 3),
    (f"{PLAN} --epochs 3", "DP064", 2),
    (f"{PLAN} --max-parameters 0", "DP009", 2),
    ("plan new --ledger missing.ledger", "DP070", 4),
    ("plan show --ledger budget.ledger nothing", "DP081", 2),
    (f"{TRAIN} --plan nothing", "DP081", 2),
    (f"{TRAIN} --classes 0", "DP009", 2),
    (f"{TRAIN} --classes 1", "DP091", 4),
    (f"{TRAIN} --target nothing", "DP091", 4),
    (f"{TRAIN} --data missing.npz", "DP091", 4),
    (f"{TRAIN} --data random.npz", "DP091", 4),
    (f"{TRAIN} --data train.txt", "DP091", 4),
    (f"{TRAIN} --data text.csv --target label", "DP091", 4),
    (f"{TRAIN} --lr -1", "DP009", 2),
    (f"{TRAIN} --momentum 1", "DP009", 2),
    (f"{TRAIN} --seed x", "DP009", 2),
    (f"{TRAIN} --model linaer", "DP060", 2),
    (f"{TRAIN} --model nowhere:make", "DP093", 2),
    (f"{TRAIN} --output train.csv", "DP074", 2),
    (f"{TRAIN} --output no/where.safetensors", "DP070", 4),
    (f"{TRAIN} --init train.csv", "DP091", 4),
    (f"{TRAIN} --writer-key missing.key", "DP070", 4),
    (f"{TRAIN} --writer-key owner.key", "DP080", 2),
    (f"{TRAIN} --public-eval missing.csv", "DP091", 4),
]


#: A quarter of them; an option without its value would take --json for it.
JSON_TOO = [row for row in REFUSED if not row[0].endswith("--epsilon")][::4]


@pytest.fixture
def messy(folder: Path) -> Path:
    """The prepared folder with everything that can be wrong about a file."""
    (folder / "dpbudget.toml").write_text('accountant = "rdp"\n', encoding="utf-8")
    (folder / "random.bin").write_bytes(bytes(range(256)) * 8)
    shutil.copy(folder / "random.bin", folder / "random.npz")
    (folder / "empty.bin").touch()
    (folder / "train.txt").write_text("1,2\n", encoding="utf-8")
    (folder / "text.csv").write_text("a,label\nSECRET,1\n", encoding="utf-8")
    ledger = (folder / "budget.ledger").read_bytes()
    (folder / "cut.ledger").write_bytes(ledger[: len(ledger) // 2])
    shutil.copy(folder / "owner.key", folder / "world.key")
    (folder / "world.key").chmod(0o644)
    (folder / "link.key").symlink_to("owner.key")
    (folder / "link.ledger").symlink_to("budget.ledger")
    return folder


@pytest.mark.parametrize(("line", "code", "exit_code"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_bad_input_gets_one_line_a_fix_and_its_exit_code(
    run_cli: Cli, messy: Path, seen: Seen, line: str, code: str | None, exit_code: int | None
) -> None:
    before = seen(messy)
    answer = run_cli(*shlex.split(line))
    assert seen(messy) == before
    assert answer.code in ({1, 2, 3, 4, 5, 6} if exit_code is None else {exit_code}), answer.err
    lines = [text for text in answer.err.splitlines() if text.startswith("error ")]
    if "--json" in line:
        assert answer.json["error"]["code"] == code
        return
    assert len(lines) == 1, answer.err
    found = re.match(r"error (DP\d{3}): \S", lines[0])
    assert found is not None
    assert found[1] in CODES
    assert code in {None, found[1]}, answer.err
    assert "Fix: " in answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert "SECRET" not in answer.err


@pytest.mark.parametrize(("line", "code", "exit_code"), JSON_TOO, ids=[row[0] for row in JSON_TOO])
def test_with_json_an_error_is_one_object_on_standard_output(
    run_cli: Cli, messy: Path, line: str, code: str | None, exit_code: int | None
) -> None:
    answer = run_cli(*shlex.split(line), "--json")
    assert set(answer.json) == {"error"}
    assert set(answer.json["error"]) == {"code", "message", "hint"}
    assert answer.json["error"]["code"] in ({code} if code else CODES)
    assert answer.code == exit_code or exit_code is None


WORDS = [
    *{word for words, _ in LEAVES for word in words},
    *{name for _, command in LEAVES for option in command.params for name in option.opts if name.startswith("-")},
]
VALUES = ["0", "1", "-1", "nan", "inf", "1e-5", "3", "0.01", "256/60000", "1/0", "1e400", "", " ", "é", "\x00", "rdp"]
VALUES += ["prv", "0.1,1,10", "1,2,3,4", "missing.ledger", "/dev/null", "--", "-", "a" * 300, "10", "🙂", "add-remove"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=st.sampled_from([words for words, _ in LEAVES]),
    arguments=st.lists(st.sampled_from([*WORDS, *VALUES]), max_size=8),
)
def test_no_arguments_whatever_end_in_a_traceback(
    run_cli: Cli, empty: Path, command: tuple[str, ...], arguments: list[str]
) -> None:
    answer = run_cli(*command, *arguments, "--accountant=rdp" if command[0] in {"epsilon", "delta"} else "--json")
    assert answer.code in range(7)
    assert "Traceback" not in answer.out + answer.err
    assert '"code": "DP099"' not in answer.out
    assert "error DP099" not in answer.err, answer.err


def _examples() -> list[tuple[tuple[str, ...], str]]:
    found = []
    for words, command in LEAVES:
        help_text = command.get_help(click.Context(command, info_name=" ".join(("dpbudget", *words))))
        lines = re.findall(r"^ +(dpbudget .+)$", help_text, re.MULTILINE)
        found += [(words, line) for line in lines]
    return found


@pytest.mark.parametrize(("words", "line"), _examples(), ids=[line for _, line in _examples()])
def test_every_example_of_every_help_page_runs(
    run_cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], line: str
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    if words in {("key", "new"), ("ledger", "init")}:
        for name in folder.glob("*"):
            name.unlink()
    if words == ("ledger", "lower"):
        assert run_cli("ledger", "grant", "budget.ledger", "--epsilon", "9").code == 0
    if words == ("ledger", "import"):
        shutil.copy("budget.ledger.writer.key", "writer.key")
        shutil.copy("budget.ledger.owner.key.pub", "owner.key.pub")
        assert run_cli("ledger", "export", "budget.ledger", "budget.jsonl").code == 0
    if words in {("key", "sign"), ("ledger", "apply")}:
        small = ("--dataset-size", "100", "--batch-size", "20", "--steps", "20", "--epsilon", "1")
        assert run_cli("plan", "new", "--ledger", "budget.ledger", *small, "--request", "plan.request").code == 0
    if words == ("ledger", "apply"):
        key = ("--owner-key", "budget.ledger.owner.key", "--ledger", "budget.ledger")
        assert run_cli("key", "sign", "plan.request", "plan.signed", *key).code == 0
    if words == ("ledger", "prove"):
        line = line.replace("3f9c", run_cli("ledger", "runs", "budget.ledger", "--json").json["runs"][0]["run"][:8])
    if words == ("key", "replay"):
        assert run_cli("key", "new", "auditor.key", "--auditor").code == 0
        kept = ("--keep-keys", "noise.sealed", "--auditor", "auditor.key.pub")
        assert run_cli(*shlex.split(TRAIN), *kept).code == 0
        line = line.replace(" b.ledger", " budget.ledger")
    if words in {("ledger", "commit"), ("ledger", "entropy")}:
        line = line.replace("3f9c", run_cli("ledger", "runs", "budget.ledger", "--json").json["runs"][0]["run"][:8])
        line = line.replace("HEX", "5e" * 32)
        assert run_cli("key", "new", "auditor.key", "--auditor").code == 0
        (folder / "phrase").write_text("secret\n")
        phrase = open("phrase", "rb")  # noqa: SIM115 - closed by the command's end
        passphrase = ("--passphrase-fd", str(phrase.fileno()))
        if words[1] == "entropy":
            commit = ("ledger", "commit", "budget.ledger", line.split()[4], "--key-file", "plan.key")
            assert run_cli(*commit, *passphrase).code == 0
        answer = run_cli(*shlex.split(line)[1:], *passphrase * (words[1] == "commit"))
        phrase.close()
        assert answer.code == 0, answer.err
        return
    answer = run_cli(*shlex.split(line)[1:])
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(("words", "command"), LEAVES, ids=[" ".join(words) for words, _ in LEAVES])
def test_every_help_page_has_examples_exit_codes_and_fits_a_screen(
    run_cli: Cli, words: tuple[str, ...], command: click.Command
) -> None:
    answer = run_cli(*words, "-h")
    assert answer.code == 0
    assert answer.out == run_cli(*words, "--help").out
    assert len(re.findall(r"^ +dpbudget ", answer.out, re.MULTILINE)) >= 2
    assert "Exit codes" in answer.out
    assert len(answer.out.splitlines()) <= (45 if words == ("calibrate",) else 40)
    assert "--json" in answer.out


def _typos() -> list[tuple[str, str]]:
    """One-letter typos: a letter left out, doubled or swapped in the middle of each command and long option."""
    found = []
    for word in sorted({words[-1] for words, _ in LEAVES} | {w for w in WORDS if w.startswith("--") and len(w) > 6}):
        middle = len(word) // 2 + 1
        if len(word) > 4:
            found += [(word[:middle] + word[middle + 1 :], word), (word[:middle] + word[middle] + word[middle:], word)]
    return found


def test_almost_every_typo_is_met_with_the_right_word(run_cli: Cli, empty: Path) -> None:
    top = {words[0] for words, _ in LEAVES if len(words) == 1}
    options = {name: words for words, command in LEAVES for p in command.params for name in p.opts}
    asked, right = 0, 0
    for typo, word in _typos():
        if word in top:
            answer = run_cli(typo)
        elif word.startswith("--") and word in options:
            answer = run_cli(*options[word], typo, "1")
        else:
            continue
        asked += 1
        right += f"Did you mean {word}?" in answer.err
    assert asked >= 50
    assert right >= 0.95 * asked


def test_an_abbreviated_option_is_not_guessed(run_cli: Cli, empty: Path) -> None:
    answer = run_cli("calibrate", "--eps", "3")
    assert (answer.code, "DP060" in answer.err) == (2, True)


def test_control_characters_of_a_name_do_not_reach_the_terminal(run_cli: Cli, empty: Path) -> None:
    answer = run_cli("ledger", "show", "\x1b[2Jx.ledger")
    assert answer.code == 4
    assert "\x1b" not in answer.err
    assert "\\x1b[2Jx.ledger" in answer.err


def test_an_internal_failure_is_reported_without_a_trace(
    run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("dpbudget._calibrate.epsilon_of", broken)
    answer = run_cli(*EPSILON.split())
    assert (answer.code, "DP099" in answer.err, "Traceback" in answer.err) == (6, True, False)


def test_help_alone_is_shown_on_a_bare_call(run_cli: Cli) -> None:
    answer = run_cli()
    assert answer.code == 2
    assert "Usage: dpbudget" in answer.err
    assert run_cli("ledger", "--json").code == 2


def test_an_interrupt_ends_with_130(empty: Path) -> None:
    code = (
        "import time, sys; from dpbudget_cli import explain; from dpbudget_cli.main import main\n"
        "def wait(*a, **k): print('ready', flush=True); time.sleep(30)\n"
        "explain.out.emit_table = wait\nmain(['explain'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in out + err


def test_a_missing_option_is_explained_and_not_only_named(run_cli: Cli, folder: Path) -> None:
    answer = run_cli("epsilon", "--sample-rate", "0.02", "--noise-multiplier", "1", "--steps", "10")
    assert answer.code == 2
    assert "error DP064: missing option '--delta'" in answer.err
    assert "Fix: pass --delta D: Delta, such as 1e-5 or 1/60000." in answer.err
