"""The rules of the house: imports point down, nothing heavy loads early, torch stays upstairs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dpbudget

ROOT = Path(__file__).resolve().parents[2]

#: Layer of every module; the longest matching prefix wins. Imports go to the same layer or below.
LAYERS = {
    "dpbudget.errors": 0,
    "dpbudget._record": 0,
    "dpbudget._pause": 0,
    "dpbudget._numerics": 1,
    "dpbudget._guarantee": 1,
    "dpbudget._truncation": 1,
    "dpbudget.curve": 1,
    "dpbudget.risk": 1,
    "dpbudget.mechanisms": 1,
    "dpbudget.grid": 1,
    "dpbudget.plan": 2,
    "dpbudget._renyi": 2,
    "dpbudget.meter": 2,
    "dpbudget._checks": 3,
    "dpbudget._schedule": 3,
    "dpbudget._search": 3,
    "dpbudget.accountants": 3,
    "dpbudget.filters": 3,
    "dpbudget.ledger": 3,
    "dpbudget._calibrate": 4,
    "dpbudget._targets": 4,
    "dpbudget._explore": 4,
    "dpbudget._compare": 4,
    "dpbudget._conventions": 4,
    "dpbudget._live": 4,
    "dpbudget.report": 4,
    "dpbudget._config": 4,
    "dpbudget._verify": 4,
    "dpbudget._attest": 4,
    "dpbudget._recompute": 4,
    "dpbudget._verdict": 4,
    "dpbudget": 5,
    "dptrainer": 6,
    "dpbudget_cli": 7,
}
#: The modules of the command line that train, and the one that asks what torch finds.
WITH_TORCH = ("train", "_checkpoints", "_training", "_models", "_weights", "_heldout", "_deep")
#: What dptrainer may know of the core: the run's documents, never an accountant.
TRAINER_MAY_IMPORT = ("dpbudget.plan", "dpbudget.ledger", "dpbudget.mechanisms", "dpbudget.errors", "dpbudget.curve")
TRAINER_MAY_IMPORT += ("dpbudget.grid",)
TRAINER_MAY_IMPORT += ("dpbudget._truncation", "dpbudget.meter", "dpbudget._record")
#: The Opacus facade writes plans from arguments, so it alone asks the surface: calibrate, ledgers with their filter.
FACADE = "dptrainer.opacus"
FACADE_MAY_IMPORT = ("dpbudget.filters", *(f"dpbudget.{name}" for name in sorted(dpbudget.__all__)))


def source_files() -> list[tuple[str, Path]]:
    found = []
    for base, package in ((ROOT, "dpbudget"), (ROOT, "dptrainer"), (ROOT / "cli", "dpbudget_cli")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports_of(module: str, path: Path) -> list[str]:
    """Every module that the file imports anywhere, in function bodies too; relative imports resolved."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            assert node.module is not None
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layer_of(name: str) -> int | None:
    best = max((prefix for prefix in LAYERS if name == prefix or name.startswith(prefix + ".")), key=len, default=None)
    return None if best is None else LAYERS[best]


def owner_of(name: str) -> str:
    return max((p for p in LAYERS if name == p or name.startswith(p + ".")), key=len, default=name)


@pytest.mark.parametrize(("module", "path"), source_files(), ids=[name for name, _ in source_files()])
def test_imports_point_down(module: str, path: Path) -> None:
    own = layer_of(module)
    assert own is not None, f"{module} has no layer: add it to LAYERS"
    for name in imports_of(module, path):
        if name.startswith(("dpbudget.", "dptrainer", "dpbudget_cli")):
            # `from dpbudget import errors` names a module; `from dpbudget import Plan` goes through the surface.
            layer = layer_of(name)
            assert layer is not None
            assert layer <= own, f"{module} (layer {own}) imports {name} (layer {layer})"


@pytest.mark.parametrize(("module", "path"), source_files(), ids=[name for name, _ in source_files()])
def test_torch_is_imported_by_the_trainer_alone(module: str, path: Path) -> None:
    if not module.startswith("dptrainer"):
        roots = {name.split(".")[0] for name in imports_of(module, path)}
        allowed = {"torch"} if module.removeprefix("dpbudget_cli.") in WITH_TORCH else set()
        assert not (roots & {"torch", "sklearn"}) - allowed


def test_the_ledger_and_the_accountants_never_import_each_other() -> None:
    for module, path in source_files():
        names = imports_of(module, path)
        if module.startswith("dpbudget.ledger"):
            assert not [n for n in names if n.startswith(("dpbudget.accountants", "dpbudget.filters"))], module
        if module.startswith("dpbudget.accountants"):
            assert not [n for n in names if n.startswith("dpbudget.ledger")], module


def test_the_rules_of_the_ledger_do_no_input_or_output() -> None:
    path = ROOT / "dpbudget" / "ledger" / "state.py"
    names = imports_of("dpbudget.ledger.state", path)
    assert not [n for n in names if n.split(".")[0] in {"os", "pathlib", "sqlite3", "io", "tempfile", "time"}]
    assert not [n for n in names if n.startswith("dpbudget.ledger.store")]


def test_the_trainer_knows_only_the_documents_of_the_core() -> None:
    for module, path in source_files():
        if module.startswith("dptrainer"):
            for name in imports_of(module, path):
                if name.startswith("dpbudget"):
                    facade = f"{module}.".startswith(f"{FACADE}.")
                    allowed = TRAINER_MAY_IMPORT + (FACADE_MAY_IMPORT if facade else ())
                    assert name.startswith(allowed), f"{module} imports {name}"


def test_the_trainer_does_not_rest_on_its_facade() -> None:
    for module, path in source_files():
        if module.startswith("dptrainer") and not f"{module}.".startswith(f"{FACADE}."):
            assert not [name for name in imports_of(module, path) if name.startswith(FACADE)], module


def test_no_module_imports_in_a_cycle() -> None:
    modules = {name for name, _ in source_files()}
    graph = {}
    for module, path in source_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = set()
        for node in tree.body:  # only what runs at import time can make a cycle
            for name in _names(node):
                while name not in modules and "." in name:
                    name = name.rpartition(".")[0]
                if name in modules and name != module:
                    targets.add(name)
        graph[module] = targets
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != 1, " -> ".join((*trail, module))
        if module not in state:
            state[module] = 1
            for target in sorted(graph[module]):
                # A package's __init__ may import its own modules.
                if not module.startswith(target + "."):
                    visit(target, (*trail, module))
            state[module] = 2

    for module in sorted(graph):
        visit(module, ())


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@pytest.mark.parametrize(
    "program",
    ["import dpbudget", "from dpbudget_cli.main import main; main(['--help'], standalone_mode=False)"],
    ids=["import", "help"],
)
def test_a_light_import_loads_no_heavy_library(program: str) -> None:
    check = f"""
import contextlib, io, sys
with contextlib.redirect_stdout(io.StringIO()):
    try:
        exec({program!r})
    except SystemExit:
        pass
print(" ".join(sorted({{name.split(".")[0] for name in sys.modules}} & {{"numpy", "scipy", "torch", "matplotlib"}})))
"""
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT / "cli", timeout=60
    )
    assert done.stdout.strip() == "", f"loaded: {done.stdout}"
