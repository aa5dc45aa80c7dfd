"""The private optimizer, under the name that Opacus gives it."""

from dptrainer.opacus.optimizers.optimizer import DPOptimizer

__all__ = ["DPOptimizer"]
