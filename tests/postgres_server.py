"""A PostgreSQL server on loopback for the tests that need one: made, started and removed by the session.

The programs are looked for on the path and where Debian puts them. PostgreSQL refuses to run as root, so root runs it
as the user ``postgres`` or ``nobody``.
"""

from __future__ import annotations

import glob
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PASSWORD = secrets.token_hex(8)
_QUICK = (
    "-c shared_buffers=16MB -c max_connections=60 -c log_min_messages=fatal -c wal_level=minimal -c max_wal_senders=0"
)


@dataclass
class Server:
    """A running server; its superuser is ``admin``."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    account: str | None

    def url(self, ledger: str = "main", *, user: str = "admin", database: str = "postgres", password: str = "") -> str:
        return f"postgresql://{user}:{password or PASSWORD}@127.0.0.1:{self.port}/{database}#{ledger}"

    def connect(self, database: str = "postgres", user: str = "admin") -> Any:
        import psycopg

        return psycopg.connect(self.url(user=user, database=database).partition("#")[0], autocommit=True)

    def database(self) -> str:
        """A fresh database, and its name."""
        name = f"d{secrets.token_hex(4)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return name

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """End server and backends at once: a backend outlives the server for a moment, and answers."""
        try:
            backends = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:  # no such file on this system
            backends = []
        self.process.kill()
        for backend in backends:
            with suppress(ProcessLookupError):
                os.kill(int(backend), signal.SIGKILL)
        self.process.wait()


def program(name: str) -> str | None:
    """Where initdb or postgres lies; the newest of Debian's versions."""
    places = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), key=lambda place: int(place.split("/")[4]))
    return places[-1] if places else shutil.which(name)


def why_not() -> str | None:
    """Why no server can be started here; None if it can."""
    missing = [name for name in ("initdb", "postgres") if program(name) is None]
    if missing:
        return f"PostgreSQL is not installed: no {' and no '.join(missing)}"
    if os.getuid() == 0 and _account() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return None


def _account() -> str | None:
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run_as(account: str | None) -> dict[str, Any]:
    # extra_groups: none of root's.
    return {} if account is None else {"user": account, "group": pwd.getpwnam(account).pw_gid, "extra_groups": []}


@contextmanager
def running(options: str = "") -> Iterator[Server]:
    """A server with password authentication, ready for connections."""
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="dpbudget-pg-"))
    try:
        secret = folder / "password"
        secret.write_text(PASSWORD, encoding="ascii")
        if account is not None:
            entry = pwd.getpwnam(account)
            for place in (folder, secret):
                os.chown(place, entry.pw_uid, entry.pw_gid)
        data = folder / "data"
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(folder)}
        subprocess.run(
            [
                str(program("initdb")),
                "-D",
                str(data),
                "-U",
                "admin",
                "-A",
                "scram-sha-256",
                "-N",
                "--pwfile",
                str(secret),
            ],
            check=True,
            capture_output=True,
            cwd=folder,
            env=environment,
            **_run_as(account),
        )
        yield from _serve(folder, data, account, environment, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(
    folder: Path, data: Path, account: str | None, environment: dict[str, str], options: str
) -> Iterator[Server]:
    port = _free_port()
    command = [str(program("postgres")), "-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    command += ["-c", f"unix_socket_directories={folder}", *_QUICK.split(), *options.split()]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **_run_as(account)
    )
    server = Server(folder, port, process, account)
    try:
        _wait(server)
        yield server
    finally:
        server.stop()


def _wait(server: Server) -> None:
    import psycopg

    deadline = time.monotonic() + 30
    while True:
        try:
            server.connect().close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline or server.process.poll() is not None:
                raise
            time.sleep(0.05)
