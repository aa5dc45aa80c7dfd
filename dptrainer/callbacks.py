"""Callbacks that write to TensorBoard, Weights & Biases or MLflow: what is public, and by default nothing else.

Public are the number of steps, epsilon, the learning rate, and the facts of the plan. A loss, a batch size or an
accuracy of private records is a release that no plan pays for, and so is the time that a step took, since it follows
the batch that was drawn. So none of them is written: where a tracker wants a time it gets the step's number, as so many
seconds. What shall be written all the same is passed as ``uncovered_release`` and stands under that name.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from types import TracebackType
from typing import Any, Self

import torch

from dpbudget.curve import Bounds
from dpbudget.errors import InvalidParameter, MissingExtra
from dpbudget.ledger.run import Run
from dptrainer.update import check_is_run

#: What is written of data that nobody charged for, by name; each is called once for every step that is written.
Uncovered = Mapping[str, Callable[[], float | torch.Tensor]]


class MetricLog(ABC):
    """A callback that writes public numbers of a run, and what ``uncovered_release`` names.

    Give it to ``callbacks`` of a trainer, or call it after each step of a loop of your own, with the number of steps
    so far and ``loader.epsilon``. A subclass says where numbers go.

    Guarantee: without ``uncovered_release`` everything that is written follows from the plan, the number of steps and
    the optimizer's settings. With it, the plan's claim does not cover what is written.

    Args:
        run: whose steps they are.
        optimizer: its learning rates are written; they must be public.
        every: steps between two writes; the last step of the plan is always written.
        uncovered_release: name to a function that returns a number. **Each is a release that no claim covers.**

    Raises:
        PrivacyViolation: ``run`` is not a run (DP081).
        InvalidParameter: ``every`` or ``uncovered_release`` is of another kind (DP009, DP060).
    """

    def __init__(
        self,
        run: Run,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 1,
        uncovered_release: Uncovered | None = None,
    ) -> None:
        check_is_run(run)
        if type(every) is not int or every < 1:
            raise InvalidParameter(f"every must be a positive integer, got {every!r}", hint="leave it out for 1")
        self._uncovered = dict(uncovered_release or {})
        for name, value in self._uncovered.items():
            if not callable(value):
                raise InvalidParameter(
                    f"uncovered_release[{name!r}] is {type(value).__name__}, not a function",
                    code="DP060",
                    hint='pass functions without arguments, as in uncovered_release={"loss": lambda: latest}',
                )
        self._run, self._optimizer, self._every = run, optimizer, every
        self._before: int | None = None

    def __call__(self, steps: int, epsilon: Bounds | None) -> None:
        """Write what is known after ``steps`` steps of this process; those of an earlier one are added."""
        if self._before is None:
            self._before = max(self._run.planned - self._run.remaining - steps, 0)
            self._write_facts(self.facts())
        if steps % self._every and self._run.remaining:
            return
        self._write(self._values(epsilon), self._before + steps)

    def facts(self) -> dict[str, str | float | int]:
        """The public facts of the run, which are written once."""
        plan = self._run.plan
        phases = [
            f"{phase.steps} steps at rate {phase.rate:.6g}, noise multiplier {phase.noise_multiplier:.6g}"
            for phase in plan.phases
        ]
        found: dict[str, str | float | int] = {
            "run": self._run.run_id,
            "claimed_epsilon": plan.claim.epsilon,
            "claimed_delta": plan.claim.delta,
            "adjacency": str(plan.adjacency),
            "unit": plan.unit,
            "accountant": plan.claim.accountant,
            "planned_steps": plan.steps,
            "phases": "; ".join(phases),
            "clip_norm": plan.clip_norm,
            "noise": plan.noise,
        }
        if self._uncovered:
            found["releases_not_covered_by_the_claim"] = ", ".join(self._uncovered)
        return found

    def _values(self, epsilon: Bounds | None) -> dict[str, float]:
        values = {"privacy/steps_charged": float(self._run.charged)}
        if epsilon is not None:
            values["privacy/epsilon"] = epsilon.upper
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        for number, group in enumerate(groups):
            values["learning_rate" if number == 0 else f"learning_rate/{number}"] = float(group["lr"])
        with torch.no_grad():
            return values | {f"uncovered_release/{name}": _number(value()) for name, value in self._uncovered.items()}

    @abstractmethod
    def _write_facts(self, facts: Mapping[str, str | float | int]) -> None:
        """Write the facts of the run."""

    @abstractmethod
    def _write(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step."""


