"""The page: whole, small, alone, escaped, the same for the same ledger, and readable by everybody."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from pagekit import Element, parse
from reportkit import OWNER, Shelf, build, plan_for

from dpbudget.curve import round_up
from dpbudget.errors import Tampered
from dpbudget.mechanisms import Adjacency
from dpbudget.report.document import Document, EventPart, write
from dpbudget.report.html import Safe, escape, join, tag
from dpbudget.report.make import make_report, name_of, printable
from dpbudget.report.markdown import markdown, plain
from dpbudget.report.page import commands, page, read_page
from dpbudget.report.words import small

NAMES = ["one", "two", "phases", "rdp", "users", "waiting", "empty", "changed", "committed"]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&`[a](javascript:b)|\u202e\x1b[2J\n"


@pytest.fixture(params=NAMES)
def document(request: pytest.FixtureRequest, shelf: Shelf) -> Document:
    return shelf.report(request.param)


def test_a_page_is_well_formed_and_below_a_megabyte(document: Document) -> None:
    data = page(document)
    assert len(data) < 1_000_000
    assert data.startswith(b"<!doctype html>\n")
    assert parse(data).one("html").attributes["lang"] == "en"


def test_a_page_says_of_every_run_where_its_noise_comes_from(shelf: Shelf) -> None:
    document = shelf.report("committed")
    fresh, committed = document.runs
    assert (fresh.commitment, fresh.entropy, committed.entropy) == (None, None, "5e" * 32)
    text = page(document).decode()
    for said in ("fresh, a new one in every lease", "committed before the run", committed.commitment, "5e" * 32):
        assert text.split('<script type="application/json"')[0].count(str(said)) == 1
    assert f"Noise of run {committed.run[:8]} committed to a key" in text
    assert f"Auditor's entropy for run {committed.run[:8]}" in text.replace("&#39;", "'")


def test_nothing_is_loaded_and_nothing_runs(document: Document) -> None:
    root = parse(page(document))
    assert not root.all("link", "img", "iframe", "object", "embed", "form", "base", "audio", "video", "use", "image")
    (data,) = root.all("script")
    assert data.attributes == {"type": "application/json", "id": "report"}
    for element in root.walk():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), name
            assert name not in ("src", "srcset", "style", "action", "xlink:href", "data"), name
            if name == "href":
                assert value
                assert value.startswith("#"), value
    style = "".join(str(part) for part in root.one("style").parts)
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(rb"https?:", page(document).split(b'<script type="application/json"')[0])


def test_the_policy_allows_this_style_and_nothing_else(document: Document) -> None:
    root = parse(page(document))
    (policy,) = [m for m in root.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy"]
    style = "".join(str(part) for part in root.one("style").parts)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    wanted = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert policy.attributes["content"] == wanted


def test_landmarks_headings_and_names_are_in_order(document: Document) -> None:
    root = parse(page(document))
    for name in ("header", "nav", "main", "footer", "h1"):
        root.one(name)
    assert root.one("head").one("title").text
    levels = [int(element.name[1]) for element in root.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [element.attributes["id"] for element in root.walk() if "id" in element.attributes]
    assert len(set(ids)) == len(ids)
    named = ("href", "aria-labelledby", "aria-describedby")
    for element in root.walk():
        for name in named:
            if value := element.attributes.get(name):
                assert value.lstrip("#") in ids, value


def test_tables_have_captions_and_headers_with_their_scope(document: Document) -> None:
    root = parse(page(document))
    for table in root.all("table"):
        assert table.one("caption").text
        assert all(header.attributes.get("scope") in ("col", "row") for header in table.all("th"))
        width = len(table.one("thead").all("th"))
        assert all(len(row.all("th", "td")) == width for row in table.one("tbody").all("tr"))
        assert all(len(row.all("th")) == 1 for row in table.one("tbody").all("tr"))


def test_every_chart_has_a_title_a_description_and_a_table_beside_it(shelf: Shelf) -> None:
    root = parse(page(shelf.report("two")))
    charts = [svg for svg in root.all("svg") if svg.attributes.get("class") == "chart"]
    assert len(charts) == 3
    for chart in charts:
        assert chart.attributes["role"] == "img"
        assert chart.one("title").text
        assert len(chart.one("desc").text) > 40
        figure = chart.parent
        assert figure is not None
        assert figure.parent is not None
        assert figure.parent.all("table")
    for bar in (svg for svg in root.all("svg") if svg.attributes.get("class") == "bar"):
        assert bar.one("title").text


def test_a_page_says_what_the_task_asks_for(shelf: Shelf) -> None:
    document = shelf.report("two", trust=OWNER.public, expect_head=shelf.report("two").head)
    text = parse(page(document)).text
    assert document.epsilon is not None
    for fact in (
        "two.ledger", f"ε ≤ {round_up(document.epsilon.upper, 4)}", "at δ = 1e-5", "Verified", "Protected", "Promise",
        "By run", "Over time", "Trade-off curve", "Privacy profile", "Plans", "Assumed", "Not covered", "Tuning",
        "Preprocessing", "Public weights", document.head, document.ledger, document.owner,
        f"dpbudget verify two.ledger --trust {document.owner} --expect-head {document.head}",
        "dpbudget verify report.html", *(run.run for run in document.runs), *(run.statement for run in document.runs),
    ):  # fmt: skip
        assert fact is not None
        assert fact in text, fact
    for run in document.runs:
        phase = run.plan.phases[0]
        for number in (f"{phase.noise_multiplier:.6g}", f"{run.planned}", round_up(run.plan.claim.epsilon)):
            assert number in text


def test_numbers_of_the_page_are_those_of_verify(shelf: Shelf) -> None:
    verdict, text = shelf.verdict("two"), parse(page(shelf.report("two"))).text
    assert verdict.epsilon is not None
    assert verdict.budget is not None
    assert f"epsilon at most {round_up(verdict.epsilon.upper)} at delta {small(verdict.delta or 0)}" in text
    assert f"{round_up(verdict.epsilon.upper)} of {verdict.budget[0]:g} spent" in text
    assert f"{verdict.steps} steps charged" in text


def test_the_same_ledger_gives_the_same_page(shelf: Shelf) -> None:
    assert page(shelf.report("changed", trust=OWNER.public)) == page(shelf.report("changed"))


def test_a_page_reads_back_as_its_document(document: Document) -> None:
    data = page(document)
    assert read_page(data) == document
    assert page(read_page(data)) == data


def test_a_page_without_its_numbers_is_refused(shelf: Shelf) -> None:
    data = page(shelf.report("one"))
    for changed in (b"<!doctype html>\n<p>Hello</p>", data[1:], data.replace(b'id="report">', b'id="other">')):
        with pytest.raises(Tampered):
            read_page(changed)
    with pytest.raises(Tampered):
        read_page(data.replace(b'"steps":20', b'"steps":21', 1))


# ---------------------------------------------------------------------------------------------------------------------
# What a hostile ledger, name or message could put into it
# ---------------------------------------------------------------------------------------------------------------------


def hostile(document: Document) -> Document:
    """The document with hostile text wherever a document holds text that is not of a fixed form."""
    event = EventPart(first=0, last=0, kind="note", about=HOSTILE, steps={})
    changes = {
        "name": HOSTILE, "problems": (HOSTILE,), "warnings": (HOSTILE,), "dpbudget": HOSTILE, "anchors": (HOSTILE,),
        "statement": (f"Promise: {HOSTILE}",), "left_out": (HOSTILE,), "checked_by": (HOSTILE,), "history": (event,),
        "accountants": {HOSTILE: 1},
    }  # fmt: skip
    return document.model_copy(update=changes)


def test_no_text_becomes_markup(shelf: Shelf) -> None:
    clean, bad = parse(page(shelf.report("two"))), page(hostile(shelf.report("two")))
    assert b"<script>alert" not in bad
    assert b"<img" not in bad
    root = parse(bad)
    assert not root.all("img")
    assert len(root.all("script")) == len(clean.all("script")) == 1
    assert not [name for element in root.walk() for name in element.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in root.text
    # The data block holds the same text and ends where it should.
    json.loads("".join(str(part) for part in root.one("script").parts))
    assert read_page(bad) == hostile(shelf.report("two"))


def test_no_text_becomes_markdown(shelf: Shelf) -> None:
    text = markdown(hostile(shelf.report("two")))
    shown = [line for line in text.splitlines() if "alert" in line]
    assert shown
    for line in shown:
        if not line.startswith("    "):  # in an indented block nothing means anything
            assert not re.search(r"(?<!\\)[<>`|\[]", line.replace("**", "").replace("[2J", "")), line


def test_plain_text_keeps_to_its_line() -> None:
    assert plain("a\n# b <i>*c*</i>") == r"a # b \<i\>\*c\*\</i\>"


def test_a_file_with_a_hostile_name_is_shown_and_quoted(shelf: Shelf, tmp_path: Path) -> None:
    place = tmp_path / "x<script>;touch y;'.ledger"
    place.write_bytes(shelf.path("one").read_bytes())
    document = make_report(place, trust=OWNER.public)
    assert document.name == "x<script>;touch y;'.ledger"
    text = parse(page(document)).text
    assert """dpbudget verify 'x<script>;touch y;'"'"'.ledger' --trust""" in text


def test_names_hold_no_folders_hosts_or_directions() -> None:
    assert name_of("/srv/secret/folder/a.ledger") == "a.ledger"
    assert name_of("postgresql://user:word@host/base#team") == "postgresql://...#team"
    assert printable("a\u202eb\x1b[0m\ud800 c") == "a\ufffdb\ufffd[0m\ufffd c"
    assert len(name_of("a" * 300)) == 120


def test_a_name_that_looks_like_an_option_is_a_path_in_the_command(shelf: Shelf) -> None:
    document = shelf.report("one").model_copy(update={"name": "--trust"})
    assert commands(document, "report.html")[0][1].startswith("dpbudget verify ./--trust ")


def test_markup_is_escaped_where_it_is_made() -> None:
    assert tag("p", "<b>", [1, None, tag("i", "&")], title="\"'") == (
        '<p title="&quot;&#39;">&lt;b&gt;1<i>&amp;</i></p>'
    )
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert tag("line", x1=1.0, x2=2.126, y1=None, hidden=True) == '<line x1="1" x2="2.13" hidden></line>'
    assert escape(Safe("<b>")) == "<b>"
    assert join("<", Safe("<")) == "&lt;<"


# ---------------------------------------------------------------------------------------------------------------------
# Ledgers that do not hold, or hold very much
# ---------------------------------------------------------------------------------------------------------------------


def test_a_ledger_that_does_not_hold_gives_no_number_to_quote(shelf: Shelf, tmp_path: Path) -> None:
    place = tmp_path / "cut.ledger"
    data = bytearray(shelf.path("one").read_bytes())
    spot = data.rindex(b'"fresh":"') + 9
    data[spot] = ord("0") if data[spot] != ord("0") else ord("1")
    place.write_bytes(bytes(data))
    document = make_report(place, trust=OWNER.public)
    text = parse(page(document)).text
    assert not document.ok
    assert "Not valid" in text
    assert "No guarantee" in text
    assert "ε ≤" not in text
    assert "Verified" not in text
    assert "No claim" in markdown(document)


def test_an_unknown_owner_or_a_missing_anchor_is_said_at_the_top(shelf: Shelf) -> None:
    untrusted = parse(page(make_report(shelf.path("one"))))
    assert "not known from outside" in untrusted.one("header").text
    missed = parse(page(shelf.report("one", trust=OWNER.public, expect_head=f"3:{'ab' * 32}")))
    assert "not the history that was expected" in missed.one("header").text


def test_a_page_of_very_many_plans_events_and_notes_stays_small(shelf: Shelf) -> None:
    document = shelf.report("phases")
    phases = document.runs[0].plan.phases * 30
    plan = document.runs[0].plan.model_copy(update={"phases": phases})
    runs = tuple(document.runs[0].model_copy(update={"run": f"{i:032x}", "plan": plan}) for i in range(400))
    events = tuple(EventPart(first=i, last=i, kind="steps", about="", steps={f"{i:032x}": 1}) for i in range(4000))
    large = document.model_copy(update={"runs": runs, "history": events, "warnings": ("x" * 900,) * 5000, "unheard": 7})
    data = page(large)
    assert len(data) < 1_000_000
    text = parse(data).text
    for said in (
        "200 more plans",
        "40 more phases",
        "events in between are left out",
        "7 later single events",
        "more: dpbudget verify",
    ):
        assert said in text
    assert len(markdown(large)) < 1_000_000


def test_a_long_report_has_its_numbers_in_its_json_form_alone(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpbudget.report.page.MOST_JSON", 1000)
    data = page(shelf.report("one"))
    assert b"application/json" not in data
    assert "dpbudget verify report.json" in parse(data).text


# ---------------------------------------------------------------------------------------------------------------------
# Colours
# ---------------------------------------------------------------------------------------------------------------------


def _luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * char for char in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2, 1.4.3."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _palettes() -> list[dict[str, str]]:
    import dpbudget.report as package

    style = Path(str(package.__file__)).with_name("page.css").read_text(encoding="utf-8")
    found = [
        dict(re.findall(r"--([a-z-]+):(#[0-9a-f]{3,6})", block))
        for block in re.findall(r":root\{([^}]*--[^}]*)\}", style)
    ]
    assert len(found) == 3  # screens by day and by night, and paper
    return found


@pytest.mark.parametrize("palette", _palettes(), ids=["day", "night", "paper"])
def test_text_and_lines_stand_out_from_what_is_behind_them(palette: dict[str, str]) -> None:
    assert contrast("#000", "#fff") == pytest.approx(21.0)
    texts = [("ink", "paper"), ("soft", "paper"), ("ink", "wash"), ("soft", "wash"), ("a", "paper"), ("ink", "wash-a")]
    texts += [(name, f"{name}-wash") for name in ("good", "fair", "bad")]
    for front, back in texts:
        assert contrast(palette[front], palette[back]) >= 4.5, (front, back)
    for line in ("a", "c", "d"):
        assert contrast(palette[line], palette["paper"]) >= 3.0, line


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_every_adjacency_has_a_page(adjacency: Adjacency, tmp_path: Path) -> None:
    place = tmp_path / "a.ledger"
    plan = plan_for(adjacency=adjacency, batch_size=2000, steps=3)
    build(place, [(plan, 2)], adjacency=adjacency).close()
    document = make_report(place, trust=OWNER.public)
    assert str(adjacency) in parse(page(document)).text
    assert isinstance(parse(page(document)), Element)
    assert write(document)
