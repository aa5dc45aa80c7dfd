"""Triton's compiler for a GPU that is not there, in a process of its own (see ``interpreted.py``)."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from dptrainer.noise import gpu


class Compiled(NamedTuple):
    """What the compiler made of a kernel: the text before and after the layouts are lowered, and machine code."""

    ttgir: str
    ptx: str
    cubin: bytes
    shared: int


def start(cache: str) -> ProcessPoolExecutor:
    """A process that compiles."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _set_up, (cache,))


def _set_up(cache: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache


def add_noise(target: str, arithmetic: str, capability: int = 90) -> Compiled:
    import triton
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dptrainer.noise import triton_kernels as kernels

    types = {"table": "*i64", "tensors": "i32", "flag": "*i32", "one": "i32", **{f"k{i}": "i32" for i in range(8)}}
    constants = {
        "TARGET": getattr(tl, target), "ARITHMETIC": getattr(tl, arithmetic), "BLOCKS": gpu.BLOCKS, "TILES": gpu.TILES
    }  # fmt: skip
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    made = triton.compile(
        ASTSource(kernels.add_noise, signature, constants, {(0,): [["tt.divisibility", 16]]}),
        target=GPUTarget("cuda", capability, 32),
        options=gpu._OPTIONS,
    )
    return Compiled(made.asm["ttgir"], made.asm["ptx"], made.asm["cubin"], made.metadata.shared)


def specialised() -> dict[str, bool]:
    """For each argument that is no constant, whether Triton compiles anew for some of its values."""
    from dptrainer.noise import triton_kernels as kernels

    return {p.name: not p.do_not_specialize for p in kernels.add_noise.params if not p.is_constexpr}
