"""Passphrases in a keyring: kept once, found again, and no key left behind that nobody can open."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.errors import NoKeyringError, PasswordDeleteError

Cli = Callable[..., Any]


class Drawer(KeyringBackend):
    """A keyring in this process."""

    priority = 1  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[str, str], str] = {}
        self.locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise NoKeyringError("locked")
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        if self.locked:
            raise NoKeyringError("locked")
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        raise PasswordDeleteError("kept for ever")


@pytest.fixture
def drawer() -> Iterator[Drawer]:
    before, mine = keyring.get_keyring(), Drawer()
    keyring.set_keyring(mine)
    yield mine
    keyring.set_keyring(before)


def test_a_key_in_the_keyring_opens_by_itself(run_cli: Cli, empty: Path, drawer: Drawer) -> None:
    made = run_cli("key", "new", "a.key", "--keyring", "--json")
    assert made.code == 0
    assert b"ENCRYPTED" in (empty / "a.key").read_bytes()
    ((service, public), passphrase) = next(iter(drawer.kept.items()))
    assert (service, public, len(passphrase)) == ("dpbudget", made.json["public"], 64)
    assert run_cli("key", "show", "a.key", "--json").json["public"] == public
    assert passphrase not in made.out + made.err


def test_a_ledger_is_granted_with_keys_of_the_keyring(run_cli: Cli, empty: Path, drawer: Drawer) -> None:
    for name in ("owner.key", "writer.key"):
        assert run_cli("key", "new", name, "--keyring").code == 0
    init = ("ledger", "init", "b.ledger", "--epsilon", "3", "--delta", "1e-5")
    assert run_cli(*init, "--owner-key", "owner.key", "--writer-key", "writer.key").code == 0
    drawer.locked = True
    assert run_cli("ledger", "note", "b.ledger", "checked").code == 4


def test_a_locked_keyring_leaves_no_key_behind(run_cli: Cli, empty: Path, drawer: Drawer) -> None:
    drawer.locked = True
    answer = run_cli("key", "new", "a.key", "--keyring")
    assert (answer.code, "DP073" in answer.err) == (2, True)
    assert not list(empty.glob("a.key*"))


def test_without_the_package_the_extra_is_named(run_cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    answer = run_cli("key", "new", "a.key", "--keyring")
    assert (answer.code, "dpbudget[keyring]" in answer.err) == (2, True)
    assert not os.path.lexists("a.key")
