"""Accountants by name. Importing this package loads no numerics; choosing an accountant does."""

from __future__ import annotations

import difflib
import importlib

from dpbudget.accountants.base import Accountant, Charge
from dpbudget.errors import InvalidParameter

__all__ = ["ACCOUNTANTS", "Accountant", "Charge", "get_accountant"]

#: Where each accountant lives: name -> (module, class).
ACCOUNTANTS: dict[str, tuple[str, str]] = {
    "prv": ("dpbudget.accountants.prv", "PRVAccountant"),
    "rdp": ("dpbudget.accountants.rdp", "RDPAccountant"),
}


def get_accountant(name: str) -> Accountant:
    """The accountant called ``name``; raises InvalidParameter (DP061) with the choices for an unknown one."""
    if not isinstance(name, str) or name not in ACCOUNTANTS:
        close = difflib.get_close_matches(str(name).lower(), ACCOUNTANTS, n=1, cutoff=0.5)
        question = f"did you mean {close[0]!r}? " if close else ""
        raise InvalidParameter(
            f"unknown accountant {name!r}",
            hint=f"{question}choose one of {', '.join(sorted(ACCOUNTANTS))}",
            code="DP061",
        )
    module, attribute = ACCOUNTANTS[name]
    accountant: Accountant = getattr(importlib.import_module(module), attribute)()
    return accountant
