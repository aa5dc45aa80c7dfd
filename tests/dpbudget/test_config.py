"""Project settings: where they are found, what they may say, and that every assumption has a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpbudget._config import DEFAULTS, Settings, load_settings
from dpbudget.errors import Unreadable


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_the_documented_defaults_are_assumed_by_name(tmp_path: Path) -> None:
    write(tmp_path, "pyproject.toml", "[project]\nname = 'x'\n")
    settings = load_settings(tmp_path)
    assert settings == Settings()
    assumed = settings.assume("dataset_size")
    assert assumed is not None
    assert (assumed.name, assumed.value, assumed.why) == ("dataset_size", 60000, "documented default")
    assert settings.assume("delta") is None


def test_a_table_in_pyproject_is_read_and_named_as_the_reason(tmp_path: Path) -> None:
    path = write(tmp_path, "pyproject.toml", "[tool.dpbudget]\ndataset-size = 1000\nclip_norm = 2\ndelta = 1e-6\n")
    settings = load_settings(tmp_path)
    assert settings.values == {"dataset_size": 1000, "clip_norm": 2.0, "delta": 1e-6}
    assumed = settings.assume("dataset_size")
    assert assumed is not None
    assert assumed.why == f"set in {path}"


def test_dpbudget_toml_comes_before_pyproject(tmp_path: Path) -> None:
    write(tmp_path, "pyproject.toml", "[tool.dpbudget]\nepochs = 3\n")
    write(tmp_path, "dpbudget.toml", "epochs = 5\n")
    assert load_settings(tmp_path).values == {"epochs": 5.0}


def test_the_nearest_folder_upward_decides(tmp_path: Path) -> None:
    write(tmp_path, "dpbudget.toml", "epochs = 5\n")
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert load_settings(inner).values == {"epochs": 5.0}
    write(tmp_path / "a", "pyproject.toml", "[project]\n")
    assert load_settings(inner) == Settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dataset_sise = 5\n", "Did you mean dataset_size?"),
        ("dataset_size = -5\n", "whole number"),
        ("dataset_size = 1.5\n", "whole number"),
        ("dataset_size = true\n", "whole number"),
        ("epochs = nan\n", "epochs"),
        ("epochs = inf\n", "epochs"),
        ("delta = 2.0\n", "delta"),
        ("clip_norm = 0\n", "clipping norm"),
        ('accountant = "rpd"\n', "Did you mean rdp?"),
        ('adjacency = "add_remove"\n', "Did you mean add-remove?"),
        ("epochs = \n", "cannot be read"),
        ("\x00", "cannot be read"),
        ("[" * 5000, "cannot be read"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_file_and_the_way_out(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, "dpbudget.toml", text)
    with pytest.raises(Unreadable) as info:
        load_settings(tmp_path)
    assert info.value.code == "DP092"
    assert str(path) in info.value.message
    assert words in str(info.value)


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dpbudget.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Unreadable, match="cannot be read"):
        load_settings(tmp_path)


def test_a_value_instead_of_the_table_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "pyproject.toml", "[tool]\ndpbudget = 5\n")
    with pytest.raises(Unreadable, match="not a table"):
        load_settings(tmp_path)


def test_every_default_passes_its_own_check(tmp_path: Path) -> None:
    lines = [f"{name} = {value!r}".replace("'", '"') for name, value in DEFAULTS.items() if value is not None]
    write(tmp_path, "dpbudget.toml", "\n".join(lines))
    values = load_settings(tmp_path).values
    assert values == {name: value for name, value in DEFAULTS.items() if value is not None}
