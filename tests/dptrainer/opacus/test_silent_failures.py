"""What Opacus 1.6.0 lets pass without a word (docs/migrating-from-opacus.md, "Ten silent failures"), one by one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacuskit import Released, data, loader, net, norm, open_ended, parts, planned, refused, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dptrainer.opacus import PrivacyEngine
from dptrainer.opacus.validators import ModuleValidator


def test_1_ghost_mode_with_the_loss_of_ones_own_is_clipped_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    released = Released().watch(monkeypatch)
    model, optimizer, _, batches = open_ended(
        grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss(), max_grad_norm=1e-3, data_loader=loader(1, 1)
    )
    train(model, optimizer, batches, F.cross_entropy)
    assert 0.0 < norm(released.sums[0]) <= 1e-3


def test_2_stepping_the_original_optimizer_adds_the_noise_and_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    released = Released().watch(monkeypatch)
    engine = PrivacyEngine()
    model = net()
    original = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, batches = open_ended(engine, module=model, optimizer=original, noise_multiplier=50.0)
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        original.step()
    assert len(engine.accountant) == len(released.sums) == len(batches)
    assert min(released.moved) > 10.0


def test_2_another_optimizer_over_the_same_parameters_cannot_step() -> None:
    model, _, batches = open_ended()
    bystander = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = next(iter(batches))
    F.cross_entropy(model(x), y)
    with refused("DP032"):
        bystander.step()


def test_3_weights_that_another_ledger_paid_for_are_not_taken_as_free() -> None:
    model, optimizer, batches = planned()
    train(model, optimizer, batches)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh, _, _ = planned()  # what a new process would do
    with refused("DP051"):
        fresh.load_state_dict(saved["model"])
    net().load_state_dict(saved["model"])  # for use, a plain model takes it
    model.load_state_dict(saved["model"])  # its own ledger has paid


def test_4_going_back_to_an_older_checkpoint_gives_no_budget_back(tmp_path: Any) -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = planned(engine)
    engine.save_checkpoint(path=tmp_path / "first.pt", module=model, optimizer=optimizer)
    train(model, optimizer, batches)
    spent = engine.get_epsilon(1e-5)
    engine.load_checkpoint(path=tmp_path / "first.pt", module=model, optimizer=optimizer)
    assert engine.get_epsilon(1e-5) == spent > 0.0
    train(model, optimizer, batches)
    with refused("DP050"):
        train(model, optimizer, batches)


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
        return self.layer(x)  # type: ignore[no-any-return]


def test_5_statistics_of_private_data_are_refused_frozen_or_home_made() -> None:
    frozen = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    frozen[1].requires_grad_(False)
    assert not ModuleValidator.is_valid(frozen)
    optimizer = torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], lr=0.1)
    with refused("DP010"):
        open_ended(module=frozen, optimizer=optimizer)
    with refused("DP013"):
        open_ended(module=RunningMean())


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + x.mean(0))  # type: ignore[no-any-return]


def test_6_a_model_or_a_loss_that_mixes_examples_is_refused() -> None:
    with refused("DP033"):
        open_ended(module=Mixes())

    def over_the_batch(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs - outputs.mean(0), target)

    with refused("DP030"):
        open_ended(criterion=over_the_batch)


def test_7_the_old_loader_trains_nothing() -> None:
    engine = PrivacyEngine()
    mine = loader()
    model, optimizer, _ = open_ended(engine, data_loader=mine)
    before = copy.deepcopy(model.state_dict())
    with refused("DP021"):
        train(model, optimizer, mine)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("make", [open_ended, planned])
def test_7_batches_that_are_not_poisson_are_refused_with_the_way_out(make: Callable[..., Any], shuffle: bool) -> None:
    with refused("DP020") as caught:
        make(data_loader=DataLoader(data(), batch_size=5, shuffle=shuffle), poisson_sampling=False)
    assert "poisson_sampling=True" in caught.value.hint


def test_8_training_past_the_plan_raises_and_leaves_the_model_alone() -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = planned(engine, epochs=1)
    train(model, optimizer, batches)
    before, spent = copy.deepcopy(model.state_dict()), engine.get_epsilon(1e-5)
    with refused("DP050"):
        train(model, optimizer, batches)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert engine.get_epsilon(1e-5) == spent <= 3.0


@pytest.mark.parametrize(
    ("wrong", "meant"), [("poison_sampling", "poisson_sampling"), ("loss_redction", "loss_reduction"), ("banana", "")]
)
@pytest.mark.parametrize("make", [open_ended, planned])
def test_9_a_misspelt_option_is_refused_with_the_nearest_one(make: Callable[..., Any], wrong: str, meant: str) -> None:
    with refused("DP060") as caught:
        make(**{wrong: False})
    assert wrong in caught.value.message
    assert meant in caught.value.hint


def test_9_so_is_one_of_the_engine_and_of_the_memory_manager() -> None:
    from dptrainer.opacus.utils.batch_memory_manager import BatchMemoryManager

    unknown: Any = {"acountant": "rdp"}
    with refused("DP060") as caught:
        PrivacyEngine(**unknown)
    assert "accountant" in caught.value.hint
    unknown = {"data_loader": None, "optimizer": None, "max_batch": 4, "max_physical_batch_size": 4}
    with refused("DP060"):
        BatchMemoryManager(**unknown)


def test_10_one_cell_that_is_not_a_number_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    released = Released().watch(monkeypatch)
    inputs, labels = data(60).tensors
    inputs[7, 2], inputs[11, 0] = float("nan"), float("inf")
    model, optimizer, batches = open_ended(data_loader=DataLoader(TensorDataset(inputs, labels), batch_size=60))
    train(model, optimizer, batches)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert 0.0 < norm(released.sums[0]) <= 58.0


def test_a_tuple_that_is_kept_from_before_is_private_too() -> None:
    """With one object in place there is nothing to rebind; only the loader is new."""
    engine = PrivacyEngine()
    mine = parts(noise_multiplier=4.0, max_grad_norm=1.0)
    _, _, batches = engine.make_private(**mine)
    train(mine["module"], mine["optimizer"], batches)
    assert len(engine.accountant) == len(batches)


def test_what_is_trained_through_the_model_after_a_step_must_not_see_its_batch() -> None:
    """A head of one's own on the features of a private batch would learn from it without noise."""
    model, optimizer, batches = open_ended()
    head = nn.Linear(2, 1)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        head(model(torch.randn(3, 6))).sum().backward()  # nothing of the batch
        loss = head(model(x[:2])).sum()
        with refused("after its step"):
            loss.backward()


def test_two_steps_on_one_batch_are_refused_and_not_charged_once() -> None:
    """Older examples of Opacus step a discriminator twice for one batch: the sample would be shared by two releases."""
    engine = PrivacyEngine()
    model, optimizer, batches = open_ended(engine)
    x, y = next(held := iter(batches))
    F.cross_entropy(model(torch.zeros_like(x)), y).backward()
    optimizer.step()
    with refused("add the losses"):
        F.cross_entropy(model(x), y).backward()
    with refused("DP021"):
        optimizer.step()
    held.close()
    assert len(engine.accountant) == 1
