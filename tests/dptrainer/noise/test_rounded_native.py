"""Rounded noise compiled, by NumPy and in integers: the same values; and libraries that are wrong, not used."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dptrainer.native import Native, threads
from dptrainer.noise import rounded_native, ziv
from dptrainer.noise.chacha import ROUNDED, keystream
from dptrainer.noise.rounded import add_rounded_, rounded_gaussian
from tests.dptrainer.noise import exact

KEY = bytes(range(32))
END = 1 << 57


@pytest.fixture(scope="session")
def kernel() -> rounded_native.Kernel:
    made, status = rounded_native.LIBRARY.build()
    if made is None:
        pytest.skip(status)
    return made


def library(
    build: Callable[[], tuple[rounded_native.Kernel | None, str]] | None = None,
) -> Native[rounded_native.Kernel]:
    """A library that nobody asked for yet."""
    native = rounded_native
    made = Native("rounded noise", native._text, native._FLAGS, native.Kernel, native._agrees)
    if build is not None:
        made.build = build  # type: ignore[method-assign]
    return made


def use(monkeypatch: pytest.MonkeyPatch, chosen: rounded_native.Kernel | None) -> None:
    monkeypatch.setattr(rounded_native, "kernel_for", lambda values: chosen)


@pytest.mark.parametrize("log2_width", [0, 17, 30])
@pytest.mark.parametrize("count", [0, 1, 7, 255, 256, 257, 16_385, 65_537, 200_003])
@pytest.mark.parametrize("offset", [0, 3, 65_541])
def test_compiled_and_plain_noise_are_equal(
    kernel: rounded_native.Kernel, monkeypatch: pytest.MonkeyPatch, log2_width: int, count: int, offset: int
) -> None:
    found = []
    for chosen in (None, kernel):
        use(monkeypatch, chosen)
        found.append(rounded_gaussian(KEY, 3, count, log2_width, offset=offset))
    assert torch.equal(*found)


@pytest.mark.parametrize("log2_width", [0, 20, 36, 40])
def test_compiled_plain_and_integer_arithmetic_are_equal(
    kernel: rounded_native.Kernel, monkeypatch: pytest.MonkeyPatch, log2_width: int
) -> None:
    expected = [ziv.element(KEY, 4, i, log2_width) for i in range(5_000)]
    for chosen in (None, kernel):
        use(monkeypatch, chosen)
        assert rounded_gaussian(KEY, 4, 5_000, log2_width).tolist() == expected


def test_values_that_64_digits_leave_open_are_right_too(
    kernel: rounded_native.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, kernel)
    for index in (890167, 1448047, 1780680):  # test_ziv.py has how they were found
        found = rounded_gaussian(KEY, 0, 9, 40, offset=index - 4)
        assert found.tolist() == [exact.element(KEY, 0, i, 40) for i in range(index - 4, index + 5)]


@pytest.mark.parametrize("first", [0, 1, (1 << 32) - 17, (1 << 32) - 1, 1 << 32, (5 << 32) - 40, (1 << 54) - 101])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 101])
@pytest.mark.parametrize("stream", [0, 1, (1 << 32) - 1])
def test_the_compiled_cipher_is_that_of_openssl(
    kernel: rounded_native.Kernel, first: int, count: int, stream: int
) -> None:
    assert kernel.keystream(KEY, stream, first, count) == bytes(keystream(KEY, stream, first, count, layout=ROUNDED))


def test_numbers_and_margins_agree_on_random_and_extreme_words(kernel: rounded_native.Kernel) -> None:
    words = bytes(keystream(KEY, 9, 0, 4_001, layout=ROUNDED))
    for log2_width in (0, 13, 27, 40):
        assert rounded_native._numbers_agree(kernel, words, log2_width)
        assert rounded_native._numbers_agree(kernel, rounded_native._extreme_words(words), log2_width)


@pytest.mark.parametrize("k", [0, 1, 2**40, 2**46 - 2**40, 2**64 - 2**42, 2**64 - 1])
def test_pairs_beyond_the_radii_of_the_bound_are_doubtful(kernel: rounded_native.Kernel, k: int) -> None:
    for a in (0, 2**61, 2**63 + 5):
        _, off = kernel.rounded(k.to_bytes(8, "little") * 4 + a.to_bytes(8, "little") * 4, 3)
        assert (off >= 0.5).all()


def test_more_doubts_than_expected_are_all_settled(
    kernel: rounded_native.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = [torch.arange(n) << 40 for n in (3_000, 0, 2_000)]
    expected = [t.clone() for t in start]
    use(monkeypatch, kernel)
    add_rounded_(expected, KEY, 40)
    assert len(kernel.add([(start[0].clone(), 0, 0)], KEY, 40)) > 20
    for room in (0, 1, 20):
        monkeypatch.setattr(rounded_native, "expected_doubts", lambda count, width, room=room: room)
        found = [t.clone() for t in start]
        add_rounded_(found, KEY, 40)
        assert all(map(torch.equal, found, expected))


def test_enough_doubts_are_expected(kernel: rounded_native.Kernel) -> None:
    for count, log2_width in ((1, 40), (100, 40), (200_000, 0), (200_000, 30), (200_000, 40)):
        out = torch.zeros(count, dtype=torch.int64)
        assert 2 * len(kernel.add([(out, 5, 0)], KEY, log2_width)) <= rounded_native.expected_doubts(count, log2_width)


@pytest.mark.parametrize("log2_width", [26, 40])
def test_the_number_of_threads_does_not_matter(kernel: rounded_native.Kernel, log2_width: int) -> None:
    found, doubts = [], []
    for share in (1, 2, 3):
        tensors = [torch.zeros(n, dtype=torch.int64) for n in (50_001, 7, 90_000)]
        places = kernel.add([(t, i, 16_384 * i + 7) for i, t in enumerate(tensors)], KEY, log2_width, share)
        found.append(tensors)
        doubts.append(sorted(map(tuple, places.tolist())))
    for tensors in found[1:]:
        assert all(map(torch.equal, tensors, found[0]))
    assert doubts[0] == doubts[1] == doubts[2]
    assert bool(doubts[0]) == (log2_width == 40)
    assert all(found[0][piece][place] == 0 for piece, place in doubts[0])


@pytest.mark.parametrize(("count", "shared", "expected"), [(40_000, False, 2), (30_000, False, 1), (40_000, True, 1)])
def test_as_many_threads_work_as_torch_uses_where_they_may(
    monkeypatch: pytest.MonkeyPatch, count: int, shared: bool, expected: int
) -> None:
    class Watched:
        def add(self, pieces: object, key: bytes, log2_width: int, threads: int) -> np.ndarray:
            used.append(threads)
            return np.zeros((0, 2), dtype=np.int64)

    used: list[int] = []
    use(monkeypatch, Watched())  # type: ignore[arg-type]  # stands for a kernel
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    tensor = torch.zeros(count, dtype=torch.int64)
    add_rounded_([tensor, tensor] if shared else [tensor], KEY, 20)
    assert used == [expected]


def test_a_forked_child_makes_its_noise_with_its_one_thread(
    kernel: rounded_native.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = torch.zeros(90_000, dtype=torch.int64)
    kernel.add([(expected, 0, 0)], KEY, 20, 2)
    child = os.fork()
    if child == 0:
        try:
            found = torch.zeros(90_000, dtype=torch.int64)
            kernel.add([(found, 0, 0)], KEY, 20, threads(90_000, 1))
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


def test_few_small_requests_do_not_compile_and_many_do_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    fake = library(lambda: (built.append(1), (None, "not compiled (a test)"))[1])
    monkeypatch.setattr(rounded_native, "LIBRARY", fake)
    monkeypatch.setattr(rounded_native, "_asked", 0)
    for _ in range(rounded_native.COMPILE_AFTER // rounded_native.LEAST_REQUEST - 1):
        rounded_gaussian(KEY, 0, 1, 20)
    assert not built
    assert rounded_native.status() == "not compiled yet"
    for _ in range(3):
        rounded_gaussian(KEY, 0, 1, 20)
    assert built == [1]
    assert rounded_native.status() == "not compiled (a test)"


@pytest.mark.parametrize(
    "change",
    [
        "#define FORMAT 2u -> #define FORMAT 1u",
        "round < 20 -> round < 18",
        "+ 962 -> + 963",
        "2.0 - h -> 2.0000000000001 - h",
        "1.0 - ((((((V6 -> 1.0000000000001 - ((((((V6",
        "* w + S2 -> * w + 1.000000001 * S2",
        "? r * slope + least : 1.0 -> ? 0.0 : 1.0",
        "r * slope + least : 1.0 -> r * slope + least : 0.0",
        "r >= R_MIN && r <= R_MAX -> r >= R_MIN",
        "r >= R_MIN && r <= R_MAX -> r <= R_MAX",
        "-(turned >> 62 & 1) -> -(turned >> 63 & 1)",
        "fabs(y - (with_y - MAGIC)) -> fabs(x - (with_x - MAGIC))",
        "- 0x4338000000000000; -> - 0x4337ffffffffffff;",
        "t.nearest[i] = 0; -> ;",
        "doubt(d, piece, start + done + i); -> ;",
        "doubt(d, piece, start + done + i); -> doubt(d, piece, done + i);",
        "+= t.nearest[i] -> = t.nearest[i]",
        "block += BLOCKS; -> block += BLOCKS + 1;",
        "(uint64_t)((start + p.skip) / 8) -> (uint64_t)(p.skip / 8)",
        "share < (p.count + SHARE - 1) / SHARE -> share < (p.count + SHARE - 1) / SHARE - (p.count > SHARE)",
    ],
)
def test_a_library_with_other_values_is_not_used(
    kernel: rounded_native.Kernel, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = change.split(" -> ")
    text = rounded_native._text()
    assert before in text
    monkeypatch.setattr(rounded_native, "_text", lambda: text.replace(before, after))
    monkeypatch.setattr("dptrainer.native._TUNINGS", (["-fopenmp"],))  # once each
    made, status = library().build()
    assert made is None
    assert "other results" in status


@pytest.mark.parametrize("tuning", [[], ["-mavx2"], ["-mavx2", "-mfma"], ["-march=native", "-ffp-contract=off"]])
def test_code_for_other_processors_gives_the_same_values(kernel: rounded_native.Kernel, tuning: list[str]) -> None:
    # Without wide vectors 64-bit integers are converted in halves; without fused operations there is one rounding more.
    cpu = Path("/proc/cpuinfo")
    if any(flag.startswith("-mavx2") for flag in tuning) and not (cpu.exists() and "avx2" in cpu.read_text()):
        pytest.skip("this processor has no AVX2")
    assert rounded_native._agrees(rounded_native.LIBRARY.compiled(["cc", *tuning]))


def test_a_compiler_without_threads_is_asked_for_code_without_them(
    kernel: rounded_native.Kernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {shutil.which("cc")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    made, status = library().build()
    assert made is not None
    assert status == f"compiled with {compiler} -march=native"


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
    struct place list[64];
    add_rounded(key, piece, 1, 1048576.0, 1, list, 64);
    return left(key, 8) + left(stream, words);
}
"""


