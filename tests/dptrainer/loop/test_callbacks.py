"""Logs for trackers: public numbers alone, at times that are steps; what is more stands under a name that says so."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dptrainer
from dpbudget.curve import Bounds
from dpbudget.errors import InvalidParameter, MissingExtra, PrivacyViolation
from dpbudget.ledger.run import Run
from dpbudget.meter import Meter
from dptrainer.callbacks import MetricLog, MLflowLog, TensorBoardLog, WandbLog
from dptrainer.private import make_private
from dptrainer.trainer import PrivateTrainer
from dptrainer.tree import TreeTrainer
from tests.dptrainer.loop.loopkit import linear_data, linear_model, make_run

PUBLIC = {"privacy/steps_charged", "privacy/epsilon", "learning_rate"}


class ListLog(MetricLog):
    """Keeps what it is given."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.written: list[tuple[int, dict[str, float]]] = []
        self.told: list[dict[str, Any]] = []

    def _write_facts(self, facts: Mapping[str, Any]) -> None:
        self.told.append(dict(facts))

    def _write(self, values: Mapping[str, float], step: int) -> None:
        self.written.append((step, dict(values)))


def metered(steps: int = 4, **more: Any) -> Run:
    run = make_run(steps, **more)
    count = tuple(range(1, steps + 1))
    run.meter = Meter(count, tuple(Bounds(0.0, number / steps) for number in count), delta=5e-7, target=1.0)
    return run


def trained(run: Run, log: Callable[..., MetricLog], seed: int = 0, **more: Any) -> Any:
    """A short training with the log as its callback; the log."""
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    made = log(run, optimizer, **more)
    PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), linear_data(seed=seed), run, callbacks=[made]).fit()
    return made


class TestWhatIsWritten:
    def test_steps_epsilon_and_learning_rate_and_nothing_else(self) -> None:
        log = trained(metered(), ListLog)
        assert [step for step, _ in log.written] == [1, 2, 3, 4]
        assert all(set(values) == PUBLIC for _, values in log.written)
        assert [values["privacy/epsilon"] for _, values in log.written] == [0.25, 0.5, 0.75, 1.0]
        assert {values["learning_rate"] for _, values in log.written} == {0.25}

    def test_it_does_not_depend_on_the_data(self) -> None:
        one, other = (trained(metered(), ListLog, seed=seed) for seed in (0, 7))
        assert one.written == other.written
        for name in ("run",):  # what is random and public
            one.told[0].pop(name), other.told[0].pop(name)
        assert one.told == other.told

    def test_the_facts_of_the_plan_are_written_once(self) -> None:
        run = metered()
        (facts,) = trained(run, ListLog).told
        assert (facts["run"], facts["claimed_epsilon"], facts["planned_steps"]) == (run.run_id, 1.0, 4)
        assert facts["phases"] == "4 steps at rate 0.5, noise multiplier 1"
        assert "releases_not_covered_by_the_claim" not in facts

    def test_every_nth_step_and_the_last_of_the_plan_are_written(self) -> None:
        log = trained(metered(7), ListLog, every=3)
        assert [step for step, _ in log.written] == [3, 6, 7]

    def test_a_run_without_a_meter_has_no_epsilon_to_write(self) -> None:
        log = trained(make_run(), ListLog)
        assert all("privacy/epsilon" not in values for _, values in log.written)

    def test_after_a_resume_steps_go_on_where_they_were(self) -> None:
        run = metered(5)
        model, data = linear_model(), linear_data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first = ListLog(run)
        stop = [first, lambda steps, epsilon: steps < 2]
        PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), data, run, callbacks=stop).fit()
        second = ListLog(run)
        PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), data, run, callbacks=[second]).fit()
        assert [step for step, _ in first.written + second.written] == [1, 2, 3, 4, 5]

    def test_a_schedule_and_several_groups_show_in_the_learning_rates(self) -> None:
        run, model = metered(3), linear_model()
        optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.5}])
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        log = ListLog(run, optimizer)
        callbacks = [log, lambda steps, epsilon: schedule.step()]
        PrivateTrainer(model, optimizer, nn.CrossEntropyLoss(), linear_data(), run, callbacks=callbacks).fit()
        assert [values["learning_rate"] for _, values in log.written] == [1.0, 0.5, 0.25]
        assert [values["learning_rate/1"] for _, values in log.written] == [0.5, 0.25, 0.125]

    def test_the_tree_trainer_and_a_loop_of_ones_own_call_it_too(self) -> None:
        run = make_run(2, rate=1.0)
        model = linear_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        log = ListLog(run, optimizer)
        data, loss_fn = linear_data(), nn.CrossEntropyLoss()
        TreeTrainer(model, optimizer, loss_fn, data, run, steps_per_pass=4, callbacks=[log]).fit()
        assert [step for step, _ in log.written] == list(range(1, 9))
        run = metered(3)
        model, optimizer, loader = make_private(model, optimizer, data, run=run, loss_fn=loss_fn)
        log = ListLog(run, optimizer)
        for steps, (x, y) in enumerate(loader, start=1):
            loss_fn(model(x), y).backward()
            optimizer.step()
            log(steps, loader.epsilon)
        assert [(step, values["privacy/epsilon"]) for step, values in log.written] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0)]


