"""Which record goes into which step of a pass: every record draws its step by itself, uniformly.

Not a shuffle and not the order of the dataset: there, whoever adds or removes one record moves others to other steps,
so that sums differ by far more than that record's gradient, and neighbours would have to be datasets of the same size.
Here the steps of the others are independent of the record, and have the same law with it and without it.

Word i of a stream decides for record i: w mod T for w below the largest multiple of T in 2^64, which is **exactly**
uniform given uniform words. A word beyond it is replaced by the word i of the next stream. So a record that is appended
changes nobody else's step, not even under the same key.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpbudget.ledger.receipt import Receipt
from dptrainer.noise.chacha import BLOCK_BYTES, keystream
from dptrainer.noise.keys import Purpose, step_key
from dptrainer.sampling import Indices

_WORDS = BLOCK_BYTES // 8
_CHUNK = 1 << 16


class UniformAllocation:
    """Draws the batches of a pass. They depend on the receipt's sampling key, the steps and the population alone."""

    def draw(self, receipt: Receipt, steps: int, population: int) -> list[Indices]:
        """Increasing int64 indices for each of the ``steps``; together every record once. Batches may be empty.

        Population and batch sizes are private: use them to pick records, and print, log or store neither.

        Args:
            receipt: spent for the purpose ``sampling``.
            steps: T, in [1, 2^32].
            population: number of records, 0 <= population < 2^62.

        Raises:
            ReceiptSpent: the receipt was used for sampling before (DP077) or in a forked process (DP076).
        """
        drawn = allocated_steps(step_key(receipt, Purpose.SAMPLING), steps, population)
        order = np.argsort(drawn, kind="stable")
        ends = np.searchsorted(drawn[order], np.arange(1, steps, dtype=np.uint64))
        return [np.asarray(part, dtype=np.int64) for part in np.split(order, ends)]


def allocated_steps(key: bytes, steps: int, population: int) -> NDArray[np.uint64]:
    """[population] uint64: the step of every record, counted from 0, independent and exactly uniform.

    Raises:
        ValueError: ``steps`` is not in [1, 2^32] or ``population`` not in [0, 2^62).
    """
    if not 1 <= steps <= 1 << 32 or not 0 <= population < 1 << 62:
        raise ValueError("steps or population is out of range")
    starts = range(0, population, _CHUNK)
    chunks = [_chunk(key, steps, first, min(_CHUNK, population - first)) for first in starts]
    return np.concatenate([np.empty(0, dtype=np.uint64), *chunks])


def _chunk(key: bytes, steps: int, first: int, count: int) -> NDArray[np.uint64]:
    words = _words(key, 0, first, count)
    fair = np.uint64((1 << 64) - (1 << 64) % steps - 1)  # the last word that is not one too many
    stream, pending = 1, np.flatnonzero(words > fair)
    while len(pending):
        for place in pending.tolist():
            words[place] = _word(key, stream, first + place)
        stream, pending = stream + 1, pending[words[pending] > fair]
    return words % np.uint64(steps)


def _words(key: bytes, stream: int, first: int, count: int) -> NDArray[np.uint64]:
    """Words ``first .. first + count`` of a stream; ``first`` begins a block."""
    raw = keystream(key, stream, first // _WORDS, -(-count // _WORDS))
    return np.frombuffer(raw, dtype="<u8", count=count).astype(np.uint64)


def _word(key: bytes, stream: int, index: int) -> np.uint64:
    block, place = divmod(index, _WORDS)
    return np.uint64(_words(key, stream, block * _WORDS, _WORDS)[place])
