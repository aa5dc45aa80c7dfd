"""Privacy for a person instead of a row: a dataset whose records are users, each with a bounded number of examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.sampling import Indices

#: Largest number of examples that one user may bring to a step.
MAX_EXAMPLES = 1 << 20


class UserDataset(Dataset[Any]):
    """The users of a dataset as its records: what the private sampler draws, what is clipped, what is counted.

    Guarantee: with this dataset in ``make_private`` or ``PrivateTrainer``, the plan's claim holds for *all examples of
    one user together*: a user is drawn with the plan's rate, brings at most ``max_examples`` of its examples, and the
    gradient that is clipped is the sum over these divided by ``max_examples``. It is void if two names in ``users`` are
    one person. The plan says ``unit="user"``: its nominal size and batch size count users.

    Args:
        dataset: map-style; an item is one example.
        users: who each example belongs to, one name an example: numbers or strings, equal for the same user.
        max_examples: k, public: chosen without looking at how many examples users have. Of a user with more, k are
            drawn anew each time.

    Raises:
        InvalidParameter: k is out of range, there is not one user an example, or names that cannot be compared (DP009).
        PrivacyViolation: the dataset gives no example by index (DP024).
    """

    def __init__(self, dataset: Dataset[Any], users: Sequence[object] | Tensor, *, max_examples: int) -> None:
        if type(max_examples) is not int or not 1 <= max_examples <= MAX_EXAMPLES:
            raise InvalidParameter(
                f"max_examples must be an integer in [1, {MAX_EXAMPLES}], got {max_examples!r}",
                code="DP009",
                hint="choose a public bound, for example what a typical user is known to have",
            )
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise PrivacyViolation(
                f"{type(dataset).__name__} gives no example by index", code="DP024", hint="use a map-style dataset"
            )
        self.examples: Any = dataset
        self.max_examples = max_examples
        names = users.tolist() if isinstance(users, Tensor | np.ndarray) else list(users)
        if len(names) != len(self.examples):
            raise InvalidParameter(
                "users does not name one user for each example of the dataset",
                code="DP009",
                hint="pass a sequence as long as the dataset",
            )
        rows: dict[object, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(_comparable(name), []).append(row)
        self._rows = [np.array(found, dtype=np.int64) for found in rows.values()]

    def __len__(self) -> int:
        """Number of users. Private under add-remove adjacency."""
        return len(self._rows)

    def __getitem__(self, index: int) -> list[Any]:
        """The examples of one user, at most k of them."""
        chosen, _ = self.chosen(np.array([index], dtype=np.int64))
        return [self.examples[row] for row in chosen.tolist()]

    def chosen(self, users: Indices) -> tuple[Indices, tuple[int, ...]]:
        """Rows of these users in the dataset of examples, user by user, and how many each has. Private."""
        rows = [self._bounded(self._rows[user]) for user in users.tolist()]
        counts = tuple(len(found) for found in rows)
        return (np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)), counts

    def _bounded(self, rows: Indices) -> Indices:
        if len(rows) <= self.max_examples:
            return rows
        # Any choice is private that looks at this user alone.
        kept: Indices = rows[np.sort(torch.randperm(len(rows))[: self.max_examples].numpy())]
        return kept


def _comparable(name: object) -> object:
    """The name, if equal names mean one user.

    Two objects that only equal themselves, a missing value (NaN) or two tensors with one number, would make two users
    of one, and the guarantee of each would be for half of a person.
    """
    plain = name.item() if isinstance(name, np.generic) or (isinstance(name, Tensor) and name.dim() == 0) else name
    if isinstance(plain, str | bytes | int) or (isinstance(plain, float) and plain == plain):
        return plain
    raise InvalidParameter(
        f"a user is named by a {type(name).__name__} or a missing value, which cannot be compared",
        code="DP009",
        hint="name users by numbers or strings, and leave out or group rows whose user is unknown",
    )