class TestWhatIsNotCovered:
    def test_it_is_written_under_a_name_that_says_so_and_named_in_the_facts(self) -> None:
        numbers = iter([3.0, 2.0, 1.5, 1.25])
        log = trained(metered(), ListLog, uncovered_release={"loss": lambda: next(numbers)})
        assert [values["uncovered_release/loss"] for _, values in log.written] == [3.0, 2.0, 1.5, 1.25]
        assert all(set(values) == PUBLIC | {"uncovered_release/loss"} for _, values in log.written)
        assert log.told[0]["releases_not_covered_by_the_claim"] == "loss"

    def test_a_tensor_of_a_loss_is_taken_as_its_number(self) -> None:
        weight = torch.ones(1, requires_grad=True)
        kept = (weight * 3.0).sum()  # made where gradients are on
        log = trained(
            metered(2), ListLog, uncovered_release={"kept": lambda: kept, "made": lambda: (weight * 2.0).sum()}
        )
        assert log.written[0][1]["uncovered_release/kept"] == 3.0
        assert log.written[0][1]["uncovered_release/made"] == 2.0

    def test_steps_that_are_not_written_do_not_ask_for_it(self) -> None:
        asked: list[int] = []
        trained(metered(6), ListLog, every=4, uncovered_release={"loss": lambda: asked.append(1) or 0.0})
        assert len(asked) == 2

    @pytest.mark.parametrize(
        ("settings", "code"),
        [({"every": 0}, "DP009"), ({"every": 2.0}, "DP009"), ({"uncovered_release": {"a": 1.0}}, "DP060")],
    )
    def test_settings_of_another_kind_are_refused(self, settings: dict[str, Any], code: str) -> None:
        with pytest.raises(InvalidParameter) as caught:
            ListLog(make_run(), **settings)
        assert caught.value.code == code

    def test_something_else_than_a_run_is_refused(self) -> None:
        with pytest.raises(PrivacyViolation, match="not a run"):
            ListLog("run")


class FakeWriter:
    def __init__(self, folder: str = "") -> None:
        self.folder, self.scalars, self.texts, self.closed = folder, list[Any](), list[Any](), 0

    def add_scalar(self, name: str, value: float, step: int, walltime: float) -> None:
        self.scalars.append((name, value, step, walltime))

    def add_text(self, name: str, text: str, step: int, walltime: float) -> None:
        self.texts.append((name, text, step, walltime))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


