"""The three charts of a report, each with the table that says the same in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from dpbudget.curve import round_down, round_up
from dpbudget.report.document import Document
from dpbudget.report.figures import TABLED
from dpbudget.report.html import Child, Safe, tag
from dpbudget.report.svg import Chart, linear_axis, logarithmic_axis
from dpbudget.report.words import percent, small

#: Rows of the table of the profile.
_ROWS = 9
_LEAST_DELTA = 1e-300
#: Above this height there is room for words below the trade-off.
_ROOMY = 0.2


def table(
    caption: str, headers: Sequence[str], rows: Sequence[Sequence[Child]], *, numbers: bool = True, named: bool = False
) -> Safe:
    """A table whose first column names its rows; on a narrow screen it is scrolled by itself.

    ``named``: a heading above names it already, so that the caption is not shown.
    """
    head = tag("tr", *(tag("th", text, scope="col") for text in headers))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    inner = tag(
        "table",
        tag("caption", caption, class_="unseen" if named else None),
        tag("thead", head),
        tag("tbody", *body),
        class_="numbers" if numbers else "words",
    )
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def legend(*entries: tuple[str, str]) -> Safe:
    """What the lines of a chart mean; each entry is the style of a line and its meaning."""
    items = [
        tag(
            "li",
            tag(
                "svg",
                tag("line", x1=0.0, x2=28.0, y1=6.0, y2=6.0, class_=f"line {style}"),
                viewBox="0 0 28 12",
                class_="swatch",
                aria_hidden="true",
            ),
            text,
        )
        for style, text in entries
    ]
    return tag("ul", *items, class_="legend")


def _figure(chart: Chart, key: Safe, numbers: Safe) -> Safe:
    return tag("div", tag("figure", chart.svg(), tag("figcaption", key)), numbers, class_="pair")


def profile_figure(document: Document) -> Safe | None:
    """Delta against epsilon; None where the profile is unknown."""
    points = [(point.epsilon, max(point.upper, _LEAST_DELTA)) for point in document.profile]
    if not points:
        return None
    mark = _mark(document)
    bottom = max((mark[1] if mark else points[-1][1]) * 1e-3, _LEAST_DELTA)
    lower = [(point.epsilon, point.lower) for point in document.profile if point.lower >= bottom]
    chart = Chart(
        "profile",
        "Privacy profile: delta against epsilon",
        f"A falling line from delta {round_up(points[0][1], 3)} at epsilon 0 to delta {small(points[-1][1])} at "
        f"epsilon {points[-1][0]:.4g}. The table beside it has the numbers.",
        linear_axis("epsilon", points[-1][0]),
        logarithmic_axis("delta", bottom, 1.0),
    )
    chart.line(points, "a")
    chart.line(lower, "c")
    if mark:
        chart.dot(mark, f"ε ≤ {round_up(mark[0], 4)}")
    known = any(point.lower > 0.0 for point in document.profile)
    rows = [
        (f"{point.epsilon:.4g}", _three(point.upper, up=True), *([_three(point.lower, up=False)] if known else []))
        for point in document.profile[:: max(1, (len(document.profile) - 1) // (_ROWS - 1))]
    ]
    key = legend(("a", "upper bound, the guarantee"), *([("c", "lower bound")] if lower else []))
    headers = ("epsilon", "delta at most", *(["at least"] if known else []))
    return _figure(chart, key, table("Delta at each epsilon", headers, rows))


def _mark(document: Document) -> tuple[float, float] | None:
    """The pair that the profile is marked at."""
    if document.scope == "spent" and document.epsilon and document.delta:
        return document.epsilon.upper, document.delta
    if document.scope == "pair" and document.budget:
        return document.budget.epsilon, document.budget.delta
    return None


def _three(delta: float, *, up: bool) -> str:
    """A bound of delta in three digits, rounded outward."""
    if delta <= 0.0:
        return "0"
    text = f"{float((round_up if up else round_down)(delta, 3)):.3g}"
    return text.replace("e-0", "e-")


def trade_off_figure(document: Document) -> Safe | None:
    """False negatives against false positives; None where the curve is unknown."""
    points = [(point.false_positives, point.false_negatives) for point in document.trade_off]
    if not points:
        return None
    chart = Chart(
        "trade-off",
        "Trade-off of any attack: false negatives against false positives",
        "A falling line below the diagonal of guessing. No attack reaches the region below the line. The table beside "
        "it has the numbers.",
        linear_axis("false positive rate", 1.0, show=_percent),
        linear_axis("false negative rate", 1.0, show=_percent),
    )
    whole = [(0.0, max(points[0][1], 0.0)), *points]
    chart.area_below(whole, "closed")
    chart.line([(0.0, 1.0), (1.0, 0.0)], "d")
    chart.line(whole, "a")
    if (height := _at(points, 0.3)) > _ROOMY:
        chart.note((0.3, 0.4 * height), "no attack gets here")
    rows = [
        (
            f"{100 * alpha:.4g} %",
            percent(1.0 - beta),
            f"{round_down(100.0 * beta, 3)} %",
        )
        for alpha, beta in points
        if alpha in TABLED
    ]
    key = legend(("a", "no attack gets below this line"), ("d", "guessing"))
    numbers = table("What any attack can reach", ("accused wrongly", "found, at most", "missed, at least"), rows)
    return _figure(chart, key, numbers)


def _at(points: Sequence[tuple[float, float]], where: float) -> float:
    """The value of the point nearest to ``where``."""
    return min(points, key=lambda point: abs(point[0] - where))[1]


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def spending_figure(document: Document) -> Safe | None:
    """Epsilon against charged steps; None before the first step."""
    points = document.spending
    if len(points) < 2 or points[-1].steps == 0:
        return None
    top = max(max(point.total for point in points), points[-1].spent)
    chart = Chart(
        "spending",
        "Budget over the steps that were charged",
        f"Epsilon that is spent rises to {round_up(points[-1].spent, 6)} after {points[-1].steps} steps; the total is "
        f"{points[-1].total:.6g}. The table of events has the numbers.",
        linear_axis("steps charged, in the order of the ledger", float(points[-1].steps)),
        linear_axis("epsilon", 1.04 * top),
    )
    chart.stairs([(point.steps, point.total) for point in points], "d")
    alone = [(point.steps, point.alone) for point in points if point.alone is not None]
    chart.stairs(alone, "c", early=True)
    if document.renyi is None:
        # A portfolio is charged whole, before its first step.
        chart.stairs([(0.0, points[1].spent), *((point.steps, point.spent) for point in points[1:])], "a")
    else:
        chart.stairs([(point.steps, point.spent) for point in points], "a", early=True)
    entries = [("a", "spent: the guarantee"), ("d", "granted in total")]
    if len(alone) > 1:
        entries.insert(1, ("c", "what the steps so far cost, had the plans ended there"))
    return tag("figure", chart.svg(), tag("figcaption", legend(*entries)), class_="single")
