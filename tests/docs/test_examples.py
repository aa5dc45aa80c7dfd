"""The example that `make demo` runs: every station is shown, nothing else, and the model is useful."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_shows_every_station_and_nothing_but_what_is_meant(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "examples" / "digits.py")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "120"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    stations = ["ledger", "plan", "signed", "train", "refused", "verify", "VALID", "accuracy"]
    positions = [re.search(rf"^{station}\b", done.stdout, re.MULTILINE) for station in stations]
    assert all(positions), done.stdout
    starts = [match.start() for match in positions if match]
    assert starts == sorted(starts)
    assert "DP050 step 31 of 30 is not in the plan" in done.stdout
    assert not re.search(r"warning|traceback|nan", done.stdout, re.IGNORECASE)
    private = re.search(r"held-out fifth: (0\.\d{4}) with privacy \(mean of 5 runs", done.stdout)
    assert private
    # The goal of 0.93 is reported as it is; this line fails when training is broken, not when noise is unlucky.
    assert 0.915 < float(private[1]) < 0.97
    assert list(tmp_path.iterdir()) == []
