"""run: a script gets ledger, run and key file by its environment; exit codes and signals pass, no shell reads it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dpbudget
from dpbudget._environment import LEDGER, PASSPHRASE_FD, RUN, WRITER_KEY
from dpbudget._verify import verify
from dpbudget.errors import InvalidParameter, Unreadable
from dpbudget.ledger.keys import new_key
from dpbudget_cli._launch import launch

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
ROOT = Path(__file__).resolve().parents[2]
MAIN = [sys.executable, "-c", "from dpbudget_cli.main import main; main()"]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
BEGIN = ("run", "--ledger", "budget.ledger", "--", sys.executable)

TAKES_THREE = """
import sys, dpbudget
run = dpbudget.start_from_environment()
for _ in range(3):
    run.next_receipt()
print("from the script", sys.argv[1:])
sys.exit(7)
"""
SAYS_SIGNALS = """
import signal, sys, time
def say(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    if number == signal.SIGTERM:
        sys.exit(5)
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), say)
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""


def dp(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    env = {**ENV, "DPBUDGET_STATE": os.environ["DPBUDGET_STATE"]}
    return subprocess.run([*MAIN, *words], capture_output=True, text=True, env=env, timeout=120, **more)


class TestTheScript:
    def test_it_spends_from_the_run_and_its_exit_code_passes_on(self, folder: Path) -> None:
        (folder / "train.py").write_text(TAKES_THREE, encoding="utf-8")
        done = dp(*BEGIN, "train.py", "--lr", "$HOME", "a b", "--json")
        assert done.returncode == 7, done.stderr
        assert done.stdout == "from the script ['--lr', '$HOME', 'a b', '--json']\n"  # no shell, no option of ours
        assert "3 of 20 steps charged, 3 meanwhile" in done.stderr
        assert f"head {verify('budget.ledger').head}" in done.stderr

    def test_with_json_one_object_stands_alone_on_standard_output(self, folder: Path) -> None:
        (folder / "train.py").write_text(TAKES_THREE, encoding="utf-8")
        done = dp("run", "--ledger", "budget.ledger", "--json", "--", sys.executable, "train.py")
        assert done.returncode == 7
        answer = json.loads(done.stdout)
        assert (answer["charged_before"], answer["charged"], answer["planned"], answer["exit_code"]) == (0, 3, 20, 7)
        assert answer["head"] == verify("budget.ledger").head
        assert "from the script" in done.stderr

    def test_it_is_told_paths_and_no_secret(self, folder: Path) -> None:
        code = "import json, os; print(json.dumps({k: v for k, v in os.environ.items()}))"
        told = json.loads(dp(*BEGIN, "-c", code).stdout)
        assert told[LEDGER] == str(folder / "budget.ledger")
        assert told[WRITER_KEY] == str(folder / "budget.ledger.writer.key")
        (run,) = dpbudget.open_ledger("budget.ledger").state.runs
        assert told[RUN] == run
        assert PASSPHRASE_FD not in told
        secret = (folder / "budget.ledger.writer.key").read_text(encoding="utf-8").split()[-2]
        assert not any(secret in value for value in told.values())

    def test_it_finds_ledger_and_key_from_another_folder(self, folder: Path, tmp_path: Path) -> None:
        code = (
            f"import os; os.chdir({str(tmp_path)!r}); import dpbudget; print(dpbudget.start_from_environment().planned)"
        )
        done = dp(*BEGIN, "-c", code)
        assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr

    def test_a_passphrase_is_handed_over_by_a_descriptor_and_no_variable(self, folder: Path) -> None:
        new_key("locked.key", b"correct horse")
        rotate = ("key", "rotate", "writer", "budget.ledger", "--new-key", "locked.key", "--passphrase-fd", "0")
        assert dp(*rotate, input="correct horse\n").returncode == 0
        code = (
            "import os, dpbudget; dpbudget.start_from_environment().next_receipt(); "
            "print([v for v in os.environ.values() if 'horse' in v])"
        )
        words = ("run", "--ledger", "budget.ledger", "--writer-key", "locked.key", "--passphrase-fd", "0", "--")
        done = dp(*words, sys.executable, "-c", code, input="wrong\ncorrect horse\n")
        assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
        assert verify("budget.ledger").steps == 1
        refused = dp(*words, sys.executable, "-c", "print('it ran')", input="wrong\n")
        assert (refused.returncode, "error DP07" in refused.stderr, refused.stdout) == (4, True, "")

    def test_a_run_that_the_script_does_not_close_is_closed_with_the_process(self, folder: Path) -> None:
        assert dp(*BEGIN, "-c", "import dpbudget; dpbudget.start_from_environment().next_receipt()").returncode == 0
        (run,) = dpbudget.open_ledger("budget.ledger").state.runs.values()
        assert (run.charged, run.reserved, run.leases) == (1, 1, ())


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "code", "exit_code"),
        [
            (("--ledger", "nowhere.ledger"), "DP070", 4),
            (("--ledger", "budget.ledger", "--plan", "nothing"), "DP081", 2),
            (("--ledger", "budget.ledger", "--writer-key", "owner.key"), "DP080", 2),
            (("--ledger", "budget.ledger", "--writer-key", "missing.key"), "DP070", 4),
        ],
    )
    def test_nothing_is_run_where_the_ledger_would_refuse_it(
        self, run_cli: Cli, folder: Path, seen: Seen, words: tuple[str, ...], code: str, exit_code: int
    ) -> None:
        before = seen(folder)
        answer = run_cli("run", *words, "--", sys.executable, "-c", "open('it ran', 'w')")
        assert (answer.code, code in answer.err, seen(folder) == before) == (exit_code, True, True), answer.err

    def test_a_used_up_plan_is_refused_before_the_script_begins(self, run_cli: Cli, folder: Path) -> None:
        writer = dpbudget.load_key("budget.ledger.writer.key")
        with dpbudget.open_ledger("budget.ledger", writer=writer) as ledger, dpbudget.start(ledger) as run:
            for _ in run:
                pass
        answer = run_cli("run", "--ledger", "budget.ledger", "--", sys.executable, "-c", "open('it ran', 'w')")
        assert (answer.code, "DP050" in answer.err, (folder / "it ran").exists()) == (3, True, False)

    @pytest.mark.parametrize("name", ["no-such-program", "./train.csv", ""])
    def test_a_program_that_cannot_be_run_is_named(self, run_cli: Cli, folder: Path, name: str) -> None:
        answer = run_cli("run", "--ledger", "budget.ledger", "--", name)
        assert (answer.code, "DP070" in answer.err, "Traceback" in answer.err) == (4, True, False)

    def test_without_a_command_it_says_how_to_write_one(self, run_cli: Cli, folder: Path) -> None:
        answer = run_cli("run", "--ledger", "budget.ledger")
        assert (answer.code, "DP064" in answer.err) == (2, True)
        assert "-- COMMAND" in answer.err

    @pytest.mark.parametrize("missing", [LEDGER, RUN, WRITER_KEY])
    def test_a_script_that_was_started_by_itself_is_told_how_to_start_it(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str
    ) -> None:
        (run,) = dpbudget.open_ledger("budget.ledger").state.runs
        values = {LEDGER: "budget.ledger", RUN: run, WRITER_KEY: "budget.ledger.writer.key"}
        for name, value in values.items():
            monkeypatch.setenv(name, "" if name == missing else value)
        with pytest.raises(InvalidParameter, match=f"{missing} is not set") as caught:
            dpbudget.start_from_environment()
        assert caught.value.code == "DP064"
        assert "dpbudget run --ledger" in caught.value.hint

    @pytest.mark.parametrize("number", ["99", "x", "-1", "9" * 30])
    def test_a_passphrase_that_was_read_already_is_asked_for_by_its_argument(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, number: str
    ) -> None:
        new_key("locked.key", b"horse")
        monkeypatch.setenv(LEDGER, "budget.ledger")
        monkeypatch.setenv(RUN, "x")
        monkeypatch.setenv(WRITER_KEY, "locked.key")
        monkeypatch.setenv(PASSPHRASE_FD, number)
        with pytest.raises(Unreadable, match="cannot be read from") as caught:
            dpbudget.start_from_environment()
        assert "passphrase=" in caught.value.hint
        with pytest.raises(InvalidParameter) as other:  # opened by the argument, and it is another ledger's writer
            dpbudget.start_from_environment(passphrase=b"horse")
        assert other.value.code == "DP080"


