"""The Triton kernels in Triton's interpreter, in a process of their own.

Triton reads ``TRITON_INTERPRET`` when it is imported, for all of a process, and PyTorch has uses of its own for Triton.
So nothing here runs in the process of the tests: :func:`start` makes another one, which calls the functions below. What
they are given and give back is numbers, bytes and arrays.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dptrainer.noise import gpu
from dptrainer.noise.boxmuller import BLOCK_ELEMENTS

Array = NDArray[Any]
CPU = torch.device("cpu")
#: Two tiles a program instead of eight: a tile takes a tenth of a second, and the code is the same.
TILES = 2
TILE = BLOCK_ELEMENTS * gpu.BLOCKS
PROGRAM = TILES * TILE


def start() -> ProcessPoolExecutor:
    """A process whose Triton interprets."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _interpret)


def _interpret() -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    gpu.TILES, gpu.PROGRAM = TILES, PROGRAM
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "(invalid value|overflow) encountered", RuntimeWarning)  # NumPy's, of inf * 0


def triton_is_loaded_and_interprets() -> bool:
    from triton.runtime.interpreter import interpreter_builder

    from dptrainer.noise import triton_kernels as kernels

    # As gpu.py has it for compiled kernels: sums of words wrap.
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    return type(kernels.add_noise).__name__ == "InterpretedFunction"


def words(key: bytes, stream: int, block: int, count: int, last: int) -> bytes:
    return gpu.words(key, stream, block, count, CPU, last=last)[: 64 * count]


def values(words: bytes, dtype: str) -> Array:
    """Of any number of blocks, 16,384 at a time."""
    blocks, found = len(words) // 64, []
    for start in range(0, blocks, 1 << 14):
        part = words[64 * start : 64 * (start + (1 << 14))]
        lanes = 1 << (len(part) // 64 - 1).bit_length()
        full = part.ljust(64 * lanes, b"\0")
        found.append(gpu.values(full, getattr(torch, dtype), CPU)[: 10 * (len(part) // 64)])
    return np.concatenate(found)


class Sums(NamedTuple):
    """What is in the tensors after the noise, whether it was finite before, and how many launches it took."""

    tensors: list[Array]
    finite: bool
    launches: int


def add(starts: Sequence[Array], key: bytes, std: float, places: Sequence[tuple[int, int]]) -> Sums:
    """Noise added to copies of arrays, each with its stream and the place of its first element."""
    tensors = [torch.from_numpy(start.copy()) for start in starts]
    launches = []
    launch = gpu._launch
    gpu._launch = lambda *arguments: (launches.append(1), launch(*arguments))[1]  # type: ignore[assignment]
    try:
        finite = gpu.add([(t, *place) for t, place in zip(tensors, places, strict=True)], key, std)
    finally:
        gpu._launch = launch
    return Sums([tensor.numpy() for tensor in tensors], finite, len(launches))


def add_to_middle(whole: Array, start: int, stop: int, key: bytes) -> Sums:
    """Noise added to a part of a copy of ``whole``: what does the rest show?"""
    tensor = torch.from_numpy(whole.copy())
    finite = gpu.add([(tensor[start:stop], 0, 3)], key, 1.0)
    return Sums([tensor.numpy()], finite, 1)


def add_beyond(start: Array, element: int, key: bytes) -> Array:
    """The noise of ``start`` as the end of a tensor of ``element`` more elements, of which there is no memory.

    ``element`` is a multiple of what one program does; the programs before are not run.
    """
    from dptrainer.noise import triton_kernels as kernels

    tensor, programs = torch.from_numpy(start.copy()), element // gpu.PROGRAM
    address = tensor.data_ptr() - element * tensor.element_size()
    one = np.float64(1.0).view(np.int64)
    table = torch.tensor([[-programs, address, element + len(start), 0, 0, 0, int(one)]])
    launch = kernels.add_noise[(-(-len(start) // gpu.PROGRAM),)]
    kind = gpu._triton_type(tensor.dtype)
    launch(
        table, 1, torch.zeros(1, dtype=torch.int32), 1, *gpu._key_words(key), TARGET=kind, ARITHMETIC=kind,
        BLOCKS=gpu.BLOCKS, TILES=gpu.TILES,
    )  # fmt: skip
    return tensor.numpy()


def agrees(change: tuple[str, str] | None, folder: str) -> bool:
    """What the test of kernels says before they are used, after ``change`` was made to their text."""
    name = "dptrainer.noise.triton_kernels"
    shipped = importlib.util.find_spec(name)
    assert shipped is not None
    assert shipped.origin is not None
    text = Path(shipped.origin).read_text(encoding="utf-8")
    if change is not None:
        assert text.count(change[0]) == 1, change
        text = text.replace(*change)
    path = Path(folder, "kernels.py")
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    import dptrainer.noise

    before = sys.modules.get(name)
    sys.modules[name], dptrainer.noise.triton_kernels = changed, changed  # type: ignore[attr-defined]
    try:
        return gpu.agrees(CPU)
    finally:
        del sys.modules[name], dptrainer.noise.triton_kernels  # type: ignore[attr-defined]
        if before is not None:
            sys.modules[name], dptrainer.noise.triton_kernels = before, before  # type: ignore[attr-defined]
