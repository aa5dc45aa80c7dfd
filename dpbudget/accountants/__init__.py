"""Accountants by name. Importing this package loads no numerics; choosing an accountant does."""

from __future__ import annotations

import difflib
import importlib

from dpbudget.accountants.base import Accountant, Charge
from dpbudget.errors import InvalidParameter

__all__ = ["ACCOUNTANTS", "FURTHER", "Accountant", "Charge", "get_accountant"]

#: Where each accountant lives whose answers a plan may claim: name -> (module, class).
ACCOUNTANTS: dict[str, tuple[str, str]] = {
    "prv": ("dpbudget.accountants.prv", "PRVAccountant"),
    "rdp": ("dpbudget.accountants.rdp", "RDPAccountant"),
}
#: Accountants that are chosen by name too, for any dominating pair, but never claimed.
FURTHER: dict[str, tuple[str, str]] = {"pld": ("dpbudget.accountants.pld", "PLDAccountant")}


def get_accountant(name: str) -> Accountant:
    """The accountant called ``name``; raises InvalidParameter (DP061) with the choices for an unknown one."""
    known = ACCOUNTANTS | FURTHER
    if not isinstance(name, str) or name not in known:
        close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
        question = f"did you mean {close[0]!r}? " if close else ""
        raise InvalidParameter(
            f"unknown accountant {name!r}",
            hint=f"{question}choose one of {', '.join(sorted(known))}",
            code="DP061",
        )
    module, attribute = known[name]
    accountant: Accountant = getattr(importlib.import_module(module), attribute)()
    return accountant