class TensorBoardLog(MetricLog):
    """Writes to TensorBoard (``pip install tensorboard``); the rest as :class:`MetricLog`.

    Args:
        to: a folder, or a ``torch.utils.tensorboard.SummaryWriter`` of yours.
        run, optimizer, every, uncovered_release: as for :class:`MetricLog`.

    Raises:
        MissingExtra: TensorBoard is not installed (DP090).
    """

    def __init__(
        self,
        to: Any,
        run: Run,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 1,
        uncovered_release: Uncovered | None = None,
    ) -> None:
        super().__init__(run, optimizer, every=every, uncovered_release=uncovered_release)
        self._own, self._writer = isinstance(to, str | os.PathLike), to
        if isinstance(to, str | os.PathLike):
            self._writer = _load("torch.utils.tensorboard", "tensorboard").SummaryWriter(os.fspath(to))

    def close(self) -> None:
        """Write out what waits, and close the writer if it was made here."""
        self._writer.flush()
        if self._own:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_facts(self, facts: Mapping[str, str | float | int]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
        self._writer.add_text("privacy", f"| | |\n|---|---|\n{rows}", 0, walltime=0.0)

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=float(step))


class WandbLog(MetricLog):
    """Writes to a run of Weights & Biases (``pip install wandb``); the rest as :class:`MetricLog`.

    What wandb records by itself is not in our hands: the time of every write, the console, the load of the machine. All
    of them tell something of the batches that were drawn. ``wandb.init(settings=wandb.Settings(console="off",
    x_disable_stats=True))`` leaves the times.

    Args:
        run, optimizer, every, uncovered_release: as for :class:`MetricLog`.
        to: the run of wandb; the active one if None.

    Raises:
        MissingExtra: wandb is not installed (DP090).
        InvalidParameter: no run of wandb is active (DP064).
    """

    def __init__(
        self,
        run: Run,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        to: Any = None,
        every: int = 1,
        uncovered_release: Uncovered | None = None,
    ) -> None:
        super().__init__(run, optimizer, every=every, uncovered_release=uncovered_release)
        self._to = _load("wandb", "wandb").run if to is None else to
        if self._to is None:
            raise InvalidParameter(
                "no run of wandb is active", code="DP064", hint="call wandb.init() first, or pass to=wandb.init()"
            )

    def _write_facts(self, facts: Mapping[str, str | float | int]) -> None:
        self._to.config.update({"privacy": dict(facts)}, allow_val_change=True)

    def _write(self, values: Mapping[str, float], step: int) -> None:
        self._to.log(dict(values), step=step)


class MLflowLog(MetricLog):
    """Writes to a run of MLflow (``pip install mlflow``); the rest as :class:`MetricLog`.

    Args:
        run, optimizer, every, uncovered_release: as for :class:`MetricLog`.
        to: the id of the run of MLflow; the active one if None.

    Raises:
        MissingExtra: MLflow is not installed (DP090).
        InvalidParameter: no run of MLflow is active (DP064).
    """

    def __init__(
        self,
        run: Run,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        to: str | None = None,
        every: int = 1,
        uncovered_release: Uncovered | None = None,
    ) -> None:
        super().__init__(run, optimizer, every=every, uncovered_release=uncovered_release)
        mlflow = _load("mlflow", "mlflow")
        if to is None:
            active = mlflow.active_run()
            if active is None:
                raise InvalidParameter(
                    "no run of MLflow is active", code="DP064", hint="call mlflow.start_run() first, or pass to=RUN_ID"
                )
            to = active.info.run_id
        self._to = to
        self._client = mlflow.MlflowClient()

    def _write_facts(self, facts: Mapping[str, str | float | int]) -> None:
        for name, value in facts.items():
            self._client.log_param(self._to, f"privacy/{name}", value)

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._to, name, value, timestamp=1000 * step, step=step)  # milliseconds


def _number(value: float | torch.Tensor) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def _load(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise MissingExtra(
            f"logging to {package} needs {package}, which is not installed", hint=f"pip install {package}"
        ) from None
