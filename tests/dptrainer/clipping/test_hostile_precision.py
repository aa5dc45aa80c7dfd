"""Switches of torch for faster, coarser products must not loosen the bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from clipping_oracle import norm
from torch import nn

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
