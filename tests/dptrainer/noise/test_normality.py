"""The noise against the law it claims, and broken generators against the same tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from dpbudget._truncation import CAP
from dpbudget.ledger.noise_keys import SecretKey
from dpbudget.ledger.receipt import Receipt
from dptrainer.noise.chacha import keystream
from dptrainer.noise.gaussian import standard_gaussian
from dptrainer.noise.keys import Purpose, step_key
from tests.dptrainer.noise import normality
from tests.dptrainer.noise.normality import Floats, Generator, suspicions
from tests.dptrainer.noise.test_gaussian import shipped

KEY = bytes(range(32))
NewReceipt = Callable[..., Receipt]


def changed(words: bytearray, change: Callable[[np.ndarray, np.ndarray], None]) -> bytearray:
    """``change`` sees the radii's words k [blocks, 5] and the angles' words a [blocks, 5]."""
    blocks = np.frombuffer(words, dtype="<u4").reshape(-1, 16).copy()
    change(blocks.view("<u8")[:, :5], blocks[:, 10:15])
    return bytearray(blocks.tobytes())


def radius_of_24_bits(words: bytearray) -> Floats:
    """What a float32 generator does: U = (the top 24 bits + 1) / 2^24."""

    def change(k: np.ndarray, a: np.ndarray) -> None:
        k |= np.uint64((1 << 40) - 1)

    return shipped(changed(words, change))


def radius_of_32_bits(words: bytearray) -> Floats:
    """What CUDA's generators do: the largest radius is 6.66."""

    def change(k: np.ndarray, a: np.ndarray) -> None:
        k |= np.uint64((1 << 32) - 1)

    return shipped(changed(words, change))


def angle_of_8_bits(words: bytearray) -> Floats:
    def change(k: np.ndarray, a: np.ndarray) -> None:
        a &= np.uint32(0xFF000000)

    return shipped(changed(words, change))


def angle_from_the_radius(words: bytearray) -> Floats:
    """Words that are used twice."""

    def change(k: np.ndarray, a: np.ndarray) -> None:
        a[:] = (k >> np.uint64(32)).astype(np.uint32)

    return shipped(changed(words, change))


def sigma_off_by_one_percent(words: bytearray) -> Floats:
    return 0.99 * shipped(words)


def mean_off_by_one_percent(words: bytearray) -> Floats:
    return shipped(words) + 0.01


def cosine_alone(words: bytearray) -> Floats:
    """Both values of a pair from the cosine: each is Gaussian, the pair is not."""
    return np.repeat(shipped(words)[::2], 2)


def blocks_used_twice(words: bytearray) -> Floats:
    half = len(words) // 128 * 64
    blocks = np.frombuffer(words[:half], dtype="V64")
    return shipped(bytearray(np.repeat(blocks, 2).tobytes()))


def cut_at_four_sigma(words: bytearray) -> Floats:
    return np.clip(shipped(words), -4.0, 4.0)


def rounded_to_float16(words: bytearray) -> Floats:
    return shipped(words).astype(np.float16).astype(np.float64)


