"""Figures for papers: several schedules, plans or ledgers in one, at the width of a column.

Style. Text of 8 points at the size at which it is printed (7 in the legend), DejaVu Sans, which comes with matplotlib,
so that every machine gives the same bytes. One column is 3.35 inches wide with the panels one below the other, two
columns are 6.9 inches with the panels side by side; a panel is 2.1 inches high. Lines of 1.2 points in the colours of
Okabe and Ito, each with dashes of its own. Fonts are embedded as TrueType (Type 42) in PDF and are outlines in SVG;
.png has 300 dots an inch. Every line is an upper bound of the attacker, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpbudget.curve import round_up
from dpbudget.errors import InvalidParameter, NotComputable
from dpbudget.plan import Plan
from dpbudget.report.document import Document
from dpbudget.report.figures import FALSE_POSITIVES, PROFILE_POINTS, THRESHOLDS
from dpbudget.report.lines import epsilon_grid, least_false_negatives
from dpbudget.report.plots import Picture, figure_of_plan, figure_of_schedule, save_drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = Literal["profile", "trade-off", "steps"]
PANELS: tuple[Panel, ...] = ("profile", "trade-off", "steps")
#: Width of a figure in inches, by name.
WIDTHS = {"one": 3.35, "two": 6.9}
_PANEL_HEIGHT, _DOTS = 2.1, 300
#: More lines than these cannot be told apart.
MOST_LINES = 7
_LINES = (
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#000000", (0, (5, 1, 1, 1, 1, 1))),
    ("#E69F00", (0, (8, 2))),
    ("#56B4E9", (0, (2, 1))),
)
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "svg.hashsalt": "dpbudget",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}
#: Deltas below this are not drawn.
_LEAST = 1e-300


@dataclass(frozen=True)
class Line:
    """One schedule, plan or ledger, as numbers.

    Attributes:
        label: its name in the legend.
        epsilon, delta: its guarantee.
        mark: the pair at which its profile has a dot.
        profile: (epsilon, delta at most).
        trade_off: (false positive rate, false negative rate at least).
        steps: (steps, epsilon at most).
    """

    label: str
    epsilon: float
    delta: float
    mark: tuple[float, float]
    profile: tuple[tuple[float, float], ...]
    trade_off: tuple[tuple[float, float], ...]
    steps: tuple[tuple[int, float], ...]


def line_of_schedule(
    phases: Sequence[tuple[float, float, int]], *, delta: float, adjacency: str, accountant: str, label: str | None
) -> Line:
    """The line of a schedule of (sampling rate, noise multiplier, steps), in real arithmetic."""
    told = "; ".join(f"q={rate:.4g}, σ={sigma:.4g}, T={steps}" for rate, sigma, steps in phases)
    return _line(label or told, figure_of_schedule(phases, delta=delta, adjacency=adjacency, accountant=accountant))


def line_of_plan(plan: Plan, label: str) -> Line:
    """The line of a plan, bounded noise tail included."""
    return _line(label, figure_of_plan(plan))


def line_of_report(document: Document, label: str | None) -> Line:
    """The line of a ledger: of what it spent, or of its plans where none began.

    Raises:
        InvalidParameter: no plan is signed in, so there is no profile (DP060).
        NotComputable: there is one, and it could not be computed in time (DP063).
    """
    if not document.profile and document.left_out:
        raise NotComputable(
            f"{document.name} cannot be drawn: {document.left_out[0]}",
            hint="draw its report, which has the time that it needs: dpbudget report LEDGER --trust KEY -o FILE.json",
        )
    if not document.profile or document.delta is None or document.epsilon is None:
        raise InvalidParameter(
            f"{document.name} has nothing to draw: no plan is signed in", code="DP060", hint="dpbudget plan new"
        )
    points, pair = document.spending, document.scope == "pair"
    by_step = [(p.steps, p.spent if document.renyi else p.alone) for p in points]
    epsilon = document.epsilon.upper or max(run.plan.claim.epsilon for run in document.runs)
    mark = (document.budget.epsilon, document.budget.delta) if pair and document.budget else (epsilon, document.delta)
    return Line(
        label or document.name,
        epsilon,
        document.delta,
        mark,
        tuple((point.epsilon, point.upper) for point in document.profile),
        tuple((point.false_positives, point.false_negatives) for point in document.trade_off),
        tuple((steps, spent) for steps, spent in by_step if spent is not None),
    )


def _line(label: str, picture: Picture) -> Line:
    epsilon = picture.epsilon.upper
    grid = epsilon_grid(epsilon, PROFILE_POINTS)
    profile = zip(grid, (bounds.upper for bounds in picture.curve.profile(grid)), strict=True)
    betas = least_false_negatives(picture.curve, epsilon, FALSE_POSITIVES, THRESHOLDS)
    return Line(
        label,
        epsilon,
        picture.delta,
        (epsilon, picture.delta),
        tuple(profile),
        tuple(zip(FALSE_POSITIVES, betas, strict=True)),
        ((0, 0.0), *((steps, bounds.upper) for steps, bounds in picture.steps)),
    )


def save_paper_figure(
    lines: Sequence[Line], path: str | Path, *, panels: Sequence[Panel] = PANELS, columns: str = "two"
) -> None:
    """Write the figure as .png, .svg or .pdf; an existing file is replaced, and the same lines give the same bytes.

    Raises:
        InvalidParameter: no line, more than seven, or another suffix (DP060).
        MissingExtra: matplotlib is not installed (DP090).
        Unreadable: the place cannot be written (DP070).
    """
    if not 1 <= len(lines) <= MOST_LINES:
        raise InvalidParameter(
            f"a figure shows 1 to {MOST_LINES} lines, got {len(lines)}", code="DP060", hint="draw several figures"
        )
    side_by_side = columns == "two"
    # The legend below the panels has a line of text for each row of entries.
    legend_rows = -(-len(lines) // 2) if side_by_side else len(lines)
    height = _PANEL_HEIGHT * (1 if side_by_side else len(panels)) + 0.17 * legend_rows
    size = (WIDTHS[columns], height)
    save_drawing(lambda figure: _draw(figure, lines, panels, side_by_side), path, size, _STYLE, dpi=_DOTS)


def _draw(figure: Figure, lines: Sequence[Line], panels: Sequence[Panel], side_by_side: bool) -> None:
    shape = (1, len(panels)) if side_by_side else (len(panels), 1)
    places = figure.subplots(*shape, squeeze=False).flat
    for panel, axes in zip(panels, places, strict=True):
        _DRAW[panel](axes, lines)
    # Drawn by hand: in a figure each line stands once, whatever the number of panels.
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(lines)) if side_by_side else 1)


def _each(lines: Sequence[Line]) -> Sequence[tuple[Line, dict[str, Any]]]:
    styles = ({"color": color, "linestyle": dash} for color, dash in _LINES)
    return [(line, {**style, "label": _label(line)}) for line, style in zip(lines, styles, strict=False)]


def _label(line: Line) -> str:
    # A dollar sign in a file's name would begin a formula.
    return f"{line.label}: ε = {round_up(line.epsilon, 4)}".replace("$", r"\$")


def _draw_profile(axes: Axes, lines: Sequence[Line]) -> None:
    axes.set_yscale("log")
    for line, style in _each(lines):
        xs, ys = zip(*line.profile, strict=True)
        axes.plot(xs, [max(y, _LEAST) for y in ys], **style)
        axes.plot([line.mark[0]], [line.mark[1]], "o", color=style["color"], markersize=3)
    axes.set(xlabel="ε", ylabel="δ", title="Privacy profile")
    axes.set_xlim(left=0.0)
    axes.set_ylim(max(min(line.delta for line in lines) * 1e-2, _LEAST), 2.0)


def _draw_trade_off(axes: Axes, lines: Sequence[Line]) -> None:
    for line, style in _each(lines):
        xs, ys = zip(*((0.0, line.trade_off[0][1]), *line.trade_off), strict=True)
        axes.plot(xs, ys, **style)
    axes.plot([0.0, 1.0], [1.0, 0.0], color="#999999", linewidth=0.7)
    axes.set(xlabel="false positive rate", ylabel="false negative rate, at least", title="Trade-off")
    axes.set(xlim=(0.0, 1.0), ylim=(0.0, 1.0))


def _draw_steps(axes: Axes, lines: Sequence[Line]) -> None:
    for line, style in _each(lines):
        if len(line.steps) > 1:
            xs, ys = zip(*line.steps, strict=True)
            # Between two numbers of steps the next bound holds, and a straight line would not.
            axes.plot(xs, ys, drawstyle="steps-pre", **style)
    axes.set(xlabel="steps", ylabel="ε, at most", title="Epsilon over steps")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0.0)
    axes.locator_params(axis="x", nbins=4)


_DRAW: dict[Panel, Callable[[Axes, Sequence[Line]], None]] = {
    "profile": _draw_profile,
    "trade-off": _draw_trade_off,
    "steps": _draw_steps,
}
