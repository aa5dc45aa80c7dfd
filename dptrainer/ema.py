"""A moving average of the weights: free, because it is computed from weights that the guarantee covers already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpbudget.errors import InvalidParameter, Unreadable


class WeightAverage:
    """The exponential moving average of a model's parameters, for evaluation. De et al. (2022), section 3.3.

    Guarantee: post-processing of the private weights; nothing is charged. :meth:`update` counts steps and not physical
    batches, whose number is private: a call between which and the last one no parameter moved does nothing.

    Args:
        model: the model that is trained; buffers are not averaged.
        decay: weight of the past, in [0, 1).
        warm_up: average over what there is at first, with min(decay, (1 + t) / (10 + t)) in step t.

    Raises:
        InvalidParameter: the decay is out of range (DP009).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, warm_up: bool = True) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0.0 <= decay < 1.0:
            raise InvalidParameter(
                f"decay must lie in [0, 1), got {decay!r}", code="DP009", hint="0.999 averages about 1000 steps"
            )
        self._model, self._decay, self._warm_up = model, float(decay), warm_up
        self._steps = 0
        self._mean = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._seen = self._versions()

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self._steps

    def update(self, *_: object) -> None:
        """Take the weights of a finished step in; also a callback of :class:`~dptrainer.PrivateTrainer`.

        Raises:
            InvalidParameter: the model has other parameters than before (DP009).
        """
        now = self._versions()
        if now == self._seen:
            return
        self._seen = now
        decay = self._decay
        if self._warm_up:
            decay = min(decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        with torch.no_grad():
            for name, parameter in self._parameters():
                self._mean[name].lerp_(parameter.detach().to(self._mean[name]), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Within the block the model has the averaged weights; evaluate there, and do not train."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters()}
        unseen = self._seen != self._versions()
        try:
            self._put(self._mean)
            yield self._model
        finally:
            self._put(kept)
            if not unseen:
                self._seen = self._versions()

    def state_dict(self) -> dict[str, Any]:
        """The average and its age, for a checkpoint."""
        return {"steps": self._steps, "mean": {name: value.clone() for name, value in self._mean.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average.

        Raises:
            Unreadable: it is not one of this model (DP091).
        """
        mean, steps = state.get("mean"), state.get("steps")
        own = {name: value.shape for name, value in self._mean.items()}
        saved = {name: value.shape for name, value in mean.items()} if isinstance(mean, dict) else None
        if not isinstance(mean, dict) or not isinstance(steps, int) or saved != own:
            raise Unreadable(
                "no average of this model's parameters is saved here", code="DP091", hint="load what state_dict() gave"
            )
        self._steps = steps
        for name, value in mean.items():
            self._mean[name].copy_(value)
        self._seen = self._versions()

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        found = dict(self._model.named_parameters())
        if found.keys() != self._mean.keys():
            raise InvalidParameter(
                "the model has other parameters than when the average began",
                code="DP009",
                hint="make a new WeightAverage after changing the model",
            )
        yield from found.items()

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters():
                parameter.copy_(values[name])

    def _versions(self) -> list[tuple[int, int]]:
        """Changes whenever a parameter is written to or replaced."""
        return [(id(parameter), parameter._version) for parameter in self._model.parameters()]
