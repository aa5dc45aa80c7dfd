"""From a clipped sum to gradients that an optimizer may see: noise, the public divisor, ``.grad``."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from dpbudget.errors import PrivacyViolation
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import Run
from dptrainer.clipping.engine import trainable_parameters
from dptrainer.clipping.policy import Clipping
from dptrainer.noise.source import NoiseSource, SecureNoise, check_size, noise_scale
from dptrainer.streams import check_streams
from dptrainer.values import ClippedSum, NoisySum


def check_run(model: nn.Module, run: Run) -> None:
    """Refuse a model that the run's plan does not cover; nothing is charged or changed.

    Raises:
        PrivacyViolation: more trainable parameters than the plan allows, or none (DP018); ``run`` is not a run (DP081).
    """
    check_is_run(run)
    check_size(trainable_parameters(model).values(), run.plan.max_parameters)


def check_noise(model: nn.Module, noise: object) -> None:
    """Refuse a model that is where ``noise``, or secret draws, cannot be made; nothing is charged or changed.

    Raises:
        PrivacyViolation: there are no kernels for a device of its parameters, or its streams are not known (DP016).
    """
    check_streams(next(model.parameters()).device)
    if isinstance(noise, SecureNoise):
        noise.check_devices(parameter.device for parameter in trainable_parameters(model).values())


def check_is_run(run: object) -> None:
    """Refuse a ledger, a plan or a run's name in the place of a run.

    Raises:
        PrivacyViolation: it is none (DP081).
    """
    if not isinstance(run, Run):
        raise PrivacyViolation(
            f"run is {type(run).__name__}, not a run of a ledger",
            code="DP081",
            hint="run = dpbudget.start(ledger, run_id)",
        )


def release(
    model: nn.Module,
    clipped: ClippedSum,
    receipt: Receipt,
    noise: NoiseSource,
    *,
    with_digest: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    clipping: Clipping | None = None,
) -> str | None:
    """Add the receipt's noise and write ``sum / expected batch size`` to ``.grad`` of every trainable parameter.

    The divisor is the plan's, never the size of the batch that was drawn. What is in ``.grad`` afterwards may be
    published, and everything computed from it. The tensors of ``clipped`` are used up: they become the gradients.

    Args:
        model: its trainable parameters are those of the sum.
        clipped: what the engine made of the whole logical batch.
        receipt: pays for it.
        noise: adds the noise.
        with_digest: whether to hash the noisy sum.
        optimizer: is told the standard deviation of the noise in ``.grad`` if it has a method ``gradient_noise``.
        clipping: learns from what was released.

    Returns:
        :func:`output_digest` of the noisy sum if ``with_digest``, else None.

    Raises:
        PrivacyViolation: the sum does not belong to this model (DP031), or the noise source refuses it.
        ReceiptSpent: the receipt was used before (DP077).
    """
    check_parameters(model, clipped)
    noisy = noise.privatise(clipped, receipt)
    digest = output_digest(noisy) if with_digest else None
    divisor = receipt.expected_batch_size / clipped.unit
    hand_over(model, noisy, divisor, noise_scale(receipt.noise_multiplier, receipt.clip_norm), optimizer)
    if clipping is not None:
        clipping.released(noisy, receipt)
    return digest


def check_parameters(model: nn.Module, clipped: ClippedSum) -> None:
    """Refuse a sum that is not over the model's trainable parameters; nothing is charged or changed.

    Raises:
        PrivacyViolation: parameters were frozen, added or renamed since the forward pass (DP031).
    """
    if list(clipped.grads) != list(trainable_parameters(model)):
        raise PrivacyViolation(
            "parameters were frozen, added or renamed between the forward pass and the step",
            code="DP031",
            hint="change requires_grad between steps",
        )


def hand_over(
    model: nn.Module, noisy: NoisySum, divisor: float, std: float, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write ``noisy / divisor`` to ``.grad`` of the parameters, and nothing to those that are not in the sum.

    Args:
        model: has the parameters of the sum.
        noisy: its tensors are used up: they become the gradients.
        divisor: public.
        std: standard deviation of the noise in the sum.
        optimizer: is told the standard deviation of the noise in ``.grad`` if it has a method ``gradient_noise``.
    """
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    for name, total in noisy.grads.items():
        parameter = parameters[name]
        parameter.grad = total.div_(divisor).to(parameter.dtype)
    told = getattr(optimizer, "gradient_noise", None)
    if told is not None:
        told(std / divisor)


def output_digest(noisy: NoisySum) -> str:
    """SHA-256 over name, type, shape and little-endian values of every noisy sum, in order; 64 hexadecimal digits.

    It commits to what was released, so that a replay with other data and the same noise shows.
    """
    digest = hashlib.sha256()
    for name, total in (*noisy.grads.items(), *noisy.statistics.items()):
        digest.update(f"{name}\0{total.dtype}\0{list(total.shape)}\0".encode())
        digest.update(total.detach().contiguous().cpu().view(torch.uint8).reshape(-1).numpy().data)
    return digest.hexdigest()