def sum_of_twelve_uniforms(words: bytearray) -> Floats:
    uniforms = np.random.default_rng(len(words)).random((len(words) // 64 * 10, 12))
    return np.asarray(uniforms.sum(1) - 6.0, dtype=np.float64)


@pytest.mark.parametrize(
    ("broken", "symptom"),
    [
        (radius_of_24_bits, "tail below 2^-24"),
        (radius_of_32_bits, "tail below 2^-32"),
        (angle_of_8_bits, "angles"),
        (angle_from_the_radius, "angles by radius"),
        (sigma_off_by_one_percent, "variance"),
        (mean_off_by_one_percent, "mean"),
        (cosine_alone, "within a pair"),
        (blocks_used_twice, "next block"),
        (cut_at_four_sigma, "above 4 sigma"),
        (sum_of_twelve_uniforms, "above 3 sigma"),
        (rounded_to_float16, "chi-squared"),
    ],
)
def test_a_broken_generator_fails_them(broken: Generator, symptom: str) -> None:
    assert symptom in suspicions(broken)


def test_a_sample_does_not_show_that_a_radius_has_24_bits() -> None:
    # So the tail is tested by words that lead there: among a million values no sum or count sees it.
    values = radius_of_24_bits(keystream(KEY, 0, 0, 100_000))
    assert normality.failed(normality.p_values(values)) == []
    assert np.abs(values).max() < math.sqrt(2 * 24 * math.log(2)) < 5.77 < CAP
    assert math.isclose(float(np.hypot(*shipped(bytearray(64))[:2])), CAP, rel_tol=1e-15)


def test_pieces_add_up_to_what_is_said_of_the_whole() -> None:
    values = shipped(keystream(KEY, 3, 0, 6000))
    pieces = normality.Sample()
    for piece in np.split(values, 6):
        pieces.feed(piece)
    whole, together = normality.p_values(values), pieces.p_values()
    assert whole.keys() == together.keys()
    across = {"next pair", "next block", "squares of the next pair"}  # the ends of pieces are not seen
    for name in whole.keys() - across:
        assert together[name] == pytest.approx(whole[name], rel=1e-9)
    assert normality.failed(together) == []


def noise_of(receipt: Receipt, param: int = 0) -> Floats:
    return standard_gaussian(step_key(receipt, Purpose.GRAD_NOISE), param, 500_000).numpy()


@pytest.fixture
def at_step(new_receipt: NewReceipt) -> Callable[[int], Receipt]:
    """Receipts whose keys are known."""
    return lambda step: new_receipt(step=step, key=SecretKey(bytearray(KEY)), fresh=bytes([step] * 16))


def test_steps_parameters_and_pairs_have_nothing_to_do_with_each_other(at_step: Callable[[int], Receipt]) -> None:
    steps = [noise_of(at_step(step)) for step in range(3)]
    key = step_key(at_step(7), Purpose.GRAD_NOISE)
    parameters = [standard_gaussian(key, param, 500_000).numpy() for param in range(3)]
    found = {}
    for name, streams in (("steps", steps), ("parameters", parameters)):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            found[f"{name} {i}, {j}"] = normality.p_of_correlation(streams[i], streams[j])
            shifted = normality.p_of_correlation(streams[i][10:], streams[j][:-10])
            found[f"{name} {i}, {j}, a block apart"] = shifted
            squares = [streams[n] ** 2 / math.sqrt(2) - math.sqrt(0.5) for n in (i, j)]
            found[f"squares of {name} {i}, {j}"] = normality.p_of_correlation(*squares)
    assert normality.failed(found) == []


def test_a_key_that_is_used_for_two_steps_or_a_stream_for_two_parameters_is_seen(
    at_step: Callable[[int], Receipt],
) -> None:
    # The same key and nonce for two gradients: the difference of the releases would be free of noise.
    key = step_key(at_step(0), Purpose.GRAD_NOISE)
    first, again = (standard_gaussian(key, 0, 500_000).numpy() for _ in range(2))
    assert normality.p_of_correlation(first, again) < normality.ALPHA
    # Even where the second use begins elsewhere in the stream.
    later = standard_gaussian(key, 0, 500_000, offset=250_000).numpy()
    assert normality.p_of_correlation(first[250_000:], later[:250_000]) < normality.ALPHA


@pytest.mark.slow
def test_a_hundred_million_values_pass_down_to_the_tail() -> None:  # by the compiled path where there is one
    sample, before, found = normality.Sample(), None, {}
    for piece in range(50):
        values = standard_gaussian(KEY, 1000 + piece, 2_000_000).numpy()
        sample.feed(values)
        if before is not None and piece <= 40:
            found[f"parameters {piece - 1}, {piece}"] = normality.p_of_correlation(before, values)
        before = values
    assert sample.count == 100_000_000
    assert normality.failed({**sample.p_values(), **found}) == []


@pytest.mark.slow
def test_a_hundred_million_values_show_a_sigma_that_is_off_by_a_thousandth() -> None:
    sample = normality.Sample()
    for piece in range(50):
        sample.feed(0.999 * standard_gaussian(KEY, 1000 + piece, 2_000_000).numpy())
    assert "variance" in normality.failed(sample.p_values())
