"""config show: every setting, its value, and whether a flag, the file or a default decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpbudget._config import DEFAULTS

Cli = Callable[..., Any]


def test_every_setting_has_a_value_and_a_reason(run_cli: Cli, empty: Path) -> None:
    (empty / "dpbudget.toml").unlink()
    answer = run_cli("config", "show", "--json").json
    assert list(answer["settings"]) == list(DEFAULTS)
    assert all(one["from"] == "default" and one["why"] for one in answer["settings"].values())
    assert answer["settings"]["delta"]["value"] == 60000**-1.1
    assert answer["settings"]["noise"]["value"] == "secure"


def test_a_flag_comes_before_the_file_and_the_file_before_the_default(run_cli: Cli, empty: Path) -> None:
    path = empty / "dpbudget.toml"
    path.write_text("epochs = 4\ndelta = 1e-6\nclip-norm = 2\n", encoding="utf-8")
    answer = run_cli("config", "show", "--epochs", "7", "--json").json
    assert answer["file"] == str(path)
    found = {name: (one["value"], one["from"]) for name, one in answer["settings"].items()}
    assert found["epochs"] == (7.0, "flag")
    assert found["delta"] == (1e-6, "file")
    assert found["clip_norm"] == (2.0, "file")
    assert found["batch_size"] == (256, "default")
    assert f"set in {path}" in answer["settings"]["delta"]["why"]


def test_it_shows_what_calibrate_takes(run_cli: Cli, empty: Path) -> None:
    (empty / "pyproject.toml").write_text("[tool.dpbudget]\ndataset_size = 100\n", encoding="utf-8")
    (empty / "dpbudget.toml").unlink()
    shown = run_cli("config", "show", "--json").json["settings"]
    taken = {item["name"]: item["value"] for item in run_cli("calibrate", "--epsilon", "3", "--json").json["assumed"]}
    assert {name: shown[name]["value"] for name in taken} == taken
    assert shown["batch_size"]["value"] == 100
    assert shown["batch_size"]["why"].startswith("the whole dataset")


def test_people_see_a_table_and_the_file(run_cli: Cli, empty: Path) -> None:
    answer = run_cli("config", "show")
    assert answer.code == 0
    assert f"the settings file is {empty / 'dpbudget.toml'}" in answer.err
    lines = {line.split()[0]: line for line in answer.out.splitlines()[1:]}
    assert list(lines) == [name.replace("_", "-") for name in DEFAULTS]
    assert " file " in lines["accountant"]
    (empty / "dpbudget.toml").unlink()
    assert "no settings file" in run_cli("config", "show").err


def test_a_file_that_cannot_be_read_is_named(run_cli: Cli, empty: Path) -> None:
    (empty / "dpbudget.toml").write_text("epoch = 4\n", encoding="utf-8")
    answer = run_cli("config", "show")
    assert (answer.code, "DP092" in answer.err, "Did you mean epochs?" in answer.err) == (4, True, True)
