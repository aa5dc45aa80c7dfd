"""``dpbudget report`` and ``dpbudget plot``: files that are written once, verify again, and say the same as verify."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpbudget
from dpbudget.report import pdf

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
LEDGER, TRUST = "budget.ledger", ("--trust", "budget.ledger.owner.key.pub")


@pytest.fixture
def spent(folder: Path) -> Path:
    """The prepared folder after twelve steps of its plan."""
    writer = dpbudget.load_key(f"{LEDGER}.writer.key")
    with (
        dpbudget.open_ledger(LEDGER, writer=writer) as ledger,
        dpbudget.start(ledger, next(iter(ledger.state.runs))) as run,
    ):
        for _ in range(12):
            run.next_receipt()
    return folder


def test_a_report_is_one_page_by_default(run_cli: Cli, spent: Path) -> None:
    answer = run_cli("report", LEDGER, *TRUST)
    assert answer.code == 0, answer.err
    assert "report.html" in answer.out
    assert "valid" in answer.out
    data = (spent / "report.html").read_bytes()
    assert data.startswith(b"<!doctype html>")
    assert len(data) < 1_000_000
    assert run_cli("verify", "report.html", *TRUST).code == 0


def test_the_json_form_says_what_verify_says_and_verifies_again(run_cli: Cli, spent: Path) -> None:
    told = run_cli("report", LEDGER, *TRUST, "-o", "r.json", "--json").json
    verdict = run_cli("verify", LEDGER, *TRUST, "--json").json
    report = json.loads((spent / "r.json").read_text(encoding="utf-8"))
    for key in ("ok", "epsilon", "delta", "budget", "steps", "head", "ledger", "warnings", "trusted", "anchored"):
        assert report[key] == verdict[key], key
    assert told == {
        "report": "r.json", "format": "json", "bytes": (spent / "r.json").stat().st_size, "ok": True,
        "head": verdict["head"], "epsilon": verdict["epsilon"], "delta": verdict["delta"], "problems": [],
    }  # fmt: skip
    again = run_cli("verify", "r.json", "--json")
    assert again.code == 0
    assert (again.json["ok"], again.json["epsilon"], again.json["head"]) == (True, verdict["epsilon"], verdict["head"])
    assert again.json["not_proved"]
    shown = run_cli("verify", "r.json")
    assert "CONFIRMED" in shown.out
    assert "not shown" in shown.out


@pytest.mark.parametrize("name", ["r.json", "r.html"])
def test_an_edited_digit_ends_with_exit_code_1(run_cli: Cli, spent: Path, name: str) -> None:
    assert run_cli("report", LEDGER, *TRUST, "-o", name).code == 0
    text = (spent / name).read_text(encoding="utf-8")
    epsilon = run_cli("verify", LEDGER, *TRUST, "--json").json["epsilon"]["upper"]
    places = [repr(epsilon)] if name == "r.json" else [repr(epsilon), "12 of 20 planned", "0.1 %", "ε ≤ 1"]
    for place in places:
        assert place in text, place
        digit = next(i for i, char in enumerate(place) if char.isdigit())
        edited = place[:digit] + str((int(place[digit]) + 1) % 10) + place[digit + 1 :]
        (spent / name).write_text(text.replace(place, edited, 1), encoding="utf-8")
        answer = run_cli("verify", name)
        assert answer.code == 1, place
        assert "Traceback" not in answer.err


def test_what_a_page_of_another_version_shows_is_not_confirmed(
    run_cli: Cli, spent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dpbudget.report.make.this_version", lambda: "0.0.9")
        assert run_cli("report", LEDGER, *TRUST).code == 0
        assert run_cli("report", LEDGER, *TRUST, "-o", "r.json").code == 0
    page = spent / "report.html"
    shown = re.sub("ε ≤ [0-9.]+", "ε ≤ 0.01", page.read_text(encoding="utf-8"))
    assert "ε ≤ 0.01" in shown
    page.write_text(shown, encoding="utf-8")
    answer = run_cli("verify", "report.html")
    assert answer.code == 5
    assert "0.0.9" in answer.out
    assert not answer.out.startswith("CONFIRMED")
    assert run_cli("verify", "report.html", "--json").json["ok"] is False
    assert run_cli("verify", "r.json").code == 0  # whose numbers are all there is


def test_a_report_under_another_owner_or_head_is_refused(run_cli: Cli, spent: Path) -> None:
    run_cli("report", LEDGER, *TRUST, "-o", "r.json")
    other = run_cli("verify", "r.json", "--trust", "owner.key.pub")
    assert (other.code, "DP072" in other.err) == (1, True)
    head = run_cli("verify", LEDGER, "--json").json["head"]
    assert run_cli("verify", "r.json", "--expect-head", head, *TRUST).code == 0
    missed = run_cli("verify", "r.json", "--expect-head", f"3:{'ab' * 32}")
    assert (missed.code, "DP079" in missed.err) == (5, True)
    run_cli("ledger", "head", LEDGER, "--output", "head.txt")
    assert run_cli("verify", "r.json", "--expect-head", "head.txt").code == 0
    run_cli("ledger", "note", LEDGER, "checked")
    run_cli("ledger", "head", LEDGER, "--output", "later.txt")
    assert run_cli("verify", "r.json", "--expect-head", "later.txt").code == 5


def test_a_report_of_what_does_not_hold_says_so_and_ends_as_verify_does(run_cli: Cli, spent: Path) -> None:
    missed = run_cli("report", LEDGER, "--expect-head", f"3:{'ab' * 32}", "-o", "a.json")
    assert missed.code == 5
    assert "not anchored" in missed.out
    assert run_cli("verify", "a.json").code == 1
    run_cli("ledger", "export", LEDGER, "x.jsonl")
    text = (spent / "x.jsonl").read_bytes()
    (spent / "x.jsonl").write_bytes(text.replace(b'"steps":20', b'"steps":21').replace(b'"count":', b'"count" :', 1))
    broken = run_cli("report", "x.jsonl", "-o", "b.html")
    assert broken.code == 1
    assert "no guarantee" in broken.out
    assert "problem:" in broken.err
    assert b"No guarantee" in (spent / "b.html").read_bytes()
    assert run_cli("verify", "b.html").code == 1


def test_nothing_is_written_over_unless_that_is_asked_for(run_cli: Cli, spent: Path, seen: Seen) -> None:
    assert run_cli("report", LEDGER, "-o", "r.md").code == 0
    before = seen(spent)
    for place in ("r.md", "train.csv", LEDGER):
        answer = run_cli("report", LEDGER, "--format", "md", "-o", place)
        assert (answer.code, "DP074" in answer.err) == (2, True)
    assert seen(spent) == before
    assert run_cli("report", LEDGER, *TRUST, "-o", "r.md", "--replace").code == 0
    assert (spent / "r.md").stat().st_mode & 0o777 == 0o644
    assert not list(spent.glob(".dpbudget-*"))
    (spent / "link.md").symlink_to("train.csv")
    assert run_cli("report", LEDGER, "-o", "link.md", "--replace").code == 4
    assert run_cli("report", LEDGER, "-o", "no/where.md", "--replace").code == 4


def test_a_report_can_go_to_standard_output(run_cli: Cli, spent: Path, seen: Seen) -> None:
    before = seen(spent)
    assert run_cli("report", LEDGER, "-o", "-").out.startswith("<!doctype html>")
    assert run_cli("report", LEDGER, "-o", "-", "--format", "md").out.startswith("# Privacy budget report of budget")
    assert json.loads(run_cli("report", LEDGER, "-o", "-", "--format", "json").out)["ok"]
    answer = run_cli("report", LEDGER, "-o", "-", "--json")
    assert (answer.code, answer.json["error"]["code"]) == (2, "DP064")
    assert seen(spent) == before


def test_an_unknown_format_is_refused(run_cli: Cli, spent: Path) -> None:
    for arguments in (("-o", "r.docx"), ("--format", "docx"), ("-o", "report")):
        answer = run_cli("report", LEDGER, *arguments)
        assert (answer.code, "DP060" in answer.err) == (2, True)


def test_without_a_browser_a_pdf_names_the_way_out(run_cli: Cli, spent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "BROWSERS", ("no-such-browser",))
    monkeypatch.delenv("DPBUDGET_BROWSER", raising=False)
    answer = run_cli("report", LEDGER, "-o", "r.pdf")
    assert (answer.code, "DP090" in answer.err, "Fix:" in answer.err) == (2, True, True)
    assert not (spent / "r.pdf").exists()


def test_a_browser_that_fails_is_named(run_cli: Cli, spent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPBUDGET_BROWSER", "false")
    answer = run_cli("report", LEDGER, "-o", "r.pdf")
    assert (answer.code, "DP090" in answer.err, "false printed no page" in answer.err) == (2, True, True)


def test_a_ledger_in_which_nothing_began_has_a_report(run_cli: Cli, folder: Path) -> None:
    assert run_cli("report", LEDGER, *TRUST, "-o", "r.json").code == 0
    assert json.loads((folder / "r.json").read_text())["scope"] == "planned"
    assert run_cli("verify", "r.json").code == 0


@pytest.mark.parametrize("text", ["<!doctype html>", "<!doctype html>\n<p>hello</p>", '{"report": 1}', '{"report":'])
def test_what_only_looks_like_a_report_is_refused(run_cli: Cli, empty: Path, text: str) -> None:
    (empty / "x").write_text(text, encoding="utf-8")
    answer = run_cli("verify", "x")
    assert (answer.code, "DP082" in answer.err) == (1, True)


def test_a_figure_of_ledgers_reports_plans_and_schedules(run_cli: Cli, spent: Path) -> None:
    pytest.importorskip("matplotlib")
    run_cli("report", LEDGER, *TRUST, "-o", "r.json")
    shutil.copy(LEDGER, "other.ledger")
    schedule = ("--schedule", "1,20,30", "--schedule", "0.5,9,10;1,20,30", "--delta", "1e-5", "--accountant", "rdp")
    answer = run_cli("plot", LEDGER, "r.json", *schedule, "--label", "ours", "-o", "f.svg", "--json")
    assert answer.code == 0, answer.err
    labels = [line["label"] for line in answer.json["lines"]]
    assert labels == ["ours", "budget.ledger", "q=1, σ=20, T=30", "q=0.5, σ=9, T=10; q=1, σ=20, T=30"]
    verdict = run_cli("verify", LEDGER, "--json").json
    assert answer.json["lines"][0]["epsilon"] == verdict["epsilon"]["upper"]
    assert (spent / "f.svg").read_bytes().startswith(b"<?xml")
    plans = run_cli("plot", LEDGER, "--plans", "--show", "profile", "--columns", "one", "-o", "f.pdf")
    assert plans.code == 0
    assert plans.out.count("run ") == 1


def test_what_cannot_be_drawn_is_refused(run_cli: Cli, spent: Path) -> None:
    pytest.importorskip("matplotlib")
    run_cli("report", LEDGER, *TRUST, "-o", "r.json")
    text = (spent / "r.json").read_text()
    (spent / "bad.json").write_text(text.replace('"charged": 12', '"charged": 11'))
    refused = [
        (("-o", "f.svg"), "DP064", 2),
        (("--schedule", "1,20,30", "-o", "f.svg"), "DP064", 2),
        (("--schedule", "1,20", "--delta", "1e-5", "-o", "f.svg"), "DP009", 2),
        ((LEDGER, "-o", "f.bmp"), "DP060", 2),
        ((LEDGER, "--label", "a", "--label", "b", "-o", "f.svg"), "DP064", 2),
        (("bad.json", "-o", "f.svg"), "DP071", 1),
        (("missing.ledger", "-o", "f.svg"), "DP070", 4),
        ((LEDGER, "-o", "no/where.svg"), "DP070", 4),
    ]
    for arguments, code, exit_code in refused:
        answer = run_cli("plot", *arguments)
        assert (answer.code, code in answer.err) == (exit_code, True), (arguments, answer.err)


def test_plans_that_would_take_too_long_are_given_up(
    run_cli: Cli, spent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("dpbudget_cli.plot._SECONDS", 0.0)
    answer = run_cli("plot", LEDGER, "--plans", "-o", "f.svg")
    assert (answer.code, "DP063" in answer.err) == (6, True)
    assert not (spent / "f.svg").exists()
