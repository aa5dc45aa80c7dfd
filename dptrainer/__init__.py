"""DP-SGD for PyTorch under a signed budget: no receipt, no noise; no noise, no step.

Names load on first use, so that ``import dptrainer`` alone does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dptrainer.base import TrainingResult
    from dptrainer.callbacks import MLflowLog, TensorBoardLog, WandbLog
    from dptrainer.checkpoint import load_checkpoint, save_checkpoint
    from dptrainer.clipping import (
        BookKeeping,
        NormalisedClipping,
        PerLayerClipping,
        QuantileClipping,
        ScheduledClipping,
        VmapEngine,
        make_engine,
        rule,
    )
    from dptrainer.compiling import compiled
    from dptrainer.ema import WeightAverage
    from dptrainer.inspection import per_example_gradients, per_example_norms
    from dptrainer.memory import MemoryBound
    from dptrainer.noise.source import SecureNoise
    from dptrainer.noise.tree import SecureTreeNoise
    from dptrainer.optim import DPAdamBC
    from dptrainer.private import PrivateLoader, make_private
    from dptrainer.sampling import PoissonSampler
    from dptrainer.trainer import PrivateTrainer
    from dptrainer.tree import TreeTrainer
    from dptrainer.users import UserDataset
    from dptrainer.validation import Change, Problem, fix, validate
    from dptrainer.values import ClippedSum, NoisySum

_HOMES = {
    "BookKeeping": "dptrainer.clipping",
    "Change": "dptrainer.validation",
    "ClippedSum": "dptrainer.values",
    "DPAdamBC": "dptrainer.optim",
    "MLflowLog": "dptrainer.callbacks",
    "MemoryBound": "dptrainer.memory",
    "NoisySum": "dptrainer.values",
    "NormalisedClipping": "dptrainer.clipping",
    "PerLayerClipping": "dptrainer.clipping",
    "PoissonSampler": "dptrainer.sampling",
    "PrivateLoader": "dptrainer.private",
    "PrivateTrainer": "dptrainer.trainer",
    "Problem": "dptrainer.validation",
    "QuantileClipping": "dptrainer.clipping",
    "ScheduledClipping": "dptrainer.clipping",
    "SecureNoise": "dptrainer.noise.source",
    "SecureTreeNoise": "dptrainer.noise.tree",
    "TensorBoardLog": "dptrainer.callbacks",
    "TrainingResult": "dptrainer.base",
    "TreeTrainer": "dptrainer.tree",
    "UserDataset": "dptrainer.users",
    "VmapEngine": "dptrainer.clipping",
    "WandbLog": "dptrainer.callbacks",
    "fix": "dptrainer.validation",
    "WeightAverage": "dptrainer.ema",
    "compiled": "dptrainer.compiling",
    "load_checkpoint": "dptrainer.checkpoint",
    "make_engine": "dptrainer.clipping",
    "make_private": "dptrainer.private",
    "per_example_gradients": "dptrainer.inspection",
    "per_example_norms": "dptrainer.inspection",
    "rule": "dptrainer.clipping",
    "save_checkpoint": "dptrainer.checkpoint",
    "validate": "dptrainer.validation",
}

__all__ = [
    "BookKeeping",
    "Change",
    "ClippedSum",
    "DPAdamBC",
    "MLflowLog",
    "MemoryBound",
    "NoisySum",
    "NormalisedClipping",
    "PerLayerClipping",
    "PoissonSampler",
    "PrivateLoader",
    "PrivateTrainer",
    "Problem",
    "QuantileClipping",
    "ScheduledClipping",
    "SecureNoise",
    "SecureTreeNoise",
    "TensorBoardLog",
    "TrainingResult",
    "TreeTrainer",
    "UserDataset",
    "VmapEngine",
    "WandbLog",
    "WeightAverage",
    "compiled",
    "fix",
    "load_checkpoint",
    "make_engine",
    "make_private",
    "per_example_gradients",
    "per_example_norms",
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
