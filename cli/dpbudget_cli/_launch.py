"""Another program as a child: no shell, its exit code as ours, signals handed on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dpbudget.errors import Unreadable

_FORWARDED = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
#: The descriptor itself, whatever stands in for sys.stderr.
_STDERR = 2
#: What a terminal sends to every process in its foreground, hence to the child without our help.
_FROM_KEYBOARD = (signal.SIGINT, signal.SIGQUIT)


def find_program(name: str) -> str:
    """The path of a program.

    Raises:
        Unreadable: there is none of this name (DP070).
    """
    found = shutil.which(name)
    if found is None:
        raise Unreadable(
            f"{name}: no such program", hint="write -- and then the command, as in -- python train.py; nothing was run"
        )
    return found


def launch(
    words: Sequence[str],
    environment: Mapping[str, str],
    *,
    to_stderr: bool = False,
    secret: tuple[str, bytes] | None = None,
) -> int:
    """Run a program to its end; returns its exit code, 128 + N where signal N ended it.

    Args:
        words: the program and its arguments; no shell reads them.
        environment: variables beside those of this process.
        to_stderr: whether its standard output goes to standard error.
        secret: a variable, and what can be read, once, from the inherited descriptor that the variable names.

    Raises:
        Unreadable: there is no such program, or it cannot be run (DP070).
    """
    program, variables, handed = find_program(words[0]), {**os.environ, **environment}, list[int]()
    if secret is not None:
        handed.append(_pipe_with(secret[1]))
        variables[secret[0]] = str(handed[0])
    try:
        with _relayed() as relay:
            child = subprocess.Popen(  # noqa: S603 - what the user asked to run, without a shell
                [program, *words[1:]], env=variables, stdout=_STDERR if to_stderr else None, pass_fds=handed
            )
            relay.attach(child)
            code = child.wait()
    except OSError as error:
        raise Unreadable(f"{words[0]}: {error.strerror or error}", hint="name a program that can be run") from None
    finally:
        for descriptor in handed:
            os.close(descriptor)
    return 128 - code if code < 0 else code


def _pipe_with(secret: bytes) -> int:
    """The end of a pipe from which ``secret`` can be read; it fits into any pipe's buffer."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as stream:
        stream.write(secret)
    return reading


class _Relay:
    """Hands signals to a child; those that come before there is one wait for it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def attach(self, child: subprocess.Popen[bytes]) -> None:
        """From now on signals go to ``child``."""
        self._child = child
        for number in self._early:
            child.send_signal(number)

    def hand_on(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if number in _FROM_KEYBOARD and _in_foreground():
            return
        if self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)


@contextmanager
def _relayed() -> Iterator[_Relay]:
    """Within the block, signals are the relay's."""
    relay, before = _Relay(), dict[signal.Signals, Any]()
    try:
        for number in _FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores for the child too
                before[number] = signal.signal(number, relay.hand_on)
    except ValueError:  # not the main thread, which alone receives signals
        pass
    try:
        yield relay
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Whether this process is in the foreground of its terminal, where the keyboard's signals reach the child too."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
