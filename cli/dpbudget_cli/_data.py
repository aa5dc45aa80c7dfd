"""Tables from files: CSV with a header, or NPZ. Messages name columns and files, never values or numbers of rows."""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpbudget.errors import Unreadable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOADED = (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Table:
    """Features ``[rows, ...]`` as float32 and labels ``[rows]`` as int64. The number of rows is private."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]


def read_table(path: str, target: str, classes: int, scale: float) -> Table:
    """Features and labels of a file.

    Args:
        path: ``.csv`` (a header row, numeric cells) or ``.npz`` (the array ``target`` and one other array).
        target: the column or array with the labels 0 to ``classes`` - 1.
        classes: number of classes, declared and not counted.
        scale: public constant by which every feature is multiplied.

    Raises:
        Unreadable: the file is missing, of another kind, or not such a table (DP091).
    """
    import numpy as np

    kind = Path(path).suffix.lower()
    if kind not in (".csv", ".npz"):
        raise _bad(f"{path} is neither a .csv nor a .npz file", "convert it; numpy.savez writes .npz")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _bad(f"{path}: {error.strerror}", "check the path") from None
    features, labels = (_read_csv if kind == ".csv" else _read_npz)(path, data, target)
    if features.ndim < 2 or labels.shape != features.shape[:1] or not len(labels):
        raise _bad(f"{path}: features and target {target!r} do not have one row for each record", "check the file")
    if labels.dtype.kind not in "iuf" or features.dtype.kind not in "iuf":
        raise _bad(f"{path} holds something that is not a real number", "encode categories as numbers first")
    within = (labels >= 0) & (labels < classes) & (labels == np.floor(labels))  # NaN is in no range
    if not within.all():
        raise _bad(f"{path}: target {target!r} has a label outside 0 to {classes - 1}", "declare --classes, or re-code")
    with np.errstate(over="ignore", invalid="ignore"):  # what leaves the range of float32 is clipped with its gradient
        scaled = features.astype(np.float32) * np.float32(scale)
    return Table(scaled, labels.astype(np.int64))


def _read_npz(path: str, data: bytes, target: str) -> tuple[NDArray[Any], NDArray[Any]]:
    import numpy as np

    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _LOADED:
        raise _bad(f"{path} is not an .npz file of plain arrays", "write it with numpy.savez") from None
    others = [name for name in arrays if name != target]
    if target not in arrays or len(others) != 1:
        raise _bad(
            f"{path} has the arrays {', '.join(arrays) or '(none)'}; it needs {target!r} and exactly one other",
            "name the label array with --target",
        )
    return arrays[others[0]], arrays[target]


def _read_csv(path: str, data: bytes, target: str) -> tuple[NDArray[Any], NDArray[Any]]:
    import numpy as np

    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig")), strict=True))
    except (ValueError, csv.Error):
        raise _bad(f"{path} is not a CSV file in UTF-8", "export it again") from None
    rows = [row for row in rows if row]
    header = rows[0] if rows else []
    _check_header(path, header, target)
    if any(len(row) != len(header) for row in rows):
        raise _bad(f"{path} has rows of another length than its header", "export it again")
    columns = dict(zip(header, zip(*rows[1:], strict=True), strict=False))
    if not columns or len(header) < 2:
        raise _bad(f"{path} has no records or no feature column", "check the file")
    numbers = {name: _column(path, name, cells) for name, cells in columns.items()}
    labels = numbers.pop(target)
    return np.stack(list(numbers.values()), axis=1), labels


def _check_header(path: str, header: list[str], target: str) -> None:
    if not header:
        raise _bad(f"{path} is empty", "write a header, and a row of numbers for each record")
    twice = [name for index, name in enumerate(header) if name in header[:index]]
    if twice:
        raise _bad(f"{path} has two columns {twice[0]!r}", "rename one of them")
    if target not in header:
        raise _bad(
            f"{path} has no column {target!r}", f"name the labels with --target; the columns are {_listed(header)}"
        )


def _listed(header: list[str]) -> str:
    """Up to 20 names: the first ones, and the last, where labels often are."""
    return ", ".join(header if len(header) <= 20 else [*header[:18], "…", header[-1]])


def _column(path: str, name: str, cells: tuple[str, ...]) -> NDArray[np.float64]:
    import numpy as np

    try:
        return np.array([float(cell) for cell in cells])
    except ValueError:
        raise _bad(
            f"{path}: column {name!r} holds something that is not a number", "encode categories as numbers first"
        ) from None


def _bad(message: str, hint: str) -> Unreadable:
    return Unreadable(message, code="DP091", hint=hint)
