"""Commands of a page, each in a copy of a process that has loaded what they import.

A command that starts anew spends most of its time on imports. So :func:`loaded` begins, before the page does anything,
a process that imports them all and then does nothing but copy itself: each command runs in a copy, with the folder and
the environment of the page, with memory, streams and an end of its own. What a shell adds, that it finds ``dpbudget``
and splits the line, is seen where a page is typed into one.
"""

from __future__ import annotations

import atexit
import importlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

#: What nearly every command imports, most of it on first use.
COMMON = ("dpbudget_cli.main", "dpbudget.ledger", "dpbudget.accountants.prv", "dpbudget.accountants.rdp", "numpy")
COMMON += ("dpbudget.accountants.pld", "scipy.special", "cryptography.hazmat.primitives.asymmetric.ed25519", "mpmath")
#: What training imports beside them.
TRAINING = ("dptrainer.trainer", "dptrainer.noise.source", "dptrainer.clipping.native", "safetensors.torch")
#: A line with one of these, within quotes or not, may mean something to a shell alone.
FOR_A_SHELL = set("|&;<>$`*?(){}~!")

Ended = tuple[int, str]
Run = Callable[[str], Ended]


def in_a_shell(line: str) -> Ended:
    """(exit code, what was said) of a line in a shell, standard output first."""
    done = subprocess.run(line, shell=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def loaded(modules: Iterable[str]) -> Run:
    """Begin the process with ``modules``; what runs a line in a copy of it. Lines for a shell go to one."""
    for module in modules:
        importlib.import_module(module)
    if clipping := sys.modules.get("dptrainer.clipping.native"):
        clipping.LIBRARY.get()  # each process compiles its own otherwise, for a second
    here, there = Pipe()
    process = _fork()
    if not process:
        here.close()
        _serve(there)
        os._exit(0)
    there.close()

    def end() -> None:
        here.close()
        os.waitpid(process, 0)

    atexit.register(end)

    def run(line: str) -> Ended:
        words = shlex.split(line, comments=True)
        if words[0] != "dpbudget" or FOR_A_SHELL & set("".join(words)):
            return in_a_shell(line)
        here.send((words, os.getcwd(), dict(os.environ)))
        ended: Ended = here.recv()
        return ended

    return run


def typed(run: Run, line: str, code: int, shown: list[str]) -> None:
    """A line ends with its exit code and says every line that the page shows of it."""
    ended, said = run(line)
    assert ended == code, f"{line} ended with {ended}: {said}"
    for one in shown:
        pattern = ".*".join(map(re.escape, one.rstrip().split("…")))
        assert re.search(f"^{pattern}$", said, re.MULTILINE), f"{line} did not say {one!r}: {said}"


def _fork() -> int:
    with warnings.catch_warnings():
        # From Python 3.12 on, of threads: of those that imports may have begun, none is needed by a command.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _serve(there: Connection) -> None:
    while True:
        try:
            words, folder, environment = there.recv()
        except EOFError:
            return
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as nothing:
            child = _fork()
            if not child:
                for number, stream in enumerate((nothing, out, err)):
                    os.dup2(stream.fileno(), number)
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
                _command(words)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = ""
            for stream in (out, err):
                stream.seek(0)
                said += stream.read().decode("utf-8")
        there.send((code, said))


def _command(words: list[str]) -> None:
    """The command, as its entry point runs it; the process ends here."""
    code: object = 1
    try:
        sys.argv = words
        from dpbudget_cli.main import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
