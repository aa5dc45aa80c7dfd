"""A command line to call, folders to call it in, and a way to see whether a folder changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dpbudget_cli.main import app


@dataclass(frozen=True)
class Answer:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert self.out.count("\n") == 1
        return value


def call(*args: str, input: str | None = None) -> Answer:
    """Run a command in this process; an exception that is not an exit fails the test."""
    result = CliRunner().invoke(app, list(args), input=input, catch_exceptions=False)
    return Answer(result.exit_code, result.stdout, result.stderr)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Mode and digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def run_cli() -> Callable[..., Answer]:
    return call


@pytest.fixture
def seen() -> Callable[[Path], dict[str, tuple[int, str]]]:
    return snapshot


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ledger of epsilon 3, one plan of 20 steps for epsilon 1, a spare key and small data files."""
    folder = tmp_path_factory.mktemp("prepared")
    ledger = str(folder / "budget.ledger")
    made = call("ledger", "init", ledger, "--epsilon", "3", "--delta", "1e-5", "--whole-budget")
    assert made.code == 0, made.err
    arguments = [
        "--epsilon",
        "1",
        "--dataset-size",
        "100",
        "--batch-size",
        "20",
        "--steps",
        "20",
        "--max-parameters",
        "5000",
    ]
    assert call("plan", "new", "--ledger", ledger, *arguments).code == 0
    assert call("key", "new", str(folder / "owner.key")).code == 0
    random = np.random.default_rng(7)
    features = random.normal(size=(100, 4))
    labels = (features[:, 0] > 0).astype(np.int64)
    np.savez(folder / "train.npz", x=features, y=labels)
    lines = ["a,b,c,d,label"]
    lines += [
        ",".join(f"{value:.5f}" for value in row) + f",{label}" for row, label in zip(features, labels, strict=True)
    ]
    script = "import os; assert len(os.environ['DPBUDGET_RUN']) == 32 and os.path.exists(os.environ['DPBUDGET_LEDGER'])"
    (folder / "train.py").write_text(script, encoding="utf-8")
    (folder / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the prepared folder, entered."""
    place = tmp_path / "work"
    shutil.copytree(prepared, place)
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, entered, in which quick answers come from the rdp accountant."""
    place = tmp_path / "empty"
    place.mkdir()
    (place / "dpbudget.toml").write_text('accountant = "rdp"\n', encoding="utf-8")
    monkeypatch.chdir(place)
    return place
