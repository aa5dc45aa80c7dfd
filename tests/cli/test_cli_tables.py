"""Files as tables: CSV, NPZ and Parquet read alike, judged before anything is charged, and no value told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpbudget.errors import InvalidParameter, MissingExtra, Unreadable
from dpbudget_cli._data import read_table
from dpbudget_cli._train_options import ClassesType

Cli = Callable[..., Any]
Seen = Callable[[Path], dict[str, tuple[int, str]]]
TRAIN = ("train", "--ledger", "budget.ledger", "--classes", "2")


def write_parquet(path: Path, columns: dict[str, Any]) -> str:
    """A Parquet file; the test is skipped where pyarrow is not installed."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return str(path)


class TestTables:
    def write(self, folder: Path, name: str, text: str | bytes) -> str:
        path = folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    def test_a_missing_label_column_is_answered_with_the_columns_that_are_there(self, tmp_path: Path) -> None:
        names = [f"f{k}" for k in range(30)] + ["label"]
        path = self.write(tmp_path, "t.csv", ",".join(names) + "\n" + ",".join("1" * 31) + "\n")
        with pytest.raises(Unreadable, match="column 'y'") as caught:
            read_table(path, "y", 2)
        assert "--target" in caught.value.hint
        assert caught.value.hint.endswith("f17, …, label")

    def test_a_csv_and_an_npz_of_one_table_are_equal(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "t.csv", "a,y,b\n1,0,2\n3,1,4\n")
        np.savez(tmp_path / "t.npz", x=np.array([[1.0, 2.0], [3.0, 4.0]]), y=np.array([0, 1]))
        one, other = (read_table(str(p), "y", 2).scaled(0.5) for p in (path, tmp_path / "t.npz"))
        assert np.array_equal(one.features, [[0.5, 1.0], [1.5, 2.0]])
        assert np.array_equal(one.features, other.features)
        assert np.array_equal(one.labels, other.labels)
        assert one.features.dtype == np.float32

    @pytest.mark.parametrize(
        "text",
        [
            "", "a,b\n1,2\n", "a,y\n", "y\n1\n", "a,y\nSECRET,1\n", "a,y\n1,7\n", "a,y\n1,-1\n", "a,y\n1,0.5\n",
            "a,y\n1,nan\n", "a,y\n1,inf\n", "a,y\n1,2,3\n", "y,y\n1,1\n", 'a,y\n"1,1\n', b"\xff\xfe", "a,y\n,1\n",
        ],
    )  # fmt: skip
    def test_a_bad_csv_is_refused_without_telling_a_value(self, tmp_path: Path, text: str | bytes) -> None:
        path = self.write(tmp_path, "t.csv", text)
        with pytest.raises(Unreadable) as info:
            read_table(path, "y", 2)
        assert info.value.code == "DP091"
        assert "SECRET" not in str(info.value)

    def test_a_pickled_array_is_refused_and_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "pwned",))

        np.savez(tmp_path / "t.npz", x=np.array([[Evil()]], dtype=object), y=np.array([0]))
        with pytest.raises(Unreadable, match="plain arrays"):
            read_table(str(tmp_path / "t.npz"), "y", 2)
        assert not (tmp_path / "pwned").exists()

    def test_arrays_that_do_not_fit_are_refused_without_their_sizes(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", x=np.zeros((31, 2)), y=np.zeros(37, dtype=int))
        with pytest.raises(Unreadable) as info:
            read_table(str(tmp_path / "t.npz"), "y", 2)
        said = info.value.message.replace(str(tmp_path), "")  # whose number may be any
        assert "31" not in said
        assert "37" not in said

    def test_numbers_are_scaled_by_the_public_constant_alone(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "t.csv", "a,y,b\n1,0,2\n3,1,4\n")
        assert np.array_equal(read_table(path, "y", 2).scaled(0.5).features, [[0.5, 1.0], [1.5, 2.0]])

    @pytest.mark.parametrize("cell", ["", " ", "nan", "NaN"])
    def test_a_missing_value_is_refused_with_its_column_or_filled_with_a_public_constant(
        self, tmp_path: Path, cell: str
    ) -> None:
        path = self.write(tmp_path, "t.csv", f"age,y,b\n1,0,2\n{cell},1,4\n")
        with pytest.raises(Unreadable, match="column 'age' has missing values") as caught:
            read_table(path, "y", 2)
        assert "--fill-missing" in caught.value.hint
        assert read_table(path, "y", 2, fill=7.0).features.tolist() == [[1.0, 2.0], [7.0, 4.0]]

    def test_a_missing_value_of_an_array_is_refused_or_filled_too(self, tmp_path: Path) -> None:
        x = np.zeros((2, 3, 3), dtype=np.float32)
        x[1, 2, 0] = np.nan
        np.savez(tmp_path / "t.npz", x=x, y=np.array([0, 1]))
        with pytest.raises(Unreadable, match="column 'x' has missing values"):
            read_table(str(tmp_path / "t.npz"), "y", 2)
        table = read_table(str(tmp_path / "t.npz"), "y", 2, fill=-1.0)
        assert (table.features[1, 2, 0], table.features.dtype) == (-1.0, np.float32)

    def test_classes_that_are_declared_by_name_are_numbered_in_their_order(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "t.csv", "a,y\n1,yes\n2, no\n3,yes\n")
        assert read_table(path, "y", 2, names=("no", "yes")).labels.tolist() == [1, 0, 1]
        np.savez(tmp_path / "t.npz", x=np.zeros((2, 1)), y=np.array(["yes", "no"]))
        assert read_table(str(tmp_path / "t.npz"), "y", 2, names=("no", "yes")).labels.tolist() == [1, 0]

    def test_a_label_that_was_not_declared_is_refused_without_being_told(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "t.csv", "a,y\n1,yes\n2,SECRET\n")
        with pytest.raises(Unreadable, match="none of no, yes") as caught:
            read_table(path, "y", 2, names=("no", "yes"))
        assert "SECRET" not in str(caught.value)
        with pytest.raises(Unreadable, match="not a number") as caught:
            read_table(path, "y", 2)
        assert "--classes no,yes" in caught.value.hint
        assert "SECRET" not in str(caught.value)

    def test_users_are_read_beside_the_features_and_one_without_a_name_is_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "t.csv", "who,a,y\nann,1,0\nbob,2,1\nann,3,1\n")
        table = read_table(path, "y", 2, user="who")
        assert table.users is not None
        assert (table.users.tolist(), table.features.tolist()) == (["ann", "bob", "ann"], [[1.0], [2.0], [3.0]])
        assert read_table(path, "y", 2, ignored="who").users is None
        path = self.write(tmp_path, "gap.csv", "who,a,y\nann,1,0\n ,2,1\n")
        with pytest.raises(Unreadable, match="column 'who' has missing values"):
            read_table(path, "y", 2, user="who")
        with pytest.raises(Unreadable, match="no column 'person'") as caught:
            read_table(path, "y", 2, user="person")
        assert "--user-column" in caught.value.hint

    def test_users_of_an_archive_are_whole_numbers_or_text(self, tmp_path: Path) -> None:
        arrays = {"x": np.zeros((2, 1)), "y": np.array([0, 1])}
        np.savez(tmp_path / "t.npz", who=np.array([3, 3]), **arrays)
        table = read_table(str(tmp_path / "t.npz"), "y", 2, user="who")
        assert table.users is not None
        assert table.users.tolist() == [3, 3]
        np.savez(tmp_path / "f.npz", who=np.array([3.0, np.nan]), **arrays)
        with pytest.raises(Unreadable, match="neither text nor whole numbers"):
            read_table(str(tmp_path / "f.npz"), "y", 2, user="who")

    @pytest.mark.parametrize("x", [np.float64(1.0), np.zeros((2, 2), dtype=bool), np.array([["a"], ["b"]])])
    def test_an_array_that_is_no_table_of_numbers_is_refused(self, tmp_path: Path, x: Any) -> None:
        np.savez(tmp_path / "t.npz", x=x, y=np.array([0, 1]))
        with pytest.raises(Unreadable) as caught:
            read_table(str(tmp_path / "t.npz"), "y", 2)
        assert caught.value.code == "DP091"


