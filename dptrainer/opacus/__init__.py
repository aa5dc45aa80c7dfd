"""Opacus's interface on this engine: change one import, keep the loop, and get a ledger that can be verified.

::

    from dptrainer.opacus import PrivacyEngine

``docs/migrating-from-opacus.md`` lists what is the same, what differs, and why.
"""

from dptrainer.opacus import accountants, layers, optimizers, schedulers, utils, validators
from dptrainer.opacus.data_loader import DPDataLoader
from dptrainer.opacus.grad_sample import GradSampleModule
from dptrainer.opacus.privacy_engine import PrivacyEngine

__all__ = [
    "DPDataLoader",
    "GradSampleModule",
    "PrivacyEngine",
    "accountants",
    "layers",
    "optimizers",
    "schedulers",
    "utils",
    "validators",
]