class TestTensorBoard:
    def test_times_are_steps_since_a_time_follows_the_batch_that_was_drawn(self) -> None:
        writer = FakeWriter()
        log = trained(metered(), lambda run, optimizer: TensorBoardLog(writer, run, optimizer))
        log.close()
        assert writer.closed == 0  # it is not ours
        assert {name for name, *_ in writer.scalars} == PUBLIC
        assert all(time == step for *_, step, time in writer.scalars)
        ((name, text, step, time),) = writer.texts
        assert (name, step, time) == ("privacy", 0, 0.0)
        assert "| claimed_epsilon | 1.0 |" in text

    def test_a_folder_is_written_that_tensorboard_reads(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with trained(metered(), lambda run, optimizer: TensorBoardLog(tmp_path / "runs", run, optimizer)):
            pass
        events = EventAccumulator(str(tmp_path / "runs"))
        events.Reload()
        assert set(events.Tags()["scalars"]) == PUBLIC
        epsilons = events.Scalars("privacy/epsilon")
        assert [(event.step, event.value, event.wall_time) for event in epsilons] == [
            (step, step / 4, float(step)) for step in range(1, 5)
        ]

    def test_without_tensorboard_the_package_is_named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(MissingExtra, match="tensorboard") as caught:
            TensorBoardLog(tmp_path, make_run())
        assert (caught.value.code, caught.value.hint) == ("DP090", "pip install tensorboard")


class FakeWandbRun:
    def __init__(self) -> None:
        self.logged, self.facts = list[Any](), dict[str, Any]()
        self.config = self

    def update(self, facts: dict[str, Any], allow_val_change: bool) -> None:
        assert allow_val_change  # a run that is resumed states its facts again
        self.facts.update(facts)

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


class TestWandb:
    @pytest.fixture
    def module(self, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
        module = types.ModuleType("wandb")
        module.run = None  # type: ignore[attr-defined]  # a stand-in
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    def test_the_active_run_or_the_one_that_is_given_gets_the_numbers(self, module: Any) -> None:
        module.run, given = FakeWandbRun(), FakeWandbRun()
        trained(metered(), WandbLog)
        trained(metered(), lambda run, optimizer: WandbLog(run, optimizer, to=given))
        for to in (module.run, given):
            assert [step for step, _ in to.logged] == [1, 2, 3, 4]
            assert all(set(values) == PUBLIC for _, values in to.logged)
            assert to.facts["privacy"]["planned_steps"] == 4

    def test_without_an_active_run_it_says_how_to_begin_one(self, module: Any) -> None:
        with pytest.raises(InvalidParameter, match="no run of wandb") as caught:
            WandbLog(make_run())
        assert "wandb.init()" in caught.value.hint

    def test_without_the_package_it_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(MissingExtra, match="pip install wandb"):
            WandbLog(make_run())


class FakeMlflow(types.ModuleType):
    """As much of MLflow as is used."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.params, self.metrics, self.active = list[Any](), list[Any](), list[str]()

    def active_run(self) -> Any:
        info = types.SimpleNamespace(run_id=self.active[0]) if self.active else None
        return None if info is None else types.SimpleNamespace(info=info)

    def MlflowClient(self) -> Any:
        return self

    def log_param(self, run_id: str, name: str, value: Any) -> None:
        self.params.append((run_id, name, value))

    def log_metric(self, run_id: str, name: str, value: float, timestamp: int, step: int) -> None:
        self.metrics.append((run_id, name, value, timestamp, step))


class TestMlflow:
    @pytest.fixture
    def module(self, monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
        module = FakeMlflow()
        monkeypatch.setitem(sys.modules, "mlflow", module)
        return module

    @pytest.mark.parametrize("given", [None, "r7"])
    def test_the_active_run_or_the_one_that_is_named_gets_numbers_at_times_that_are_steps(
        self, module: FakeMlflow, given: str | None
    ) -> None:
        module.active = [] if given else ["active"]
        trained(metered(), lambda run, optimizer: MLflowLog(run, optimizer, to=given))
        assert {row[0] for row in module.metrics + module.params} == {given or "active"}
        assert {row[1] for row in module.metrics} == PUBLIC
        assert all(timestamp == 1000 * step for *_, timestamp, step in module.metrics)
        assert ("privacy/planned_steps", 4) in [row[1:] for row in module.params]

    def test_without_an_active_run_it_says_how_to_begin_one(self, module: FakeMlflow) -> None:
        with pytest.raises(InvalidParameter, match="no run of MLflow") as caught:
            MLflowLog(make_run())
        assert "mlflow.start_run()" in caught.value.hint


def test_the_names_load_without_any_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert (dptrainer.TensorBoardLog, dptrainer.WandbLog, dptrainer.MLflowLog) == (TensorBoardLog, WandbLog, MLflowLog)
