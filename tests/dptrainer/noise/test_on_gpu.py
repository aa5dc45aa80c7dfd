"""The compiled kernels on a CUDA device: ``pytest -m gpu tests/dptrainer/noise``."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from dpbudget.errors import PrivacyViolation, ReceiptSpent
from dpbudget.ledger.receipt import Receipt
from dptrainer import PrivateTrainer
from dptrainer.noise import gpu
from dptrainer.noise.chacha import keystream
from dptrainer.noise.gaussian import add_gaussian_, add_gaussians_
from dptrainer.noise.keys import Purpose, step_key
from dptrainer.noise.source import SecureNoise
from dptrainer.values import ClippedSum
from tests.dptrainer.loop.loopkit import linear_data, linear_model, make_run
from tests.dptrainer.noise.normality import suspicions
from tests.dptrainer.noise.test_gaussian import EDGE_K, shipped, words_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]
KEY = bytes(range(32))
CUDA = torch.device("cuda", 0)


def values(words: bytes, dtype: torch.dtype) -> np.ndarray:
    blocks = len(words) // 64
    lanes = 1 << (blocks - 1).bit_length()
    return gpu.values(words.ljust(64 * lanes, b"\0"), dtype, CUDA)[: 10 * blocks]


def test_the_kernels_pass_their_test() -> None:
    assert gpu.why_not(CUDA) is None
    assert gpu.agrees(CUDA)


@pytest.mark.parametrize("first", [0, 1, 2**31 - 77, 2**32 - 64, 2**32, 2**63 - 3, 2**64 - 128])
@pytest.mark.parametrize("stream", [0, 2**31, 2**32 - 1])
def test_words_are_those_of_openssl(first: int, stream: int) -> None:
    assert gpu.words(KEY, stream, first, 128, CUDA) == bytes(keystream(KEY, stream, first, 128))


def test_values_on_extreme_words() -> None:
    angles = [0, 1, 2**29 - 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 1, 123456789]
    words = b"".join(bytes(words_for(k, a)) for k in EDGE_K for a in angles)
    exact = shipped(bytearray(words))
    radius = np.repeat(np.hypot(exact[::2], exact[1::2]), 2)
    assert np.array_equal(values(words, torch.float64), exact)
    assert (np.abs(values(words, torch.float32).astype(float) - exact) <= 2.0**-21 * radius).all()


def test_values_in_float32_pass_every_test_of_normality() -> None:
    def generate(words: bytearray) -> np.ndarray:
        return np.concatenate(
            [values(bytes(words[i : i + 64 * 4096]), torch.float32) for i in range(0, len(words), 64 * 4096)]
        ).astype(float)

    assert suspicions(generate) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 3, 10 * 2**32 - 7])
def test_a_million_values_are_those_of_the_cpu(dtype: torch.dtype, offset: int) -> None:
    start = torch.linspace(-3.0, 3.0, 1_000_003, dtype=dtype)
    found = add_gaussian_(start.to(CUDA), KEY, 5, 0.7, offset=offset)
    assert gpu.close(found, start, 5, offset, KEY, 0.7)


def test_many_tensors_of_two_types_shapes_and_devices() -> None:
    starts = [torch.full((i % 7 + 1, i % 5 + 1), 0.5, dtype=(torch.float32, torch.float64)[i % 2]) for i in range(300)]
    starts += [torch.zeros(70_001), torch.zeros(0), torch.zeros(40, 30).t()]
    found = [start.to(CUDA) if i % 10 else start.clone() for i, start in enumerate(starts)]
    assert add_gaussians_(found, KEY, 1.3)
    for i, (seen, start) in enumerate(zip(found, starts, strict=True)):
        assert gpu.close(seen.reshape(-1), start.reshape(-1), i, 0, KEY, 1.3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1279, 1280, 70_000])
def test_a_sum_that_is_not_finite_is_not_released(new_receipt: Callable[..., Receipt], bad: float, place: int) -> None:
    receipt = new_receipt()
    sums = {"a": torch.zeros(9, device=CUDA), "b": torch.full((70_001,), 1e38, device=CUDA)}
    sums["b"][place] = bad
    with pytest.raises(PrivacyViolation, match="not finite; nothing was released"):
        SecureNoise().privatise(ClippedSum(sums, 1.0), receipt)
    with pytest.raises(ReceiptSpent):
        SecureNoise().privatise(ClippedSum({"a": torch.zeros(9, device=CUDA)}, 1.0), receipt)


def test_a_receipt_gives_the_noise_of_its_key_wherever_it_is_made(new_receipt: Callable[..., Receipt]) -> None:
    facts = {"key": new_receipt().key, "fresh": bytes(16), "noise_multiplier": 2.0, "clip_norm": 0.5}
    start = torch.linspace(-1.0, 1.0, 5000)
    secret = step_key(new_receipt(**facts), Purpose.GRAD_NOISE)
    near = SecureNoise(generate_on_cpu=True).privatise(ClippedSum({"w": start.to(CUDA)}, 0.5), new_receipt(**facts))
    far = SecureNoise().privatise(ClippedSum({"w": start.to(CUDA)}, 0.5), new_receipt(**facts))
    assert torch.equal(near.grads["w"].cpu(), add_gaussian_(start.clone(), secret, 0, 1.0))
    assert gpu.close(far.grads["w"], start, 0, 0, secret, 1.0)


def test_no_key_makes_triton_compile_again() -> None:
    from dptrainer.noise import triton_kernels as kernels

    target = torch.zeros(100, device=CUDA)
    add_gaussian_(target, KEY, 0, 1.0)
    before = len(kernels.add_noise.device_caches[0][0])
    for key in (bytes(32), b"\xff" * 32, b"\1\0\0\0" * 8, b"\x10\0\0\0" * 8):
        add_gaussian_(target, key, 0, 1.0)
    assert len(kernels.add_noise.device_caches[0][0]) == before


def test_no_memory_of_the_size_of_the_model_is_taken() -> None:
    targets = [torch.zeros(5_000_000, device=CUDA) for _ in range(20)]
    add_gaussians_(targets[:1], KEY, 1.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    add_gaussians_(targets, KEY, 1.0)
    assert torch.cuda.max_memory_allocated() - before <= 1 << 16


def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [torch.zeros(1000, device=CUDA), torch.zeros(1000, dtype=torch.float64, device=CUDA)]
    add_gaussians_(targets, KEY, 1.0)
    waits: list[int] = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: waits.append(1) or _unwatched(item, tensor))
    torch.cuda.set_sync_debug_mode("error")  # whatever else waits is an error
    try:
        add_gaussians_(targets, KEY, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [1]


def _unwatched(item: Callable[[torch.Tensor], object], tensor: torch.Tensor) -> object:
    torch.cuda.set_sync_debug_mode("default")
    found = item(tensor)
    torch.cuda.set_sync_debug_mode("error")
    return found


def test_elements_beyond_the_range_of_32_bits_get_their_own_noise() -> None:
    count = (1 << 31) + 12_345
    if torch.cuda.mem_get_info()[0] < 5 * count:
        pytest.skip("less than 11 GB of device memory are free")
    target = torch.zeros(count, device=CUDA)
    add_gaussian_(target, KEY, 0, 1.0)
    for place in (0, (1 << 31) - 500, count - 1000):
        assert gpu.close(target[place : place + 1000], torch.zeros(1000), 0, place, KEY, 1.0)


def test_noise_is_never_recorded_into_a_graph() -> None:
    target, graph = torch.zeros(100, device=CUDA), torch.cuda.CUDAGraph()
    gpu.check([CUDA])
    with pytest.raises(PrivacyViolation, match="would repeat the noise"), torch.cuda.graph(graph):
        add_gaussian_(target, KEY, 0, 1.0)


def test_a_model_trains_on_the_device() -> None:
    model, run = linear_model().to(CUDA), make_run(steps=3, rate=1.0)
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = PrivateTrainer(model, optimizer, torch.nn.CrossEntropyLoss(), linear_data(), run).fit()
    assert result.steps == 3
    assert all(
        not torch.equal(p, q) and bool(p.isfinite().all()) for p, q in zip(model.parameters(), before, strict=True)
    )
