"""The pictures of the pages are what their program draws, and every page that shows one says what is in it."""

from __future__ import annotations

import os
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
@pytest.mark.parametrize("page", ["concepts", "planning"])
def test_the_program_of_a_page_draws_all_its_pictures(page: str, tmp_path: Path) -> None:
    program = str(DOCS / "images" / f"{page}.py")
    env = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run([sys.executable, program, str(tmp_path)], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr.decode()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {Path(source).name for name, _, source in SHOWN if name == f"{page}.md"}
    for name in drawn:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.startswith("<?xml")
        # as many curves and letters as in the picture that is shown; their last digits are the machine's
        assert text.count("<path") == (DOCS / "images" / name).read_text(encoding="utf-8").count("<path")
