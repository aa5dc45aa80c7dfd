"""Random numbers of dropout and augmentation: not those of the program, but begun from secret words of a receipt.

The streams of a program are shared by all records and often start from a public number. A record less would then give
all later ones other draws, which are known too: other vectors, and a sum that differs by more than one. Therefore
every batch begins new streams from words that nobody knows, once before its records are read and once before the model
is called, since datasets seed streams too. Wherever in them they stand, records then draw
independently and alike, and a record less leaves the draws of the others as likely as they were
(docs/threat-model.md). The theorem of exact noise wants more (docs/exact.md): that a record's draws are its own, so
there every record begins streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch

from dpbudget.ledger.receipt import Receipt
from dptrainer.noise.chacha import BLOCK_BYTES, fill, keystream
from dptrainer.noise.keys import Purpose, step_key
from dptrainer.streams import SECRET_BYTES, begin_short_streams, begin_streams, lent_streams

#: Added to a batch's number: the stream from which reading its records draws.
_READING = 1 << 31


class BatchDraws:
    """New streams for every batch of a run whose batches go through the model whole.

    The n-th batch of a receipt (a piece of a large one, or a step of a pass) begins them under the receipt's key for
    ``record-draws``: from the words of stream 2^31 + n to read its records, and from those of stream n for the model.
    """

    def __init__(self) -> None:
        self._receipt: Receipt | None = None
        self._key, self._next = b"", 0

    def open(self, receipt: Receipt) -> None:
        """Take the key of a receipt, unless it is that of the last one; before its noise, which is a key's last use.

        Raises:
            ReceiptSpent: the receipt was used for this elsewhere (DP077) or in a forked process (DP076).
        """
        if receipt is not self._receipt:
            self._key, self._receipt, self._next = step_key(receipt, Purpose.RECORD_DRAWS), receipt, 0

    def begin(self, receipt: Receipt, device: torch.device, *, reading: bool = True) -> None:
        """Begin the streams that reading the next batch of a receipt draws from.

        Within :func:`~dptrainer.streams.lent_streams`, as :meth:`go_on`. Without ``reading``, for records that are
        rows of tensors, none are begun, which saves time.

        Raises:
            ReceiptSpent: as :meth:`open`.
        """
        self.open(receipt)
        if reading:
            begin_batch(self._key, self._next, device, reading=True)
        self._next += 1

    def go_on(self, device: torch.device) -> None:
        """Begin the streams from which the model draws for the batch that was read, whatever reading it left of them.

        A dataset that seeds (``torch.manual_seed(index)``, for repeatable augmentation) would otherwise tell all.
        """
        begin_batch(self._key, self._next - 1, device)

    def close(self) -> None:
        """Forget the key."""
        self._receipt, self._key = None, b""


def begin_batch(key: bytes, number: int, device: torch.device, *, reading: bool = False) -> None:
    """Begin the streams of the model, or of reading, for a batch of the step whose key for ``record-draws`` this is."""
    secret = bytearray(SECRET_BYTES)
    fill(secret, key, number + _READING if reading else number, 0)
    try:
        begin_streams(device, secret)
    finally:
        secret[:] = bytes(SECRET_BYTES)


def own_draws(receipt: Receipt, records: int, device: torch.device) -> AbstractContextManager[Callable[[int], None]]:
    """:func:`record_draws` with the key of a receipt, which is spent for the purpose ``record-draws``.

    Raises:
        ReceiptSpent: the receipt was used for this before (DP077) or in a forked process (DP076).
    """
    return record_draws(step_key(receipt, Purpose.RECORD_DRAWS), records, device)


@contextmanager
def record_draws(key: bytes, records: int, device: torch.device) -> Iterator[Callable[[int], None]]:
    """Within the block, the call with a record's place in the step begins the streams from which it may draw.

    Afterwards the program's go on.

    Args:
        key: of the step, for ``record-draws``.
        records: how many were drawn. Private.
        device: of the model.
    """
    raw = keystream(key, 0, 0, -(-8 * records // BLOCK_BYTES))
    words = np.frombuffer(raw, dtype="<u8")
    try:
        with lent_streams(device):
            yield lambda place: begin_short_streams(device, int(words[place]))
    finally:
        words.fill(0)
