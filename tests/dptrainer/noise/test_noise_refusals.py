"""What cannot get noise is refused before any is drawn, with a code, the numbers and a way out."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpbudget.errors import DPBudgetError, InvalidParameter, PrivacyViolation, ReceiptSpent
from dpbudget.ledger.receipt import Receipt
from dptrainer.allocation import UniformAllocation
from dptrainer.noise import chacha, native, rounded_native
from dptrainer.noise.gaussian import add_gaussian_, add_gaussians_
from dptrainer.noise.rounded import add_rounded_, rounded_gaussian
from dptrainer.noise.source import SecureNoise
from dptrainer.noise.tree import SecureTreeNoise, check_tree_size
from dptrainer.sampling import PoissonSampler, poisson_indices
from dptrainer.values import ClippedSum

NewReceipt = Callable[..., Receipt]
KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every keystream that is asked for, plain or compiled."""
    asked: list[str] = []
    fill, add, rounded = chacha.fill, native.Kernel.add, rounded_native.Kernel.add
    for module in ("chacha", "gaussian", "rounded"):
        monkeypatch.setattr(f"dptrainer.noise.{module}.fill", lambda *a, **n: (asked.append("plain"), fill(*a, **n))[1])
    monkeypatch.setattr(native.Kernel, "add", lambda *a: (asked.append("compiled"), add(*a))[1])
    monkeypatch.setattr(rounded_native.Kernel, "add", lambda *a: (asked.append("compiled"), rounded(*a))[1])
    return asked


def refused(attempt: Callable[[], object], code: str, *says: object) -> DPBudgetError:
    with pytest.raises(DPBudgetError) as caught:
        attempt()
    error = caught.value
    assert error.code == code
    assert error.hint
    assert str(error) == f"{code} {error.message} Fix: {error.hint}"
    for part in says:
        assert str(part) in error.message
    return error


TYPES = [torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_type_that_cannot_hold_the_noise(dtype: torch.dtype, new_receipt: NewReceipt, drawn: list[str]) -> None:
    sums = {"fine": torch.zeros(3), "other": torch.zeros(4, dtype=dtype)}
    receipt = new_receipt()
    refused(lambda: SecureNoise().privatise(ClippedSum(sums, 1.0), receipt), "DP019", "other", dtype)
    error = refused(lambda: add_gaussians_(sums.values(), KEY, 1.0), "DP019", dtype)
    assert isinstance(error, InvalidParameter)
    assert not receipt.was_used("grad-noise")
    assert drawn == []
    assert not any(one.any() for one in sums.values())


def test_a_sum_that_is_part_of_a_graph(new_receipt: NewReceipt, drawn: list[str]) -> None:
    sums = {"w": torch.zeros(3, requires_grad=True)}
    refused(lambda: SecureNoise().privatise(ClippedSum(sums, 1.0), new_receipt()), "DP019", "w is", "part of a graph")
    assert drawn == []


@pytest.mark.parametrize(
    "address",
    [
        {"param_id": 1 << 32},
        {"param_id": -1},
        {"param_id": 0, "offset": -1},
        {"param_id": 0, "offset": (10 << 64) - 4},  # its last element would take the first word again
    ],
)
def test_a_parameter_that_does_not_fit_its_counter(address: dict[str, int], drawn: list[str]) -> None:
    tensor = torch.zeros(5)
    numbers = (address["param_id"], address.get("offset", 0), address.get("offset", 0) + 5, "2^32", "10 * 2^64")
    refused(lambda: add_gaussian_(tensor, KEY, std=1.0, **address), "DP018", *numbers)
    assert drawn == []
    assert not tensor.any()


def test_an_integer_parameter_that_does_not_fit_its_counter(drawn: list[str]) -> None:
    refused(lambda: rounded_gaussian(KEY, 3, 5, 20, offset=(1 << 57) - 4), "DP018", 3, (1 << 57) - 4, "2^57")
    refused(lambda: add_rounded_([torch.zeros(5)], KEY, 20), "DP019", "int64", "torch.float32")
    assert drawn == []


def test_a_tree_that_does_not_fit_its_counter(drawn: list[str]) -> None:
    tensors = {"w": torch.empty(1 << 60, device="meta")}
    refused(lambda: check_tree_size(tensors, 1 << 8, 1 << 90), "DP018", "w", 1 << 60, 511, 256)
    check_tree_size(tensors, 1 << 6, 1 << 90)
    assert drawn == []


@pytest.mark.parametrize("std", [-1.0, float("inf"), float("nan")])
def test_a_deviation_that_is_none(std: float, drawn: list[str]) -> None:
    refused(lambda: add_gaussian_(torch.zeros(5), KEY, 0, std), "DP005", repr(std))
    assert drawn == []


@pytest.mark.parametrize(("rate_k", "population"), [(0, 10), ((1 << 64) + 1, 10), (1, -1), (1, 1 << 62)])
def test_a_rate_or_dataset_beyond_the_layout(rate_k: int, population: int, drawn: list[str]) -> None:
    refused(lambda: poisson_indices(KEY, rate_k, population), "DP008", "2^64", "2^62")
    assert drawn == []


@pytest.mark.parametrize("purpose", ["grad-noise", "sampling"])
def test_a_receipt_that_was_used(purpose: str, new_receipt: NewReceipt, drawn: list[str]) -> None:
    receipt, sums = new_receipt(step=6, run_id="run-9", rate_k=1 << 60), {"w": torch.zeros(40)}
    use: Callable[[], object]
    if purpose == "sampling":
        use = lambda: PoissonSampler().draw(receipt, 100)  # noqa: E731
    else:
        use = lambda: SecureNoise().privatise(ClippedSum(sums, 1.0), receipt)  # noqa: E731
    use()
    before = sums["w"].clone()
    assert drawn
    drawn.clear()
    error = refused(use, "DP077", "step 6", "run-9", purpose)
    assert isinstance(error, ReceiptSpent)
    assert isinstance(error, PrivacyViolation)
    assert drawn == []
    assert torch.equal(sums["w"], before)


def whole(new_receipt: NewReceipt) -> Receipt:
    return new_receipt(rate_k=1 << 64)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda receipt: SecureNoise().privatise(ClippedSum({"w": torch.zeros(40)}, 1.0), receipt),
        lambda receipt: PoissonSampler().draw(receipt, 100),
        lambda receipt: UniformAllocation().draw(receipt, 3, 100),
        lambda receipt: SecureTreeNoise().open(receipt, 3),
    ],
)
def test_a_forked_worker(attempt: Callable[[Receipt], Any], new_receipt: NewReceipt, drawn: list[str]) -> None:
    receipt, parent = whole(new_receipt), os.getpid()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            refused(lambda: attempt(receipt), "DP076", parent, os.getpid())
            code = 0 if drawn == [] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    attempt(receipt)  # the parent's works as before
