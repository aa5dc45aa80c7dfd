"""Draws the pictures of docs/concepts.md: ``python docs/images/concepts.py [FOLDER]`` writes them, here if not told.

Everything that is a number is computed by dpbudget; the same version gives the same bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
os.environ["SOURCE_DATE_EPOCH"] = "0"
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import dpbudget

HERE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
BLUE, ORANGE, GREEN, PURPLE, GREY, PALE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666", "#DCE6EC"
mpl.rcParams.update({
    "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "lines.linewidth": 1.8, "legend.frameon": False, "svg.hashsalt": "dpbudget",
    "svg.fonttype": "path", "figure.facecolor": "white",
})  # fmt: skip


def save(name: str, figure: Any) -> None:
    """One picture."""
    figure.savefig(HERE / f"{name}.svg", bbox_inches="tight", pad_inches=0.08, metadata={"Date": None})
    plt.close(figure)


def epsilon() -> None:
    """What the best membership attack on a training run can reach, for three budgets."""
    figure, axes = plt.subplots(figsize=(5.4, 4.2))
    rates = np.concatenate([np.logspace(-4, -1, 25), np.linspace(0.11, 1.0, 40)])
    for budget, colour, style in ((1.0, GREEN, "-"), (3.0, BLUE, "--"), (8.0, ORANGE, "-.")):
        plan = dpbudget.calibrate(epsilon=budget, delta=1e-5, dataset_size=60000, batch_size=256, epochs=10)
        curve = dpbudget.get_accountant("prv").curve(plan.charges, plan.adjacency)
        found = [curve.tpr_at(float(rate)).upper for rate in rates]
        axes.plot(rates, found, color=colour, linestyle=style, label=f"$\\varepsilon = {budget:g}$")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="guessing")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="false alarms: records accused that were not used")
    axes.set_ylabel("found: used records that are found")
    axes.set_title("The best attack there can be, at $\\delta = 10^{-5}$")
    axes.legend(loc="lower right")
    save("epsilon", figure)


def _rows(axes: Axes, x: float, rows: list[tuple[str, str]], title: str) -> None:
    for place, (text, colour) in enumerate(rows):
        y = -0.42 * place
        style = {"facecolor": colour, "edgecolor": GREY, "linewidth": 0.8}
        if text == "":
            style |= {"facecolor": "none", "linestyle": (0, (3, 3))}
        axes.add_patch(Rectangle((x, y), 1.5, 0.34, **style))
        axes.text(x + 0.75, y + 0.17, text or "not there", ha="center", va="center", fontsize=9)
    axes.text(x + 0.75, 0.55, title, ha="center", va="bottom", fontsize=10)


def adjacency() -> None:
    """What one record more, less or other means."""
    figure, axes = plt.subplots(figsize=(7.6, 2.5))
    people = [("Ada", PALE), ("Ben", PALE), ("Cleo", "#FBD9C5"), ("Dan", PALE)]

    def with_third(text: str, colour: str) -> list[tuple[str, str]]:
        return [*people[:2], (text, colour), people[3]]

    _rows(axes, 0.0, people, "your data")
    _rows(axes, 2.2, with_third("", PALE), "add-remove:\nwithout Cleo")
    _rows(axes, 4.4, with_third("zeros", "white"), "zero-out:\na blank for Cleo")
    _rows(axes, 6.6, with_third("Eve", "#D5EFE3"), "replace-one:\nEve for Cleo")
    axes.set(xlim=(-0.1, 8.2), ylim=(-1.45, 1.3))
    axes.axis("off")
    save("adjacency", figure)


def poisson() -> None:
    """The same training under the two ways of making batches."""
    shares = {"width_ratios": [1.3, 1], "wspace": 0.4}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.2), gridspec_kw=shares)
    random = np.random.default_rng(3)
    records, steps = 24, 6
    for column, (name, chosen) in enumerate((
        ("shuffled", np.eye(steps, dtype=bool)[random.permutation(np.arange(records) % steps)]),
        ("Poisson", random.random((records, steps)) < 1 / steps),
    )):  # fmt: skip
        for record in range(records):
            for step in range(steps):
                colour = (BLUE if column else ORANGE) if chosen[record, step] else PALE
                left.add_patch(Rectangle((column * 8 + step, -record * 0.5), 0.9, 0.42, facecolor=colour))
        left.text(column * 8 + 3, 1.0, name, ha="center")
    left.text(7, -12.9, "one row a record, one column a step", ha="center", fontsize=9, color=GREY)
    left.set(xlim=(-0.3, 14.3), ylim=(-13.4, 2.0))
    left.axis("off")
    plan = dpbudget.calibrate(epsilon=3.0, delta=1e-5, dataset_size=60000, batch_size=256, epochs=10)
    sigma = plan.phases[0].noise_multiplier
    once = dpbudget.epsilon_of([(1.0, sigma, 10)], delta=1e-5).upper
    bars = right.barh(["shuffled", "Poisson"], [once, plan.claim.epsilon], color=[ORANGE, BLUE], height=0.55)
    right.bar_label(bars, [f" {once:.1f}", f" {plan.claim.epsilon:.2f}"])
    right.set(xlabel="$\\varepsilon$ at $\\delta = 10^{-5}$", xlim=(0, once * 1.2))
    right.set_title("10 epochs, 60,000 records,\nthe same noise", fontsize=10)
    right.grid(visible=False)
    save("poisson", figure)


def _box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.9) -> None:
    style = {"boxstyle": "round,pad=0.05", "facecolor": "white", "edgecolor": colour, "linewidth": 1.6}
    axes.add_patch(FancyBboxPatch((x, y), width, 0.9, **style))
    axes.text(x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=9)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.2))


def ledger() -> None:
    """What is written before what."""
    figure, axes = plt.subplots(figsize=(8.6, 3.0))
    chain = [
        ("budget\n(owner signs)", PURPLE), ("plan\n(owner signs)", PURPLE), ("lease: steps 1-64\nare charged", BLUE),
        ("settled: what\nwas released", BLUE),
    ]  # fmt: skip
    for place, (text, colour) in enumerate(chain):
        _box(axes, 2.5 * place, 1.6, text, colour)
        if place:
            _arrow(axes, (2.5 * place - 0.05, 2.05), (2.5 * place - 0.55, 2.05))
    axes.text(8.75 / 2 + 0.3, 2.85, "each record names the hash of the one before", ha="center", fontsize=9, color=GREY)
    _box(axes, 5.0, -0.1, "on disk, then:\nnoise is drawn", GREEN)
    _box(axes, 7.5, -0.1, "the model moves", GREEN)
    _arrow(axes, (5.95, 1.5), (5.95, 0.9), GREEN)
    _arrow(axes, (6.95, 0.35), (7.45, 0.35), GREEN)
    _arrow(axes, (8.45, 0.9), (8.45, 1.5), GREEN)
    _box(axes, 0.0, -0.1, "anyone with the owner's\npublic key recomputes\nepsilon from the records", ORANGE, 3.6)
    _arrow(axes, (1.8, 1.5), (1.8, 0.95), ORANGE)
    axes.set(xlim=(-0.15, 9.65), ylim=(-0.3, 3.2))
    axes.axis("off")
    save("ledger", figure)


def noise() -> None:
    """How much noise a parameter gets against what clipping leaves of a batch: larger batches drown it."""
    figure, axes = plt.subplots(figsize=(5.4, 3.6))
    sizes = [64, 128, 256, 512, 1024, 2048, 4096]
    for budget, colour, style in ((1.0, GREEN, "-"), (3.0, BLUE, "--"), (8.0, ORANGE, "-.")):
        plans = [
            dpbudget.calibrate(epsilon=budget, delta=1e-5, dataset_size=60000, batch_size=size, epochs=10)
            for size in sizes
        ]
        ratios = [plan.phases[0].noise_multiplier / size for plan, size in zip(plans, sizes, strict=True)]
        label = f"$\\varepsilon = {budget:g}$"
        axes.loglog(sizes, ratios, color=colour, linestyle=style, marker="o", markersize=3.5, label=label)
    axes.set(xlabel="expected batch size", ylabel="noise / batch size, in units of C")
    axes.set_title("10 epochs over 60,000 records: noise a step")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend()
    save("noise", figure)


def main() -> None:
    """Draw all of them."""
    pictures: list[Callable[[], None]] = [epsilon, adjacency, poisson, ledger, noise]
    for picture in pictures:
        picture()


if __name__ == "__main__":
    main()
