"""The compiled path against the plain one, bit for bit, with any number of threads and without a compiler."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dptrainer.native import Native, disjoint, threads
from dptrainer.noise import boxmuller, gaussian, native
from dptrainer.noise.chacha import keystream
from dptrainer.noise.gaussian import add_gaussian_, add_gaussians_

KEY = bytes(range(32))


@pytest.fixture(scope="session")
def kernel() -> native.Kernel:
    made, status = native.LIBRARY.build()
    if made is None:
        pytest.skip(status)
    return made


def library(build: Callable[[], tuple[native.Kernel | None, str]] | None = None) -> Native[native.Kernel]:
    """A library that nobody asked for yet."""
    made = Native("noise", native._text, native._FLAGS, native.Kernel, native._agrees)
    if build is not None:
        made.build = build  # type: ignore[method-assign]
    return made


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", library())
    monkeypatch.setattr(native, "_asked", 0)


def use(monkeypatch: pytest.MonkeyPatch, chosen: native.Kernel | None) -> None:
    monkeypatch.setattr(native, "kernel_for", lambda values: chosen)
    monkeypatch.setattr(gaussian, "BLOCKS", 4096)  # what a large request does, for small ones
    monkeypatch.setattr(gaussian, "_IDLE", [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 9, 319, 320, 321, 40_961, 81_919, 81_920, 81_921, 200_003])
@pytest.mark.parametrize("offset", [0, 3, 81_927])
def test_compiled_noise_has_the_bits_of_plain_noise(
    kernel: native.Kernel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int, offset: int
) -> None:
    start = torch.linspace(-2.0, 2.0, count, dtype=dtype)
    found = []
    for chosen in (None, kernel):
        use(monkeypatch, chosen)
        found.append(add_gaussian_(start.clone(), KEY, 3, 0.37, offset=offset))
    assert torch.equal(*found)


def test_tensors_with_gaps_get_the_same_noise_compiled_or_not(
    kernel: native.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chosen in (None, kernel):
        use(monkeypatch, chosen)
        whole = torch.zeros(400)
        add_gaussian_(whole[::2], KEY, 3, 0.37)
        assert torch.equal(whole[::2], add_gaussian_(torch.zeros(200), KEY, 3, 0.37))
        assert not whole[1::2].any()


@pytest.mark.parametrize("first", [0, 1, (1 << 32) - 17, (1 << 32) - 1, 1 << 32, (5 << 32) - 40, (1 << 64) - 101])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 101])
@pytest.mark.parametrize("stream", [0, 1, (1 << 32) - 1])
def test_the_compiled_cipher_is_that_of_openssl(kernel: native.Kernel, first: int, count: int, stream: int) -> None:
    assert kernel.keystream(KEY, stream, first, count) == bytes(keystream(KEY, stream, first, count))


def test_the_compiled_cipher_uses_the_whole_key(kernel: native.Kernel) -> None:
    plain = kernel.keystream(KEY, 0, 0, 2)
    for place in range(32):
        changed = bytes(KEY[:place]) + bytes([KEY[place] ^ 1]) + bytes(KEY[place + 1 :])
        found = kernel.keystream(changed, 0, 0, 2)
        assert found != plain
        assert found == bytes(keystream(changed, 0, 0, 2))


def test_bits_agree_on_random_and_extreme_words(kernel: native.Kernel) -> None:
    blocks = 4001
    words = np.frombuffer(keystream(KEY, 9, 0, blocks), dtype="<u8").reshape(blocks, 8).copy()
    for row in range(0, blocks, 2):
        words[row, :5] >>= np.uint64(row // 2 % 64)
        if row % 4:
            words[row, :5] ^= np.uint64(2**64 - 1)
    plain = boxmuller.Workbench(blocks)
    plain.words[:] = words.tobytes()
    assert np.array_equal(kernel.values(words.tobytes()), plain.box_muller(blocks))


def test_the_number_of_threads_does_not_matter(kernel: native.Kernel) -> None:
    start = [
        torch.zeros(n, dtype=d) for n, d in ((500_001, torch.float32), (7, torch.float64), (90_000, torch.float64))
    ]
    found = []
    for share in (1, 2, 3):
        tensors = [t.clone() for t in start]
        kernel.add([(t, position, 16_384 * position + 7) for position, t in enumerate(tensors)], KEY, 2.0, share)
        found.append(tensors)
    for tensors in found[1:]:
        assert all(map(torch.equal, tensors, found[0]))
    for position, tensor in enumerate(found[0]):
        expected = add_gaussian_(torch.zeros_like(tensor), KEY, position, 2.0, offset=16_384 * position + 7)
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize(("count", "shared", "expected"), [(40_000, False, 2), (30_000, False, 1), (40_000, True, 1)])
def test_as_many_threads_work_as_torch_uses_where_they_may(
    kernel: native.Kernel, monkeypatch: pytest.MonkeyPatch, count: int, shared: bool, expected: int
) -> None:
    class Watched:
        def add(self, pieces: Any, key: bytes, std: float, threads: int) -> None:
            used.append(threads)

    used: list[int] = []
    use(monkeypatch, Watched())  # type: ignore[arg-type]  # stands for a kernel
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    tensor = torch.zeros(count)
    add_gaussians_([tensor, tensor] if shared else [tensor], KEY, 1.0)
    assert used == [expected]


def test_a_forked_child_makes_its_noise_with_its_one_thread(
    kernel: native.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert threads(90_000, 1) == 2
    expected = torch.zeros(90_000)
    kernel.add([(expected, 0, 0)], KEY, 1.0, 2)
    child = os.fork()
    if child == 0:
        try:
            found = torch.zeros(90_000)
            kernel.add([(found, 0, 0)], KEY, 1.0, threads(90_000, 1))
            os._exit(0 if torch.equal(found, expected) else 2)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if done[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)


def test_tensors_that_share_memory_are_not_given_to_several_threads() -> None:
    base = torch.zeros(10)
    assert disjoint([base[:5], base[5:], torch.zeros(0)])
    assert not disjoint([base[:6], base[5:]])
    assert not disjoint([base, base])


@pytest.mark.parametrize("plain", [True, False])
def test_strided_gradients_get_the_noise_of_contiguous_ones(
    kernel: native.Kernel, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    use(monkeypatch, None if plain else kernel)
    base = torch.zeros(601, 402)
    add_gaussians_([base.t()[::2]], KEY, 1.0)
    assert torch.equal(base.t()[::2].reshape(-1), add_gaussian_(torch.zeros(201 * 601), KEY, 0, 1.0))
    assert not base.t()[1::2].any()


def test_few_small_requests_do_not_compile_and_many_or_large_ones_do_once(
    untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    monkeypatch.setattr(native, "LIBRARY", library(lambda: (built.append(1), (None, "not compiled (a test)"))[1]))
    for _ in range(native.COMPILE_AFTER // native.LEAST - 1):
        add_gaussian_(torch.zeros(1), KEY, 0, 1.0)
    assert not built
    assert native.status() == "not compiled yet"
    for _ in range(3):
        add_gaussian_(torch.zeros(1), KEY, 0, 1.0)
    assert built == [1]
    assert native.status() == "not compiled (a test)"
    monkeypatch.setattr(native, "LIBRARY", library(lambda: (built.append(2), (None, "not compiled (a test)"))[1]))
    monkeypatch.setattr(native, "_asked", 0)
    add_gaussian_(torch.zeros(native.COMPILE_AFTER), KEY, 0, 1.0)
    assert built == [1, 2]


def test_without_a_compiler_noise_is_the_same_and_says_so(
    untried: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = add_gaussian_(torch.zeros(native.COMPILE_AFTER), KEY, 0, 1.0)
    monkeypatch.setattr(native, "LIBRARY", library())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert torch.equal(add_gaussian_(torch.zeros(native.COMPILE_AFTER), KEY, 0, 1.0), expected)
    assert native.status() == "not compiled (no C compiler found)"


def test_the_environment_can_forbid_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPTRAINER_NATIVE", "0")
    assert library().build() == (None, "not compiled (DPTRAINER_NATIVE=0)")


@pytest.mark.parametrize("cc", ["false", "no-such-compiler", "true"])
def test_a_compiler_that_fails_is_reported_not_raised(cc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", cc)
    made, status = library().build()
    assert made is None
    assert status.startswith(f"not compiled ({cc} did not build it")


def test_a_variable_that_names_no_command_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc '")
    assert library().build() == (None, "not compiled (CC is not a command)")


def test_a_compiler_without_threads_is_asked_for_code_without_them(
    kernel: native.Kernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {shutil.which("cc")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    made, status = library().build()
    assert made is not None
    assert status == f"compiled with {compiler} -march=native"
    found = torch.zeros(90_000)
    made.add([(found, 0, 0)], KEY, 1.0, 2)
    assert torch.equal(found, add_gaussian_(torch.zeros(90_000), KEY, 0, 1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_number_that_is_not_finite_is_seen(
    kernel: native.Kernel, value: float, dtype: torch.dtype, threads: int
) -> None:
    largest = torch.finfo(dtype).max / 2
    for place in (None, 0, 15, 16, 20_000, 40_002):
        tensors = [torch.full((5,), -1e38), torch.full((40_003,), largest, dtype=dtype), torch.zeros(0)]
        if place is not None:
            tensors[1][place] = value
        pieces = [(tensor, stream, 7) for stream, tensor in enumerate(tensors)]
        assert kernel.add(pieces, KEY, 1.0, threads) == (place is None)


@pytest.mark.parametrize(
    "change",
    [
        "sqrt(cos2x + 1.0) -> sqrt(cos2x + 1.0000000001)",
        "+ 962 -> + 963",
        "round < 20 -> round < 18",
        "(block >> 32) - (lanes) -> (block >> 32) + (lanes)",
        "block += BLOCKS; -> block += BLOCKS + 1;",
        "#define FORMAT 1u -> #define FORMAT 2u",
        "(uint64_t)((start + p.skip) / 10) -> (uint64_t)(p.skip / 10)",
        "share < (p.count + SHARE - 1) / SHARE -> share < (p.count + SHARE - 1) / SHARE - (p.count > SHARE)",
        "reduction(+ : bad) -> firstprivate(bad)",
    ],
)
def test_a_library_with_other_bits_is_not_used(
    kernel: native.Kernel, change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, after = change.split(" -> ")
    text = "".join(path.read_text(encoding="utf-8") for path in native._SOURCES)
    assert before in text
    (tmp_path / "wrong.c").write_text(text.replace(before, after), encoding="utf-8")
    monkeypatch.setattr(native, "_SOURCES", (tmp_path / "wrong.c",))
    monkeypatch.setattr("dptrainer.native._TUNINGS", (["-fopenmp"],))  # once each
    made, status = library().build()
    assert made is None
    assert "other results" in status


_LOOK = """
__attribute__((noinline)) static int64_t left(const char *secret, int64_t words)
{
    volatile char here = 0;
    int64_t found = 0;
    for (uintptr_t at = 512; at < 60000; at += 4)
        for (int64_t k = 0; k < words; k++)
            found += !memcmp((const char *)(((uintptr_t)&here - at) & ~(uintptr_t)3), secret + 4 * k, 4);
    return found;
}
int64_t noise_and_look(const char *key, const struct piece *piece, const char *stream, int64_t words)
{
    add_noise(key, piece, 1, 1.0, 1);
    return left(key, 8) + left(stream, words);
}
"""


@pytest.mark.parametrize("tuning", [["-march=native"], [], ["-mavx2"]])
def test_neither_key_nor_keystream_is_left_on_the_stack(kernel: native.Kernel, tuning: list[str]) -> None:
    if tuning == ["-mavx2"] and not (Path("/proc/cpuinfo").exists() and "avx2" in Path("/proc/cpuinfo").read_text()):
        pytest.skip("this processor has no AVX2")
    looking = Native("looking", lambda: native._text() + _LOOK, native._FLAGS, lambda made: made, lambda _: True)
    library, key, out = looking.compiled(["cc", *tuning]), bytes(range(101, 133)), torch.zeros(20_000)
    library.noise_and_look.restype = ctypes.c_int64
    piece, last = native._described((out, 0, 0)), bytes(keystream(key, 0, 1996, 4))
    assert library.noise_and_look(key, ctypes.byref(piece), last, ctypes.c_int64(len(last) // 4)) == 0


def test_a_request_for_what_no_stream_has_is_refused(kernel: native.Kernel) -> None:
    end = 10 << 64
    kernel.add([(torch.zeros(10), 0, end - 10)], KEY, 1.0)
    for out, key, stream, offset in (
        (torch.zeros(11), KEY, 0, end - 10),
        (torch.zeros(4, 8)[:, ::2], KEY, 0, 0),
        (torch.zeros(1, device="meta"), KEY, 0, 0),
        (torch.zeros(1), KEY, 0, -1),
        (torch.zeros(1), KEY, 1 << 32, 0),
        (torch.zeros(1), KEY[1:], 0, 0),
    ):
        with pytest.raises(ValueError, match=r"no such noise|key of 31"):
            kernel.add([(out, stream, offset)], key, 1.0)


@pytest.mark.parametrize("tuning", [[], ["-mavx2"]])
def test_code_for_older_processors_gives_the_same_bits(kernel: native.Kernel, tuning: list[str]) -> None:
    # Without wide vectors 64-bit integers are converted in halves, and fewer blocks are made at a time.
    if tuning and not (Path("/proc/cpuinfo").exists() and "avx2" in Path("/proc/cpuinfo").read_text()):
        pytest.skip("this processor has no AVX2")
    assert native._agrees(native.LIBRARY.compiled(["cc", *tuning]))


def test_defaults_of_the_program_do_not_reach_compiled_noise(kernel: native.Kernel) -> None:
    expected = torch.zeros(50)
    kernel.add([(expected, 0, 0)], KEY, 1.0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    found = torch.zeros(50, dtype=torch.float32)
    try:
        with torch.device("meta"):
            made, status = library().build()
            assert made is not None, status
            add_gaussian_(found, KEY, 0, 1.0)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)
