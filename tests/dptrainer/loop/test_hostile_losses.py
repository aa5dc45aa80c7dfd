"""Criteria of one's own loop that mix examples, or do not do what is declared: measured, and refused when shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loopkit import NoNoise, linear_data, linear_model, make_run, norm
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.private import make_private


def words() -> TensorDataset:
    tokens = torch.randint(0, 7, (40, 6), generator=torch.Generator().manual_seed(0))
    return TensorDataset(tokens, tokens.roll(1, 1))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x)).transpose(1, 2)


def regression() -> TensorDataset:
    x, y = linear_data().tensors
    return TensorDataset(x, y.float())


def set_up(model: nn.Module, data: Any, loss_fn: Any, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return make_private(model, optimizer, data, run=make_run(1, rate=1.0), loss_fn=loss_fn, **options)


def contrastive(outputs: Tensor, _: Tensor) -> Tensor:
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


REFUSED = {
    "[B, 1] against [B]": (lambda: linear_model(classes=1), regression, nn.MSELoss(), "mean"),
    "class weights": (linear_model, linear_data, nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 9.0])), "mean"),
    "ignored targets": (Tagger, words, nn.CrossEntropyLoss(), "mean"),
    "in-batch negatives": (linear_model, linear_data, contrastive, "mean"),
    "a sum declared a mean": (linear_model, linear_data, nn.CrossEntropyLoss(reduction="sum"), "mean"),
    "a mean declared a sum": (linear_model, linear_data, nn.CrossEntropyLoss(), "sum"),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("case", REFUSED)
def test_a_criterion_that_is_shown_and_mixes_examples_is_refused(case: str) -> None:
    build, data, loss_fn, reduction = REFUSED[case]
    model = build()
    with pytest.raises(PrivacyViolation, match="DP030"):
        set_up(model, data(), loss_fn, loss_reduction=reduction)
    model.zero_grad()
    assert not model._forward_pre_hooks, "a refused set-up leaves the model plain"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_honest_criterion_is_accepted(reduction: Any, smoothing: float) -> None:
    said: list[str] = []
    loss_fn = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)
    set_up(linear_model(), linear_data(), loss_fn, loss_reduction=reduction, note=said.append)
    set_up(linear_model(classes=5), regression(), lambda o, y: (o.mean(1) - y).square().mean(), note=said.append)
    assert said == []


def test_a_criterion_that_cannot_be_tested_is_mentioned() -> None:
    said: list[str] = []
    set_up(linear_model(), linear_data(), lambda o, y, extra: o.sum(), note=said.append)
    assert len(said) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_criterion_that_was_not_given_is_noted_once_and_is_no_warning(reduction: Any) -> None:
    said: list[str] = []
    loader = set_up(linear_model(), linear_data(), None, loss_reduction=reduction, note=said.append)[2]
    (note,) = said
    assert f'loss_reduction="{reduction}"' in note
    assert "Pass loss_fn=criterion" in note
    list(loader)
    assert len(said) == 1, "the loop adds nothing"
    set_up(linear_model(), linear_data(), None)  # a warning would be an error here


def test_the_name_of_a_criterion_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="DP060 loss_fn is 'cross_entropy', which cannot be called"):
        set_up(linear_model(), linear_data(), "cross_entropy")


def test_the_loader_answers_whether_the_criterion_was_tested() -> None:
    for loss_fn, tested, words in ((F.cross_entropy, True, "loss tested"), (None, False, "loss not tested")):
        loader = set_up(linear_model(), linear_data(), loss_fn)[2]
        assert loader.loss_tested is loader.in_pieces(7).loss_tested is tested
        assert repr(loader).endswith(f": 1 of 1 steps left, {words}>")
    with pytest.warns(UserWarning, match="could not be called"):
        assert not set_up(linear_model(), linear_data(), lambda o, y, extra: o.sum())[2].loss_tested


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_is_refused_would_have_moved_the_sum_by_more_than_c() -> None:
    """The reason for the test: one record, several times the clipping norm."""
    x, y = regression().tensors
    y = y.clone()
    y[-1] = 300.0
    sums = []
    for rows in (40, 39):
        noise, model = NoNoise(), linear_model(classes=1)
        data, run = TensorDataset(0.1 * x[:rows], y[:rows]), make_run(1, rate=1.0, clip_norm=20.0)
        _, optimizer, loader = make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.1), data, run=run, noise=noise
        )
        for inputs, target in loader:
            F.mse_loss(model(inputs), target).backward()
            optimizer.step()
        sums.append(noise.sums[0])
    assert norm({name: sums[0][name] - sums[1][name] for name in sums[0]}) > 2 * 20.0
