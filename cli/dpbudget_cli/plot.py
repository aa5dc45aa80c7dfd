"""``dpbudget plot``: figures for papers of schedules, plans and ledgers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dpbudget.errors import InvalidParameter, NotComputable, Tampered
from dpbudget_cli import _output as out
from dpbudget_cli._options import DELTA, JSON, PhaseType, question_options
from dpbudget_cli.main import Leaf

if TYPE_CHECKING:
    from dpbudget.report.document import Document
    from dpbudget.report.paper import Line

_PANELS = ("profile", "trade-off", "steps")
#: For the plans of one ledger.
_SECONDS = 120.0
#: Longer than for a verdict on a ledger that nobody vouches for: the lines are what is asked for.
_FOR_A_LEDGER = 60.0


class ScheduleType(PhaseType):
    """``Q,S,T`` or several of them joined by semicolons."""

    name = "q,s,t;..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The phases as checked triples; raises InvalidParameter (DP005 to DP009)."""
        if not isinstance(value, str):
            return value
        return tuple(super(ScheduleType, self).convert(part, param, ctx) for part in value.split(";"))


@click.command("plot", cls=Leaf)
@click.argument("sources", nargs=-1, metavar="[LEDGER]...")
@click.option(
    "--schedule",
    "schedules",
    type=ScheduleType(),
    multiple=True,
    metavar="Q,S,T",
    help="Its phases, joined by semicolons.",
)
@click.option("--plans", is_flag=True, help="Draw each plan of LEDGER by itself.")
@click.option("--delta", type=DELTA, metavar="D", help="Delta of the schedules.")
@question_options
@click.option("--label", "labels", multiple=True, metavar="TEXT", help="Name of a line, in order of the lines.")
@click.option("--show", "panels", type=click.Choice(_PANELS), multiple=True, help="A panel; all three if not given.")
@click.option("--columns", type=click.Choice(("one", "two")), default="two", help="Width: 3.35 or 6.9 inches.")
@click.option("-o", "--output", required=True, metavar="FILE", help="A .pdf, .svg or .png file, which is replaced.")
@JSON
def command(
    sources: tuple[str, ...],
    schedules: tuple[tuple[tuple[float, float, int], ...], ...],
    plans: bool,
    delta: float | None,
    accountant: str | None,
    adjacency: str | None,
    labels: tuple[str, ...],
    panels: tuple[Any, ...],
    columns: str,
    output: str,
    as_json: bool,
) -> None:
    """Draw privacy profile, trade-off and epsilon over steps of ledgers, reports, plans and schedules for a paper.

    LEDGER is a ledger, an export or a report.json; it is verified first. Lines are upper bounds of the attacker. Text
    has 8 points at the printed width, fonts are embedded, .pdf and .svg are vectors, and the same lines give the same
    bytes. Needs matplotlib.

    Examples:
      dpbudget plot budget.ledger -o budget.svg
      dpbudget plot --schedule 0.01,0.8,500 --schedule 0.01,1.1,500 --delta 1e-5 --columns one -o noise.pdf
    """
    from dpbudget.report.paper import PANELS, save_paper_figure

    lines = [line for source in sources for line in _lines_of(source, plans)]
    if schedules:
        lines += _scheduled(schedules, delta, adjacency or "add-remove", accountant or "prv")
    if not lines:
        raise InvalidParameter("nothing to draw", code="DP064", hint="pass LEDGER, or --schedule Q,S,T with --delta D")
    lines = _labelled(lines, labels)
    save_paper_figure(lines, output, panels=panels or PANELS, columns=columns)
    told = [{"label": line.label, "epsilon": line.epsilon, "delta": line.delta} for line in lines]
    if as_json:
        out.emit_json({"plot": output, "lines": told})
    else:
        from dpbudget.curve import round_up, show_delta

        rows = [(line.label, round_up(line.epsilon), show_delta(line.delta)) for line in lines]
        out.emit_columns(("line", "epsilon at most", "delta"), rows)
        out.talk(f"drawn into {output}")


def _lines_of(source: str, plans: bool) -> list[Line]:
    from dpbudget._pause import interruptible
    from dpbudget._recompute import Clock, OutOfTime
    from dpbudget.report.paper import line_of_plan, line_of_report

    document = _document(source)
    if not plans:
        return [line_of_report(document, None)]
    clock = Clock(_SECONDS)
    try:
        # Nobody may have vouched for the plans, and some would take for ever.
        with interruptible(clock.check):
            return [line_of_plan(run.plan.plan(), f"run {run.run[:8]}") for run in document.runs]
    except OutOfTime:
        raise NotComputable(
            f"the plans of {document.name} were not drawn in {_SECONDS:g} s", hint="draw the ledger as a whole"
        ) from None


def _document(source: str) -> Document:
    """The report of a ledger, or in a file, once it holds; raises Tampered otherwise."""
    from dpbudget.report.make import make_report
    from dpbudget_cli._documents import is_report
    from dpbudget_cli._reports import read_report

    if is_report(source):
        document, problems = read_report(source)[:2]
    else:
        document, problems = make_report(source, time_limit=_FOR_A_LEDGER), []
    problems += [] if document.ok else document.problems
    if problems:
        raise Tampered(f"{document.name} does not hold: {problems[0]}", hint="see all of it: dpbudget verify")
    return document


def _scheduled(schedules: Any, delta: float | None, adjacency: str, accountant: str) -> list[Line]:
    from dpbudget.report.paper import line_of_schedule

    if delta is None:
        raise InvalidParameter(
            "--delta is missing", code="DP064", hint="pass --delta D for the schedules, such as 1e-5"
        )
    facts: Any = {"delta": delta, "adjacency": adjacency, "accountant": accountant, "label": None}
    return [line_of_schedule(phases, **facts) for phases in schedules]


def _labelled(lines: list[Line], labels: tuple[str, ...]) -> list[Line]:
    from dataclasses import replace

    if len(labels) > len(lines):
        raise InvalidParameter(
            f"{len(labels)} labels for {len(lines)} lines", code="DP064", hint="pass at most one --label for each line"
        )
    named = [replace(line, label=label) for line, label in zip(lines, labels, strict=False)]
    return [*named, *lines[len(named) :]]
