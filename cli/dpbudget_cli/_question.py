"""From options to a complete question: what was not said is assumed by name, what was said twice is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpbudget._config import Assumed, Settings, load_settings
from dpbudget.errors import InvalidParameter
from dpbudget_cli._output import detail

_REAL_ARITHMETIC = Assumed(
    "noise", "real arithmetic", "the mechanism alone; the claim of a plan also covers the bounded tail of its noise"
)


@dataclass
class Question:
    """Values by name, and those among them that were assumed."""

    values: dict[str, Any]
    settings: Settings = field(default_factory=load_settings)
    assumed: list[Assumed] = field(default_factory=list)

    def __post_init__(self) -> None:
        source = self.settings.source
        detail("no settings file; documented defaults hold" if source is None else f"settings are those of {source}")

    def need(self, *names: str) -> None:
        """Assume every one of ``names`` that has no value; delta may stay without one."""
        for name in names:
            if self.values.get(name) is None and (found := self.settings.assume(name)) is not None:
                self.values[name] = found.value
                self.assumed.append(found)

    def require(self, name: str, hint: str) -> None:
        """Take ``name`` from the project file if it was not given; raises InvalidParameter (DP064) without either."""
        if not self.has(name) and name not in self.settings.values:
            raise InvalidParameter(f"--{name.replace('_', '-')} is missing", code="DP064", hint=hint)
        self.need(name)

    def note(self, name: str, value: Any, why: str) -> None:
        """Set a value that was derived rather than stated."""
        self.values[name] = value
        self.assumed.append(Assumed(name, value, why))

    def has(self, name: str) -> bool:
        """Whether the value was given or assumed."""
        return self.values.get(name) is not None

    def pick(self, *names: str) -> dict[str, Any]:
        """Those of ``names`` that have a value, as keyword arguments."""
        return {name: self.values[name] for name in names if self.values.get(name) is not None}


def refuse_together(values: dict[str, Any], first: str, second: str) -> None:
    """Raise InvalidParameter (DP064) when both options are given."""
    if values.get(first) is not None and values.get(second) is not None:
        one, other = (f"--{name.replace('_', '-')}" for name in (first, second))
        raise InvalidParameter(
            f"{one} and {other} say the same thing twice", code="DP064", hint=f"leave {other} out, or {one}"
        )


def ask_schedule(
    question: Question, *, solve_steps: bool = False, solve_batch: bool = False, solve_size: bool = False
) -> None:
    """Complete sampling rate, steps, public size and delta.

    With ``solve_steps`` the length is what is asked for, with ``solve_batch`` the expected batch size, with
    ``solve_size`` the dataset size, which then chooses delta too if nothing else does.
    """
    values = question.values
    refuse_together(values, "sample_rate", "batch_size")
    refuse_together(values, "steps", "epochs")
    if solve_steps or solve_batch:
        for name in ("steps", "epochs") if solve_steps else ("sample_rate", "batch_size"):
            if question.has(name):
                raise InvalidParameter(
                    f"--{name.replace('_', '-')}, --noise-multiplier and --epsilon leave nothing to solve for",
                    code="DP064",
                    hint="exactly one is solved for: leave one out, or --dataset-size where --batch-size is given",
                )
    question.need("delta")
    if solve_size:
        question.need("accountant", "adjacency")
        return
    if not question.has("sample_rate") or not question.has("delta"):
        question.need("dataset_size")
    if not question.has("sample_rate") and not solve_batch:
        ask_batch(question)
    if not solve_steps and not question.has("steps"):
        question.need("epochs")
    if not question.has("delta"):
        ask_delta(question)
    question.need("accountant", "adjacency")


def ask_batch(question: Question) -> None:
    """Take the batch size of the settings, or the whole dataset where that is smaller."""
    found, size = question.settings.assume("batch_size"), question.values["dataset_size"]
    if not question.has("batch_size") and found is not None and found.value > size:
        question.note("batch_size", size, "the whole dataset, since it is smaller than the default batch")
    question.need("batch_size")


def ask_delta(question: Question) -> None:
    """Take the default delta for the dataset size."""
    from dpbudget._schedule import default_delta

    size = question.values["dataset_size"]
    question.note("delta", default_delta(size), f"1 / n^1.1 for a dataset size n = {size}")


def ask_mechanism(values: dict[str, Any]) -> Question:
    """A question about a mechanism: phases from --phase, or from --sample-rate, --noise-multiplier and --steps."""
    question = Question(values)
    facts = ("sample_rate", "dataset_size", "batch_size", "noise_multiplier", "steps", "epochs")
    if values["phases"]:
        for name in facts:
            if question.has(name):
                refuse_together({"phase": True, name: True}, "phase", name)
    else:
        values["phases"] = (_single_phase(question),)
    question.need("accountant", "adjacency")
    question.assumed.append(_REAL_ARITHMETIC)
    return question


def _single_phase(question: Question) -> tuple[float, float, int]:
    """Rate, noise and steps, each stated directly or through batch size, dataset size and epochs."""
    from dpbudget._schedule import make_schedule

    values = question.values
    refuse_together(values, "sample_rate", "batch_size")
    refuse_together(values, "steps", "epochs")
    wanted = ["noise_multiplier"]
    wanted += ["dataset_size"] if question.has("batch_size") else ["sample_rate"]
    wanted += [] if question.has("epochs") else ["steps"]
    missing = ", ".join(f"--{name.replace('_', '-')}" for name in wanted if not question.has(name))
    if missing:
        raise InvalidParameter(
            f"the schedule is incomplete: {missing} missing", code="DP064", hint=f"pass {missing}, or --phase Q,S,T"
        )
    if not (question.has("batch_size") or question.has("epochs")):
        return values["sample_rate"], values["noise_multiplier"], values["steps"]
    schedule = make_schedule(**question.pick("sample_rate", "batch_size", "dataset_size", "steps", "epochs"))
    return schedule.rate, values["noise_multiplier"], schedule.steps
