"""Opacus's schedules of noise and clipping norm: refused, since the plan is signed before training."""

from __future__ import annotations

from dptrainer.opacus._options import unsupported


class _Scheduler:
    def __init__(self, *args: object, **kwargs: object) -> None:
        raise unsupported(
            f"{type(self).__name__} would change noise or clipping norm of a signed plan while it runs",
            "plan a schedule of noise in phases, with dpbudget and dptrainer.make_private; "
            "learning rate schedules of torch work",
        )


class ExponentialNoise(_Scheduler):
    """Refused (DP065)."""


class LambdaNoise(_Scheduler):
    """Refused (DP065)."""


class StepNoise(_Scheduler):
    """Refused (DP065)."""


class ExponentialGradClip(_Scheduler):
    """Refused (DP065)."""


class LambdaGradClip(_Scheduler):
    """Refused (DP065)."""


class StepGradClip(_Scheduler):
    """Refused (DP065)."""


__all__ = ["ExponentialGradClip", "ExponentialNoise", "LambdaGradClip", "LambdaNoise", "StepGradClip", "StepNoise"]
