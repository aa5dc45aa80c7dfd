"""Utilities under Opacus's names."""

from dptrainer.opacus.utils import batch_memory_manager, fast_gradient_clipping_utils, uniform_sampler

__all__ = ["batch_memory_manager", "fast_gradient_clipping_utils", "uniform_sampler"]
