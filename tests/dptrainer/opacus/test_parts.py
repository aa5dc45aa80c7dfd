"""Opacus's parts: physical batches, per-example gradients, grad samplers, validators, accountants."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import opacus
import opacus.accountants.utils
import pytest
import torch
import torch.nn.functional as F
from opacus.utils.batch_memory_manager import BatchMemoryManager as TheirManager
from opacuskit import Released, loader, net, norm, open_ended, refused, train
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpbudget
from dptrainer.clipping.rules import _RULES
from dptrainer.opacus import GradSampleModule, PrivacyEngine, _validation, accountants, layers
from dptrainer.opacus.accountants.utils import get_noise_multiplier
from dptrainer.opacus.grad_sample import register_grad_sampler, register_norm_sampler
from dptrainer.opacus.utils.batch_memory_manager import BatchMemoryManager
from dptrainer.opacus.validators import ModuleValidator, register_module_fixer, register_module_validator
from dptrainer.opacus.validators.errors import ShouldReplaceModuleError, UnsupportedModuleError

# --------------------------------------------------------------------------------------- physical batches


def test_pieces_add_up_to_the_step_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    released = Released(noise=False).watch(monkeypatch)
    weights = []
    for size in (60, 7):
        engine = PrivacyEngine()
        model, optimizer, batches = open_ended(engine, data_loader=loader(60, 60))
        with BatchMemoryManager(data_loader=batches, max_physical_batch_size=size, optimizer=optimizer) as pieces:
            rows = []
            for x, y in pieces:
                rows.append(len(x))
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                assert optimizer._check_skip_next_step(pop_next=False) == (sum(rows) < 60)
                before = model[0].weight.detach().clone()
                optimizer.step()
                assert torch.equal(before, model[0].weight) == optimizer._is_last_step_skipped == (sum(rows) < 60)
        assert max(rows) <= size
        assert len(engine.accountant) == 1
        weights.append(model[0].weight.detach().clone())
    assert len(released.sums) == 2
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    ours, theirs = (set(inspect.signature(kind).parameters) for kind in (BatchMemoryManager, TheirManager))
    assert ours == theirs


def test_the_memory_manager_takes_private_parts_only() -> None:
    _, optimizer, batches = open_ended()
    with refused("DP021"):
        BatchMemoryManager(data_loader=loader(), max_physical_batch_size=4, optimizer=optimizer)
    with refused("DP032"):
        BatchMemoryManager(
            data_loader=batches, max_physical_batch_size=4, optimizer=torch.optim.SGD(net().parameters(), lr=0.1)
        )
    with refused("DP009"):
        BatchMemoryManager(data_loader=batches, max_physical_batch_size=0, optimizer=optimizer)


def test_a_schedule_within_a_batch_is_refused() -> None:
    _, optimizer, batches = open_ended(data_loader=loader(60, 60))
    model = batches._private._loop._model  # type: ignore[union-attr]
    with (
        refused("DP034"),
        BatchMemoryManager(data_loader=batches, max_physical_batch_size=7, optimizer=optimizer) as pieces,
    ):
        for x, y in pieces:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9


# --------------------------------------------------------------------------------------- per-example gradients


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 4))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_per_example_gradients_are_those_of_opacus(reduction: str) -> None:
    x, y = torch.randn(5, 1, 8, 8), torch.arange(5) % 4
    found = []
    for kind in (GradSampleModule, opacus.GradSampleModule):
        module = kind(convolutional(), loss_reduction=reduction)
        F.cross_entropy(module(x), y, reduction=reduction).backward()
        found.append({name: (p.grad_sample, p.grad) for name, p in module.named_parameters()})
    assert list(found[0]) == list(found[1])
    for name, (rows, whole) in found[0].items():
        torch.testing.assert_close(rows, found[1][name][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole, found[1][name][1], rtol=1e-4, atol=1e-5)


def test_per_example_gradients_of_any_layer_are_those_of_single_examples() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x * self.scale).sin())  # type: ignore[no-any-return]

    x, y = torch.randn(6, 4), torch.arange(6) % 2
    model = Odd()
    wrapped = GradSampleModule(copy.deepcopy(model))
    F.cross_entropy(wrapped(x), y).backward()
    for index in range(6):
        model.zero_grad()
        F.cross_entropy(model(x[index : index + 1]), y[index : index + 1]).backward()
        for name, parameter in model.named_parameters():
            rows: Any = wrapped.get_parameter(f"_module.{name}").grad_sample  # type: ignore[attr-defined]
            torch.testing.assert_close(rows[index], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_grad_sample_module_can_be_looked_through_and_taken_off() -> None:
    model = net()
    wrapped = GradSampleModule(model)
    F.cross_entropy(wrapped(torch.randn(4, 6)), torch.arange(4) % 2).backward()
    wrapped.zero_grad()
    assert model[0].weight.grad_sample is None
    assert list(wrapped.state_dict()) == [f"_module.{name}" for name in model.state_dict()]
    F.cross_entropy(wrapped(torch.randn(4, 6)), torch.arange(4) % 2).backward()
    assert wrapped.to_standard_module() is model
    assert not hasattr(model[0].weight, "grad_sample")
    with torch.no_grad():
        assert torch.equal(wrapped(torch.ones(1, 6)), model(torch.ones(1, 6)))
    train(*open_ended(module=GradSampleModule(net())))
    with pytest.raises(UnsupportedModuleError, match="DP010"):
        GradSampleModule(nn.BatchNorm1d(3))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((6,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_grad_sampler_of_opacus_serves_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dptrainer.clipping.rules._RULES", dict(_RULES))
    calls = []

    @register_grad_sampler(Scaled)
    def _(layer: Scaled, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        calls.append(len(activations))
        return {layer.factor: activations[0] * backprops}

    @register_norm_sampler(Scaled)
    def _(layer: Scaled, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        raise AssertionError("norms are taken from the gradients")

    torch.manual_seed(0)
    model = nn.Sequential(Scaled(), nn.Linear(6, 2))
    x, y = torch.randn(4, 6), torch.arange(4) % 2
    wrapped = GradSampleModule(copy.deepcopy(model))
    F.cross_entropy(wrapped(x), y).backward()
    assert calls
    for index in range(4):
        model.zero_grad()
        F.cross_entropy(model(x[index : index + 1]), y[index : index + 1]).backward()
        rows: Any = wrapped.get_parameter("_module.0.factor").grad_sample  # type: ignore[attr-defined]
        torch.testing.assert_close(rows[index], model[0].factor.grad)


def test_a_grad_sampler_that_leaves_a_parameter_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dptrainer.clipping.rules._RULES", dict(_RULES))

    @register_grad_sampler([Scaled])
    def _(layer: Scaled, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        return {}

    with refused("DP019"):
        train(*open_ended(module=nn.Sequential(Scaled(), nn.Linear(6, 2))))


# --------------------------------------------------------------------------------------- validators and layers


def test_the_validator_returns_what_it_finds_and_raises_when_strict() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    (error,) = ModuleValidator.validate(model, strict=False)
    assert isinstance(error, ShouldReplaceModuleError)
    assert error.code == "DP010"
    with pytest.raises(UnsupportedModuleError) as caught:
        ModuleValidator.validate(model.eval(), strict=True)
    assert caught.value.errors
    assert ModuleValidator.is_valid(net())


def test_recurrent_layers_and_attention_need_no_replacement() -> None:
    for layer in (nn.LSTM(3, 4, batch_first=True), nn.GRU(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)):
        assert ModuleValidator.is_valid(layer)
        assert type(ModuleValidator.fix(layer)) is type(layer)
    assert (layers.DPLSTM, layers.DPGRU, layers.DPRNN) == (nn.LSTM, nn.GRU, nn.RNN)


def test_fix_leaves_the_original_alone_and_uses_registered_fixers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModuleValidator, "FIXERS", {})
    monkeypatch.setattr(ModuleValidator, "VALIDATORS", {})

    @register_module_fixer(nn.BatchNorm1d)
    def _(layer: nn.BatchNorm1d) -> nn.Module:
        return nn.LayerNorm(layer.num_features)

    @register_module_validator([nn.Tanh])
    def _(layer: nn.Tanh) -> list[UnsupportedModuleError]:
        return [UnsupportedModuleError("no tanh here", code="DP019")]

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(nn.BatchNorm1d(8)), nn.Linear(8, 2))
    fixed = PrivacyEngine.get_compatible_module(model)
    assert type(fixed[1]) is type(fixed[2][0]) is nn.LayerNorm  # type: ignore[index]
    assert type(model[1]) is nn.BatchNorm1d
    with pytest.raises(UnsupportedModuleError, match="no tanh"):
        ModuleValidator.fix_and_validate(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))


def test_fix_is_that_of_dptrainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_validation, "fix", lambda model: nn.Identity())
    assert type(ModuleValidator.fix(nn.BatchNorm1d(4))) is nn.Identity


# --------------------------------------------------------------------------------------- accountants


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")  # said by Opacus
@pytest.mark.parametrize("name", ["prv", "rdp"])
def test_the_noise_for_a_budget_is_near_that_of_opacus_and_never_below_the_certified_one(name: str) -> None:
    question = {"target_epsilon": 3.0, "target_delta": 1e-5, "sample_rate": 256 / 60000, "epochs": 10}
    ours = get_noise_multiplier(**question, accountant=name)  # type: ignore[arg-type]
    theirs = opacus.accountants.utils.get_noise_multiplier(**question, accountant=name)
    assert ours == pytest.approx(theirs, rel=5e-3)
    spent = dpbudget.epsilon_of([(256 / 60000, ours, 2350)], delta=1e-5, adjacency="zero-out", accountant=name)
    assert spent.upper <= 3.0


def test_noise_questions_without_an_answer_end_at_once() -> None:
    base: dict[str, Any] = {"target_epsilon": 3.0, "target_delta": 1e-5, "sample_rate": 0.01, "epochs": 10}
    for change, code in (
        ({"epochs": 0}, "DP009"),
        ({"epochs": -3}, "DP009"),
        ({"target_epsilon": float("nan")}, "DP001"),
        ({"sample_rate": 256.0}, "DP008"),
        ({"accountant": "gdp"}, "DP061"),
        ({"steps": 5}, "DP064"),
        ({"epochs": None}, "DP064"),
        ({"epsilon_tolerance": 0.0}, "DP009"),
        ({"tolerance": 1}, "DP060"),
    ):
        with refused(code):
            get_noise_multiplier(**{**base, **change})


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")  # said by Opacus
@pytest.mark.parametrize("name", ["prv", "rdp"])
def test_an_accountant_counts_steps_and_answers_as_opacus_does(name: str) -> None:
    ours, theirs = accountants.create_accountant(name), opacus.accountants.create_accountant(name)
    assert ours.get_epsilon(1e-5) == 0.0
    for sigma, rate in [(1.0, 0.01)] * 40 + [(2.0, 0.01)] * 10:
        ours.step(noise_multiplier=sigma, sample_rate=rate)
        theirs.step(noise_multiplier=sigma, sample_rate=rate)
    assert ours.history == theirs.history
    assert len(ours) == 50  # steps; Opacus counts entries of the history
    assert ours.get_epsilon(1e-5) == pytest.approx(theirs.get_epsilon(1e-5), rel=0.05)
    again = accountants.create_accountant("prv" if name == "rdp" else "rdp")
    again.load_state_dict(ours.state_dict())
    assert len(again) == 50
    with refused("DP091"):
        again.load_state_dict({})


def test_the_norm_of_one_example_is_bounded_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    released = Released().watch(monkeypatch)
    model, optimizer, batches = open_ended(data_loader=loader(1, 1), max_grad_norm=1e-2)
    with BatchMemoryManager(data_loader=batches, max_physical_batch_size=3, optimizer=optimizer) as pieces:
        assert isinstance(pieces, DataLoader)
        train(model, optimizer, pieces)
    assert 0.0 < norm(released.sums[0]) <= 1e-2
