"""A warm process that forks one training child for every line of JSON on standard input; run by test_kill.py.

It imports torch once and opens no ledger itself: a fork must come before the ledger, since a forked run is refused.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model, reopen

from dpbudget.ledger.receipt import Receipt
from dptrainer.clipping import native
from dptrainer.noise.source import SecureNoise
from dptrainer.trainer import PrivateTrainer
from dptrainer.values import ClippedSum, NoisySum


class LoggedNoise(SecureNoise):
    """Writes the step number the moment that its noisy sum exists: from then on it may have been seen by anybody."""

    def __init__(self, log: str) -> None:
        self._file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        noisy = super().privatise(clipped, receipt)
        os.write(self._file, b"%d\n" % receipt.step)
        return noisy


def train(order: dict[str, str]) -> None:
    ledger = reopen(Path(order["ledger"]), high_water=False)  # every training begins from a copy of one ledger
    run = ledger.start(order["run"])
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = LoggedNoise(order["log"])
    PrivateTrainer(model, optimizer, F.cross_entropy, linear_data(), run, noise=noise).fit()
    ledger.close()


def main() -> None:
    torch.set_num_threads(1)
    native.LIBRARY.get()  # each child would compile its own, for a second
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                train(json.loads(line))
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