class TestSignals:
    @pytest.fixture(autouse=True)
    def _interrupts_are_not_ignored(self) -> Iterator[None]:
        """Whoever starts the tests in the background has them ignore Ctrl-C, and a child would go on ignoring it."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def begun(self, folder: Path, **more: Any) -> subprocess.Popen[str]:
        (folder / "wait.py").write_text(SAYS_SIGNALS, encoding="utf-8")
        env = {**ENV, "DPBUDGET_STATE": os.environ["DPBUDGET_STATE"]}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        child = subprocess.Popen([*MAIN, *BEGIN, "wait.py"], text=True, env=env, **pipes)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    def test_they_go_to_the_script_which_decides_how_to_end(self, folder: Path) -> None:
        with self.begun(folder, start_new_session=True) as child:
            for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
                child.send_signal(number)
                assert child.stdout is not None
                assert child.stdout.readline() == f"got {number.name}\n"
            assert child.wait(60) == 5
            assert child.stderr is not None
            assert "0 of 20 steps charged, 0 meanwhile" in child.stderr.read()

    def test_a_script_that_a_signal_ends_gives_128_and_its_number(self, folder: Path) -> None:
        code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        assert dp(*BEGIN, "-c", code).returncode == 128 + signal.SIGKILL

    def test_a_signal_that_comes_before_the_child_is_there_reaches_it(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        popen = subprocess.Popen

        def early(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)  # ours, between the handlers and the child
            return popen(*args, **kwargs)

        monkeypatch.setattr(subprocess, "Popen", early)
        before = signal.getsignal(signal.SIGTERM)
        assert launch([sys.executable, "-c", "import time; time.sleep(60)"], {}) == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before

    def test_a_key_on_the_terminal_reaches_the_script_once(self, folder: Path) -> None:
        (folder / "wait.py").write_text(SAYS_SIGNALS, encoding="utf-8")
        env = {**ENV, "DPBUDGET_STATE": os.environ["DPBUDGET_STATE"]}
        pid, terminal = pty.fork()
        if pid == 0:  # a new session, whose terminal sends Ctrl-C to all of its foreground
            os.execve(sys.executable, [*MAIN, *BEGIN, "wait.py"], env)
        seen = _until(terminal, b"ready")
        os.write(terminal, b"\x03")
        seen += _until(terminal, b"got SIGINT")
        time.sleep(0.5)  # a second one would come now
        os.kill(pid, signal.SIGTERM)
        seen += _until(terminal, b"meanwhile")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
        assert seen.count(b"got SIGINT") == 1
        os.close(terminal)


def _until(terminal: int, word: bytes) -> bytes:
    seen = b""
    while word not in seen:
        seen += os.read(terminal, 4096)
    return seen


@pytest.mark.slow
def test_torchrun_hands_the_run_to_its_workers_and_one_of_them_trains(folder: Path) -> None:
    code = """
import os, dpbudget
if os.environ["RANK"] == "0":
    run = dpbudget.start_from_environment()
    run.next_receipt()
"""
    (folder / "train.py").write_text(code, encoding="utf-8")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")
    done = dp(*BEGIN, *torchrun)
    assert done.returncode == 0, done.stderr
    assert verify("budget.ledger").steps == 1
