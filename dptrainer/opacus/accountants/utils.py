"""Noise for a budget, with the arguments of Opacus."""

from __future__ import annotations

from dpbudget import Adjacency, calibrate
from dpbudget.errors import InvalidParameter
from dptrainer.opacus._options import known_options
from dptrainer.opacus._spending import steps_of_epoch
from dptrainer.opacus.accountants.accountant import check_accountant


@known_options
def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    epochs: int | None = None,
    steps: int | None = None,
    accountant: str = "prv",
    epsilon_tolerance: float = 0.01,
) -> float:
    """The least noise multiplier whose plan claims at most ``target_epsilon``: the one that the engine trains with.

    Args:
        target_epsilon: in (0, 1e6].
        target_delta: in (0, 1).
        sample_rate: batch size / dataset size.
        epochs: each of ``ceil(1 / sample_rate)`` steps, as many as a ``DataLoader`` has batches.
        steps: instead of epochs.
        accountant: ``prv`` or ``rdp``. The default is that of the engine, so that both give one answer.
        epsilon_tolerance: always met; the result is within a millionth of the best one.

    Raises:
        InvalidParameter: a value is out of range (DP001 to DP009), or not one of epochs and steps is given (DP064).
        NotComputable: no noise reaches the target (DP004).
    """
    if (steps is None) == (epochs is None):
        raise InvalidParameter("give either steps or epochs", code="DP064", hint="steps = epochs * len(data_loader)")
    if not epsilon_tolerance > 0.0:
        raise InvalidParameter(f"epsilon_tolerance must be > 0, got {epsilon_tolerance!r}", code="DP009")
    if steps is None and isinstance(epochs, int) and not isinstance(epochs, bool) and 0.0 < sample_rate <= 1.0:
        steps = epochs * steps_of_epoch(sample_rate)
    plan = calibrate(
        epsilon=target_epsilon,
        delta=target_delta,
        sample_rate=sample_rate,
        steps=steps,
        epochs=None if steps is not None else epochs,
        adjacency=Adjacency.ZERO_OUT,
        accountant=check_accountant(accountant),
    )
    return plan.phases[0].noise_multiplier
