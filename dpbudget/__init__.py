"""Privacy budgets that are certified before, enforced during and proved after training.

One document flows one way: :func:`calibrate` writes a :class:`Plan`; a :class:`Ledger` signs it in and hands out
receipts; noise cannot be added without a receipt; :func:`verify` replays the ledger and recomputes every number.

Names load on first use, so that ``import dpbudget`` stays light: no scipy, torch or matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpbudget._calibrate import calibrate, delta_of, epsilon_of, max_steps, noise_for, plan_for
    from dpbudget._environment import start_from_environment
    from dpbudget._explore import Sweep, explore
    from dpbudget._surface import create_ledger, open_ledger, start
    from dpbudget._verify import Report, verify
    from dpbudget.accountants import get_accountant
    from dpbudget.curve import Bounds, PrivacyCurve, round_down, round_up
    from dpbudget.errors import DPBudgetError, DPBudgetWarning
    from dpbudget.filters import PortfolioFilter, RDPFilter
    from dpbudget.ledger.auditor import load_auditor_key, load_auditor_public_key, new_auditor_key
    from dpbudget.ledger.keys import load_key, load_public_key, new_key
    from dpbudget.ledger.ledger import Ledger
    from dpbudget.ledger.plan_key import load_plan_key, new_plan_key
    from dpbudget.ledger.replay import RunReplay, StepKey
    from dpbudget.ledger.sealed import SealedKeys
    from dpbudget.mechanisms import Adjacency, Charge, Gaussian, PoissonSampled
    from dpbudget.meter import Meter
    from dpbudget.plan import Budget, Phase, Plan

__version__ = "0.1.0"

_HOMES = {
    "Adjacency": "dpbudget.mechanisms",
    "Bounds": "dpbudget.curve",
    "Budget": "dpbudget.plan",
    "Charge": "dpbudget.mechanisms",
    "DPBudgetError": "dpbudget.errors",
    "DPBudgetWarning": "dpbudget.errors",
    "Gaussian": "dpbudget.mechanisms",
    "Ledger": "dpbudget.ledger.ledger",
    "Meter": "dpbudget.meter",
    "Phase": "dpbudget.plan",
    "Plan": "dpbudget.plan",
    "PoissonSampled": "dpbudget.mechanisms",
    "PortfolioFilter": "dpbudget.filters",
    "PrivacyCurve": "dpbudget.curve",
    "RDPFilter": "dpbudget.filters",
    "Report": "dpbudget._verify",
    "RunReplay": "dpbudget.ledger.replay",
    "SealedKeys": "dpbudget.ledger.sealed",
    "StepKey": "dpbudget.ledger.replay",
    "Sweep": "dpbudget._explore",
    "calibrate": "dpbudget._calibrate",
    "create_ledger": "dpbudget._surface",
    "delta_of": "dpbudget._calibrate",
    "epsilon_of": "dpbudget._calibrate",
    "explore": "dpbudget._explore",
    "get_accountant": "dpbudget.accountants",
    "load_auditor_key": "dpbudget.ledger.auditor",
    "load_auditor_public_key": "dpbudget.ledger.auditor",
    "load_key": "dpbudget.ledger.keys",
    "load_plan_key": "dpbudget.ledger.plan_key",
    "load_public_key": "dpbudget.ledger.keys",
    "max_steps": "dpbudget._calibrate",
    "new_auditor_key": "dpbudget.ledger.auditor",
    "new_key": "dpbudget.ledger.keys",
    "new_plan_key": "dpbudget.ledger.plan_key",
    "noise_for": "dpbudget._calibrate",
    "open_ledger": "dpbudget._surface",
    "plan_for": "dpbudget._calibrate",
    "round_down": "dpbudget.curve",
    "round_up": "dpbudget.curve",
    "start": "dpbudget._surface",
    "start_from_environment": "dpbudget._environment",
    "verify": "dpbudget._verify",
}

__all__ = [
    "Adjacency",
    "Bounds",
    "Budget",
    "Charge",
    "DPBudgetError",
    "DPBudgetWarning",
    "Gaussian",
    "Ledger",
    "Meter",
    "Phase",
    "Plan",
    "PoissonSampled",
    "PortfolioFilter",
    "PrivacyCurve",
    "RDPFilter",
    "Report",
    "RunReplay",
    "SealedKeys",
    "StepKey",
    "Sweep",
    "calibrate",
    "create_ledger",
    "delta_of",
    "epsilon_of",
    "explore",
    "get_accountant",
    "load_auditor_key",
    "load_auditor_public_key",
    "load_key",
    "load_plan_key",
    "load_public_key",
    "max_steps",
    "new_auditor_key",
    "new_key",
    "new_plan_key",
    "noise_for",
    "open_ledger",
    "plan_for",
    "round_down",
    "round_up",
    "start",
    "start_from_environment",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'dpbudget' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
