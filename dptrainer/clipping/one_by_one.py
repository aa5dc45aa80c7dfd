"""The engine of ``exact`` noise: every record alone through the model, its gradient clipped to an integer vector.

A record's contribution must be a function of that record. In a batch it is that up to rounding only: which kernel a
library takes, and the order in which it adds, follow from how many records there are and where each of them stands. So
each goes through forward and backward pass by itself. That is what exact noise costs; :class:`BookKeeping`, which never
has a single gradient that could be truncated, is for ``secure`` noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dpbudget.grid import Grid
from dptrainer.clipping.engine import checked_clip_norm, trainable_parameters
from dptrainer.clipping.form import Form
from dptrainer.clipping.integers import IntegerSums, sums_for
from dptrainer.clipping.policy import Clipping, FlatClipping, total
from dptrainer.clipping.standing import Standing
from dptrainer.values import ClippedSum


class OneByOne:
    """Clips one record at a time to integer vectors of bounded length: ``begin``, ``add`` for each, ``finish``.

    Guarantee: what ``finish`` returns is the sum of one integer vector for each :meth:`add`, over all parameters and
    statistics together of squared length at most ``grid.bound``. Clip factors and quantisation are floating-point
    arithmetic, and nothing rests on them. That a vector is a function of its record takes more than this class can see
    to: ``PrivateTrainer`` gives every record memory and random numbers of its own (docs/exact.md).

    Args:
        model: called as ``model(...)``; its parameters are read anew at every ``begin``.
        clip_norm: C in [1e-6, 1e12].
        clipping: how gradients are brought below C; flat unless given.
        beside: modules besides the model that losses are computed with: they must keep nothing either.
        test: is called, and may refuse, before a step of a model whose modules, ``forward`` or hooks were exchanged.
        sums: makes the sums of a step from its shapes.

    Raises:
        InvalidParameter: (DP007) clip_norm out of range; (DP060) clipping is no policy.
        PrivacyViolation: what the policy refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        clip_norm: float,
        clipping: Clipping | None = None,
        beside: Sequence[nn.Module] = (),
        test: Callable[[], object] | None = None,
        sums: Callable[[Mapping[str, torch.Size], Grid, torch.device], IntegerSums] = sums_for,
    ) -> None:
        if clipping is not None and not isinstance(clipping, Clipping):
            raise InvalidParameter(
                f"clipping is {clipping!r:.60}, which is no policy",
                hint="clipping=dptrainer.PerLayerClipping.equal(model, run.plan.clip_norm), or leave it out",
                code="DP060",
            )
        self._model, self._clip_norm, self._test, self._make = model, checked_clip_norm(clip_norm), test, sums
        self._clipping = FlatClipping() if clipping is None else clipping
        self._clipping.check(list(trainable_parameters(model)), self._clip_norm)
        self._beside, self._form = tuple(beside), Form(model)
        self._step: _Step | None = None

    @property
    def clip_norm(self) -> float:
        """C: the largest Euclidean norm that one record may contribute."""
        return self._clip_norm

    @property
    def clipping(self) -> Clipping:
        """How gradients are brought below C."""
        return self._clipping

    def begin(self, grid: Grid) -> None:
        """Open a step; one that was not finished is dropped.

        Raises:
            PrivacyViolation: (DP018) nothing is trainable; (DP031) a parameter has hooks; what the test of a changed
                model refuses.
        """
        self.abort()
        form = Form(self._model)
        if form != self._form:
            if self._test is not None:
                self._test()
            self._form = form
        parameters = trainable_parameters(self._model)
        if not parameters:
            raise PrivacyViolation("nothing is trainable.", hint="requires_grad_(True) on what to train.", code="DP018")
        _refuse_hooks(parameters)
        # Casts of parameters that autocast keeps would be those of an earlier step, if it is on around all of them.
        torch.clear_autocast_cache()
        self._clipping.check(list(parameters), self._clip_norm)
        standing = Standing(self._model, *self._beside)
        self._step = _Step(standing, parameters, self._clipping, self._clip_norm, grid, self._make)

    def add(self, losses: Tensor, divisor: int = 1) -> None:
        """Add the gradient of one record.

        Args:
            losses: of the rows that are the record: one, or several whose gradients are added up.
            divisor: public number that the sum of their gradients is divided by.

        Raises:
            PrivacyViolation: (DP031) no step is open, or the loss does not depend on the model.
        """
        if self._step is None:
            raise PrivacyViolation("add() without begin().", hint="call begin(grid) first.", code="DP031")
        if not losses.requires_grad:
            raise PrivacyViolation(
                "the loss does not depend on the trainable parameters.",
                hint="leave out torch.no_grad() and detach() between model and loss.",
                code="DP031",
            )
        self._step.add(losses.sum() / divisor if divisor != 1 else losses.sum())

    def finish(self) -> ClippedSum:
        """The integer sums of the step, in units of the grid, and closes it.

        Raises:
            PrivacyViolation: (DP031) no step is open, or a forward pass changed parameters, modules or hooks; (DP013)
                it changed buffers or what attributes hold.
        """
        step = self._step
        if step is None:
            raise PrivacyViolation("finish() without begin().", hint="call begin(grid) first.", code="DP031")
        self._step = None
        _refuse_hooks(step.parameters)
        if Form(self._model) != self._form:
            raise PrivacyViolation(
                "a module, forward or hook of the model was exchanged during forward: later records met another model "
                "than earlier ones.",
                hint="exchange them between steps.",
                code="DP031",
            )
        return step.finish()

    def abort(self) -> None:
        """Drop the open step, and what it left in attributes of the model."""
        if self._step is not None:
            self._step.standing.put_back()
        self._step = None

    def detach(self) -> None:
        """As :meth:`abort`: nothing of it is on the model."""
        self.abort()


