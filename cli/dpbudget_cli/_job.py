"""What the options of ``dpbudget train`` say; every field is public."""

from __future__ import annotations

from dataclasses import dataclass

from dpbudget.errors import InvalidParameter
from dpbudget_cli._data import Table, read_table

#: Declared classes: how many, and their names if they have any.
Classes = tuple[int, tuple[str, ...]]


@dataclass(frozen=True)
class Job:
    """One call of ``dpbudget train``, without its ledger and keys."""

    data: str
    target: str
    classes: Classes
    model: str
    hidden: int
    lr: float
    momentum: float
    feature_scale: float
    fill_missing: float | None
    user_column: str | None
    max_examples: int | None
    hold_out: float | None
    validation: str | None
    score_plan: str | None
    seed: int
    output: str | None
    init: str | None
    public_eval: str | None
    physical_batch_size: int | None
    checkpoint_every: int
    max_steps: int | None
    stop_epsilon: float | None

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return self.classes[0]

    def check(self) -> None:
        """Refuse options that contradict each other, before anything is read.

        Raises:
            InvalidParameter: one is missing, or two are too many (DP064).
        """
        if (self.user_column is None) != (self.max_examples is None):
            raise _wanted(
                "--user-column and --max-examples belong together: whose each row is, and how many of a user's rows "
                "one step uses",
                "choose K for --max-examples without looking at how many rows users have",
            )
        private = [name for name, value in (("--hold-out", self.hold_out), ("--validation", self.validation)) if value]
        if len(private) == 2:
            raise _wanted("--hold-out and --validation are two sets of held-out records", "keep one of them")
        if self.score_plan is not None and not private:
            raise _wanted(
                "--score-plan pays for an accuracy on held-out records, and there are none",
                "pass --hold-out SHARE or --validation FILE",
            )

    def read(self, path: str) -> Table:
        """The table of a private file, before features are scaled."""
        return self._read(path, user=self.user_column)

    def read_public(self, path: str) -> Table:
        """The table of a file that is declared public, where nobody asks whose a row is."""
        return self._read(path, ignored=self.user_column)

    def _read(self, path: str, **roles: str | None) -> Table:
        count, names = self.classes
        return read_table(path, self.target, count, names=names, fill=self.fill_missing, **roles)


def _wanted(message: str, hint: str) -> InvalidParameter:
    return InvalidParameter(message, code="DP064", hint=f"{hint}; nothing was charged")
