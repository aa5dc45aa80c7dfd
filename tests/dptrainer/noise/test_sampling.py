"""Poisson sampling: the same decisions as exact rational arithmetic, and the statistics that follow."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from dpbudget.errors import ReceiptSpent
from dpbudget.ledger.noise_keys import LeaseKey
from dpbudget.ledger.receipt import Receipt
from dptrainer import sampling
from dptrainer._binomial import _floors, binomial_counts, distribution_floors
from dptrainer.noise.chacha import keystream
from dptrainer.sampling import PoissonSampler, physical_batches, poisson_indices, rank_part

ONE = 1 << 64
KEY = bytes(range(32))


def key(seed: int) -> bytes:
    return seed.to_bytes(32, "little")


def exact_cdf(trials: int, rate_k: int, up_to: int) -> list[Fraction]:
    """F(0), F(1), ... of Bin(trials, rate_k / 2^64) in rational arithmetic."""
    q = Fraction(rate_k, ONE)
    total, found = Fraction(0), []
    for c in range(up_to):
        total += math.comb(trials, c) * q**c * (1 - q) ** (trials - c)
        found.append(total)
    return found


@pytest.mark.parametrize(("trials", "rate_k"), [(64, 1 << 58), (64, (1 << 59) - 1), (128, (1 << 57) + 987654321)])
@pytest.mark.parametrize("bits", [64, 128, 320])
def test_the_distribution_function_has_every_bit_right(trials: int, rate_k: int, bits: int) -> None:
    floors = distribution_floors(trials, rate_k, bits)
    cdf = exact_cdf(trials, rate_k, len(floors))
    assert floors == tuple(math.floor(value * 2**bits) for value in cdf)
    assert floors[-1] == 2**bits - 1


def test_the_distribution_function_asks_for_more_precision_when_its_ends_disagree() -> None:
    # Without guard bits the outward rounding shows, and the answer is withheld; with them both agree.
    assert _floors(1 << 40, (1 << 24) + 1, 64, 1) is None
    assert distribution_floors(1 << 40, (1 << 24) + 1, 64) == _floors(1 << 40, (1 << 24) + 1, 64, 500)


def exact_count(uniform: int, bits: int, cdf: list[Fraction]) -> int:
    low = Fraction(uniform, 2**bits)
    count = sum(value <= low for value in cdf)
    assert cdf[count] >= Fraction(uniform + 1, 2**bits), "the bits do not decide"
    return count


@given(st.lists(st.integers(0, ONE - 1), min_size=1, max_size=50), st.integers(1 << 58, (1 << 59) - 1))
@settings(max_examples=30, deadline=None)
def test_counts_are_those_of_rational_arithmetic(words: list[int], rate_k: int) -> None:
    cdf = exact_cdf(64, rate_k, 40)
    counts = binomial_counts(np.array(words, dtype=np.uint64), 64, rate_k, lambda i, n: 0)
    for word, count in zip(words, counts.tolist(), strict=True):
        extended = exact_count(word << 256, 320, cdf)
        assert count == extended


@pytest.mark.parametrize("extra", [0, 1, 2**63, ONE - 1])
@pytest.mark.parametrize("edge", range(6))
def test_a_word_on_an_edge_is_decided_by_further_bits(edge: int, extra: int) -> None:
    rate_k = (1 << 58) + 12345
    cdf = exact_cdf(64, rate_k, 40)
    word = math.floor(cdf[edge] * ONE)
    asked: list[int] = []

    def more(index: int, words: int) -> int:
        assert index == 0
        asked.append(words)
        return extra << 64 * (words - 1)

    counts = binomial_counts(np.array([word], dtype=np.uint64), 64, rate_k, more)
    assert asked, "the first 64 bits cannot decide a word on an edge"
    assert counts[0] == exact_count(((word << 64) | extra) << 192, 320, cdf)


def test_bits_that_stay_on_the_edge_are_read_until_they_leave_it() -> None:
    rate_k = 1 << 58
    target = exact_cdf(64, rate_k, 40)[2]
    wanted: list[int] = []

    def more(index: int, words: int) -> int:
        wanted.append(words)
        # Agrees with F(2) for 192 bits, then exceeds it.
        bits = math.floor(target * 2**256) & ((1 << 192) - 1)
        return bits >> 64 * (3 - words) if words <= 3 else ((bits + 1) << 64 * (words - 3)) - 1

    word = math.floor(target * ONE)
    assert binomial_counts(np.array([word], dtype=np.uint64), 64, rate_k, more).tolist() == [3]
    assert wanted[:3] == [1, 2, 3]


def test_the_largest_word_is_never_out_of_the_table() -> None:
    counts = binomial_counts(np.array([ONE - 1], dtype=np.uint64), 64, 1 << 58, lambda i, n: (1 << 64 * n) - 2)
    cdf = exact_cdf(64, 1 << 58, 60)
    assert counts[0] == exact_count((ONE - 1) << 64 | (ONE - 2), 128, cdf)


def test_dense_sampling_compares_one_word_a_record_with_k() -> None:
    rate_k = 3 << 61
    words = np.frombuffer(keystream(KEY, 0, 0, 125), dtype="<u8")
    assert poisson_indices(KEY, rate_k, 1000).tolist() == np.flatnonzero(words < rate_k).tolist()


def drawn_by_the_text(secret: bytes, rate_k: int, population: int) -> list[int]:
    """docs/adr/0003, "Samples", record by record."""
    size = next(1 << j for j in range(65) if ONE <= rate_k << j < 2 * ONE)

    def word(stream: int, at: int) -> int:
        return int.from_bytes(keystream(secret, stream, at // 8, 1)[at % 8 * 8 :][:8], "little")

    cdf = exact_cdf(size, rate_k, 40)
    owners = []
    for block in range(-(-population // size)):
        extra = int.from_bytes(keystream(secret, 2, 64 * block, 1), "big")
        owners += [block] * exact_count(word(1, block) << 512 | extra, 576, cdf)
    places: list[int | None] = [None] * len(owners)
    stream = 16
    while None in places:
        for at, entry in enumerate([entry for entry, place in enumerate(places) if place is None]):
            places[entry] = word(stream, at) * size >> 64
        chosen = list(zip(owners, places, strict=True))
        clashing = {owner for owner, place in chosen if chosen.count((owner, place)) > 1}
        places = [None if owner in clashing else place for owner, place in chosen]
        stream += 1
    found = (owner * size + place for owner, place in zip(owners, places, strict=True) if place is not None)
    return sorted(index for index in found if index < population)


@pytest.mark.parametrize(
    ("rate_k", "population"), [(1 << 58, 5000), ((1 << 59) - 1, 3000), ((1 << 56) + 12345, 20_000)]
)
def test_small_rates_draw_what_the_text_of_the_layout_says(rate_k: int, population: int) -> None:
    for seed in range(3):
        assert poisson_indices(key(seed), rate_k, population).tolist() == drawn_by_the_text(
            key(seed), rate_k, population
        )


def test_dense_pieces_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = poisson_indices(KEY, 1 << 62, 5000)
    monkeypatch.setattr(sampling, "_CHUNK", 64)
    assert poisson_indices(KEY, 1 << 62, 5000).tolist() == whole.tolist()


def test_block_pieces_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = poisson_indices(KEY, 1 << 54, 3_000_000)
    monkeypatch.setattr(sampling, "_CHUNK", 64)
    assert poisson_indices(KEY, 1 << 54, 3_000_000).tolist() == whole.tolist()


def test_rate_one_takes_everything_and_no_records_give_nothing() -> None:
    assert poisson_indices(KEY, ONE, 7).tolist() == list(range(7))
    for rate_k in (1, 1 << 50, 1 << 60, ONE):
        assert poisson_indices(KEY, rate_k, 0).tolist() == []


@pytest.mark.parametrize("rate_k", [1 << 63, 1 << 60, (1 << 59) - 1, 1 << 58, (1 << 57) + (1 << 56) + 99, 1 << 55])
def test_every_record_is_included_at_the_rate(rate_k: int) -> None:
    population, rounds = 200, 3000
    hits = np.zeros(population)
    sizes = []
    for seed in range(rounds):
        drawn = poisson_indices(key(seed), rate_k, population)
        hits[drawn] += 1
        sizes.append(len(drawn))
    q = rate_k / ONE
    chi = float(((hits - rounds * q) ** 2).sum() / (rounds * q * (1 - q)))
    assert 1e-4 < special.chdtrc(population, chi) < 1 - 1e-4
    mean, variance = float(np.mean(sizes)), float(np.var(sizes))
    expected = population * q * (1 - q)
    assert abs(mean - population * q) < 5 * math.sqrt(expected / rounds)
    assert variance == pytest.approx(expected, rel=0.15)


def test_records_of_one_block_are_independent() -> None:
    # Rate 2^-6: all 64 records share a block, so a wrong law of the count would show as correlation.
    pairs = np.zeros((64, 64))
    rounds = 20_000
    for seed in range(rounds):
        drawn = poisson_indices(key(seed), 1 << 58, 64)
        pairs[np.ix_(drawn, drawn)] += 1
    together = pairs[np.triu_indices(64, 1)]
    expected = rounds / 64**2
    assert abs(float(together.mean()) - expected) < 5 * math.sqrt(expected / len(together))
    chi = float(((together - expected) ** 2).sum() / expected)
    assert abs(chi - len(together)) < 6 * math.sqrt(2 * len(together) * (1 + 0.5 / expected))


@given(st.integers(1, ONE), st.integers(0, 3000), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_indices_increase_and_stay_inside_the_population(rate_k: int, population: int, seed: int) -> None:
    drawn = poisson_indices(key(seed), rate_k, population)
    assert drawn.dtype == np.int64
    assert (np.diff(drawn) > 0).all()
    assert ((drawn >= 0) & (drawn < population)).all()


def test_the_cost_follows_the_batch_not_the_population() -> None:
    # 10^15 records at rate 10^-12: a list of them would not fit into any memory.
    drawn = poisson_indices(KEY, round(1e-12 * 2**64), 10**15)
    assert abs(len(drawn) - 1000) < 6 * math.sqrt(1000)
    assert int(drawn.max()) > 9 * 10**14


@pytest.mark.parametrize(("population", "rate"), [(10**9, 1e-6), (10**12, 1e-9), (10**9, 1e-5)])
def test_a_step_reads_as_much_keystream_as_its_batch_has_records(
    monkeypatch: pytest.MonkeyPatch, population: int, rate: float
) -> None:
    read: list[int] = []

    def counted(secret: bytes, stream: int, first: int, blocks: int) -> bytearray:
        read.append(blocks)
        return keystream(secret, stream, first, blocks)

    monkeypatch.setattr(sampling, "keystream", counted)
    drawn = poisson_indices(KEY, round(rate * ONE), population)
    assert len(drawn) > 0.8 * rate * population
    # A word for the place of each record, one for each block of 1/rate to 2/rate records, and few that are redrawn.
    assert 8 * sum(read) < 3 * len(drawn)


@pytest.mark.parametrize(("rate_k", "population"), [(1, 2**62 - 1), (2, 2**62 - 1), (5, 2**61), (2**10, 2**55)])
def test_the_smallest_rates_do_not_overflow(rate_k: int, population: int) -> None:
    sizes = [len(poisson_indices(key(seed), rate_k, population)) for seed in range(400)]
    expected = rate_k * population / ONE
    assert abs(float(np.mean(sizes)) - expected) < 5 * math.sqrt(expected / 400)


@pytest.mark.parametrize(("rate_k", "population"), [(0, 5), (ONE + 1, 5), (1, -1), (1, 2**62)])
def test_arguments_out_of_range_are_refused_without_naming_the_population(rate_k: int, population: int) -> None:
    with pytest.raises(ValueError, match="out of range") as caught:
        poisson_indices(KEY, rate_k, population)
    assert str(population) not in str(caught.value)


def test_a_receipt_draws_one_batch(new_receipt: Callable[..., Receipt]) -> None:
    receipt = new_receipt(rate_k=1 << 62)
    drawn = PoissonSampler().draw(receipt, 1000)
    assert 150 < len(drawn) < 350
    assert not receipt.was_used("grad-noise")
    with pytest.raises(ReceiptSpent, match="sampling"):
        PoissonSampler().draw(receipt, 1000)


def test_one_sampling_key_draws_one_batch_on_every_rank(new_receipt: Callable[..., Receipt]) -> None:
    facts = {"key": LeaseKey(), "fresh": bytes(16), "rate_k": 1 << 62}
    first, second = (PoissonSampler().draw(new_receipt(**facts), 500) for _ in range(2))
    assert first.tolist() == second.tolist()
    assert PoissonSampler().draw(new_receipt(**facts, step=1), 500).tolist() != first.tolist()


RATES = [(round(1e-6 * ONE), 10**9), (1 << 57, 20_000), (3 << 61, 1000), (ONE, 100)]


@pytest.mark.parametrize(("rate_k", "population"), RATES)
@pytest.mark.parametrize("world", [1, 2, 3, 8, 5000])
def test_the_parts_of_any_number_of_processes_make_up_the_same_draw(rate_k: int, population: int, world: int) -> None:
    parts = [rank_part(poisson_indices(KEY, rate_k, population), rank, world) for rank in range(world)]
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1
    whole = poisson_indices(KEY, rate_k, population)
    assert np.array_equal(np.sort(np.concatenate(parts)), whole)
    # Physical batches within a part change nothing either.
    pieces = [piece for part in parts[:8] for piece in physical_batches(part, 7)]
    assert np.array_equal(np.concatenate(pieces), np.concatenate(parts[:8]))


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
def test_a_process_that_is_not_there_has_no_part(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="no process"):
        rank_part(np.arange(5), rank, world)


def test_another_process_draws_the_same_records() -> None:
    code = (
        "import hashlib; from dptrainer.sampling import poisson_indices as draw;"
        f"print(*(hashlib.sha256(draw(bytes(range(32)), *facts).tobytes()).hexdigest() for facts in {RATES}))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    here = [hashlib.sha256(poisson_indices(KEY, *facts).tobytes()).hexdigest() for facts in RATES]
    assert done.stdout.split() == here


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (0, 3, [0]), (5, None, [5])]
)
def test_physical_batches_cut_one_draw(count: int, size: int | None, expected: list[int]) -> None:
    pieces = list(physical_batches(np.arange(count), size))
    assert [len(piece) for piece in pieces] == expected
    assert np.concatenate(pieces).tolist() == list(range(count))


def test_a_physical_batch_holds_at_least_one_record() -> None:
    with pytest.raises(ValueError, match="at least one"):
        list(physical_batches(np.arange(3), 0))
