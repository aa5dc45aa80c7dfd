"""Which step of a pass a record is in: uniform, independent, and nobody else's business."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpbudget.errors import ReceiptSpent
from dpbudget.ledger.receipt import Receipt
from dptrainer import allocation
from dptrainer.allocation import UniformAllocation, allocated_steps
from dptrainer.noise.chacha import keystream
from dptrainer.noise.keys import Purpose, step_key

KEY = bytes(range(32))
KEYS = st.binary(min_size=32, max_size=32)


def key(seed: int) -> bytes:
    return seed.to_bytes(32, "little")


@settings(max_examples=60, deadline=None)
@given(KEYS, st.integers(1, 40), st.integers(0, 200))
def test_every_record_is_in_exactly_one_step(secret: bytes, steps: int, population: int) -> None:
    drawn = allocated_steps(secret, steps, population)
    assert len(drawn) == population
    assert all(0 <= step < steps for step in drawn.tolist())


def test_the_batches_of_a_pass_are_the_records_of_each_step_in_order(new_receipt: Callable[..., Receipt]) -> None:
    facts = {"fresh": bytes(16), "key": new_receipt().key}
    batches = UniformAllocation().draw(new_receipt(**facts), 7, 100)
    drawn = allocated_steps(step_key(new_receipt(**facts), Purpose.SAMPLING), 7, 100)
    assert [batch.tolist() for batch in batches] == [np.flatnonzero(drawn == step).tolist() for step in range(7)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(100))
    assert {batch.dtype for batch in batches} == {np.dtype(np.int64)}


@pytest.mark.parametrize(("steps", "population"), [(1, 0), (1, 5), (5, 0), (300, 10)])
def test_there_are_as_many_batches_as_steps_and_some_may_be_empty(
    new_receipt: Callable[..., Receipt], steps: int, population: int
) -> None:
    batches = UniformAllocation().draw(new_receipt(), steps, population)
    assert len(batches) == steps
    assert sum(map(len, batches)) == population


@settings(max_examples=60, deadline=None)
@given(KEYS, st.integers(1, 50), st.integers(0, 100), st.integers(0, 100))
def test_a_record_that_is_added_changes_nobody_elses_step(secret: bytes, steps: int, few: int, more: int) -> None:
    assert np.array_equal(allocated_steps(secret, steps, few + more)[:few], allocated_steps(secret, steps, few))


def test_a_record_that_is_added_changes_nobody_elses_step_where_chunks_meet() -> None:
    whole = allocated_steps(KEY, 5, 200_000)
    for population in (65_535, 65_536, 65_537, 131_072, 199_999):
        assert np.array_equal(allocated_steps(KEY, 5, population), whole[:population])


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 64])
def test_steps_are_uniform(steps: int) -> None:
    counts = np.bincount(allocated_steps(KEY, steps, 100_000).astype(np.int64), minlength=steps)
    expected = 100_000 / steps
    squares = float(((counts - expected) ** 2 / expected).sum())
    assert abs(squares - (steps - 1)) < 6 * math.sqrt(2 * (steps - 1)) + 6


def test_one_record_is_uniform_over_passes_and_independent_of_its_neighbour() -> None:
    drawn = np.array([allocated_steps(key(seed), 3, 2) for seed in range(9000)]).astype(np.int64)
    pairs = np.bincount(3 * drawn[:, 0] + drawn[:, 1], minlength=9)
    assert float(((pairs - 1000) ** 2 / 1000).sum()) < 8 + 6 * math.sqrt(2 * 8)


def test_a_step_is_the_word_of_the_record_modulo_the_steps() -> None:
    """Binds the layout: word i of stream 0, little-endian."""
    raw = bytes(keystream(KEY, 0, 0, 13))
    words = [int.from_bytes(raw[8 * i : 8 * i + 8], "little") for i in range(100)]
    assert allocated_steps(KEY, 10, 100).tolist() == [word % 10 for word in words]


def faked(monkeypatch: pytest.MonkeyPatch, streams: list[list[int]]) -> None:
    def fake(secret: bytes, stream: int, first: int, blocks: int) -> bytes:
        words = streams[stream] + [0] * (8 * (first + blocks))
        return b"".join(word.to_bytes(8, "little") for word in words[8 * first : 8 * (first + blocks)])

    monkeypatch.setattr(allocation, "keystream", fake)


def test_words_that_would_tip_the_scales_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    top, steps = (1 << 64) - 1, 10  # 2^64 mod 10 = 6: the last six words would favour the steps 0 to 5
    streams = [[top, top - 5, top - 6, 3, 4, 5, 6, 7, 8, top], [0, top, 5, 5, 5, 5, 5, 5, 5, 21], [9, 18, 9]]
    faked(monkeypatch, streams)
    assert allocated_steps(KEY, steps, 10).tolist() == [0, 8, (top - 6) % 10, 3, 4, 5, 6, 7, 8, 1]


@pytest.mark.parametrize("steps", [1, 2, 64, 1 << 32])
def test_a_power_of_two_redraws_no_word(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    top = (1 << 64) - 1
    faked(monkeypatch, [[top, 0, 5]])  # there is no second stream to ask
    assert allocated_steps(KEY, steps, 3).tolist() == [steps - 1, 0, 5 % steps]


def test_every_word_that_counts_is_as_likely_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactness at its edge, for any number of steps: the last fair word belongs to the last step."""
    for steps in (3, 5, 6, 7, 11, 1000, (1 << 32) - 1):
        last = (1 << 64) - (1 << 64) % steps - 1
        faked(monkeypatch, [[last, last + 1], [0, 2]])
        assert allocated_steps(KEY, steps, 2).tolist() == [steps - 1, 2]


def test_a_receipt_allocates_once(new_receipt: Callable[..., Receipt]) -> None:
    receipt = new_receipt()
    UniformAllocation().draw(receipt, 3, 10)
    with pytest.raises(ReceiptSpent) as caught:
        UniformAllocation().draw(receipt, 3, 10)
    assert caught.value.code == "DP077"


def test_two_passes_allocate_differently(new_receipt: Callable[..., Receipt]) -> None:
    batches = [UniformAllocation().draw(new_receipt(), 4, 200) for _ in range(2)]
    assert [batch.tolist() for batch in batches[0]] != [batch.tolist() for batch in batches[1]]


@pytest.mark.parametrize("bad", [(0, 5), (-1, 5), ((1 << 32) + 1, 5), (3, -1), (3, 1 << 62)])
def test_ranges_are_checked(bad: Any) -> None:
    with pytest.raises(ValueError, match="out of range"):
        allocated_steps(KEY, *bad)
