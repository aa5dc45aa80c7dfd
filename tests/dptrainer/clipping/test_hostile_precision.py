"""Switches of torch for faster, coarser products must not loosen the bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from clipping_oracle import norm
from torch import nn

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping import BookKeeping, VmapEngine

_MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture(autouse=True)
def _precision_as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for matmul in _MATMULS:
        matmul.fp32_precision = "none"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("engine", ["book-keeping", "vmap"])
def test_one_example_moves_a_batch_by_at_most_c_in_every_matmul_precision(engine: str, precision: str) -> None:
    """All elements of its gradient are equal, and lie where bfloat16 rounds most: errors add up to 2^-9 of the norm."""
    clip_norm = 512.0 * (1 + 3 * 2.0**-9)
    model, rows = nn.Linear(512, 512, bias=False), torch.zeros(64, 512)
    rows[0] = 1.0
    torch.set_float32_matmul_precision(precision)
    if engine == "vmap":
        found = VmapEngine(model, lambda o, y: (o * y).sum(1) * 100, clip_norm=clip_norm, chunk_size=64)(
            [rows], [rows[:, :1]]
        )
    else:
        bookkeeping = BookKeeping(model, clip_norm=clip_norm)
        with bookkeeping.record(64):
            values = (model(rows) * rows[:, :1]).sum(1) * 100
        found = bookkeeping.backward(values)
    assert 0.999 * clip_norm < norm(found.grads) <= clip_norm
    assert torch.get_float32_matmul_precision() == precision


def test_the_precision_of_the_program_is_given_back() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    model = nn.Linear(4, 2)
    engine = BookKeeping(model, clip_norm=1.0)
    with engine.record(3):
        values = model(torch.ones(3, 4)).sum(1)
    engine.backward(values)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def _bfloat16_step(model: nn.Module, rows: torch.Tensor, reduction: str) -> dict[str, torch.Tensor]:
    engine = BookKeeping(model, clip_norm=0.1)
    engine.begin(len(rows))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(rows), torch.arange(len(rows)) % 3, reduction=reduction)
    loss.backward()
    grads = dict(engine.finish(reduction).grads)  # type: ignore[arg-type]  # one of the reductions
    engine.detach()
    return grads


def test_a_mean_in_bfloat16_is_refused_and_a_sum_keeps_the_bound() -> None:
    """The divisor of a mean changes the rounding of every example: 1.01 C for one record of 257."""
    torch.manual_seed(0)
    model, rows = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)), torch.randn(129, 20)
    with pytest.raises(PrivacyViolation, match="DP030"):
        _bfloat16_step(model, rows, "mean")
    whole, without = _bfloat16_step(model, rows, "sum"), _bfloat16_step(model, rows[:-1], "sum")
    assert norm({name: whole[name] - without[name] for name in whole}) <= 0.1 * (1 + 1e-6)
