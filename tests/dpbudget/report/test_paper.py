"""Figures for papers: vectors, of a column's width, the same bytes for the same lines, upper bounds only."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from reportkit import Shelf

from dpbudget.errors import InvalidParameter, NotComputable
from dpbudget.report import paper
from dpbudget.report.paper import (
    MOST_LINES,
    Line,
    line_of_plan,
    line_of_report,
    line_of_schedule,
    save_paper_figure,
)


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    facts = {"delta": 1e-5, "adjacency": "add-remove", "accountant": "prv", "label": None}
    return [line_of_schedule([(1.0, sigma, 60)], **facts) for sigma in (8.0, 20.0)]


def inches(svg: bytes) -> tuple[float, float]:
    found = re.search(rb'<svg [^>]*?height="([\d.]+)pt"[^>]*?width="([\d.]+)pt"', svg, re.DOTALL) or re.search(
        rb'width="([\d.]+)pt" height="([\d.]+)pt"', svg
    )
    assert found is not None
    one, other = (float(number) / 72 for number in found.groups())
    return (one, other) if b'width="' + found[1] in svg else (other, one)


@pytest.mark.parametrize(("columns", "width"), [("one", 3.35), ("two", 6.9)])
def test_a_figure_has_exactly_the_width_of_its_columns(
    lines: list[Line], tmp_path: Path, columns: str, width: float
) -> None:
    place = tmp_path / "f.svg"
    save_paper_figure(lines, place, columns=columns)
    assert inches(place.read_bytes())[0] == pytest.approx(width, abs=1e-3)


@pytest.mark.parametrize("suffix", ["svg", "pdf", "png"])
def test_the_same_lines_give_the_same_bytes(lines: list[Line], tmp_path: Path, suffix: str) -> None:
    one, other = tmp_path / f"one.{suffix}", tmp_path / f"other.{suffix}"
    for place in (one, other):
        save_paper_figure(lines, place, panels=("profile",), columns="one")
    assert one.read_bytes() == other.read_bytes()
    data = one.read_bytes()
    if suffix == "pdf":
        # TrueType, which journals take, and no Type 3.
        assert b"/Type0" in data or b"/TrueType" in data
        assert b"/Type3" not in data
    if suffix == "svg":
        assert b"<image" not in data


def test_lines_of_a_ledger_a_plan_and_a_schedule_are_upper_bounds(shelf: Shelf, tmp_path: Path) -> None:
    document = shelf.report("one")
    run = document.runs[0]
    phase = run.plan.phases[0]
    ledger, plan = line_of_report(document, None), line_of_plan(run.plan.plan(), "plan")
    ideal = line_of_schedule(
        [(phase.sample_rate, phase.noise_multiplier, phase.steps)],
        delta=run.plan.claim.delta, adjacency="add-remove", accountant="prv", label="real arithmetic",
    )  # fmt: skip
    assert ledger.label == "one.ledger"
    assert ledger.epsilon == run.plan.claim.epsilon
    # The bounded tail of the noise is charged to plans and ledgers.
    assert ideal.epsilon <= plan.epsilon <= ledger.epsilon
    for with_tail, without in zip(plan.profile, ideal.profile, strict=True):
        assert with_tail[1] >= without[1] * (1 - 1e-6)
    assert [steps for steps, _ in plan.steps] == sorted(steps for steps, _ in plan.steps)
    assert plan.steps[-1][1] == pytest.approx(plan.epsilon, rel=1e-6)
    save_paper_figure([ledger, plan, ideal], tmp_path / "all.png")


@pytest.mark.parametrize("name", ["rdp", "waiting", "changed", "two"])
def test_every_ledger_with_a_plan_can_be_drawn(shelf: Shelf, tmp_path: Path, name: str) -> None:
    document = shelf.report(name)
    line = line_of_report(document, "x")
    assert line.epsilon > 0.0
    if document.scope == "pair":
        assert document.budget is not None
        assert line.mark == (document.budget.epsilon, document.budget.delta)
    save_paper_figure([line], tmp_path / "f.svg", columns="one")


def test_a_ledger_without_a_plan_has_nothing_to_draw(shelf: Shelf) -> None:
    with pytest.raises(InvalidParameter, match="nothing to draw"):
        line_of_report(shelf.report("empty"), None)


def test_what_was_not_computed_in_time_is_not_taken_for_an_empty_ledger(shelf: Shelf) -> None:
    late = "the privacy profile: not computed in 6 s"
    document = shelf.report("one").model_copy(update={"profile": (), "left_out": (late,)})
    with pytest.raises(NotComputable, match=late):
        line_of_report(document, None)


def test_more_lines_than_can_be_told_apart_are_refused(lines: list[Line], tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="1 to 7 lines"):
        save_paper_figure(lines * 4, tmp_path / "f.svg")
    with pytest.raises(InvalidParameter, match="1 to 7 lines"):
        save_paper_figure([], tmp_path / "f.svg")
    assert len(paper._LINES) == MOST_LINES
    assert len(set(map(str, paper._LINES))) == MOST_LINES


def test_a_label_is_text_and_no_formula(lines: list[Line], tmp_path: Path) -> None:
    save_paper_figure([replace(lines[0], label=r"a$\frac{1}$_b")], tmp_path / "f.svg", panels=("steps",))
