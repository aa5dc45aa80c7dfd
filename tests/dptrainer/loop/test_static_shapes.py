"""Batches that are filled up with rows of zeros: one shape for all, and not a number of the release changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data, linear_model, make_run, private, refused, step
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import dptrainer
from dpbudget.ledger.receipt import Receipt
from dptrainer import PrivateTrainer, QuantileClipping, TreeTrainer, UserDataset
from dptrainer.noise import keys
from dptrainer.values import ClippedSum, NoisySum


class Silent:
    """Releases sums without noise, and keeps them."""

    def __init__(self) -> None:
        self.sums: list[dict[str, torch.Tensor]] = []

    def privatise(self, clipped: ClippedSum, receipt: Receipt) -> NoisySum:
        receipt.use("grad-noise")
        self.sums.append({n: v.clone() for n, v in (*clipped.grads.items(), *clipped.statistics.items())})
        return NoisySum(clipped.grads, clipped.statistics)


@pytest.fixture(autouse=True)
def _same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step t draws the same records in every run."""

    def same(receipt: Receipt, purpose: keys.Purpose) -> bytes:
        receipt.use(purpose.value)
        return bytes([receipt.step]) * 32

    monkeypatch.setattr("dptrainer.sampling.step_key", same)
    monkeypatch.setattr("dptrainer.allocation.step_key", same)


ROWS: list[int] = []


class Watched(nn.Module):
    """A linear model that notes how many rows it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ROWS.append(len(x))
        out: torch.Tensor = self.inner(x)
        return out


Released = list[dict[str, torch.Tensor]]


def trained(data: Any, run: Any, kind: Any = PrivateTrainer, **options: Any) -> tuple[Released, list[int]]:
    """What was released without noise, and the rows of every physical batch."""
    noise, model = Silent(), Watched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extra = {} if kind is TreeTrainer else {"noise": noise}
    trainer = kind(model, optimizer, F.cross_entropy, data, run, **extra, **options)
    ROWS.clear()
    trainer.fit()
    return noise.sums, list(ROWS)


def assert_same(first: Released, second: Released) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert list(one) == list(other)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clipping", [None, QuantileClipping])
@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_the_sums_are_those_of_the_drawn_records_and_every_batch_has_one_shape(rate: float, clipping: Any) -> None:
    found = []
    for static in (False, True):
        policy = None if clipping is None else clipping()
        run = make_run(6, rate=rate, sigma=20.0)
        sums, rows = trained(linear_data(), run, physical_batch_size=32, static_shapes=static, clipping=policy)
        found.append(sums)
        if static:
            assert set(rows) == {32}
        else:
            assert len(set(rows)) > 1
    assert_same(*found)


def test_several_physical_batches_of_one_shape_make_a_step() -> None:
    whole, _ = trained(linear_data(), make_run(3, rate=0.5))
    pieces, rows = trained(linear_data(), make_run(3, rate=0.5), physical_batch_size=8, static_shapes=True)
    assert set(rows) == {8}
    assert_same(whole, pieces)


def test_an_empty_draw_is_rows_of_zeros_that_count_as_nothing() -> None:
    sums, rows = trained(linear_data(1), make_run(4, rate=1e-9), physical_batch_size=5, static_shapes=True)
    assert rows == [5] * 4
    assert not any(value.any() for grads in sums for value in grads.values())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_a_loop_of_ones_own_sees_the_rows_and_releases_the_same(reduction: str, rate: float) -> None:
    found = []
    for static in (False, True):
        noise, seen = Silent(), set()
        model, optimizer, loader = private(
            run=make_run(6, rate=rate), noise=noise, physical_batch_size=40, static_shapes=static,
            loss_reduction=reduction, loss_fn=nn.CrossEntropyLoss(reduction=reduction),
        )  # fmt: skip
        for x, y in loader:
            seen.add(len(x))
            assert len(x) == len(y)
            F.cross_entropy(model(x), y, reduction=reduction).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(noise.sums)
        assert (seen == {40}) == static
    assert_same(*found)


class Noisy(nn.Module):
    """Gradients of rows of zeros are NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x / x.norm(dim=1, keepdim=True))
        return out


def test_rows_of_zeros_may_have_any_gradient() -> None:
    found = []
    for static in (False, True):
        noise = Silent()
        model, optimizer, loader = private(
            Noisy(), run=make_run(3), noise=noise, physical_batch_size=40, static_shapes=static, note=lambda _: None
        )
        for batch in loader:
            step(model, optimizer, batch)
        found.append(noise.sums)
    assert all(value.isfinite().all() for grads in found[1] for value in grads.values())
    assert_same(*found)


def test_views_and_users_are_filled_up_to_their_most_rows() -> None:
    found = []
    for static in (False, True):
        sums, rows = trained(linear_data(), make_run(4), views=3, physical_batch_size=30, static_shapes=static)
        found.append(sums)
        assert (set(rows) == {90}) == static
    assert_same(*found)
    found = []
    users = [str(i % 13) for i in range(40)]
    for static in (False, True):
        data = UserDataset(linear_data(), users, max_examples=4)
        sums, rows = trained(data, make_run(4, unit="user"), physical_batch_size=13, static_shapes=static)
        found.append(sums)
        assert (set(rows) == {52}) == static
    assert_same(*found)


def test_a_pass_of_dp_ftrl_has_one_shape_too() -> None:
    _, rows = trained(
        linear_data(), make_run(2, rate=1.0), kind=TreeTrainer, steps_per_pass=4, physical_batch_size=40,
        static_shapes=True,
    )  # fmt: skip
    assert rows == [40] * 8


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at inputs
def test_compiled_parts_are_compiled_once() -> None:
    shapes: list[torch.Size] = []

    def backend(graph: Any, inputs: Any) -> Any:
        shapes.append(inputs[0].shape)
        return graph.forward

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
            self.between = dptrainer.compiled(lambda h: torch.tanh(h) * h, dynamic=False, backend=backend)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(self.between(self.first(x)))
            return out

    torch._dynamo.reset()
    model, optimizer, loader = private(Model(), run=make_run(6), physical_batch_size=40, static_shapes=True)
    before = len(shapes)
    for batch in loader:
        step(model, optimizer, batch)
    assert len(shapes) - before == 1
    assert shapes[-1][0] == 40


def with_more(items: list[Any]) -> Any:
    """Inputs, seven numbers that belong to nobody, targets."""
    return torch.stack([x for x, _ in items]), torch.ones(7), torch.stack([y for _, y in items])


class Words(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.zeros(5), "labels": 0, "word": "w"}


def test_what_cannot_be_filled_up_is_refused_before_anything_is_charged() -> None:
    run = make_run(2)
    with refused("DP009"):
        private(run=run, static_shapes=True)
    with refused("DP023"):
        private(data=Words(), run=run, static_shapes=True, physical_batch_size=8)
    with refused("DP023"):
        flat = TensorDataset(torch.randn(10, 5), torch.zeros(10, dtype=torch.long))
        private(data=flat, run=run, static_shapes=True, physical_batch_size=8, collate_fn=with_more)
    assert run.charged == 0
