"""The usual loop with one import changed: what comes back, what is charged, what epsilon is."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import opacus
import pytest
import torch
from opacuskit import Released, data, loader, net, norm, open_ended, parts, planned, refused, train
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import dpbudget
from dptrainer import DPAdamBC
from dptrainer import opacus as facade
from dptrainer.opacus import PrivacyEngine
from dptrainer.opacus.optimizers import DPOptimizer
from dptrainer.opacus.utils.uniform_sampler import UniformWithReplacementSampler


@pytest.mark.parametrize(
    "name",
    [
        "__init__",
        "make_private",
        "make_private_with_epsilon",
        "get_epsilon",
        "is_compatible",
        "validate",
        "get_compatible_module",
        "save_checkpoint",
        "load_checkpoint",
    ],
)
def test_every_argument_of_opacus_is_there_with_its_name_kind_and_default(name: str) -> None:
    theirs = inspect.signature(getattr(opacus.PrivacyEngine, name)).parameters
    ours = inspect.signature(getattr(PrivacyEngine, name)).parameters
    for key, parameter in theirs.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        assert key in ours
        assert ours[key].kind is parameter.kind
        if parameter.default is not inspect.Parameter.empty and key != "criterion":
            assert ours[key].default == parameter.default
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in ours.values())


def test_the_same_objects_come_back_and_train_in_the_usual_loop() -> None:
    module = net()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    before = copy.deepcopy(module.state_dict())
    model, stepped, batches = planned(module=module, optimizer=optimizer)
    assert model is module
    assert stepped is optimizer
    assert isinstance(stepped, DPOptimizer)
    assert isinstance(stepped, torch.optim.Adam)
    assert isinstance(batches, DataLoader)
    assert isinstance(batches, facade.DPDataLoader)
    train(model, stepped, batches)
    assert list(model.state_dict()) == list(before)  # names unchanged: a plain model loads it
    assert not torch.equal(model[0].weight, before["0.weight"])
    nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).load_state_dict(model.state_dict())
    assert model._module is model  # where code for Opacus looks for the model inside the wrapper


def test_training_learns_within_the_target_and_stops_at_the_plan() -> None:
    engine, records, module = PrivacyEngine(), data(600), net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    model, optimizer, batches = planned(
        engine, epochs=4, module=module, optimizer=optimizer, data_loader=DataLoader(records, batch_size=50)
    )
    assert engine.get_epsilon(1e-5) == 0.0
    seen = []
    for _ in range(4):
        train(model, optimizer, batches)
        seen.append(engine.get_epsilon(1e-5))
    assert seen == sorted(seen)
    assert 2.99 < seen[-1] <= 3.0
    assert len(engine.accountant) == 4 * len(batches) == 48
    inputs, labels = records.tensors
    assert (model(inputs).argmax(1) == labels).float().mean() > 0.9
    weights = copy.deepcopy(model.state_dict())
    with refused("DP050"):
        train(model, optimizer, batches)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert engine.get_epsilon(1e-5) == seen[-1]


@pytest.mark.parametrize("rows", [600, 610, 615])
def test_the_rate_is_batch_over_size_and_not_one_over_the_number_of_batches(rows: int) -> None:
    _, optimizer, batches = planned(data_loader=loader(rows, 60))
    assert batches.sample_rate == 60 / rows
    assert len(batches) == math.ceil(rows / 60)
    assert optimizer.expected_batch_size == pytest.approx(60, rel=1e-12)


@pytest.mark.parametrize("rows", [600, 610, 639])
def test_planner_and_engine_agree_on_the_noise_to_the_last_digit(rows: int) -> None:
    _, optimizer, batches = planned(data_loader=loader(rows, 60), epochs=3)
    assert len(batches) * 3 == 3 * math.ceil(rows / 60)
    planner = facade.accountants.utils.get_noise_multiplier(
        target_epsilon=3.0, target_delta=1e-5, sample_rate=60 / rows, epochs=3
    )
    assert optimizer.noise_multiplier == planner


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")  # said by Opacus
def test_epsilon_is_close_to_that_of_opacus_for_a_plan_and_larger_where_nothing_was_planned() -> None:
    history = []
    for make in (planned, open_ended):
        engine = PrivacyEngine()
        model, optimizer, batches = make(engine)
        train(model, optimizer, batches)
        theirs = opacus.accountants.create_accountant("prv")
        theirs.history = engine.accountant.history
        history.append((engine.get_epsilon(1e-5), theirs.get_epsilon(1e-5)))
    (fixed, fixed_opacus), (free, free_opacus) = history
    assert fixed == pytest.approx(fixed_opacus, rel=0.02)
    assert free > free_opacus


def test_epsilon_at_another_delta_is_certified_for_the_steps_charged() -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = planned(engine)
    train(model, optimizer, batches)
    ((sigma, rate, steps),) = engine.accountant.history
    bare = dpbudget.epsilon_of([(rate, sigma, steps)], delta=1e-3, adjacency="zero-out").upper
    assert bare <= engine.get_epsilon(1e-3) == pytest.approx(bare, rel=0.02)
    assert engine.get_epsilon(1e-3) < engine.get_epsilon(1e-5)


def test_the_plan_is_for_zero_out_neighbours_and_the_ledger_verifies(tmp_path: Path) -> None:
    engine = PrivacyEngine(ledger=tmp_path / "run.ledger")
    model, optimizer, batches = planned(engine)
    train(model, optimizer, batches)
    assert engine.ledger is not None
    assert engine.ledger.state.genesis.adjacency == "zero-out"
    engine.ledger.close()
    owner = dpbudget.load_public_key(tmp_path / "run.ledger.owner.pub")
    report = dpbudget.verify(tmp_path / "run.ledger", trust=owner)
    assert report.ok


def test_the_assumed_budget_is_said_and_another_one_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dptrainer.opacus"):
        engine = PrivacyEngine()
        open_ended(engine)
    assert "assumed a budget of epsilon 8" in caplog.text
    assert engine.ledger is not None
    assert (engine.ledger.state.epsilon, engine.ledger.state.delta) == (8.0, 60**-1.1)
    assert engine.ledger.state.genesis.filter == "rdp"
    caplog.clear()
    engine = PrivacyEngine(budget=dpbudget.Budget(epsilon=2.0, delta=1e-4))
    open_ended(engine)
    assert "assumed" not in caplog.text
    assert engine.ledger is not None
    assert engine.ledger.state.epsilon == 2.0


def test_training_without_a_number_of_steps_ends_where_the_budget_does() -> None:
    engine = PrivacyEngine(budget=dpbudget.Budget(epsilon=3.0, delta=1e-3))
    model, optimizer, batches = open_ended(engine, noise_multiplier=1.5)

    def on_and_on() -> None:
        while True:
            train(model, optimizer, batches)

    with pytest.raises(dpbudget.DPBudgetError, match="DP050"):
        on_and_on()
    assert 2.5 < engine.get_epsilon(1e-3) <= 3.0


def test_two_models_on_one_engine_share_its_budget() -> None:
    engine = PrivacyEngine()
    first, second = open_ended(engine), open_ended(engine)
    for made in (first, second):
        train(*made)
    assert [steps for _, _, steps in engine.accountant.history] == [12, 12]
    alone = PrivacyEngine()
    train(*open_ended(alone))
    assert engine.get_epsilon(1e-4) > alone.get_epsilon(1e-4)


def test_a_second_plan_of_the_same_budget_is_refused() -> None:
    engine = PrivacyEngine()
    train(*planned(engine))
    with refused("DP052"):
        planned(engine)
    with refused("DP052"):
        open_ended(engine)


def test_a_failed_set_up_can_be_repeated() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x + x.mean(0))

    engine = PrivacyEngine()
    with refused("DP033"):
        planned(engine, module=Mixes())
    with refused("DP030"):
        planned(engine, grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss(reduction="sum"))
    train(*planned(engine))
    assert len(engine.accountant) == 12


def test_the_noisy_sum_is_divided_for_a_mean_and_left_whole_for_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = []
    for reduction in ("mean", "sum"):
        released = Released(noise=False).watch(monkeypatch)
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        module = net()
        before = module[0].weight.detach().clone()
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        # Every record is drawn, so that the batch is known.
        model, optimizer, batches = open_ended(
            module=module,
            optimizer=optimizer,
            loss_reduction=reduction,
            data_loader=loader(60, 60),
            criterion=criterion,
        )
        held = iter(batches)  # a batch is dropped with its iteration
        x, y = next(held)
        criterion(model(x), y).backward()
        optimizer.step()
        moves.append(before - model[0].weight.detach())
        divisor = 60 if reduction == "mean" else 1
        torch.testing.assert_close(moves[-1], released.sums[0]["0.weight"] / divisor, rtol=1e-4, atol=1e-6)
        monkeypatch.undo()
    torch.testing.assert_close(moves[0] * 60, moves[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", 5.0), ("sum", 1.0)])
def test_adam_is_told_the_noise_that_is_in_the_gradients_it_gets(reduction: str, divisor: float) -> None:
    module = nn.Linear(4000, 2)  # so many elements that the spread of the noise shows
    optimizer = DPAdamBC(module.parameters(), lr=1e-3)
    model, optimizer, batches = open_ended(
        module=module,
        optimizer=optimizer,
        loss_reduction=reduction,
        data_loader=DataLoader(data(60, 4000), batch_size=5),
        max_grad_norm=0.5,
    )
    told: list[float] = []
    spread: list[float] = []
    optimizer.register_step_pre_hook(lambda given, *_: told.append(given._noise))
    optimizer.register_step_post_hook(lambda *_: spread.append(float(module.weight.grad.std())))
    train(model, optimizer, batches, nn.CrossEntropyLoss(reduction=reduction))
    assert told == pytest.approx([4.0 * 0.5 / divisor] * 12)
    assert spread == pytest.approx(told, rel=0.05)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_clipped_sum_is_that_of_the_gradients_opacus_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    images = torch.utils.data.TensorDataset(torch.randn(12, 1, 8, 8), torch.arange(12) % 4)
    theirs = opacus.GradSampleModule(copy.deepcopy(module))
    nn.CrossEntropyLoss()(theirs(images.tensors[0]), images.tensors[1]).backward()
    rows = {name.removeprefix("_module."): p.grad_sample for name, p in theirs.named_parameters()}
    norms = sum(r.flatten(1).double().square().sum(1) for r in rows.values()).sqrt()
    limit = float(norms.median())
    expected = {
        name: torch.einsum("b,b...->...", (limit / norms).clamp(max=1.0), r.double()) for name, r in rows.items()
    }
    released = Released().watch(monkeypatch)
    model, optimizer, batches = open_ended(
        module=module, data_loader=DataLoader(images, batch_size=12), max_grad_norm=limit, noise_multiplier=20.0
    )
    held = iter(batches)  # a batch is dropped with its iteration
    x, y = next(held)
    nn.CrossEntropyLoss()(model(x), y).backward()
    optimizer.step()
    for name, value in expected.items():
        torch.testing.assert_close(released.sums[0][name].double(), value, rtol=1e-3, atol=1e-4 * norm(expected))


def test_ghost_mode_returns_four_and_its_loss_is_an_ordinary_tensor() -> None:
    criterion = nn.CrossEntropyLoss()
    model, optimizer, private_criterion, batches = open_ended(grad_sample_mode="ghost", criterion=criterion)
    held = iter(batches)  # a batch is dropped with its iteration
    x, y = next(held)
    assert private_criterion(model(x), y).item() == pytest.approx(criterion(model(x), y).item(), rel=1e-5)
    train(model, optimizer, batches, private_criterion)
    _, _, on_sequences, _ = open_ended(grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss(ignore_index=0))
    logits, target = torch.randn(4, 5, 7), torch.randint(0, 7, (4, 5))
    flat = on_sequences(logits.reshape(20, 7), target.reshape(20), shape=(4, 5, 7))
    each = [nn.functional.cross_entropy(logits[i], target[i], ignore_index=0) for i in range(4)]
    torch.testing.assert_close(flat, torch.stack(each).mean())


def test_without_wrapping_a_handle_cleans_up_and_the_model_is_ordinary_again() -> None:
    module, optimizer = net(), None
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    handle, returned, batches = open_ended(module=module, optimizer=optimizer, wrap_model=False)
    assert returned is optimizer
    train(module, optimizer, batches)
    handle.cleanup()
    assert type(optimizer) is torch.optim.SGD
    assert not hasattr(module, "_module")
    train(module, optimizer, loader())  # public data: no guard is left


def test_a_learning_rate_schedule_made_before_or_after_works() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    early = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, batches = open_ended(module=module, optimizer=optimizer)
    late = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, batches)
    early.step()
    late.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_copies_and_pickles_of_model_and_optimizer_are_plain() -> None:
    model, optimizer, batches = open_ended()
    train(model, optimizer, batches)
    twin, stepper = copy.deepcopy((model, optimizer))
    assert type(stepper) is torch.optim.SGD
    assert type(pickle.loads(pickle.dumps(optimizer))) is torch.optim.SGD
    assert torch.equal(pickle.loads(pickle.dumps(model))[0].weight, model[0].weight)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), loader())


def test_what_users_read_off_the_optimizer_is_there_and_what_the_plan_fixed_cannot_be_set() -> None:
    _, optimizer, _ = open_ended()
    assert optimizer.original_optimizer is optimizer
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm, optimizer.loss_reduction) == (4.0, 1.0, "mean")
    assert optimizer.accumulated_iterations == 1
    assert len(optimizer.params) == 4
    for name in ("noise_multiplier", "max_grad_norm"):
        with refused("DP065"):
            setattr(optimizer, name, 0.1)
    with refused("DP065"):
        optimizer.signal_skip_step()


def test_a_step_hook_runs_once_a_step_and_may_count_in_an_accountant_of_ones_own() -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = planned(engine)
    mine = facade.accountants.PRVAccountant()
    optimizer.attach_step_hook(mine.get_optimizer_hook_fn(sample_rate=5 / 60))
    train(model, optimizer, batches)
    assert len(mine) == 12
    assert mine.get_epsilon(1e-5) == pytest.approx(engine.get_epsilon(1e-5), rel=0.1)


def test_a_loader_with_a_batch_sampler_or_of_an_earlier_engine_is_taken() -> None:
    sampled = DataLoader(data(), batch_sampler=BatchSampler(RandomSampler(range(60)), 20, False))
    _, _, batches = open_ended(data_loader=sampled)
    assert (batches.sample_rate, len(batches)) == (20 / 60, 3)
    _, _, again = open_ended(data_loader=batches)
    assert (again.sample_rate, len(again)) == (20 / 60, 3)
    poisson = facade.DPDataLoader(data(), sample_rate=0.0417)
    _, optimizer, drawn = open_ended(data_loader=poisson)
    assert (drawn.sample_rate, len(drawn)) == (0.0417, 24)
    assert optimizer.expected_batch_size == pytest.approx(0.0417 * 60)
    by_hand = UniformWithReplacementSampler(num_samples=60, sample_rate=0.25)
    _, _, drawn = open_ended(data_loader=DataLoader(data(), batch_sampler=by_hand))
    assert (drawn.sample_rate, len(drawn)) == (0.25, 4)


def test_an_empty_batch_is_a_step_of_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    released = Released().watch(monkeypatch)
    model, optimizer, batches = open_ended(data_loader=loader(60, 1))
    train(model, optimizer, batches)
    empty = [norm(total) == 0.0 for total in released.sums]
    assert any(empty)  # 60 draws of one expected record: none empty has probability 1e-12
    assert all(moved > 0.0 for moved in released.moved)


def test_another_model_trains_through_a_private_one_between_its_batches() -> None:
    model, optimizer, batches = open_ended()
    generator = nn.Linear(3, 6)
    own = torch.optim.SGD(generator.parameters(), lr=0.1)
    before = generator.weight.detach().clone()
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        stepped = model[0].weight.detach().clone()
        own.zero_grad()
        model(generator(torch.ones(4, 3))).sum().backward()
        own.step()
        assert torch.equal(model[0].weight, stepped)
    assert not torch.equal(before, generator.weight)


def test_the_name_of_a_resumed_ledger_counts_before_anything_is_made_private(tmp_path: Path) -> None:
    place = tmp_path / "run.ledger"
    engine = PrivacyEngine(ledger=place)
    train(*planned(engine))
    spent = engine.get_epsilon(1e-5)
    assert engine.ledger is not None
    engine.ledger.close()
    later: Any = PrivacyEngine(ledger=place)
    assert later.get_epsilon(1e-5) == pytest.approx(spent, rel=0.05)
    model, optimizer, batches = planned(later)
    train(model, optimizer, batches)
    with refused("DP050"):
        train(model, optimizer, batches)
    assert 2.99 < later.get_epsilon(1e-5) <= 3.0
    later.ledger.close()


def test_parts_of_the_loop_that_opacus_examples_touch_exist() -> None:
    made = parts()
    engine = PrivacyEngine(secure_mode=True)
    assert engine.secure_mode
    assert engine.is_compatible(**{key: made[key] for key in ("module", "optimizer", "data_loader")})
    assert engine.accountant.mechanism() == "prv"
    assert len(engine.accountant) == 0
    assert PrivacyEngine(accountant="rdp").accountant.mechanism() == "rdp"
