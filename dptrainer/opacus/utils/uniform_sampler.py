"""Opacus's Poisson batch sampler: a rate here, since the ledger draws the batches."""

from dptrainer.opacus.data_loader import PoissonBatches as UniformWithReplacementSampler

__all__ = ["UniformWithReplacementSampler"]
