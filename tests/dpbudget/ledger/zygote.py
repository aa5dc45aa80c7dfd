"""A process with the fault shim preloaded: forks a child for every job that a test sends it.

LD_PRELOAD takes effect when a program starts, and importing takes a while, so one program imports once and forks. A job
is a line of JSON on standard input; answered are the child's id when it starts and its wait status when it is over.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ledgerkit import OWNER, make_ledger, make_plan, reopen

from dpbudget.errors import DPBudgetError, StorageFailed
from dpbudget.ledger.run import Run

SHIM = ctypes.CDLL(None)


class Spender:
    """One job: spends steps, logs every release, and reports how the fault showed."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.trace = os.open(job["trace"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if job.get("trace") else -1
        #: (step or act, code, counted calls by then) of every failure.
        self.failures: list[tuple[str, str, int]] = []

    def arm(self) -> None:
        path = os.path.realpath(self.job["path"]).encode()
        fault = (ctypes.c_long(self.job.get("number", 0)), self.job.get("mode", 0), self.job.get("error", 0))
        SHIM.shim_arm(path, *fault, self.trace)

    def release(self, step: int) -> None:
        SHIM.shim_mark(ctypes.c_long(step))
        os.write(self.log, b"%d\n" % step)

    def step(self, run: Run) -> None:
        if self.job.get("early"):  # the order that the ledger forbids: release, then charge
            self.release(run.charged)
            run.next_receipt()
        else:
            self.release(run.next_receipt().step)

    def attempt(self, name: str, act: Any) -> None:
        try:
            act()
        except StorageFailed as error:
            self.failures.append((name, error.code, SHIM.shim_calls()))

    def work(self) -> None:
        job = self.job
        if job.get("arm") in ("open", "create"):
            self.arm()
        if job.get("arm") == "create":
            with make_ledger(Path(job["path"])) as ledger:
                ledger.sign_plan(make_plan(4), owner=OWNER)
            return
        ledger = reopen(job["path"], high_water=False)  # trials restore the same copy
        if job.get("unsynced"):
            ledger._journal.store._connection.execute("PRAGMA synchronous=OFF")  # type: ignore[attr-defined]
        run = ledger.start(job["run"], lease_steps=job.get("lease_steps", 1))
        for _ in range(job.get("before", 0)):
            self.step(run)
        if job.get("arm", "steps") == "steps":
            self.arm()
        for _ in range(job.get("steps", 1)):
            self.bend_clock(job.get("clock", []))
            self.attempt("step", lambda: self.step(run))
        if job.get("arm") == "close":
            self.arm()
        self.attempt("close", run.close)
        SHIM.shim_disarm()
        ledger._journal.close()

    def bend_clock(self, clock: list[list[Any]]) -> None:
        if clock:
            act, value = clock.pop(0)
            if act == "zone":
                os.environ["TZ"] = value
                time.tzset()
            else:
                getattr(SHIM, f"shim_{act}_clock")(ctypes.c_int64(value))

    def report(self, code: str) -> None:
        facts = {"code": code, "failures": self.failures, "calls": SHIM.shim_calls(), "now": int(time.time())}
        Path(self.job["report"]).write_text(json.dumps(facts), encoding="utf-8")


def run_job(job: dict[str, Any]) -> None:
    spender = Spender(job)
    code = ""
    try:
        spender.work()
    except DPBudgetError as error:
        code = error.code
    SHIM.shim_disarm()
    spender.report(code)


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run_job(job)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