class _Step:
    """The sums of an open step."""

    def __init__(
        self,
        standing: Standing,
        parameters: Mapping[str, nn.Parameter],
        clipping: Clipping,
        clip_norm: float,
        grid: Grid,
        make: Callable[[Mapping[str, torch.Size], Grid, torch.device], IntegerSums],
    ) -> None:
        self.standing, self.parameters = standing, parameters
        self._clipping, self._clip_norm, self._grid = clipping, clip_norm, grid
        self._unit = clipping.unit(clip_norm)  # before any record was seen
        nobody = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._statistics = {name: one.shape for name, one in clipping.statistics(nobody, clip_norm).items()}
        clash = self._shapes.keys() & self._statistics.keys()
        if clash:
            raise PrivacyViolation("a statistic has the name of a parameter", code="DP019", hint="rename the parameter")
        self._groups = clipping.groups(list(parameters))
        self._device = next(iter(parameters.values())).device
        self._sums = make({**self._shapes, **self._statistics}, grid, self._device)

    def add(self, loss: Tensor) -> None:
        """See :meth:`OneByOne.add`."""
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        self.standing.put_back()
        with torch.no_grad():
            parts = {name: _plain(one) for name, one in zip(self.parameters, found, strict=True)}
            norms = self._sums.squared_norms([*parts.values(), *[None] * len(self._statistics)])
            squares = dict(zip(parts, norms, strict=False))
            squared = {
                group: torch.tensor([sum(squares[name] for name in names)], dtype=torch.float64, device="cpu")
                for group, names in self._groups.items()
            }
            factors = self._clipping.factors(squared, self._clip_norm)
            scale = {name: float(factors[group]) for group, names in self._groups.items() for name in names}
            more = self._clipping.statistics(total(squared), self._clip_norm)
            parts |= {name: _plain(more[name].to(self._device)) for name in self._statistics}
            per_unit = 1.0 / self._grid.unit(self._clip_norm)
            self._sums.add(list(parts.values()), [scale.get(name, 1.0) * per_unit for name in parts])

    def finish(self) -> ClippedSum:
        """See :meth:`OneByOne.finish`."""
        self.standing.check()
        shapes = {**self._shapes, **self._statistics}
        sums = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), self._sums.parts, strict=True)}
        return ClippedSum(
            grads={name: sums[name] for name in self._shapes},
            sensitivity=self._clip_norm,
            statistics={name: sums[name] for name in self._statistics},
            unit=self._unit,
            grid=self._grid,
        )


def _plain(value: Tensor | None) -> Tensor | None:
    """A gradient as the sums take it: dense, contiguous, float32 or float64."""
    if value is None:
        return None
    dense = value.to_dense() if value.layout != torch.strided else value
    return (dense if dense.dtype == torch.float64 else dense.float()).contiguous()


def _refuse_hooks(parameters: Mapping[str, nn.Parameter]) -> None:
    hooked = [name for name, parameter in parameters.items() if parameter._backward_hooks]
    if hooked:
        raise PrivacyViolation(
            f'a hook on the gradient of "{hooked[0]}" would see every record, and could make of one what it learnt '
            "from others.",
            hint="remove it: handle.remove(), of the handle that register_hook returned.",
            code="DP031",
        )
