"""Passphrases in the user's keyring (Secret Service, Keychain, Credential Locker), by the public half of their key."""

from __future__ import annotations

from typing import Any

from dpbudget.errors import InvalidParameter, MissingExtra

_SERVICE = "dpbudget"


def remember(public: str, passphrase: str) -> None:
    """Store the passphrase of a key.

    Raises:
        MissingExtra: the package keyring is not installed (DP090).
        InvalidParameter: no keyring is unlocked here (DP073).
    """
    keyring = _load()
    if keyring is None:
        raise MissingExtra("the package keyring is not installed", hint="pip install 'dpbudget[keyring]'")
    try:
        keyring.set_password(_SERVICE, public, passphrase)
        if keyring.get_password(_SERVICE, public) != passphrase:
            raise InvalidParameter("the keyring did not keep the passphrase", code="DP073", hint="use --passphrase")
    except keyring.errors.KeyringError as error:
        raise InvalidParameter(
            f"the keyring refuses: {type(error).__name__}",
            code="DP073",
            hint="unlock it, or use --passphrase or --passphrase-fd",
        ) from None


def recall(public: str) -> bytes | None:
    """The passphrase of a key; None where no keyring has it."""
    keyring = _load()
    if keyring is None:
        return None
    try:
        found = keyring.get_password(_SERVICE, public)
    except keyring.errors.KeyringError:
        return None
    return None if found is None else str(found).encode()


def _load() -> Any:
    try:
        import keyring
        import keyring.errors
    except ImportError:
        return None
    return keyring
