"""Columns of a file, by its kind: CSV with a header, NPZ, Parquet. Messages name columns, never values or sizes."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpbudget.errors import MissingExtra, Unreadable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOADED = (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile)
_NUMBERS_FIRST = "encode categories as numbers first"


@dataclass(frozen=True)
class Roles:
    """Which columns of a file are what; all others are features.

    Attributes:
        target: the labels.
        user: who each row belongs to; None where every row is a unit of its own.
        ignored: a column that may be there and is of no use.
    """

    target: str
    user: str | None = None
    ignored: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that must be there beside the features."""
        return (self.target,) if self.user is None else (self.target, self.user)

    def features(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that are features."""
        return [name for name in names if name not in (*self.named, self.ignored)]


@dataclass(frozen=True)
class Columns:
    """What a file holds, before anything of it is judged.

    Attributes:
        features: by column, ``[rows]`` each, or one array ``[rows, ...]``; NaN where a value is missing.
        labels: ``[rows]`` numbers or text.
        users: ``[rows]`` whole numbers or text; None where no column names them.
    """

    features: Mapping[str, NDArray[Any]]
    labels: NDArray[Any]
    users: NDArray[Any] | None


def read_columns(path: str, roles: Roles) -> Columns:
    """The columns of a file.

    Raises:
        Unreadable: the file is missing, of another kind, or lacks a column (DP091).
        MissingExtra: what reads Parquet is not installed (DP090).
    """
    kind = Path(path).suffix.lower()
    if kind not in _READERS:
        raise bad(f"{path} is neither a .csv nor an .npz nor a .parquet file", "convert it; numpy.savez writes .npz")
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        from dpbudget.ledger.store.files import check_path

        raise bad(f"{path}: {getattr(error, 'strerror', None) or error}", check_path(path)) from None
    return _READERS[kind](path, data, roles)


def bad(message: str, hint: str) -> Unreadable:
    """The error of a data file."""
    return Unreadable(message, code="DP091", hint=hint)


# ---------------------------------------------------------------------------- NPZ


def _read_npz(path: str, data: bytes, roles: Roles) -> Columns:
    import numpy as np

    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _LOADED:
        raise bad(f"{path} is not an .npz file of plain arrays", "write it with numpy.savez") from None
    others = roles.features(arrays)
    if not set(roles.named) <= set(arrays) or len(others) != 1:
        wanted = " and ".join(map(repr, roles.named))
        raise bad(
            f"{path} has the arrays {', '.join(arrays) or '(none)'}; it needs {wanted} and exactly one other",
            "name the label array with --target",
        )
    (features,) = others
    if arrays[features].dtype.kind not in "iuf":
        raise bad(f"{path}: array {features!r} holds something that is not a real number", _NUMBERS_FIRST)
    return Columns({features: arrays[features]}, arrays[roles.target], arrays[roles.user] if roles.user else None)


# ---------------------------------------------------------------------------- CSV


def _read_csv(path: str, data: bytes, roles: Roles) -> Columns:
    import numpy as np

    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig")), strict=True))
    except (ValueError, csv.Error):
        raise bad(f"{path} is not a CSV file in UTF-8", "export it again") from None
    rows = [row for row in rows if row]
    header = rows[0] if rows else []
    _check_header(path, header, roles)
    if any(len(row) != len(header) for row in rows):
        raise bad(f"{path} has rows of another length than its header", "export it again")
    columns = dict(zip(header, zip(*rows[1:], strict=True), strict=False))
    if not columns:
        raise bad(f"{path} has no records", "check the file")
    text = {name: np.array([cell.strip() for cell in columns[name]]) for name in roles.named}
    features = {name: _cells(path, name, columns[name]) for name in roles.features(columns)}
    return Columns(features, text[roles.target], text[roles.user] if roles.user else None)


def _check_header(path: str, header: list[str], roles: Roles) -> None:
    if not header:
        raise bad(f"{path} is empty", "write a header, and a row of numbers for each record")
    twice = [name for index, name in enumerate(header) if name in header[:index]]
    missing = not set(roles.named) <= set(header)
    # The first line may be a record, of which nothing is shown.
    if missing and len(header) == 1 and re.search("[;\t|]", header[0]):
        raise bad(f"{path} has one column alone", "separate values by commas: export it again")
    if (twice or missing) and any(map(_is_number, header)):
        raise bad(
            f"{path} has numbers in the place of column names", "name the columns in the first line, as in a,b,label"
        )
    if twice:
        raise bad(f"{path} has two columns {twice[0]!r}", "rename one of them")
    _require(path, header, roles)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _require(path: str, header: list[str], roles: Roles) -> None:
    """Refuse a table without labels, users or any feature, with the names that it has."""
    from dpbudget._checks import did_you_mean

    options = dict(zip(roles.named, ("labels with --target", "users with --user-column"), strict=False))
    for name, option in options.items():
        if name not in header:
            meant = f"{did_you_mean(name, header)} The columns are {_listed(header)}".strip()
            raise bad(f"{path} has no column {name!r}", f"name the {option}. {meant}")
    if not roles.features(header):
        raise bad(f"{path} has no feature column", "check the file")


def _listed(header: list[str]) -> str:
    """Up to 20 names: the first ones, and the last, where labels often are."""
    return ", ".join(header if len(header) <= 20 else [*header[:18], "…", header[-1]])


def _cells(path: str, name: str, cells: tuple[str, ...]) -> NDArray[np.float64]:
    """A column of numbers; an empty cell is a missing value."""
    import numpy as np

    try:
        return np.array([float(cell) if cell.strip() else np.nan for cell in cells])
    except ValueError:
        raise bad(f"{path}: column {name!r} holds something that is not a number", _NUMBERS_FIRST) from None


# ---------------------------------------------------------------------------- Parquet


def _read_parquet(path: str, data: bytes, roles: Roles) -> Columns:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra(
            "reading Parquet needs pyarrow, which is not installed",
            hint="pip install 'dpbudget[parquet]', or write the table as .csv or .npz",
        ) from None
    try:
        table = parquet.read_table(arrow.BufferReader(data))
    except (arrow.ArrowException, OSError, ValueError):
        raise bad(f"{path} is not a Parquet file", "export it again") from None
    header = list(table.column_names)
    _check_header(path, header, roles)
    features = {name: _numbers(path, name, table[name]) for name in roles.features(header)}
    labels = table[roles.target]
    users = None if roles.user is None else _plain(path, roles.user, table[roles.user])
    return Columns(features, _plain(path, roles.target, labels), users)


def _numbers(path: str, name: str, column: Any) -> NDArray[np.float64]:
    """A column of numbers or truth values as float64, NaN where it is null."""
    import pyarrow as arrow

    kind = column.type
    if arrow.types.is_boolean(kind):
        column = column.cast(arrow.int8())
    elif not (arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_decimal(kind)):
        raise bad(f"{path}: column {name!r} is of type {kind}, which is not a number", _NUMBERS_FIRST)
    values: NDArray[np.float64] = column.cast(arrow.float64(), safe=False).to_numpy()
    return values


def _plain(path: str, name: str, column: Any) -> NDArray[Any]:
    """A column of labels or users: text, whole numbers, or floats for whoever judges them."""
    import numpy as np
    import pyarrow as arrow

    if arrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if column.null_count:
        raise bad(f"{path}: column {name!r} has missing values", "leave out rows without a value in this column")
    if arrow.types.is_boolean(kind) or arrow.types.is_decimal(kind):
        return _numbers(path, name, column)
    if arrow.types.is_integer(kind) or arrow.types.is_floating(kind):
        return np.asarray(column.to_numpy())
    if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
        return np.array(column.to_pylist(), dtype=str)
    raise bad(f"{path}: column {name!r} is of type {kind}", "store it as text or whole numbers")


_READERS: dict[str, Callable[[str, bytes, Roles], Columns]] = {
    ".csv": _read_csv,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
}
