"""DP-SGD for PyTorch under a signed budget: no receipt, no noise; no noise, no step.

Names load on first use, so that ``import dptrainer`` alone does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dptrainer.checkpoint import load_checkpoint, save_checkpoint
    from dptrainer.clipping import BookKeeping, VmapEngine, make_engine, rule
    from dptrainer.noise.source import SecureNoise
    from dptrainer.private import PrivateLoader, make_private
    from dptrainer.sampling import PoissonSampler
    from dptrainer.trainer import PrivateTrainer, TrainingResult
    from dptrainer.validation import Change, Problem, fix, validate
    from dptrainer.values import ClippedSum, NoisySum

_HOMES = {
    "BookKeeping": "dptrainer.clipping",
    "Change": "dptrainer.validation",
    "ClippedSum": "dptrainer.values",
    "NoisySum": "dptrainer.values",
    "PoissonSampler": "dptrainer.sampling",
    "PrivateLoader": "dptrainer.private",
    "PrivateTrainer": "dptrainer.trainer",
    "Problem": "dptrainer.validation",
    "SecureNoise": "dptrainer.noise.source",
    "TrainingResult": "dptrainer.trainer",
    "VmapEngine": "dptrainer.clipping",
    "fix": "dptrainer.validation",
    "load_checkpoint": "dptrainer.checkpoint",
    "make_engine": "dptrainer.clipping",
    "make_private": "dptrainer.private",
    "rule": "dptrainer.clipping",
    "save_checkpoint": "dptrainer.checkpoint",
    "validate": "dptrainer.validation",
}

__all__ = [
    "BookKeeping",
    "Change",
    "ClippedSum",
    "NoisySum",
    "PoissonSampler",
    "PrivateLoader",
    "PrivateTrainer",
    "Problem",
    "SecureNoise",
    "TrainingResult",
    "VmapEngine",
    "fix",
    "load_checkpoint",
    "make_engine",
    "make_private",
    "rule",
    "save_checkpoint",
    "validate",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'dptrainer' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
