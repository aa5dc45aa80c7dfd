"""Poisson sampling, exactly at rate k / 2^64, from the sampling key of a step.

Every record is included independently with probability **exactly** k / 2^64, given uniform keystream words: all
decisions compare integers, so neither a float nor a rounding can bias the rate that the accountant counts with.

* k = 2^64: every record.
* Rate at least 1/32: one 64-bit word w a record; it is included iff w < k.
* Smaller rates, at a cost proportional to the batch: the records are cut into blocks of m = 2^j, the power of two with
  1 <= m k / 2^64 < 2. How many records of a block are included follows Bin(m, k / 2^64), decided by comparing uniform
  bits with the exact distribution function (:mod:`dptrainer._binomial`); *which* ones is then a uniform subset of that
  size, drawn as j-bit positions and redrawn until they differ. Given its size, the set of included records of
  independent equal trials is uniform, so this is the same law. Positions beyond the population are dropped, which is
  harmless because records are independent of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dpbudget.errors import InvalidParameter
from dpbudget.ledger.receipt import Receipt
from dptrainer._binomial import binomial_counts
from dptrainer.noise.chacha import BLOCK_BYTES, keystream
from dptrainer.noise.keys import Purpose, step_key

Indices = NDArray[np.int64]

_ONE = 1 << 64
_DENSE = _ONE >> 5
# Streams of the sampling key. Rounds of positions count upwards from _POSITIONS.
_RECORDS, _COUNTS, _EXTRA, _POSITIONS = 0, 1, 2, 16
_CHUNK = 1 << 16


class PoissonSampler:
    """Draws the batch of a receipt. The result depends on the receipt's sampling key and the population alone."""

    def draw(self, receipt: Receipt, population: int) -> Indices:
        """Increasing int64 indices of the records of one step; often of another length, possibly empty.

        The population size and the result are private: use them to pick records, and print, log or store neither.

        Args:
            receipt: spent for the purpose ``sampling``.
            population: number of records, 0 <= population < 2^62.

        Raises:
            ReceiptSpent: the receipt was used for sampling before (DP077) or in a forked process (DP076).
        """
        return poisson_indices(step_key(receipt, Purpose.SAMPLING), receipt.rate_k, population)


def poisson_indices(key: bytes, rate_k: int, population: int) -> Indices:
    """Indices below ``population``, each included independently with probability exactly ``rate_k / 2**64``.

    Raises:
        InvalidParameter: ``rate_k`` is not in [1, 2^64] or ``population`` not in [0, 2^62) (DP008; a ValueError).
    """
    if not 1 <= rate_k <= _ONE or not 0 <= population < 1 << 62:
        raise InvalidParameter(  # the number of records is private
            "rate or number of records is out of range: a rate is k / 2^64, 1 <= k <= 2^64, of fewer than 2^62 records",
            code="DP008",
            hint="take rate_k from the plan or its receipts",
        )
    if rate_k == _ONE:
        return np.arange(population, dtype=np.int64)
    if rate_k >= _DENSE:
        return _dense(key, rate_k, population)
    return _by_blocks(key, rate_k, population)


def physical_batches(indices: Indices, max_size: int | None) -> Iterator[Indices]:
    """The same indices in pieces of at most ``max_size`` (None: one piece); an empty batch is one empty piece.

    Raises:
        ValueError: ``max_size`` is below 1.
    """
    if max_size is not None and max_size < 1:
        raise ValueError(f"a physical batch holds at least one record, got {max_size}")
    step = max_size or max(1, len(indices))
    for start in range(0, max(1, len(indices)), step):
        yield indices[start : start + step]


def rank_part(indices: Indices, rank: int, world: int) -> Indices:
    """What process ``rank`` of ``world`` takes of a step's indices, which each of them draws whole from the same key.

    Every index is in one part, and no part is larger than another by more than one.

    Raises:
        ValueError: 0 <= rank < world does not hold.
    """
    if not 0 <= rank < world:
        raise ValueError(f"there is no process {rank} among {world}")
    return indices[rank::world]


def _words(key: bytes, stream: int, first: int, count: int) -> NDArray[np.uint64]:
    """Words ``first .. first + count`` of a stream as uint64; ``first`` is a multiple of 8."""
    blocks = -(-8 * count // BLOCK_BYTES)
    raw = keystream(key, stream, first // 8, blocks)
    return np.frombuffer(raw, dtype="<u8", count=count).astype(np.uint64, copy=False)


def _dense(key: bytes, rate_k: int, population: int) -> Indices:
    found = [np.empty(0, dtype=np.int64)]
    for first in range(0, population, _CHUNK):
        words = _words(key, _RECORDS, first, min(_CHUNK, population - first))
        found.append(np.flatnonzero(words < np.uint64(rate_k)).astype(np.int64) + first)
    return np.concatenate(found)


def _by_blocks(key: bytes, rate_k: int, population: int) -> Indices:
    # 1 <= 2^j k / 2^64 < 2; j is 64 only for k = 1.
    bits = 65 - rate_k.bit_length()
    size = 1 << bits
    blocks = -(-population // size)
    owners = [np.empty(0, dtype=np.uint64)]
    for first in range(0, blocks, _CHUNK):
        words = _words(key, _COUNTS, first, min(_CHUNK, blocks - first))
        counts = binomial_counts(words, size, rate_k, partial(_extra_bits, key, first))
        owners.append(np.repeat(np.arange(first, first + len(words), dtype=np.uint64), counts))
    index = _distinct_places(key, np.concatenate(owners), bits)
    return index[: np.searchsorted(index, np.uint64(population))].astype(np.int64)


def _extra_bits(key: bytes, first: int, at: int, words: int) -> int:
    """``64 * words`` further bits for the count of block ``first + at``; more bits extend fewer."""
    # 2^6 keystream blocks each: 32,768 bits, of which not even 2^-1000 of the draws would need all.
    raw = keystream(key, _EXTRA, (first + at) << 6, -(-8 * words // BLOCK_BYTES))
    return int.from_bytes(bytes(raw[: 8 * words]), "big")


def _distinct_places(key: bytes, owner: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Increasing ``owner * 2^bits + place``, with uniform places, different within each owner.

    Whole owners are redrawn until they are. Nothing overflows: a block of 2^64 is alone, and the start of any other is
    below the population.
    """
    shift = np.uint64(bits)  # a shift by 64 gives 0
    index, pending = owner << shift, np.arange(len(owner))
    stream = _POSITIONS
    while True:
        places = _words(key, stream, 0, len(pending)) >> np.uint64(64 - bits)
        index[pending] = (owner[pending] << shift) | places
        ordered = np.sort(index)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(twice):
            return ordered
        pending = np.flatnonzero(np.isin(owner, np.unique(twice >> shift)))
        stream += 1
