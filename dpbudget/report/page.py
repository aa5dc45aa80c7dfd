"""One self-contained page: no script that runs, nothing that is loaded, the same bytes for the same document.

The document itself lies in the page as JSON, so that ``dpbudget verify report.html`` can compute its numbers again and
make the page anew: a page in which one digit was changed is not what its own numbers give.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from functools import cache
from importlib.resources import files

from dpbudget.curve import round_up
from dpbudget.errors import Tampered
from dpbudget.report.document import Document, read, write
from dpbudget.report.html import Child, Safe, join, tag
from dpbudget.report.sections import (
    attack_section,
    budget_section,
    lower_end,
    plans_section,
    section,
    verdict_lists,
)
from dpbudget.report.words import ASSUMPTIONS, NOT_COVERED, small

START = b"<!doctype html>\n"
#: A larger document is not put into the page, so that the page stays below a megabyte.
MOST_JSON = 400_000
#: Digits of the headline; the claim below it has six.
_HEADLINE = 4
_DATA = re.compile(rb'<script type="application/json" id="report">(.*?)</script>', re.DOTALL)
_VERDICTS = {
    ("valid", True): ("good", "✓", "Verified"),
    ("valid", False): ("fair", "!", "Consistent; the owner's key was not known from outside"),
    ("not anchored", True): ("fair", "!", "Valid, but not the history that was expected"),
    ("not anchored", False): ("fair", "!", "Valid, but not the history that was expected"),
    ("not valid", True): ("bad", "✕", "Not valid"),
    ("not valid", False): ("bad", "✕", "Not valid"),
}


def page(document: Document) -> bytes:
    """The page, in UTF-8; below a megabyte."""
    style, data = _style(), _data(document)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"dpbudget {document.dpbudget}"),
        tag("title", f"Privacy budget report: {document.name}"),
        tag("style", Safe(style)),
    )
    sections = [
        ("claim", "Claim", _claim(document)),
        ("budget", "Budget", budget_section(document) if document.budget else None),
        ("attack", "Attacker", attack_section(document)),
        ("plans", "Plans", plans_section(document)),
        ("limits", "Limits", _limits()),
        ("verify", "Verify", _verification(document, "report.json" if data is None else "report.html")),
    ]
    kept = [(name, title, body) for name, title, body in sections if body is not None]
    body = tag(
        "body",
        tag("a", "Skip to the report", href="#main", class_="skip"),
        tag("header", _headline(document)),
        tag(
            "nav",
            tag("ul", *(tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in kept)),
            aria_label="Sections",
        ),
        tag("main", *(part for _, _, part in kept), id="main"),
        tag("footer", _footer(document)),
        data,
    )
    return START + tag("html", head, body, lang="en").encode("utf-8") + b"\n"


def read_page(data: bytes) -> Document:
    """The document in a page; whether the page says the same, only :func:`page` of it shows.

    Raises:
        Tampered: no page with a document in it, or one whose document was changed (DP082, DP071).
    """
    found = _DATA.search(data)
    if not data.startswith(START) or found is None:
        raise Tampered("not a page that dpbudget report wrote with its numbers in it", code="DP082")
    return read(found[1])


def _headline(document: Document) -> Safe:
    colour, mark, words = _VERDICTS[document.verdict, document.trusted]
    title = tag("h1", "Privacy budget report of ", tag("strong", document.name))
    pill = tag("p", tag("span", mark, aria_hidden="true"), words, class_=f"pill {colour}")
    if document.epsilon is None or document.delta is None:
        return join(title, tag("p", "No guarantee", class_="big"), pill)
    if document.epsilon.upper == 0.0:
        budget = document.budget
        granted = f"of {budget.epsilon:.6g} granted, delta {small(budget.delta)}" if budget else ""
        return join(title, tag("p", "ε = 0 spent", tag("small", granted), class_="big"), pill)
    below = tag("small", f"at δ = {small(document.delta)}; in the worst case at least {lower_end(document)}")
    return join(title, tag("p", f"ε ≤ {round_up(document.epsilon.upper, _HEADLINE)}", below, class_="big"), pill)


def _claim(document: Document) -> Safe:
    rows = []
    for paragraph in document.statement:
        subject, _, text = paragraph.partition(": ")
        rows.append(tag("div", tag("dt", subject), tag("dd", text[:1].upper() + text[1:])))
    return section("claim", "The claim in plain words", tag("dl", *rows, class_="claim"))


def _limits() -> Safe:
    def items(pairs: tuple[tuple[str, str], ...]) -> Safe:
        return tag("ul", *(tag("li", tag("strong", f"{name}: "), text) for name, text in pairs), class_="list")

    return section(
        "limits",
        "What it rests on, and where it ends",
        tag(
            "div",
            tag("div", tag("h3", "Assumed"), items(ASSUMPTIONS)),
            tag("div", tag("h3", "Not covered"), items(NOT_COVERED)),
            class_="two",
        ),
    )


def _verification(document: Document, name: str) -> Safe:
    again = f"; epsilon computed again by {' and '.join(document.checked_by)}" if document.checked_by else ""
    checks: list[tuple[bool, str]] = [
        (document.verdict != "not valid", f"Every record, signature and rule{again}"),
        (document.trusted and document.ledger is not None, "The owner's key was known from outside the file"),
        (document.anchored, "A head that was kept elsewhere is part of this history"),
    ]
    if document.heads is not None:
        checks.append((True, f"All {document.heads} heads that the store kept"))
    items = [
        tag(
            "li",
            tag("span", "✓" if good else "–", class_=f"mark {'good' if good else 'fair'}", aria_hidden="true"),
            tag("span", f"{'Checked' if good else 'Not shown'}: ", text[:1].lower() + text[1:]),
        )
        for good, text in checks
    ]
    return section(
        "verify",
        "Verification",
        tag("ul", *items, class_="checks"),
        *verdict_lists(document),
        *_identity(document),
        tag("h3", "Do it again"),
        tag("p", _AGAIN),
        *(join(tag("p", text), tag("pre", tag("code", line))) for text, line in commands(document, name)),
    )


_AGAIN = (
    "A page proves nothing; the ledger does. With the ledger or an export of it, and the owner's public key from the "
    "owner, anybody repeats the verification offline. A key that stands in this page is no substitute."
)


_ANEW = "Compute the numbers of this report again, from this file alone:"


def _identity(document: Document) -> list[Safe]:
    rows = (
        ("Newest head (records:root)", document.head),
        *(("Expected head", head) for head in document.anchors),
        ("Ledger id", document.ledger),
        ("Owner's public key", document.owner),
        ("Writer's public key", document.writer),
    )
    facts = [_fact(name, tag("span", text, class_="hash"), class_="wide") for name, text in rows if text]
    if document.public_data is not None:
        facts.append(_fact("Data", "declared public" if document.public_data else "private"))
        facts.append(_fact("Records", f"{document.records:,}"))
    return [tag("h3", "Which history"), tag("dl", *facts, class_="facts")] if facts else []


def _fact(name: str, value: Child, class_: str | None = None) -> Safe:
    return tag("div", tag("dt", name), tag("dd", value), class_=class_)


def commands(document: Document, name: str) -> list[tuple[str, str]]:
    """What to do and the exact command, for a shell; the report is called ``name`` there."""
    ledger = shlex.quote(document.name if not document.name.startswith("-") else f"./{document.name}")
    again = f"dpbudget verify {ledger} --trust {document.owner or 'OWNER.pub'}"
    if document.head and document.ok:
        again += f" --expect-head {document.head}"
    found = [("Verify the ledger, with the owner's key and this head:", again)]
    if document.ok:
        found.append((_ANEW, f"dpbudget verify {name}"))
    return found


def _footer(document: Document) -> Safe:
    names = ", ".join(f"{name} {version}" for name, version in document.accountants.items())
    return tag(
        "p",
        f"Made by dpbudget {document.dpbudget} (accountants {names}). This file loads nothing and runs no script.",
    )


def _data(document: Document) -> Safe | None:
    """The JSON form, which no browser runs; ``<`` is written so that it can end no element."""
    text = json.dumps(json.loads(write(document)), separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    if len(text) > MOST_JSON:
        return None
    return tag("script", Safe(text), type="application/json", id="report")


@cache
def _style() -> str:
    text = files("dpbudget.report").joinpath("page.css").read_text(encoding="utf-8")
    return text.replace("\n", "")


def _policy(style: str) -> str:
    """Nothing may be loaded or run, and no style but this one applies."""
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
