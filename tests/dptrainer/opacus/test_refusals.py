"""Options that cannot be kept with a guarantee, and set-ups that cannot be private: refused, with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opacuskit import data, loader, net, open_ended, parts, planned, refused
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, SubsetRandomSampler, WeightedRandomSampler

from dptrainer.opacus import DPDataLoader, PrivacyEngine, accountants, schedulers
from dptrainer.opacus.optimizers import DPOptimizer


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ({"batch_first": False}, "DP065"),
        ({"clipping": "per_layer"}, "DP065"),
        ({"clipping": "adaptive"}, "DP065"),
        ({"noise_generator": torch.Generator()}, "DP065"),
        ({"grad_sample_mode": "no_op"}, "DP065"),
        ({"grad_sample_mode": "ghost_fsdp"}, "DP065"),
        ({"max_grad_norm": [1.0, 1.0]}, "DP065"),
        ({"max_grad_norm": 0.0}, "DP007"),
        ({"max_grad_norm": "1"}, "DP007"),
        ({"loss_reduction": "median"}, "DP030"),
        ({"noise_multiplier": 0.0}, "DP006"),
        ({"noise_multiplier": -1.0}, "DP005"),
        ({"noise_multiplier": 0.02}, "DP05"),
    ],
)
def test_an_option_that_cannot_be_kept_is_refused(option: dict[str, Any], code: str) -> None:
    engine = PrivacyEngine()
    with refused(code) as caught:
        open_ended(engine, **option)
    assert caught.value.hint
    assert len(engine.accountant) == 0


def test_a_misspelt_mode_names_the_nearest() -> None:
    with refused("DP065") as caught:
        open_ended(grad_sample_mode="ghosts")
    assert "did you mean ghost?" in caught.value.hint


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_modes_of_opacus_name_one_engine(mode: str) -> None:
    assert len(open_ended(grad_sample_mode=mode)) == 3


@pytest.mark.parametrize("epochs", [0, -3, 1.5, True])
def test_epochs_are_a_positive_whole_number(epochs: Any) -> None:
    with refused("DP009"):
        planned(epochs=epochs)


@pytest.mark.parametrize(("target", "code"), [("target_epsilon", "DP001"), ("target_delta", "DP002")])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "3"])
def test_targets_are_checked(target: str, code: str, value: Any) -> None:
    with refused(code):
        planned(**{target: value})


@pytest.mark.parametrize("name", ["gdp", "renyi", "PRV", None])
def test_an_accountant_that_may_understate_or_is_unknown_is_refused(name: Any) -> None:
    with refused("DP061") as caught:
        PrivacyEngine(accountant=name)
    assert "prv" in caught.value.hint
    with refused("DP061"):
        accountants.create_accountant(name)


def test_an_accountant_that_understates_cannot_be_made_by_hand() -> None:
    with refused("DP061"):
        accountants.GaussianAccountant()


class Every(Sampler[int]):
    def __iter__(self) -> Any:
        return iter(range(60))

    def __len__(self) -> int:
        return 60


@pytest.mark.parametrize("sampler", [WeightedRandomSampler([1.0] * 60, 60), SubsetRandomSampler([1, 2]), Every()])
@pytest.mark.parametrize("as_batches", [False, True])
def test_weights_and_choices_are_refused_and_not_replaced(sampler: Any, as_batches: bool) -> None:
    given = (
        DataLoader(data(), batch_sampler=torch.utils.data.BatchSampler(sampler, 5, False))
        if as_batches
        else DataLoader(data(), batch_size=5, sampler=sampler)
    )
    with refused("DP022"):
        open_ended(data_loader=given)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(data())


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (DataLoader(Stream(), batch_size=5), "DP024"),
        (DataLoader(data(), batch_size=None), "DP009"),
        (DataLoader(data(4), batch_size=5, drop_last=True), "DP009"),
        ([1, 2], "DP024"),
    ],
)
def test_a_loader_without_indices_or_batches_is_refused(given: Any, code: str) -> None:
    with refused(code):
        open_ended(data_loader=given)


def test_a_batch_larger_than_the_data_draws_every_record() -> None:
    _, optimizer, batches = open_ended(data_loader=loader(12, 100))
    assert (batches.sample_rate, len(batches), optimizer.expected_batch_size) == (1.0, 1, 12.0)


def test_a_private_loader_that_no_engine_bound_draws_nothing() -> None:
    with refused("DP021"):
        next(iter(DPDataLoader(data(), sample_rate=0.1)))
    _, _, batches = open_ended()
    with refused("DP021"):
        next(iter(batches.batch_sampler))
    for option in ({"distributed": True}, {"generator": torch.Generator()}, {"batch_first": False}):
        with refused("DP065"):
            DPDataLoader(data(), sample_rate=0.1, **option)  # type: ignore[arg-type]
    with refused("DP008"):
        DPDataLoader(data(), sample_rate=1.5)


def test_an_optimizer_of_another_model_or_in_another_form_is_refused() -> None:
    with refused("DP011"):
        open_ended(optimizer=torch.optim.SGD(net(seed=1).parameters(), lr=0.1))
    module = net()
    with refused("DP017"):
        open_ended(module=module, optimizer=torch.optim.LBFGS(module.parameters()))
    with refused("DP065"):
        DPOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0)


def test_validation_says_what_opacus_says_and_checks_the_rest_too() -> None:
    engine = PrivacyEngine()
    made = parts()
    norms = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    assert not engine.is_compatible(module=norms, optimizer=None, data_loader=None)
    with pytest.raises(ValueError, match="DP010"):
        engine.validate(module=norms, optimizer=None, data_loader=None)
    weighted = DataLoader(data(), batch_size=5, sampler=WeightedRandomSampler([1.0] * 60, 60))
    assert not engine.is_compatible(module=made["module"], optimizer=None, data_loader=weighted)
    with refused("DP014"):
        open_ended(module=net().eval())


def test_several_processes_are_not_this_facades_matter() -> None:
    module = net()
    with refused("DP065"):
        open_ended(module=nn.DataParallel(module), optimizer=torch.optim.SGD(module.parameters(), lr=0.1))


@pytest.mark.parametrize("name", schedulers.__all__)
def test_schedules_of_noise_and_norm_are_refused(name: str) -> None:
    with refused("DP065"):
        getattr(schedulers, name)(None, gamma=0.9)


def test_a_step_cannot_be_added_to_the_ledger_or_taken_from_it() -> None:
    engine = PrivacyEngine()
    with refused("DP065"):
        engine.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(AttributeError):
        engine.accountant.history = []  # type: ignore[misc]


def test_a_criterion_that_sums_where_a_mean_was_declared_is_refused() -> None:
    criterion = nn.CrossEntropyLoss(reduction="sum")
    for mode in ("hooks", "ghost"):
        with refused("DP030"):
            open_ended(criterion=criterion, grad_sample_mode=mode)
        open_ended(criterion=criterion, grad_sample_mode=mode, loss_reduction="sum")


def test_a_checkpoint_has_no_schedule_of_noise() -> None:
    engine = PrivacyEngine()
    model, _, _ = open_ended(engine)
    with refused("DP065"):
        engine.save_checkpoint(path="unused", module=model, noise_scheduler=object())  # type: ignore[arg-type]
    with refused("DP065"):
        engine.load_checkpoint(path="unused", module=model, grad_clip_scheduler=object())  # type: ignore[arg-type]
