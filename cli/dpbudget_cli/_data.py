"""Tables from files, checked before anything is charged. Messages name columns, never values or numbers of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpbudget_cli._tables import Roles, bad, read_columns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Table:
    """Features ``[rows, ...]`` as float32, labels ``[rows]`` as int64, and who owns each row, if anybody is named.

    The number of rows is private.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    users: NDArray[Any] | None = None

    def rows(self, chosen: NDArray[np.bool_]) -> Table:
        """The chosen rows."""
        return Table(self.features[chosen], self.labels[chosen], None if self.users is None else self.users[chosen])

    def scaled(self, factor: float) -> Table:
        """The same with every feature multiplied by a public constant."""
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):  # as read_table
            return Table(self.features * np.float32(factor), self.labels, self.users)


def read_table(
    path: str,
    target: str,
    classes: int,
    *,
    user: str | None = None,
    ignored: str | None = None,
    names: Sequence[str] = (),
    fill: float | None = None,
) -> Table:
    """Features, labels and users of a file.

    Args:
        path: ``.csv`` (a header row, numeric cells), ``.parquet`` (likewise), or ``.npz`` (the named arrays and one of
            features).
        target: the column or array with the labels 0 to ``classes`` - 1, or with ``names``.
        classes: number of classes, declared and not counted.
        user: the column or array that says whose each row is.
        ignored: a column that may be there and is of no use.
        names: declared names of the classes, in the order of their numbers.
        fill: public constant that takes the place of missing features; without it they are refused.

    Raises:
        Unreadable: the file is missing, of another kind, or not such a table (DP091).
        MissingExtra: what reads Parquet is not installed (DP090).
    """
    import numpy as np

    columns = read_columns(path, Roles(target, user, ignored))
    labels = _labels(path, target, columns.labels, classes, names)
    users = None if columns.users is None else _users(path, str(user), columns.users)
    features = _features(path, columns.features, fill)
    rows = {len(part) for part in (labels, users) if part is not None}
    if features.ndim < 2 or rows != {len(features)} or not len(features):
        raise bad(f"{path}: features and target {target!r} do not have one row for each record", "check the file")
    with np.errstate(over="ignore", invalid="ignore"):  # what leaves the range of float32 is clipped with its gradient
        return Table(features.astype(np.float32), labels, users)


def _labels(path: str, target: str, labels: NDArray[Any], classes: int, names: Sequence[str]) -> NDArray[np.int64]:
    """Numbers from 0 of labels that are numbers, or names that were declared."""
    import numpy as np

    if labels.ndim != 1:
        raise bad(f"{path}: target {target!r} has not one label for each record", "store labels as one column")
    if names:
        return _numbered(path, target, labels, names)
    if labels.dtype.kind == "U":
        try:
            labels = labels.astype(np.float64)
        except ValueError:
            raise bad(
                f"{path}: column {target!r} holds something that is not a number",
                "declare the classes by name, as in --classes no,yes, or encode categories as numbers first",
            ) from None
    if labels.dtype.kind not in "iuf":
        raise bad(
            f"{path}: target {target!r} holds something that is not a real number", "encode categories as numbers"
        )
    within = (labels >= 0) & (labels < classes) & (labels == np.floor(labels))  # NaN is in no range
    if not within.all():
        raise bad(f"{path}: target {target!r} has a label outside 0 to {classes - 1}", "declare --classes, or re-code")
    return labels.astype(np.int64)


def _numbered(path: str, target: str, labels: NDArray[Any], names: Sequence[str]) -> NDArray[np.int64]:
    import numpy as np

    if labels.dtype.kind != "U":
        raise bad(
            f"{path}: target {target!r} holds numbers, and the classes are declared by name",
            "declare their number, as in --classes 2",
        )
    found = np.full(len(labels), -1, dtype=np.int64)
    for number, name in enumerate(names):
        found[labels == name] = number
    if (found < 0).any():
        raise bad(
            f"{path}: target {target!r} has a label that is none of {', '.join(names)}", "declare all in --classes"
        )
    return found


def _users(path: str, column: str, users: NDArray[Any]) -> NDArray[Any]:
    """The users, if equal names mean one user and every row has one."""
    if users.ndim != 1 or users.dtype.kind not in "iuU":
        raise bad(
            f"{path}: users {column!r} are neither text nor whole numbers", "name every user by text or a whole number"
        )
    if users.dtype.kind == "U" and (users == "").any():
        raise bad(f"{path}: column {column!r} has missing values", "leave out rows whose user is unknown")
    return users


def _features(path: str, columns: Mapping[str, NDArray[Any]], fill: float | None) -> NDArray[Any]:
    import numpy as np

    filled = {name: _without_missing(path, name, values, fill) for name, values in columns.items()}
    if len(filled) == 1 and next(iter(filled.values())).ndim != 1:  # the array of an .npz file
        return next(iter(filled.values()))
    return np.stack(list(filled.values()), axis=1)


def _without_missing(path: str, name: str, values: NDArray[Any], fill: float | None) -> NDArray[Any]:
    import numpy as np

    missing = np.isnan(values) if values.dtype.kind == "f" else None
    if missing is None or not missing.any():
        return values
    if fill is None:
        raise bad(
            f"{path}: column {name!r} has missing values", "--fill-missing V puts a public constant in their place"
        )
    return np.where(missing, values.dtype.type(fill), values)
