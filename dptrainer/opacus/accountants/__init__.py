"""Accountants under Opacus's names: pure bookkeeping, certified answers."""

from dptrainer.opacus.accountants import utils
from dptrainer.opacus.accountants.accountant import (
    GaussianAccountant,
    IAccountant,
    PRVAccountant,
    RDPAccountant,
    create_accountant,
)

__all__ = ["GaussianAccountant", "IAccountant", "PRVAccountant", "RDPAccountant", "create_accountant", "utils"]
