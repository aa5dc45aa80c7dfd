"""Per-example gradients on request, and samplers for layers of one's own."""

from dptrainer.opacus.grad_sample.grad_sample_module import GradSampleModule
from dptrainer.opacus.grad_sample.samplers import register_grad_sampler, register_norm_sampler

__all__ = ["GradSampleModule", "register_grad_sampler", "register_norm_sampler"]
