"""``dpbudget verify`` of a report, as JSON or as a page: its numbers again, from what stands in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import click

from dpbudget.curve import round_down, round_up, show_delta
from dpbudget.errors import Tampered
from dpbudget_cli import _output as out

if TYPE_CHECKING:
    from dpbudget.report.document import Document
    from dpbudget_cli._documents import Demands

#: Seconds for a report, which nobody signed; an honest one takes one or two.
SECONDS = 30.0
_NOT_SHOWN = (
    "that the ledger holds these plans and charges and no others: verify it against the head",
    "that owner and writer are who they should be: verify the ledger with --trust",
)


class Read(NamedTuple):
    """A report that was read.

    Attributes:
        document: its numbers and words.
        problems: what of them does not follow from its plans.
        unseen: it is a page of another version, which is not made anew here, so that it may show other numbers.
    """

    document: Document
    problems: list[str]
    unseen: bool


def read_report(path: str, seconds: float = SECONDS) -> Read:
    """The report in a JSON file or a page, and what of its numbers and words does not follow from its plans.

    Raises:
        Tampered: its digest or form does not hold (DP071, DP082).
    """
    from dpbudget._recompute import Clock
    from dpbudget.ledger.store.files import as_path, read_regular
    from dpbudget.report.check import check_report
    from dpbudget.report.document import MAX_BYTES, read
    from dpbudget.report.make import this_version
    from dpbudget.report.page import page, read_page

    data = read_regular(as_path(path), MAX_BYTES)
    is_page = data.startswith(b"<")
    document = read_page(data) if is_page else read(data)
    problems = check_report(document, Clock(seconds))
    # A page is made of numbers that hold, and of no others.
    other_version = document.dpbudget != this_version()
    if is_page and not problems and not other_version and page(document) != data:
        problems.append("the page says something else than its own numbers: it was changed after it was written")
    return Read(document, problems, is_page and other_version)


def show_report(path: str, demands: Demands) -> None:
    """Check the report in ``path`` and say what follows from it.

    The exit code is 1 if something does not, and 5 where nobody looked at what a page of another version shows.

    Raises:
        Tampered: its digest or form does not hold (DP071, DP082), or it names another owner than the trusted one
            (DP072).
        Unanchored: it is about another head than the expected one (DP079).
    """
    from dpbudget.ledger.keys import load_public_key
    from dpbudget.report.make import this_version

    document, problems, unseen = read_report(path, click.get_current_context().params.get("time_limit") or SECONDS)
    other_version = document.dpbudget != this_version()
    if demands.trust is not None and document.owner not in (None, load_public_key(demands.trust).hex):
        raise Tampered(
            f"the report names the owner {document.owner}, another key than the trusted one",
            code="DP072",
            hint="after a rekey of the owner, trust the newest key, or verify the ledger itself",
        )
    demands.meet(document.head, "report", "verify the ledger itself for other heads")
    if not document.ok:
        problems = [*problems, *(f"of the ledger, when the report was made: {text}" for text in document.problems)]
        problems = problems or ["the ledger did not hold when the report was made"]
    ends = document.epsilon
    notes = [f"its words are those of dpbudget {document.dpbudget}, and were not compared"] if other_version else []
    if unseen:
        notes.append("what the page shows may be something else: verify it with that version, or make it anew")
    if demands.as_json:
        out.emit_json(
            {
                "ok": not problems and not unseen,
                "problems": problems,
                "notes": notes,
                "epsilon": ends and {"lower": ends.lower, "upper": ends.upper, "kind": ends.kind},
                "delta": document.delta,
                "steps": document.steps,
                "ledger": document.ledger,
                "head": document.head,
                "checked_by": list(document.checked_by),
                "not_proved": list(_NOT_SHOWN),
            }
        )
    else:
        _tell(document.name, problems, notes, unseen=unseen)
        if not problems and ends is not None and document.delta is not None:
            upper, lower = round_up(ends.upper, 10), round_down(ends.lower, 10)
            spent = f"epsilon <= {upper} at delta {show_delta(document.delta)}, lower bound {lower}"
            click.echo(f"  {spent if document.steps else 'nothing spent yet'}")
            click.echo(out.clean(f"  head {document.head}"))
            for line in _NOT_SHOWN:
                click.echo(f"  not shown: {line}")
    if problems or unseen:
        click.get_current_context().exit(1 if problems else 5)


def _tell(name: str, problems: list[str], notes: list[str], *, unseen: bool) -> None:
    said = "NOT CONFIRMED" if problems else "CONFIRMED: every number follows from the plans and charges that are stated"
    if unseen and not problems:
        said = "NOT COMPARED: the numbers in its data follow from their plans and charges; what it shows was not read"
    click.echo(out.clean(f"{said}; report of {name}"))
    for problem in problems:
        click.echo(out.clean(f"  problem: {problem}"))
    for note in notes:
        click.echo(out.clean(f"  note: {note}"))
