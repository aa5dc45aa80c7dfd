"""What the repository promises about itself: stable codes, one machine's paths nowhere, documented names."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import dpbudget
from dpbudget import errors

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("dpbudget/**/*.py"), *ROOT.glob("dptrainer/**/*.py"), *ROOT.glob("cli/**/*.py")])


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # an sdist has no git
        return [path for path in SOURCES if path.is_file()]
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_every_code_in_the_sources_is_explained() -> None:
    used = {code for path in SOURCES for code in re.findall(r"\bDP\d{3}\b", path.read_text(encoding="utf-8"))}
    assert used <= set(errors.CODES), f"unexplained: {sorted(used - set(errors.CODES))}"


def test_every_code_has_a_way_out() -> None:
    assert list(errors.WAYS_OUT) == list(errors.CODES)
    for code, way in errors.WAYS_OUT.items():
        assert way.endswith("."), code
        assert len(way) > 20, code


def test_every_error_class_has_a_known_code_and_exit_code() -> None:
    stack, seen = [errors.DPBudgetError], set()
    while stack:
        cls = stack.pop()
        seen.add(cls.__name__)
        assert cls.default_code in errors.CODES
        assert cls.exit_code in range(1, 7)
        stack += cls.__subclasses__()
    assert len(seen) > 8


def test_no_file_names_a_path_of_one_machine_or_a_package_index() -> None:
    forbidden = re.compile(r"/(?:root|work|home|opt/wheels|tmp/bash_jobs)/|pypi\.org|download\.pytorch\.org|index-url")
    own = Path(__file__).resolve()
    for path in tracked_files():
        if path.resolve() != own and path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cfg", ""}:
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not forbidden.search(text), f"{path.relative_to(ROOT)}: {forbidden.search(text)}"


def test_the_exports_are_what_is_declared() -> None:
    assert sorted(dpbudget.__all__) == dpbudget.__all__
    for name in dpbudget.__all__:
        assert getattr(dpbudget, name) is not None


def test_every_public_name_has_a_docstring() -> None:
    for name in dpbudget.__all__:
        value = getattr(dpbudget, name)
        if callable(value):
            assert value.__doc__, name
            assert len(value.__doc__) > 20, name


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'epsilonn'"):
        dpbudget.epsilonn


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_outgrows_one_idea(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 520


def test_every_folder_of_tests_is_in_one_shard_of_the_long_ones() -> None:
    listed = re.findall(r"^SLOW_\w+ := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    folders = sorted(folder for shard in listed for folder in shard.split())
    assert len(listed) == 3
    assert folders == sorted(
        f"tests/{folder.name}" for folder in (ROOT / "tests").iterdir() if any(folder.rglob("test_*.py"))
    )
