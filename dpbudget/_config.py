"""What a question did not say: ``[tool.dpbudget]`` in a project file, else the documented defaults, always named.

The nearest folder upward from the working directory that holds ``dpbudget.toml`` or ``pyproject.toml`` decides.
``dpbudget.toml`` has the keys at its top; in ``pyproject.toml`` they stand under ``[tool.dpbudget]``. The keys are
those of :data:`DEFAULTS`. A command line option comes before the file, the file before the default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpbudget._checks import (
    as_accountant,
    as_adjacency,
    as_clip_norm,
    as_count,
    as_delta,
    as_epochs,
    as_noise_mode,
    did_you_mean,
)
from dpbudget.errors import InvalidParameter, Unreadable
from dpbudget.plan import DEFAULT_MAX_PARAMETERS, MAX_SIZE

#: The documented defaults. Delta has none of its own: 1 / dataset_size^1.1 is taken.
DEFAULTS: dict[str, Any] = {
    "dataset_size": 60000,
    "batch_size": 256,
    "epochs": 10.0,
    "clip_norm": 1.0,
    "adjacency": "add-remove",
    "accountant": "prv",
    "max_parameters": DEFAULT_MAX_PARAMETERS,
    "noise": "secure",
    "delta": None,
}
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "dataset_size": lambda value: as_count("dataset_size", value, MAX_SIZE),
    "batch_size": lambda value: as_count("batch_size", value, MAX_SIZE),
    "epochs": lambda value: float(as_epochs(value)),
    "clip_norm": as_clip_norm,
    "adjacency": lambda value: str(as_adjacency(value)),
    "accountant": as_accountant,
    "max_parameters": lambda value: as_count("max_parameters", value, 1 << 40),
    "noise": as_noise_mode,
    "delta": as_delta,
}
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Assumed:
    """One value that nobody stated in the question, and where it came from."""

    name: str
    value: Any
    why: str


@dataclass(frozen=True)
class Settings:
    """Checked values of a project file.

    Attributes:
        values: the keys that the file sets.
        source: the file; None where there is none.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None

    def assume(self, name: str) -> Assumed | None:
        """The file's value of ``name``, else its documented default, else None (delta alone has no default)."""
        if name in self.values:
            return Assumed(name, self.values[name], f"set in {self.source}")
        if DEFAULTS[name] is None:
            return None
        return Assumed(name, DEFAULTS[name], "documented default")


def load_settings(folder: Path | None = None) -> Settings:
    """Settings of the nearest project file at or above ``folder`` (the working directory if not given).

    Raises:
        Unreadable: the file cannot be read, or has an unknown key or a value out of range (DP092).
    """
    start = (folder or Path.cwd()).resolve()
    for place in (start, *start.parents):
        own, project = place / "dpbudget.toml", place / "pyproject.toml"
        if own.is_file():
            return _checked(_read_toml(own), own)
        if project.is_file():
            table = _read_toml(project).get("tool", {}).get("dpbudget", {})
            return _checked(table, project) if table else Settings()
    return Settings()


_WHERE = "only pyproject.toml has a section for them, [tool.dpbudget]"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise Unreadable(f"{path} has more than {_MAX_BYTES} bytes", code="DP092", hint="it is no settings file")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise Unreadable(
            f"{path} cannot be read: {reason}", code="DP092", hint="correct the file; it is in the TOML format"
        ) from None


def _checked(table: Any, path: Path) -> Settings:
    if not isinstance(table, dict):
        raise Unreadable(f"{path}: tool.dpbudget is not a table", code="DP092", hint="write [tool.dpbudget]")
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in _CHECKS:
            if isinstance(value, dict):
                raise Unreadable(
                    f"{path} has a section [{key}]", code="DP092", hint=f"write the keys without [{key}]; {_WHERE}"
                )
            hint = f"{did_you_mean(name, tuple(_CHECKS))} The keys are {', '.join(_CHECKS)}".strip()
            raise Unreadable(f"{path} sets an unknown key {key!r}", code="DP092", hint=hint)
        try:
            values[name] = _CHECKS[name](value)
        except InvalidParameter as error:
            raise Unreadable(f"{path}, key {key!r}: {error.message}", code="DP092", hint=error.hint) from None
    return Settings(values, path)
