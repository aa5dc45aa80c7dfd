"""The fields of ``--json`` are a promise: within a version of the format none goes away or changes its name.

A field may be added to a row of the table. To remove or rename one is another major version (docs/commands.md).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Cli = Callable[..., Any]

#: Lines as they are typed one after the other, each with the fields of its answer.
TABLE = Path(__file__).with_name("json_fields.txt").read_text(encoding="utf-8")
FIELDS = dict(re.findall(r"^\$ dpbudget (.+)\n(.+)$", TABLE, re.MULTILINE))
#: An interval, wherever one stands.
BOUNDS = {"lower", "upper", "kind"}


def test_every_field_of_every_answer_is_still_there(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(FIELDS) > 30
    np.savez("train.npz", x=np.random.default_rng(0).normal(size=(60, 4)), y=np.arange(60) % 2)
    for line, fields in FIELDS.items():
        words = shlex.split(line)
        answer = run_cli(*words, *(() if "--json" in words else ("--json",)))
        assert answer.code == 0, (line, answer.err)
        found = answer.json
        assert set(fields.split()) <= set(found), (line, sorted(found))
        if isinstance(found.get("epsilon"), dict) and "kind" in found["epsilon"]:
            assert set(found["epsilon"]) >= BOUNDS, line


def test_an_error_has_its_fields_too(run_cli: Cli, empty: Path) -> None:
    assert set(run_cli("calibrate", "--epsilon", "0", "--json").json["error"]) >= {"code", "message", "hint"}
