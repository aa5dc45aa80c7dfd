"""Draws the picture of docs/planning.md: ``python docs/images/planning.py [FOLDER]`` writes it, here if not told.

The picture is what ``dpbudget plan explore --examples 60000 --plot planning.svg`` writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import dpbudget
from dpbudget._explore import EPSILONS, FEWER_POINTS, MAX_EPOCHS, MIN_STEPS
from dpbudget.report.sweeps import SweepPicture, save_sweeps

HERE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent

law = {
    "dataset_size": 60000,
    "max_batch": MAX_EPOCHS * 60000 // MIN_STEPS,
    "min_steps": MIN_STEPS,
    "points": FEWER_POINTS,
}
sweeps = tuple(dpbudget.explore(epsilon=epsilon, **law) for epsilon in EPSILONS)
save_sweeps(SweepPicture(sweeps, MIN_STEPS), HERE / "planning.svg")
