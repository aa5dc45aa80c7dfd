"""Random numbers of a record's own, which the theorem of exact noise asks of dropout and augmentation (docs/exact.md).

The streams of a program are shared by all records and often start from a public number. A record less would then give
all later ones other draws, which are known too: other vectors, and a sum that differs by more than one. Therefore
every record of a step begins new streams, from secret words of the step's receipt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dpbudget.ledger.receipt import Receipt
from dptrainer.noise.chacha import BLOCK_BYTES, keystream
from dptrainer.noise.keys import Purpose, step_key


@contextmanager
def own_draws(receipt: Receipt, records: int, device: torch.device) -> Iterator[Callable[[int], None]]:
    """Within the block, the call with a record's place in the step begins the streams from which it may draw.

    They are those of :func:`begun_streams`, and afterwards the program's go on.

    Args:
        receipt: spent for the purpose ``record-draws``.
        records: how many were drawn. Private.
        device: of the model.

    Raises:
        ReceiptSpent: the receipt was used for this before (DP077) or in a forked process (DP076).
    """
    raw = keystream(step_key(receipt, Purpose.RECORD_DRAWS), 0, 0, -(-8 * records // BLOCK_BYTES))
    words = np.frombuffer(raw, dtype="<u8")
    try:
        with begun_streams(device) as begin:
            yield lambda place: begin(int(words[place]))
    finally:
        words.fill(0)


@contextmanager
def begun_streams(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Within the block, the call with a 64-bit word begins new streams, each a function of the word alone.

    These are torch's on the CPU and on ``device``, that of ``random`` and NumPy's global one; generators of other
    objects are not reached. After the block the program's streams go on as if nothing had been drawn: how much was is
    private.
    """

    def begin(word: int) -> None:
        torch.default_generator.manual_seed(word)  # which looks at 32 bits
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(word)
        random.seed(word)
        np.random.seed(word >> 32)

    plain, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield begin
    finally:
        random.setstate(plain)
        np.random.set_state(legacy)
