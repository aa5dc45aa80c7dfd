"""Figures are written whole, in every format, the same bytes for the same input, and draw bounds only."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from dpbudget import calibrate
from dpbudget.errors import InvalidParameter, MissingExtra, Unreadable
from dpbudget.report.lines import least_false_negatives, pair_line
from dpbudget.report.plots import Picture, figure_of_plan, figure_of_schedule, save_figure

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture(scope="module")
def picture() -> Picture:
    return figure_of_schedule([(1.0, 8.0, 60)], delta=1e-5)


@pytest.mark.parametrize("suffix", sorted(MAGIC))
def test_the_suffix_chooses_the_format_and_the_bytes_repeat(picture: Picture, tmp_path: Path, suffix: str) -> None:
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    save_figure(picture, one)
    save_figure(picture, other)
    assert one.read_bytes().startswith(MAGIC[suffix])
    assert one.read_bytes() == other.read_bytes()


def test_a_plan_and_several_phases_are_drawn_at_another_size(tmp_path: Path) -> None:
    plan = calibrate(epsilon=2.0, sample_rate=1.0, steps=20, delta=1e-5)
    save_figure(figure_of_plan(plan), tmp_path / "plan.png", size=(8.0, 3.0))
    two = figure_of_schedule([(0.01, 1.0, 30), (0.02, 1.5, 30)], delta=1e-5, accountant="rdp")
    save_figure(two, tmp_path / "two.svg")
    assert [steps for steps, _ in two.steps][-1] == 60
    assert all(one[1].upper <= other[1].upper for one, other in zip(two.steps, two.steps[1:], strict=False))


@pytest.mark.parametrize(("sigma", "delta"), [(0.05, 1e-5), (20.0, 1e-200), (1e5, 1e-5)])
def test_extreme_answers_are_drawn_without_a_warning(sigma: float, delta: float, tmp_path: Path) -> None:
    save_figure(figure_of_schedule([(1.0, sigma, 5)], delta=delta), tmp_path / "extreme.png")


def test_the_drawn_trade_off_never_exceeds_the_true_one(picture: Picture) -> None:
    alphas = [1e-6, 0.003, 0.1, 0.37, 0.9, 1.0]
    drawn = least_false_negatives(picture.curve, picture.epsilon.upper, alphas, 41)
    for low, bounds in zip(drawn, picture.curve.trade_off(alphas), strict=True):
        assert low <= bounds.upper
        assert low >= bounds.lower - 0.01


def test_the_line_of_one_pair_is_its_own_trade_off() -> None:
    assert pair_line(0.0, 1.0, 0.1) == pytest.approx(0.9)
    assert pair_line(0.5, 1.0, 0.1) == pytest.approx(math.exp(-1.0) * 0.4)
    assert pair_line(1.0, 1.0, 0.1) == 0.0


def test_another_suffix_is_refused(picture: Picture, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match=r"\.png, \.svg or \.pdf"):
        save_figure(picture, tmp_path / "figure.bmp")


def test_a_place_that_cannot_be_written_is_named(picture: Picture, tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="could not be written") as caught:
        save_figure(picture, tmp_path / "nowhere" / "figure.png")
    assert caught.value.exit_code == 4


def test_without_matplotlib_the_extra_is_named(
    picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra) as caught:
        save_figure(picture, tmp_path / "figure.png")
    assert "dpbudget[plot]" in caught.value.hint
