"""Utilities under Opacus's names."""

from dptrainer.opacus.utils import batch_memory_manager, fast_gradient_clipping_utils

__all__ = ["batch_memory_manager", "fast_gradient_clipping_utils"]
