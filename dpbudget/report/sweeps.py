"""The picture of a sweep before training: signal by batch size and length, and what more compute brings.

Colours of Okabe and Ito and the map ``cividis``, which colour-blind readers tell apart; marks and line styles differ
too. All of it is drawn from estimates, and says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpbudget._explore import ENOUGH, Sweep
from dpbudget.curve import round_up
from dpbudget.report.plots import _STYLE, save_drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: One colour, mark and line a target; further ones begin anew.
_LINES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"))
_GREY = "#888888"
_STAR: dict[str, Any] = {
    "color": "#E69F00", "markersize": 13, "markeredgecolor": "black", "markeredgewidth": 0.7, "zorder": 5
}  # fmt: skip


@dataclass(frozen=True)
class SweepPicture:
    """What is drawn: sweeps of one dataset, one a target epsilon; the first has its map.

    Attributes:
        min_steps: what a cell of the frontier has at least.
    """

    sweeps: tuple[Sweep, ...]
    min_steps: int


def save_sweeps(picture: SweepPicture, path: str | Path, *, size: tuple[float, float] = (11.0, 4.6)) -> None:
    """Write the picture as .png, .svg or .pdf, as :func:`~dpbudget.report.plots.save_figure` does, errors included."""
    save_drawing(lambda figure: _draw(figure, picture), path, size, _STYLE, dpi=150)


def _draw(figure: Figure, picture: SweepPicture) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    first = picture.sweeps[0]
    _draw_map(figure, left, picture, first)
    right.set(xscale="log", yscale="log", title="Efficient frontier: what more compute brings")
    for index, sweep in enumerate(picture.sweeps):
        _draw_frontier(right, picture, sweep, _LINES[index % len(_LINES)], only=len(picture.sweeps) == 1)
    right.set(xlabel="records processed (batch size × steps)", ylabel="signal-to-noise per step (batch size / noise)")
    low, high = right.get_ylim()
    right.set_ylim(top=high * (high / low) ** (0.09 * max(len(picture.sweeps), 2)))  # room for the legend
    right.legend(loc="upper left")
    for axis in (left.xaxis, left.yaxis, right.xaxis, right.yaxis):
        _tick(axis)
    delta = float(round_up(first.delta, 3))
    figure.suptitle(f"{first.dataset_size} records, delta {delta:g}; the noise is a numerical estimate", fontsize=10)


def _draw_map(figure: Figure, axes: Axes, picture: SweepPicture, sweep: Sweep) -> None:
    """Signal by batch size and epochs; cells with too few steps are dimmed, steps are contour lines."""
    import numpy as np
    from matplotlib.colors import LogNorm

    shape = (len(sweep.epochs), len(sweep.batch_sizes))
    signal = np.array([cell.signal for cell in sweep.cells]).reshape(shape)
    x, y = np.array(sweep.batch_sizes, dtype=float), np.array([float(value) for value in sweep.epochs])
    shown = np.ma.masked_less_equal(signal, 0.0)
    known = signal[signal > 0.0]
    colours = LogNorm(*((known.min(), known.max()) if known.size else (1.0, 10.0)))
    mesh = axes.pcolormesh(_edges(x), _edges(y), shown, cmap="cividis", norm=colours, rasterized=True)
    few = np.array([float(cell.steps < picture.min_steps) for cell in sweep.cells]).reshape(shape)
    axes.pcolormesh(_edges(x), _edges(y), np.ma.masked_equal(few, 0.0), cmap="Greys", vmin=0, vmax=2, alpha=0.55,
                    rasterized=True)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="expected batch size (records)", ylabel="epochs (expected uses)")
    axes.set(xlim=(_edges(x)[0], _edges(x)[-1]), ylim=(_edges(y)[0], _edges(y)[-1]))
    axes.set_title(f"Signal-to-noise per step at epsilon {sweep.epsilon:g}")
    axes.grid(visible=False)
    _draw_steps(axes, picture.min_steps, sweep.dataset_size)
    if few.any():
        axes.plot([], [], "s", color="#B0B0B0", markersize=7, label=f"under {picture.min_steps} steps")
    _mark(axes, sweep, picture.min_steps)
    bar = figure.colorbar(mesh, ax=axes, label="batch size / noise multiplier", pad=0.02)
    _tick(bar.ax.yaxis)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3, columnspacing=1.0, handletextpad=0.2)


def _draw_steps(axes: Axes, min_steps: int, size: int) -> None:
    """Lines of equal numbers of steps, the least that is asked for among them, up to the edges of the map."""
    from matplotlib.patheffects import withStroke

    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    edge = [withStroke(linewidth=1.6, foreground="#444444")]
    for steps in sorted({min_steps, *(10**k for k in range(1, 10))}):
        if not size * bottom / right < steps < size * top / left:
            continue
        least = steps == min_steps
        axes.plot([left, right], [steps * left / size, steps * right / size], color="white", zorder=3,
                  linewidth=1.6 if least else 0.9, linestyle="-" if least else ":")  # fmt: skip
        # Along its line and below it, where no cell has the steps to be on the frontier.
        x, y = 0.95 * min(size * top / steps, right), 0.95 * min(top, steps * right / size)
        y *= (bottom / top) ** 0.012
        if x < left * (right / left) ** 0.2:
            continue  # no room for its name
        turn: dict[str, Any] = {
            "rotation": math.degrees(math.atan2(y, x)),
            "rotation_mode": "anchor",
            "transform_rotates_text": True,
        }
        look: dict[str, Any] = {"color": "white", "fontsize": 7, "path_effects": edge, "clip_on": True}
        axes.text(x, y, f"{steps} steps ", ha="right", va="top", **look, **turn)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _draw_frontier(axes: Axes, picture: SweepPicture, sweep: Sweep, style: tuple[str, str, str], *, only: bool) -> None:
    """The members of one target as a line; where it is the only one, the cells below it too."""
    colour, mark, line = style
    if only:
        useful = [cell for cell in sweep.cells if cell.steps >= picture.min_steps and cell.signal > 0.0]
        axes.scatter([cell.records for cell in useful], [cell.signal for cell in useful], s=6, color=_GREY, alpha=0.6,
                     linewidths=0, label=f"other cells of {picture.min_steps} steps or more")  # fmt: skip
    cells = [member.cell for member in sweep.frontier(picture.min_steps)]
    label, chosen = f"epsilon {sweep.epsilon:g}", sweep.chosen(picture.min_steps)
    if chosen is not None:
        cell = chosen.cell
        label += f"; star: batch {cell.batch_size}, {float(cell.epochs):g} epochs, noise ≈ {cell.noise_multiplier:.2f}"
        axes.plot([cell.records], [cell.signal], "*", **_STAR)
    axes.plot([cell.records for cell in cells], [cell.signal for cell in cells], color=colour, marker=mark,
              linestyle=line, markersize=4, label=label)  # fmt: skip


def _mark(axes: Axes, sweep: Sweep, min_steps: int) -> None:
    """The frontier as dots and the chosen member as a star, on the map."""
    cells = [member.cell for member in sweep.frontier(min_steps)]
    if cells:
        axes.plot([cell.batch_size for cell in cells], [float(cell.epochs) for cell in cells], "o", color="white",
                  markersize=4.5, markeredgecolor="black", markeredgewidth=0.7, label="efficient frontier")  # fmt: skip
    chosen = sweep.chosen(min_steps)
    if chosen is not None:
        label = f"chosen ({ENOUGH:.0%} of the signal)"
        axes.plot([chosen.cell.batch_size], [float(chosen.cell.epochs)], "*", label=label, **_STAR)


def _tick(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade, 20k and 3M for large ones."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    wide = high > 300.0 * low
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(LogLocator(subs=(2.0, 5.0)) if wide else NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9999:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _edges(centres: Any) -> Any:
    """Borders of cells around their centres, in logarithms."""
    import numpy as np

    if len(centres) == 1:
        return np.array([centres[0] / 1.5, centres[0] * 1.5])
    logs = np.log(centres)
    middle = 0.5 * (logs[1:] + logs[:-1])
    return np.exp(np.concatenate([[2.0 * logs[0] - middle[0]], middle, [2.0 * logs[-1] - middle[-1]]]))
