"""The pictures of the pages are what their program draws, and every page that shows one says what is in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHOWN = [
    (page.name, alt, source)
    for page in sorted(DOCS.glob("*.md"))
    for alt, source in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "alt", "source"), SHOWN)
def test_a_picture_is_there_and_can_be_heard(page: str, alt: str, source: str) -> None:
    assert (DOCS / source).is_file()
    assert len(alt.split()) >= 6, f"{page}: {source} has no description for who cannot see it"


@pytest.mark.slow
def test_the_program_draws_every_picture_of_the_concepts(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(DOCS / "images" / "concepts.py"), str(tmp_path)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {Path(source).name for page, _, source in SHOWN if page == "concepts.md"}
    for name in drawn:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.startswith("<?xml")
        # as many curves and letters as in the picture that is shown; their last digits are the machine's
        assert text.count("<path") == (DOCS / "images" / name).read_text(encoding="utf-8").count("<path")
