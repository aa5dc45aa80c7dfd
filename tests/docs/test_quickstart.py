"""The first block of the quickstart: fifteen lines, no word on standard error, and a model that is of use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)[0]


def accuracy(folder: Path, seed: int) -> float:
    """What the block prints, as a program of its own; the seed is of the initial weights, noise cannot be seeded."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import torch; torch.manual_seed({seed})\n{BLOCK}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = re.fullmatch(r"accuracy on public images (0\.\d+)\n", done.stdout)
    assert found, done.stdout
    return float(found[1])


def test_it_is_short_and_names_no_setting_that_weakens_the_guarantee() -> None:
    lines = [line for line in BLOCK.splitlines() if line.strip()]
    assert len(lines) <= 15
    assert all(len(line) <= 120 for line in lines)
    assert "epsilon=3, delta=1e-5" in BLOCK
    assert "public_data" not in BLOCK
    assert "unsafe" not in BLOCK


def test_it_runs_in_silence_and_learns(tmp_path: Path) -> None:
    assert accuracy(tmp_path, 0) > 0.9  # one run; far below what noise explains


@pytest.mark.slow
def test_five_seeds_reach_093_in_the_mean(tmp_path: Path) -> None:
    found = []
    for seed in range(5):
        (folder := tmp_path / str(seed)).mkdir()
        found.append(accuracy(folder, seed))
    assert sum(found) / 5 >= 0.93, found
