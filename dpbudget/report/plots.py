"""One figure for a mechanism or plan: privacy profile, trade-off curve and epsilon by step.

Style: three panels in a row, at most three lines each, colours of Okabe and Ito that colour-blind readers tell apart
(line styles differ too), vector output for .svg and .pdf, the same bytes for the same input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpbudget._calibrate import make_phases
from dpbudget._live import build_meter
from dpbudget.curve import Bounds, PrivacyCurve, round_up, show_delta
from dpbudget.errors import InvalidParameter, MissingExtra, NotComputable, Unreadable
from dpbudget.mechanisms import Adjacency, Charge
from dpbudget.plan import Plan
from dpbudget.report.lines import epsilon_grid, kink, least_false_negatives, pair_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_SUFFIXES = (".png", ".svg", ".pdf")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "dpbudget",
    "svg.fonttype": "path",
}
#: Points of the profile, whose line between them guides the eye, and of the epsilon table, drawn as stairs.
_POINTS, _METER_POINTS = 41, 24
#: Smaller deltas are not drawn.
_LEAST = 1e-300
_ALPHAS = (*(10.0 ** (-6.0 + 0.05 * i) for i in range(80)), *(0.01 * i for i in range(1, 101)))


@dataclass(frozen=True)
class Picture:
    """What a figure shows, as numbers.

    Attributes:
        curve: the profile; rdp: that of the Renyi accountant.
        epsilon, delta: the answer that is marked.
        steps: (number of steps, epsilon) in increasing order; empty where nothing is known.
        label: one line about the mechanism.
    """

    curve: PrivacyCurve
    rdp: PrivacyCurve
    epsilon: Bounds
    delta: float
    steps: tuple[tuple[int, Bounds], ...]
    label: str


def figure_of_schedule(
    phases: Sequence[tuple[float, float, int]], *, delta: float, adjacency: str = "add-remove", accountant: str = "prv"
) -> Picture:
    """The picture of a schedule of (sampling rate, noise multiplier, steps), in real arithmetic."""
    from dpbudget.accountants import get_accountant

    charges, relation = [phase.charge for phase in make_phases(phases)], Adjacency(adjacency)
    counting = get_accountant(accountant)
    curve, total = counting.curve(charges, relation), sum(charge.count for charge in charges)
    rows = []
    for steps in sorted({max(1, total * i // _METER_POINTS) for i in range(1, _METER_POINTS + 1)}):
        try:
            rows.append((steps, counting.curve(_first(charges, steps), relation).epsilon(delta)))
        except NotComputable:
            continue
    label = f"{accountant}, {adjacency}, {total} steps"
    return Picture(
        curve, get_accountant("rdp").curve(charges, relation), curve.epsilon(delta), delta, tuple(rows), label
    )


def figure_of_plan(plan: Plan) -> Picture:
    """The picture of a plan, bounded noise tail included."""
    from dpbudget._calibrate import bounds_of
    from dpbudget._targets import curve_of
    from dpbudget.accountants import get_accountant

    meter = build_meter(plan, points=_METER_POINTS)
    rdp = get_accountant("rdp").curve(plan.charges, plan.adjacency)
    label = f"{plan.claim.accountant}, {plan.adjacency}, {plan.steps} steps"
    rows = tuple(zip(meter.steps, meter.bounds, strict=True))
    return Picture(curve_of(plan), rdp, bounds_of(plan), plan.claim.delta, rows, label)


def save_figure(picture: Picture, path: str | Path, *, size: tuple[float, float] = (12.0, 3.8)) -> None:
    """Write the figure as .png, .svg or .pdf by the suffix of ``path``; an existing file is replaced.

    Args:
        picture: what it shows.
        path: where it goes.
        size: width and height in inches.

    Raises:
        InvalidParameter: another suffix (DP060).
        MissingExtra: matplotlib is not installed (DP090).
        Unreadable: the place cannot be written (DP070).
    """
    save_drawing(lambda figure: _draw(figure, picture), path, size, _STYLE, dpi=150)


def save_drawing(
    draw: Callable[[Figure], None], path: str | Path, size: tuple[float, float], style: dict[Any, Any], *, dpi: int
) -> None:
    """Let ``draw`` fill a figure of ``size`` inches, and write it as :func:`save_figure` does."""
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InvalidParameter(
            f"a figure is written as .png, .svg or .pdf, got {str(path)!r}", code="DP060", hint="name the file p.svg"
        )
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            "a figure needs matplotlib, which is not installed", hint="pip install 'dpbudget[plot]'"
        ) from error
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        # No date and no version of a library in the file: the same input gives the same bytes.
        metadata: dict[str, Any] = {
            ".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}, ".pdf": {"CreationDate": None},
        }[suffix]  # fmt: skip
        try:
            figure.savefig(target, dpi=dpi, format=suffix[1:], metadata=metadata)
        except OSError as error:
            raise Unreadable(
                f"the figure {str(path)!r} could not be written: {error.strerror or error}", hint="choose another place"
            ) from error


def _draw(figure: Figure, picture: Picture) -> None:
    profile, trade, steps = figure.subplots(1, 3)
    _draw_profile(profile, picture)
    _draw_trade_off(trade, picture)
    _draw_steps(steps, picture)
    bound = f"epsilon {round_up(picture.epsilon.upper, 4)} at delta {show_delta(picture.delta)}"
    figure.suptitle(f"{bound}  ({picture.label})", fontsize=10)


def _draw_profile(axes: Axes, picture: Picture) -> None:
    """Log delta against epsilon."""
    grid = epsilon_grid(picture.epsilon.upper, _POINTS)
    known = picture.curve.profile(grid)
    axes.set_yscale("log")
    rdp = [max(bounds.upper, _LEAST) for bounds in picture.rdp.profile(grid)]
    axes.plot(grid, rdp, color=_ORANGE, linestyle="--", label="Rényi bound")
    axes.plot(grid, [max(bounds.upper, _LEAST) for bounds in known], color=_BLUE, label="upper bound")
    lower = [bounds.lower if bounds.lower >= _LEAST else math.nan for bounds in known]
    axes.plot(grid, lower, color=_GREEN, linestyle=":", label="lower bound")
    axes.plot([picture.epsilon.upper], [picture.delta], "o", color=_BLUE, markersize=5)
    axes.set(title="Privacy profile", xlabel="epsilon (nats)", ylabel="delta (probability)", xlim=(0.0, grid[-1]))
    axes.set_ylim(max(picture.delta * 1e-3, _LEAST), 2.0)
    axes.legend(loc="lower left")


def _draw_trade_off(axes: Axes, picture: Picture) -> None:
    """Type II error against type I error; the region below the curve is closed to every attack."""
    epsilon = picture.epsilon.upper
    alphas = sorted({*_ALPHAS, kink(epsilon, picture.delta)})
    axes.plot([0.0, 1.0], [1.0, 0.0], color=_GREY, linestyle=":", linewidth=1.0, label="guessing")
    guarantee = least_false_negatives(picture.curve, epsilon, alphas, _POINTS)
    axes.plot(alphas, guarantee, color=_BLUE, label="guarantee")
    line = [pair_line(alpha, epsilon, picture.delta) for alpha in alphas]
    axes.plot(alphas, line, color=_ORANGE, linestyle="--", label="one (ε, δ) alone")
    axes.set(title="Trade-off", xlabel="type I error (false positive rate)", ylabel="type II error (1 - TPR)")
    axes.set(xlim=(-0.01, 1.0), ylim=(-0.01, 1.02))
    axes.legend(loc="upper right")


def _draw_steps(axes: Axes, picture: Picture) -> None:
    """Epsilon after a number of steps, had stopping there been planned."""
    rows = [(steps, bounds) for steps, bounds in picture.steps if math.isfinite(bounds.upper)]
    counts = [0, *(steps for steps, _ in rows)]
    # Between two tabled numbers of steps the next upper and the previous lower end hold.
    upper, lower = [0.0, *(bounds.upper for _, bounds in rows)], [0.0, *(bounds.lower for _, bounds in rows)]
    axes.plot(counts, upper, color=_BLUE, drawstyle="steps-pre", label="upper bound")
    axes.plot(counts, lower, color=_GREEN, drawstyle="steps-post", linestyle=":", label="lower bound")
    axes.set(title="Epsilon by step", xlabel="steps", ylabel="epsilon (nats)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0.0)
    axes.locator_params(axis="x", nbins=5)
    axes.legend(loc="lower right")


def _first(charges: Sequence[Charge], steps: int) -> list[Charge]:
    """What the first ``steps`` steps cost."""
    found = []
    for charge in charges:
        if steps > 0:
            found.append(replace(charge, count=min(charge.count, steps)))
        steps -= charge.count
    return found
