"""The kernels compiled for an H200 without one: what is in the code, and what is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tests.dptrainer.noise import offline

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
KINDS = [("float32", "float32"), ("float32", "float64"), ("float64", "float64")]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Calls a function of ``offline`` in a process whose Triton compiles."""
    with offline.start(str(tmp_path_factory.mktemp("triton"))) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def instructions(ptx: str) -> list[str]:
    return re.findall(r"^\t(?:@!?%p\d+ )?([a-z][a-z0-9_.]*)", ptx, re.MULTILINE)


@pytest.mark.parametrize(("target", "arithmetic"), KINDS)
def test_values_cross_lanes_once_and_nothing_is_spilled(
    compiler: Callable[..., Any], target: str, arithmetic: str
) -> None:
    made = compiler(offline.add_noise, target, arithmetic)
    assert made.cubin
    assert made.ttgir.count("ttg.convert_layout") == 1
    assert made.shared <= 1 << 14
    assert ".local" not in made.ptx
    loads = [line for line in made.ttgir.splitlines() if "tt.load" in line and "x16x" in line]
    stores = [line for line in made.ttgir.splitlines() if "tt.store" in line and "x16x" in line]
    layout = re.search(r"#blocked = #ttg\.blocked<\{sizePerThread = \[1, 1\], threadsPerWarp = \[2, 16\]", made.ttgir)
    assert layout is not None  # a warp has two rows of ten values: eighty consecutive bytes of float32
    assert loads
    assert stores
    assert all("#blocked>" in line for line in loads + stores)


def test_float32_noise_has_no_slow_path_and_no_float64_but_the_scale(compiler: Callable[..., Any]) -> None:
    made = instructions(compiler(offline.add_noise, "float32", "float32").ptx)
    assert [name for name in made if "f64" in name] == ["cvt.rn.f32.f64"]
    assert {name for name in made if "approx" in name} == {"rsqrt.approx.ftz.f32"}
    assert not [name for name in made if name.startswith(("call", "div", "sin", "cos", "lg2"))]
    # One double round in a loop: eight quarters of four rotations, and four sums as products with 1.
    assert made.count("shf.l.wrap.b32") == 32
    assert made.count("mad.lo.s32") + made.count("mul.lo.s32") >= 32
    assert len(made) < 1000


@pytest.mark.parametrize("target", ["float32", "float64"])
def test_float64_arithmetic_is_rounded_operation_by_operation(compiler: Callable[..., Any], target: str) -> None:
    made = instructions(compiler(offline.add_noise, target, "float64").ptx)
    used = {name for name in made if name.endswith("f64") and not name.startswith(("cvt", "mov", "ld", "st", "setp"))}
    # The fused operation is that of the flag, x * 0.
    assert used <= {"add.rn.f64", "sub.rn.f64", "mul.rn.f64", "div.rn.f64", "sqrt.rn.f64", "fma.rn.f64"}
    assert made.count("fma.rn.f64") == (16 if target == "float64" else 0)
    assert made.count("div.rn.f64") == 5
    assert made.count("sqrt.rn.f64") == 10


def test_no_key_has_a_kernel_of_its_own(compiler: Callable[..., Any]) -> None:
    assert compiler(offline.specialised) == {
        "table": True, "tensors": False, "flag": True, "one": False, **{f"k{i}": False for i in range(8)}
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 89, 100, 120])
@pytest.mark.parametrize(("target", "arithmetic"), KINDS)
def test_the_kernels_compile_for_other_devices(
    compiler: Callable[..., Any], target: str, arithmetic: str, capability: int
) -> None:
    made = compiler(offline.add_noise, target, arithmetic, capability)
    assert made.cubin
    assert made.ttgir.count("ttg.convert_layout") == 1
    assert ".local" not in made.ptx