@pytest.mark.parametrize("tuning", [["-march=native"], [], ["-mavx2"]])
def test_neither_key_nor_keystream_is_left_on_the_stack(kernel: rounded_native.Kernel, tuning: list[str]) -> None:
    if tuning == ["-mavx2"] and not (Path("/proc/cpuinfo").exists() and "avx2" in Path("/proc/cpuinfo").read_text()):
        pytest.skip("this processor has no AVX2")
    text, flags = rounded_native._text() + _LOOK, rounded_native._FLAGS
    looking = Native("looking", lambda: text, flags, lambda made: made, lambda _: True).compiled(["cc", *tuning])
    key, out = bytes(range(101, 133)), torch.zeros(20_000, dtype=torch.int64)
    looking.noise_and_look.restype = ctypes.c_int64
    piece, last = rounded_native._described((out, 0, 0)), bytes(keystream(key, 0, 2_496, 4, layout=ROUNDED))
    assert looking.noise_and_look(key, ctypes.byref(piece), last, ctypes.c_int64(len(last) // 4)) == 0


def test_a_request_for_what_no_stream_has_is_refused(kernel: rounded_native.Kernel) -> None:
    eleven = torch.zeros(11, dtype=torch.int64)
    kernel.add([(eleven, 0, END - 11)], KEY, 20)
    for out, key, stream, offset, log2_width in (
        (eleven, KEY, 0, END - 10, 20),
        (eleven[::2], KEY, 0, 0, 20),
        (torch.zeros(1, dtype=torch.int64, device="meta"), KEY, 0, 0, 20),
        (torch.zeros(1), KEY, 0, 0, 20),
        (eleven, KEY, 0, -1, 20),
        (eleven, KEY, 1 << 32, 0, 20),
        (eleven, KEY[1:], 0, 0, 20),
        (eleven, KEY, 0, 0, 41),
        (eleven, KEY, 0, 0, -1),
    ):
        with pytest.raises(ValueError, match=r"no such noise|a key of"):
            kernel.add([(out, stream, offset)], key, log2_width)
