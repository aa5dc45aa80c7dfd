from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loopkit import linear_data
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from dpbudget.errors import DPBudgetError, PrivacyViolation
from dptrainer.data import Records, check_rows, split_batch
from dptrainer.losses import PerExampleLoss


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (nn.MSELoss(), lambda out, y: ((out - y) ** 2).mean((1, 2))),
        (nn.MSELoss(reduction="sum"), lambda out, y: ((out - y) ** 2).sum((1, 2))),
        (nn.MSELoss(reduction="none"), lambda out, y: ((out - y) ** 2).mean((1, 2))),
        (nn.KLDivLoss(reduction="batchmean"), lambda out, y: F.kl_div(out, y, reduction="none").sum((1, 2))),
        (F.l1_loss, lambda out, y: (out - y).abs().mean((1, 2))),
        (lambda out, y: (out - y).abs().amax((1, 2)), lambda out, y: (out - y).abs().amax((1, 2))),
    ],
)
def test_values_within_an_example_are_put_together_as_the_criterion_says(loss: Any, expected: Any) -> None:
    out, y = torch.rand(4, 3, 2), torch.rand(4, 3, 2) + 0.1
    found = PerExampleLoss(loss)(out, y, 4)
    assert found.shape == (4,)
    torch.testing.assert_close(found, expected(out, y))


def test_the_criterion_of_the_user_is_not_changed() -> None:
    criterion = nn.CrossEntropyLoss()
    PerExampleLoss(criterion)
    assert criterion.reduction == "mean"


@pytest.mark.parametrize("shape", [(), (3,), (5, 4)])
def test_rows_that_are_not_examples_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PrivacyViolation) as caught:
        PerExampleLoss(lambda out, y: torch.zeros(shape))(torch.zeros(4), torch.zeros(4), 4)
    assert caught.value.code == "DP030"


class Listed(Dataset[Any]):
    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return linear_data()[index]


def test_every_kind_of_dataset_gives_the_same_batch() -> None:
    data, indices = linear_data(), np.array([3, 7, 31])
    sources: list[Any] = [data, Listed(), Subset(data, list(range(40))), list(data)]
    batches = [Records(source).batch(indices) for source in sources]
    for x, y in batches:
        assert torch.equal(x, data.tensors[0][[3, 7, 31]])
        assert torch.equal(y, data.tensors[1][[3, 7, 31]])


def test_only_drawn_records_are_read() -> None:
    data = Listed()
    records = Records(data)
    assert data.asked == []
    records.batch(np.array([5, 6]))
    assert data.asked == [5, 6]


def test_a_synthetic_batch_has_shapes_and_types_but_no_value_of_the_data() -> None:
    data = TensorDataset(torch.randn(6, 2, 3).double(), torch.arange(6) + 4)
    x, y = Records(data).synthetic()
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((1, 2, 3), torch.float64, (1,), torch.int64)
    assert not x.any()
    assert not y.any()


@pytest.mark.parametrize(
    ("batch", "inputs", "named"),
    [((1, 2), (1,), {}), ([1, 2, 3], (1, 2), {}), ({"a": 1, "labels": 2}, (), {"a": 1})],
)
def test_a_batch_splits_into_inputs_and_target(batch: Any, inputs: Any, named: Any) -> None:
    found = split_batch(batch)
    assert found[:2] == (inputs, named)
    assert found[2] == (3 if isinstance(batch, list) else 2)


@pytest.mark.parametrize("batch", [(1,), {"labels": 1}, {"a": 1, "b": 2}, torch.zeros(3), "text"])
def test_a_batch_of_another_form_is_refused(batch: Any) -> None:
    with pytest.raises(DPBudgetError, match="DP091"):
        split_batch(batch)


def test_a_batch_without_a_row_for_each_record_is_refused_without_naming_sizes() -> None:
    check_rows([torch.zeros(7, 2), torch.zeros(3)], 7)
    with pytest.raises(PrivacyViolation, match="DP023") as caught:
        check_rows([torch.zeros(6, 2), torch.tensor(7)], 7)
    assert not any(digit in caught.value.message for digit in "67")
