"""doctor: what is unsafe fails, what lacks is named with its way out, and nothing is changed or loaded for it."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from dpbudget.ledger.store import files
from dpbudget_cli import _checkup

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
ROOT = Path(__file__).resolve().parents[2]


def checks(answer: Any) -> dict[str, dict[str, str]]:
    """Every finding by its name; no two have one name."""
    found = {one["name"]: one for one in answer.json["checks"]}
    assert len(found) == len(answer.json["checks"])
    assert answer.json["ok"] is (answer.code == 0)
    return found


def test_a_machine_in_order_is_told_so(run_cli: Cli, folder: Path, seen: Seen) -> None:
    before = seen(folder)
    answer = run_cli("doctor", "--json")
    found = checks(answer)
    assert (answer.code, answer.json["unsafe"]) == (0, 0)
    assert seen(folder) == before
    for name in ("python", "dpbudget", "click", "torch", "C compiler", "GPU", "SQLite", "state folder", "settings"):
        assert found[name]["status"] in ("ok", "warn")
        assert found[name]["message"]
    for name in (
        "ledger budget.ledger",
        "key budget.ledger.owner.key",
        "key budget.ledger.writer.key",
        "key owner.key",
    ):
        assert found[name]["status"] == "ok"
    assert sqlite3.sqlite_version in found["SQLite"]["message"]
    assert "verify budget.ledger" in found["ledger budget.ledger"]["fix"]


def test_people_get_a_line_each_and_a_verdict(run_cli: Cli, folder: Path) -> None:
    lines = run_cli("doctor").out.splitlines()
    assert all(re.match(r"(ok  |warn|fail)  \S|       +(Try|Fix): \S", line) for line in lines[:-1]), lines
    assert lines[-1].startswith("nothing unsafe")
    (folder / "owner.key").chmod(0o644)
    answer = run_cli("doctor")
    assert (answer.code, answer.out.splitlines()[-1][:8]) == (1, "1 unsafe")
    assert re.search(r"^fail  key owner.key .* has mode 0644: others can read or replace it$", answer.out, re.MULTILINE)
    assert re.search(r"^ +Fix: chmod 600 .*owner.key$", answer.out, re.MULTILINE)


def test_another_folder_may_be_named(run_cli: Cli, folder: Path, tmp_path: Path) -> None:
    found = checks(run_cli("doctor", str(tmp_path / "work"), "--json"))
    assert "ledger budget.ledger" in found
    empty = tmp_path / "nothing"
    empty.mkdir()
    assert "init" in checks(run_cli("doctor", str(empty), "--json"))["ledgers"]["fix"]
    missing = run_cli("doctor", "nowhere")
    assert (missing.code, "error DP070: nowhere is not a folder" in missing.err) == (4, True)


class TestWhatIsUnsafe:
    """Each of these ends with exit code 1 and names the one thing."""

    @staticmethod
    def failing(answer: Any) -> dict[str, dict[str, str]]:
        assert answer.code == 1
        return {name: one for name, one in checks(answer).items() if one["status"] == "fail"}

    def test_a_key_that_others_can_read(self, run_cli: Cli, folder: Path) -> None:
        (folder / "budget.ledger.writer.key").chmod(0o640)
        (one,) = self.failing(run_cli("doctor", "--json")).values()
        assert one["name"] == "key budget.ledger.writer.key"
        assert "chmod 600" in one["fix"]

    def test_a_folder_in_which_others_can_replace_keys(self, run_cli: Cli, folder: Path) -> None:
        folder.chmod(0o777)
        found = self.failing(run_cli("doctor", "--json"))
        assert {name[:3] for name in found} == {"key"}
        assert all("chmod go-w" in one["fix"] for one in found.values())

    def test_a_ledger_that_others_can_write(self, run_cli: Cli, folder: Path) -> None:
        (folder / "budget.ledger").chmod(0o666)
        (one,) = self.failing(run_cli("doctor", "--json")).values()
        assert (one["name"], one["message"]) == ("ledger budget.ledger", "others can write it")

    def test_a_ledger_in_wal_mode(self, run_cli: Cli, folder: Path) -> None:
        connection = sqlite3.connect(folder / "budget.ledger")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
        (one,) = self.failing(run_cli("doctor", "--json")).values()
        assert "WAL" in one["message"]
        assert "journal_mode=DELETE" in one["fix"]

    def test_a_ledger_with_two_names(self, run_cli: Cli, folder: Path) -> None:
        os.link(folder / "budget.ledger", folder / "twin.ledger")
        assert len(self.failing(run_cli("doctor", "--json"))) == 2

    def test_a_state_folder_that_others_can_write(self, run_cli: Cli, empty: Path) -> None:
        Path(os.environ["DPBUDGET_STATE"]).chmod(0o777)
        (one,) = self.failing(run_cli("doctor", "--json")).values()
        assert one["name"] == "state folder"
        assert "chmod go-w" in one["fix"]

    def test_a_sqlite_that_does_not_sync_as_asked(
        self, run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Careless(sqlite3.Connection):
            def execute(self, text: str, *rest: Any) -> sqlite3.Cursor:
                return super().execute("SELECT 1" if text == "PRAGMA synchronous" else text, *rest)

        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda *args, **kw: connect(*args, factory=Careless, **kw))
        (one,) = self.failing(run_cli("doctor", "--json")).values()
        assert "synchronous 1, where ledgers need delete and 3" in one["message"]


class TestWhatLacks:
    """Not unsafe: exit code 0, a warning, and what to do."""

    @staticmethod
    def warning(answer: Any, name: str) -> str:
        assert answer.code == 0
        one = checks(answer)[name]
        assert one["status"] == "warn", one
        assert one["fix"]
        return f"{one['message']} {one['fix']}"

    def test_no_compiler(self, run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(empty))
        monkeypatch.delenv("CC", raising=False)
        said = self.warning(run_cli("doctor", "--json"), "C compiler")
        assert "none found; without it the same results are slower" in said
        monkeypatch.setenv("CC", "nothing -O3")
        assert "nothing (of CC) is not there" in self.warning(run_cli("doctor", "--json"), "C compiler")
        monkeypatch.setenv("CC", "'")
        assert "CC is not a command" in self.warning(run_cli("doctor", "--json"), "C compiler")
        monkeypatch.setenv("DPTRAINER_NATIVE", "0")
        assert "unset DPTRAINER_NATIVE" in self.warning(run_cli("doctor", "--json"), "C compiler")

    def test_no_place_for_marks(self, run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (empty / "file").touch()
        monkeypatch.setenv("DPBUDGET_STATE", str(empty / "file" / "state"))
        assert "set DPBUDGET_STATE" in self.warning(run_cli("doctor", "--json"), "state folder")

    def test_settings_that_cannot_be_read(self, run_cli: Cli, empty: Path) -> None:
        (empty / "dpbudget.toml").write_text("dataset_sise = 3\n", encoding="utf-8")
        assert "Did you mean dataset_size?" in self.warning(run_cli("doctor", "--json"), "settings")

    def test_a_network_file_system(self, run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "file_system_of", lambda *_: "nfs4")
        assert "PostgreSQL" in self.warning(run_cli("doctor", "--json"), "folder")

    def test_a_journal_beside_a_ledger(self, run_cli: Cli, folder: Path) -> None:
        (folder / "budget.ledger-journal").touch()
        assert "died and is rolled back" in self.warning(run_cli("doctor", "--json"), "ledger budget.ledger")

    def test_packages_that_are_missing_or_old(self, run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        version = metadata.version

        def some(name: str) -> str:
            if name in ("torch", "matplotlib"):
                raise metadata.PackageNotFoundError
            return "1.10.3" if name == "scipy" else version(name)

        monkeypatch.setattr(metadata, "version", some)
        answer = run_cli("doctor", "--json")
        assert "pip install 'dpbudget[train]'" in self.warning(answer, "torch")
        assert "1.10.3, older than 1.11 pip install 'scipy>=1.11'" in self.warning(answer, "scipy")
        one = checks(answer)["matplotlib"]
        assert (one["status"], one["fix"]) == ("ok", "pip install 'dpbudget[plot]'")  # nobody needs it


def test_the_versions_that_are_asked_for_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def table(lines: list[str]) -> dict[str, str]:
        found = (re.fullmatch(r"([a-z-]+)(?:\[.*\])?(?:>=([0-9.]+))?.*", line) for line in lines)
        return {match[1]: match[2] for match in found if match and match[1] != "dpbudget"}

    assert table(project["dependencies"]) == _checkup.NEEDED
    extras = {name: table(lines) for name, lines in project["optional-dependencies"].items()}
    assert {name: extras[name] for name in extras if name not in ("all", "dev", "docs")} == _checkup.EXTRAS


def test_keys_of_others_are_not_judged(run_cli: Cli, folder: Path) -> None:
    shutil.copy(folder / "owner.key", folder / "server.pem")
    (folder / "server.pem").chmod(0o644)
    shutil.copy(folder / "owner.key", folder / "signer")
    shutil.copy(folder / "owner.key.pub", folder / "signer.pub")
    (folder / "pipe.key").unlink(missing_ok=True)
    os.mkfifo(folder / "pipe.key")  # must not be waited for
    found = checks(run_cli("doctor", "--json"))
    assert "key signer" in found
    assert not [name for name in found if "server.pem" in name or "pipe" in name]


def test_what_it_finds_of_the_compiler_is_what_the_trainer_finds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dptrainer.native import Native

    class Asked(Native[object]):
        def compiled(self, command: list[str]) -> object:
            self.command = command
            return object()

    def trainer() -> str | None:
        native = Asked("x", str, (), lambda _: object(), lambda _: True)
        return shutil.which(native.command[0]) if native.build()[0] is not None else None

    for change in ({}, {"CC": "cat -n"}, {"CC": "'"}, {"DPTRAINER_NATIVE": "0"}, {"PATH": str(tmp_path)}):
        with monkeypatch.context() as patch:
            patch.delenv("CC", raising=False)
            for name, value in change.items():
                patch.setenv(name, value)
            found = _checkup.compiler()
            assert (found.says if found.status == "ok" else None) == trainer(), change


def test_torch_is_loaded_only_when_asked_for(tmp_path: Path) -> None:
    code = "import sys; from dpbudget_cli.main import main\ntry:\n main()\nexcept SystemExit:\n pass\n"
    code += "print(*sorted({n.split('.')[0] for n in sys.modules} & {'numpy', 'scipy', 'torch', 'matplotlib'}))"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert (done.stdout.splitlines()[1:], done.stderr) == ([""], "")


def test_deep_asks_torch_and_compiles(run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = checks(run_cli("doctor", "--deep", "--json"))
    assert found["native noise"]["message"]
    assert found["native clipping"]["message"]
    assert ("none that torch sees" in found["GPU"]["message"]) is not torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    reasons = [None, "no Triton"]
    monkeypatch.setattr("dptrainer.noise.gpu.why_not", lambda device: reasons[device.index])
    answer = run_cli("doctor", "--deep", "--json")
    found = checks(answer)
    assert (answer.code, found["GPU 0"]["status"], found["GPU 1"]["status"]) == (0, "ok", "warn")
    assert "card 1" in found["GPU 1"]["message"]
    assert "no Triton" in found["GPU 1"]["message"]
    assert "dpbudget[gpu]" in found["GPU 1"]["fix"]


def test_deep_survives_a_broken_torch(run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    answer = run_cli("doctor", "--deep", "--json")
    one = checks(answer)["GPU"]
    assert (answer.code, one["status"], "torch cannot be loaded" in one["message"]) == (0, "warn", True)
    assert "dpbudget[train]" in one["fix"]