class TestParquet:
    COLUMNS: dict[str, Any] = {"a": [1, 3], "y": [0, 1], "b": [2.0, 4.0], "flag": [True, False]}  # noqa: RUF012

    def test_it_is_read_as_a_csv_of_the_same_table_is(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "t.parquet", self.COLUMNS)
        (tmp_path / "t.csv").write_text("a,y,b,flag\n1,0,2,1\n3,1,4,0\n", encoding="utf-8")
        one, other = read_table(path, "y", 2), read_table(str(tmp_path / "t.csv"), "y", 2)
        assert np.array_equal(one.features, other.features)
        assert np.array_equal(one.labels, other.labels)

    def test_text_is_for_labels_and_users_and_nulls_are_missing_values(self, tmp_path: Path) -> None:
        columns = {"who": ["ann", "bob"], "a": [1.0, None], "y": ["no", "yes"]}
        path = write_parquet(tmp_path / "t.parquet", columns)
        with pytest.raises(Unreadable, match="column 'a' has missing values"):
            read_table(path, "y", 2, user="who", names=("no", "yes"))
        table = read_table(path, "y", 2, user="who", names=("no", "yes"), fill=0.0)
        assert table.users is not None
        assert (table.users.tolist(), table.labels.tolist()) == (["ann", "bob"], [0, 1])

    @pytest.mark.parametrize(
        ("columns", "words"),
        [
            ({"city": ["SECRET", "x"], "y": [0, 1]}, "column 'city' is of type string, which is not a number"),
            ({"a": [1, 2], "y": [0, None]}, "column 'y' has missing values"),
            ({"a": [1, 2], "y": [0, 9]}, "a label outside 0 to 1"),
            ({"a": [1, 2]}, "no column 'y'"),
            ({"y": [0, 1]}, "no feature column"),
        ],
    )
    def test_a_table_that_does_not_fit_is_refused_without_a_value(
        self, tmp_path: Path, columns: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(Unreadable, match=words) as caught:
            read_table(write_parquet(tmp_path / "t.parquet", columns), "y", 2)
        assert caught.value.code == "DP091"
        assert "SECRET" not in str(caught.value)

    def test_what_is_no_parquet_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow")
        (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing else PAR1")
        with pytest.raises(Unreadable, match="not a Parquet file"):
            read_table(str(tmp_path / "t.parquet"), "y", 2)

    def test_without_pyarrow_the_extra_is_named_and_another_way(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "t.parquet").write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MissingExtra, match="pyarrow") as caught:
            read_table(str(tmp_path / "t.parquet"), "y", 2)
        assert caught.value.code == "DP090"
        assert "pip install 'dpbudget[parquet]'" in caught.value.hint
        assert ".csv" in caught.value.hint


class TestClasses:
    @pytest.mark.parametrize(
        ("text", "read"),
        [("2", (2, ())), ("1e1", (10, ())), ("no, yes", (2, ("no", "yes"))), ("a,b,c", (3, ("a", "b", "c")))],
    )
    def test_they_are_a_number_or_names(self, text: str, read: Any) -> None:
        assert ClassesType().convert(text, None, None) == read

    @pytest.mark.parametrize("text", ["0", "-1", "x", "2.5", "a,a", "a,", ","])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(InvalidParameter) as caught:
            ClassesType().convert(text, None, None)
        assert caught.value.code == "DP009"


def test_a_file_is_judged_before_anything_is_charged(run_cli: Cli, folder: Path, seen: Seen) -> None:
    Path("gap.csv").write_text("a,b,label\n1,,0\n2,3,1\n", encoding="utf-8")
    before = seen(folder)
    answer = run_cli(*TRAIN, "--data", "gap.csv", "--target", "label")
    assert (answer.code, "DP091" in answer.err, seen(folder) == before) == (4, True, True)
    assert run_cli(*TRAIN, "--data", "gap.csv", "--target", "label", "--fill-missing", "0").code == 0
