"""Every row of the table of attacks has a test that is named after its number."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
ATTACKS = 42
_NAME = re.compile(r"test_attacks?_(\d\d)(?:_to_(\d\d))?_[a-z]\w+")


def _tests() -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for path in sorted(HERE.glob("test_attacks_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [
            (path.name, node)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
        ]
    return found


def _numbers(name: str) -> range:
    match = _NAME.fullmatch(name)
    assert match, f"{name} does not say which attack it is"
    first, last = int(match[1]), int(match[2] or match[1])
    assert match[2] is None or first < last, name
    return range(first, last + 1)


def test_every_attack_from_1_to_42_has_a_test_of_its_name() -> None:
    covered = {number for _, test in _tests() for number in _numbers(test.name)}
    assert covered == set(range(1, ATTACKS + 1))


def test_every_attack_is_met_in_the_default_suite_and_none_is_skipped() -> None:
    everywhere = set()
    for file, test in _tests():
        marks = [ast.unparse(decorator) for decorator in test.decorator_list]
        assert not any("skip" in mark or "xfail" in mark for mark in marks), f"{file}: {test.name}"
        assert any(isinstance(node, ast.Assert | ast.With) for node in ast.walk(test)), f"{file}: {test.name}"
        if not any("slow" in mark or "gpu" in mark for mark in marks):
            everywhere |= set(_numbers(test.name))
    assert everywhere == set(range(1, ATTACKS + 1))
