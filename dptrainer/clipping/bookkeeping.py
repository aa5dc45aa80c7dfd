"""Per-example clipping with one backward pass. Bu et al. (2022), "Differentially private optimization on large model".

While ``model(...)`` runs, its trainable parameters do not require grad, so the backward pass computes gradients of
activations only. A forward hook of each layer saves its input and hooks the gradient of its output; from the two come
the per-example norms of every layer, then the factors, then the clipped sums.

The hooks stay on the model: ``begin(batch_size)``, the ordinary ``criterion(model(x), y).backward()``,
``finish("mean")``. Nothing is recorded in eval mode or under ``no_grad``. Outside ``begin`` and ``finish`` the model
behaves as if it had no hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpbudget.errors import InvalidParameter, PrivacyViolation
from dptrainer.clipping.collect import parts_of
from dptrainer.clipping.compiled import CompiledForward, stand_back, standing_in
from dptrainer.clipping.engine import (
    Reduction,
    check_losses,
    checked_batch_size,
    checked_clip_norm,
    clip_factors,
    full_precision,
    gradient_scale,
    sum_dtype,
    trainable_parameters,
    usable_factors,
    zero_sums,
)
from dptrainer.clipping.form import Form, exchanged, frozen, in_place
from dptrainer.clipping.graph import NotCompilable
from dptrainer.clipping.grouping import Grouping, grouped, real_units
from dptrainer.clipping.guard import BufferWatch, Entered, ParameterGuard
from dptrainer.clipping.layout import Layer, layout
from dptrainer.clipping.marks import EnterHook, LeaveHook, refuse_compilers_around
from dptrainer.clipping.per_example import PerExample, packed, summed, unpacked
from dptrainer.clipping.policy import Clipping, FlatClipping, total
from dptrainer.clipping.recording import Call, Hook, Session, in_backward, note_shared, refuse_batch_norm, tap
from dptrainer.clipping.trace import Trace
from dptrainer.values import ClippedSum


class BookKeeping:
    """The clipping engine: exact per-example clipping, one forward and one backward pass, any ordinary loop.

    Guarantee: the clipped sum changes by at most ``clip_norm`` (Euclidean norm over all parameters) when one example is
    added or removed, provided that the model's output for one example does not depend on another
    (:func:`dptrainer.isolation.isolation_test` tests that). Whatever is not understood is refused, never skipped.

    Args:
        model: the model, called as ``model(...)`` with the examples in dimension 0. Its class, names and state_dict do
            not change.
        clip_norm: C in [1e-6, 1e12].
        replay: modules to differentiate as a whole, one example at a time, for example because they use the weight of
            one of their layers directly. Modules with parameters but without a rule are found by themselves.
        clipping: how gradients are brought below C; flat unless given.
        test: is called, and may refuse, before a batch of a model whose modules, ``forward`` or hooks were exchanged.
        compiled: runs the forward pass of private batches, when the model is called through :meth:`call`.

    Raises:
        InvalidParameter: (DP007) clip_norm out of range.
        PrivacyViolation: (DP018) nothing is trainable; (DP019) something cannot be trained privately.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        clip_norm: float,
        replay: Sequence[nn.Module] = (),
        clipping: Clipping | None = None,
        test: Callable[[], object] | None = None,
        compiled: CompiledForward | None = None,
    ) -> None:
        if clipping is not None and not isinstance(clipping, Clipping):
            raise InvalidParameter(
                f"clipping is {clipping!r:.60}, which is no policy",
                hint="clipping=dptrainer.PerLayerClipping.equal(model, run.plan.clip_norm), NormalisedClipping() or "
                "QuantileClipping()",
                code="DP060",
            )
        self._model = model
        self._clip_norm = checked_clip_norm(clip_norm)
        self._clipping = FlatClipping() if clipping is None else clipping
        self._grouping: Grouping | None = None
        self._replay = tuple(replay)
        self._session: Session | None = None
        self._handles: list[Any] = []
        self._signature: tuple[object, ...] = ()
        self._layers: dict[nn.Module, Layer] = {}
        self._guard: ParameterGuard | None = None
        self._watch: BufferWatch | None = None
        self._busy = False
        self._stack: list[Entered] = []
        self._recomputing: list[tuple[nn.Module, ParameterGuard]] = []
        self._off: dict[int, nn.Parameter] = {}
        self._places: list[tuple[nn.Module, int, int]] = []
        self._run: Callable[..., Any] = model._call_impl  # hooks and forward, whatever stands for the call
        self._test, self._form, self._compiled = test, Form(model), compiled
        self._refresh(trainable_parameters(model))

    @property
    def clip_norm(self) -> float:
        """C: the largest Euclidean norm that one example may contribute."""
        return self._clip_norm

    @property
    def clipping(self) -> Clipping:
        """How gradients are brought below C."""
        return self._clipping

    @property
    def replayed(self) -> tuple[str, ...]:
        """Names of the modules without a rule, which are replayed one example at a time; "" is the model itself."""
        return tuple(layer.name for layer in self._layers.values() if layer.rule is None)

    @property
    def batch_is_open(self) -> bool:
        """Whether :meth:`begin` opened a batch that neither ended nor was dropped."""
        return self._session is not None

    @property
    def task(self) -> int | None:
        """Identity of the open batch's backward pass, as autograd numbers them; None before it ran."""
        return None if self._session is None else self._session.task

    @property
    def latest(self) -> float:
        """When the last gradient of the open batch came, as ``time.perf_counter`` counts; 0 before."""
        return 0.0 if self._session is None else self._session.latest

    # ------------------------------------------------------------------ one physical batch

    def begin(self, batch_size: int, *, grouping: Grouping | None = None) -> None:
        """Opens a physical batch; an unfinished one is dropped. ``requires_grad`` is read anew.

        Args:
            batch_size: number of rows that the model will see: the examples that the sampler drew; 0 is legal.
            grouping: which rows count as one; each row for itself unless given.

        Raises:
            InvalidParameter: (DP009) not an integer >= 0, or not the number of rows of the grouping.
            PrivacyViolation: (DP018) nothing is trainable; what the test of a changed model refuses.
        """
        checked_batch_size(batch_size)
        if grouping is not None and grouping.rows != batch_size:
            raise InvalidParameter("the grouping has another number of rows than the batch.", code="DP009")
        self.abort()
        form = Form(self._model)
        if form != self._form:
            if self._test is not None:
                self._test()
            self._form, self._signature = form, ()
            if self._compiled is not None:
                self._compiled.forget()
        trainable = trainable_parameters(self._model)
        self._refresh(trainable)
        if self._compiled is not None:
            self._compiled.ready()  # which takes batches of its own
        self._grouping = grouping
        self._session = Session(batch_size, trainable, self._parts_of)

    def finish(self, loss_reduction: Reduction = "mean", *, loss_scale: float = 1.0) -> ClippedSum:
        """The clipped sum of the batch, after its one backward pass; closes the batch.

        Args:
            loss_reduction: what the backward pass started from: the mean over the B rows of the batch, their sum,
                or ("none") a vector that was summed.
            loss_scale: factor on the loss (mixed precision); it is divided out before the norm is taken.

        Returns:
            A sum for every parameter that was trainable at ``begin``; zeros where no gradient came.

        Raises:
            PrivacyViolation: (DP031) no batch is open, no backward pass ran, or gradients bypassed the engine, which
                are then discarded; (DP014) the same in eval mode; (DP030) a layer does not have one row per
                example; (DP019) no rule fits a layer.
        """
        session = self._session
        if session is None:
            raise PrivacyViolation("finish() without begin().", hint="call begin(batch_size) first.", code="DP031")
        scale = gradient_scale(loss_reduction, session.batch_size, loss_scale)
        try:
            session.refuse_bypass(self._model.training)
            found: dict[str, Tensor] = {}
            device = next(iter(session.trainable.values())).device
            units = session.batch_size if self._grouping is None else self._grouping.units
            squared = torch.zeros(units, dtype=torch.float64, device=device)
            if session.batch_size > 0:
                session.require_backward(self._model.training)
                if loss_reduction == "mean":
                    session.refuse_coarse_mean()
                with self._computing(device):
                    found, squared = self._sums(session, scale, squared)
            zeros = zero_sums({name: p for name, p in session.trainable.items() if name not in found})
            grads = {name: found[name] if name in found else zeros[name] for name in session.trainable}
            return ClippedSum(
                grads=grads,
                sensitivity=self._clip_norm,
                statistics=self._clipping.statistics(real_units(squared, self._grouping), self._clip_norm),
                unit=self._clipping.unit(self._clip_norm),
            )
        finally:
            self.abort()

    def abort(self) -> None:
        """Drops the batch with everything recorded of it; backward through its graph is refused from now on."""
        self._restore()
        if self._session is not None:
            self._session.close()
            self._session = None

    @contextmanager
    def _computing(self, device: torch.device) -> Iterator[None]:
        """Within the block nothing is recorded, and products are what they say: no graph, no autocast, no TF32."""
        self._busy = True
        try:
            with torch.no_grad(), full_precision():
                if not torch.is_autocast_enabled(device.type):
                    yield
                    return
                with torch.autocast(device.type, enabled=False):
                    yield
        finally:
            self._busy = False

    def _parts_of(self, call: Call, batch_size: int) -> Iterable[tuple[str, PerExample | None]]:
        """What a call contributes; often asked within the backward pass."""
        if self._busy:  # at the end of the batch
            return parts_of(call, batch_size)
        with self._computing(next(iter(call.layer.parameters.values())).device):
            return list(parts_of(call, batch_size))

    def _units(self, session: Session) -> dict[str, PerExample]:
        """Parameter name -> the gradients of each unit of privacy, rows that belong together added up."""
        return {
            name: summed([grouped(part, self._grouping) for part in parts])
            for name, parts in session.contributions().items()
        }

    def _sums(self, session: Session, scale: float, nothing: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Norms over all parameters first, then the factors, then the sums; and the squared norms of the units."""
        scale /= 1 if self._grouping is None else self._grouping.divisor
        units = self._units(session)
        if not units:
            return {}, nothing
        groups = self._clipping.groups(units)
        packs = {group: packed({name: units.pop(name) for name in names}) for group, names in groups.items()}
        squared = {
            group: total({str(at): form.squared_norms() for at, (form, _) in enumerate(forms)}) * scale**2
            for group, forms in packs.items()
        }
        factors = self._clipping.factors(squared, self._clip_norm)
        if type(self._clipping) is not FlatClipping:  # whose factors are what clip_factors gives
            # Whatever a policy answers, no example leaves with more than C; of what keeps the bound nothing is taken.
            held = {group: squared[group] * factors[group] ** 2 for group in groups}
            left = clip_factors(total(held), self._clip_norm)
            factors = {group: factor * left for group, factor in factors.items()}
        if self._grouping is not None and self._grouping.padding:
            # Whatever is in these rows, an example of weight 0 contributes exactly 0.
            real = self._grouping.units - self._grouping.padding
            factors = {group: F.pad(factor[:real], (0, len(factor) - real)) for group, factor in factors.items()}
        sums: dict[str, Tensor] = {}
        for group, forms in packs.items():
            while forms:  # the rows of each make room for the next sum
                form, members = forms.pop()
                for name, part in unpacked(form.weighted_sum(usable_factors(factors[group] * scale)), members):
                    sums[name] = part.to(sum_dtype(session.trainable[name]))
        return sums, total(squared)

    # ------------------------------------------------------------------ with a per-example loss

    @contextmanager
    def record(self, batch_size: int, *, grouping: Grouping | None = None) -> Iterator[BookKeeping]:
        """``with engine.record(B): losses = loss_fn(model(x), y)``, then ``engine.backward(losses)``."""
        self.begin(batch_size, grouping=grouping)
        try:
            yield self
        except BaseException:
            self.abort()
            raise

    def backward(self, losses: Tensor) -> ClippedSum:
        """Backward from one loss per example, and the clipped sum; closes the batch.

        Args:
            losses: [B].

        Raises:
            PrivacyViolation: as :meth:`finish`, and (DP030) if the loss is not a vector of B values.
        """
        if self._session is None:
            raise PrivacyViolation("backward() without begin().", hint="use engine.record(B).", code="DP031")
        try:
            check_losses(losses, self._session.batch_size)
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        except BaseException:
            self.abort()
            raise
        return self.finish("none")

    def per_example(self, losses: Tensor) -> dict[str, PerExample]:
        """Backward from one loss per example, and the gradients themselves, *unclipped*; closes the batch.

        These are private and nothing bounds them: for public data, tests and measurements alone. A parameter that no
        gradient reached is left out.

        Args:
            losses: [B].

        Raises:
            PrivacyViolation: as :meth:`backward`.
        """
        session = self._session
        if session is None:
            raise PrivacyViolation("per_example() without begin().", hint="use engine.record(B).", code="DP031")
        try:
            check_losses(losses, session.batch_size)
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            session.refuse_bypass(self._model.training)
            with self._computing(losses.device):
                return self._units(session)
        finally:
            self.abort()

    # ------------------------------------------------------------------ hooks

    def detach(self) -> None:
        """Takes the hooks off the model; the engine cannot be used afterwards until the next ``begin``."""
        self.abort()
        for handle in self._handles:
            handle.remove()
        self._handles, self._places, self._signature = [], [], ()

    def _refresh(self, trainable: dict[str, nn.Parameter]) -> None:
        """Finds the layers again and hooks them, if parameters were frozen, unfrozen, added or replaced."""
        if not trainable:
            raise PrivacyViolation(
                "the model has no trainable parameter.", hint="requires_grad_(True) on what to train.", code="DP018"
            )
        signature = tuple((name, id(parameter)) for name, parameter in trainable.items())
        if signature == self._signature:
            return
        self._clipping.check(trainable, self._clip_norm)
        self.detach()
        self._layers = layout(self._model, trainable, self._replay)
        root = self._model
        add = self._handles.append
        add(root.register_forward_pre_hook(Hook(self._enter_model), with_kwargs=True, prepend=True))
        marks = None if self._compiled is None else self._compiled.marks
        for place, (module, layer) in enumerate(self._layers.items()):
            # Last before the layer's own forward and first after it: what is recorded is what that forward was given,
            # and the gradient of its own output.
            enter = module.register_forward_pre_hook(EnterHook(self._enter_layer, marks, place), with_kwargs=True)
            left = LeaveHook(self._leave_layer, marks, place)
            leave = module.register_forward_hook(left, with_kwargs=True, prepend=True)
            self._handles += [enter, leave]
            self._places.append((module, enter.id, leave.id))
            if layer.rule is not None and layer.rule.traced:
                add(module.register_forward_hook(Hook(self._recomputed), with_kwargs=True, always_call=True))
        add(root.register_forward_hook(Hook(self._leave_model), with_kwargs=True))
        add(root.register_forward_hook(Hook(self._always_restore), with_kwargs=True, always_call=True))
        self._signature = signature
        if self._compiled is not None:
            self._compiled.restart(list(self._layers.items()))

    # ------------------------------------------------------------------ compiled

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """``model(...)``, in a private batch with a compiled forward pass."""
        session, compiled = self._session, self._compiled
        ready = session is not None and compiled is not None and compiled.takes(session.batch_size)
        if ready and torch.is_grad_enabled() and self._model.training and not self._busy and not in_backward():
            with standing_in(self._model, self._compiled_forward):
                return self._run(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _compiled_forward(self, *args: Any, **kwargs: Any) -> Any:
        stand_back(self._model)
        session, guard, compiled = self._session, self._guard, self._compiled
        if session is not None and guard is not None and compiled is not None:
            guard.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch does not annotate it
            try:
                with suppress(NotCompilable):  # then nothing ran
                    return compiled(session, guard.allowed, args, kwargs)
            finally:
                guard.__enter__()  # type: ignore[no-untyped-call]
        return self._model.forward(*args, **kwargs)

    # ------------------------------------------------------------------ hooks of model and layers

    def _enter_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        stand_back(self._model)  # its form is looked at
        session = self._session
        if session is None or self._busy or self._guard is not None or in_backward():
            return
        if not torch.is_grad_enabled() or not self._model.training:
            return
        refuse_compilers_around()
        refuse_batch_norm(self._model)
        self._restore()  # what a recomputation left
        self._refuse_changes(session)
        self._watch = BufferWatch(self._model)
        self._guard = ParameterGuard(session.trainable, self._model.buffers())
        self._switch_off(session.trainable.values())
        self._guard.__enter__()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def _leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        watch = self._watch
        if self._guard is not None and watch is not None:
            self._restore()
            watch.check()

    def _always_restore(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._session is not None and not self._busy:  # a replay of the whole model passes here too
            self._restore()

    def _restore(self) -> None:
        """Gives the parameters back as they were and stops watching; safe to call at any time."""
        guard, self._guard, self._watch = self._guard, None, None
        if guard is not None:
            guard.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._stack.clear()
        for parameter in self._off.values():
            parameter.requires_grad_(True)
        self._off.clear()

    def _switch_off(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.requires_grad:  # what the program froze is not ours to give back
                parameter.requires_grad_(False)
                self._off[id(parameter)] = parameter

    def _refuse_changes(self, session: Session) -> None:
        """Before a forward pass: the model must be as it was when the batch was opened, and our hooks in their places.

        Raises:
            PrivacyViolation: (DP031) a parameter was frozen; (DP019) a module, ``forward`` or hook was exchanged.
        """
        for name, parameter in session.trainable.items():
            if not parameter.requires_grad:
                raise frozen(name)
        places = all(in_place(*place) for place in self._places)
        if not places or Form(self._model) != self._form:
            raise exchanged()

    def _inside_unit(self) -> bool:
        return any(entered.active and self._layers[entered.module].rule is None for entered in self._stack)

    def _enter_layer(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._session is None or self._busy or module not in self._layers:
            return
        layer = self._layers[module]
        if self._guard is not None:
            active, guard = not self._inside_unit(), self._guard
            self._stack.append(Entered(module, active, guard.allowed, guard.functions))
            guard.functions = {}
            if active and self._traces(layer):
                guard.functions = Trace(self._session, module, layer, (args, kwargs), keep=True).functions()
            else:
                guard.allowed = guard.allowed | layer.ids
        elif in_backward():
            # Recomputation for gradient checkpointing must build the graph that was built first.
            self._switch_off(layer.parameters.values())
            if self._traces(layer):
                keep = module in self._session.recomputed
                again = Trace(self._session, module, layer, (args, kwargs), keep=keep).guard()
                again.__enter__()  # type: ignore[no-untyped-call]  # torch does not annotate it
                self._recomputing.append((module, again))

    @staticmethod
    def _traces(layer: Layer) -> bool:
        """Whether the layer's own functions are recorded, rather than its output."""
        return layer.rule is not None and bool(layer.rule.traced) and torch.is_grad_enabled()

    def _recomputed(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Ends the recomputation of a traced layer, also by an exception: torch leaves early when it has enough."""
        if self._recomputing and self._recomputing[-1][0] is module:
            self._recomputing.pop()[1].__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _leave_layer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        session = self._session
        if session is None or self._busy or module not in self._layers:
            return None
        layer = self._layers[module]
        if self._guard is not None:
            if not self._pop(module, self._guard):
                return None
            note_shared(session, module, (args, kwargs), self._model.buffers())
            if not torch.is_grad_enabled():
                session.recomputed.add(module)
                return None
            return None if self._traces(layer) else tap(session, module, layer, (args, kwargs), output, keep=True)
        if in_backward() and torch.is_grad_enabled():
            self._recomputed(module, args, kwargs, output)  # its guard must not see what follows
            for identity in layer.ids & self._off.keys():
                self._off.pop(identity).requires_grad_(True)
            if self._traces(layer):
                return None
            return tap(session, module, layer, (args, kwargs), output, keep=module in session.recomputed)
        return None

    def _pop(self, module: nn.Module, guard: ParameterGuard) -> bool:
        """Leaves ``module``, and whatever inside it ended by an exception; whether its call is to be recorded."""
        while self._stack:
            entered = self._stack.pop()
            guard.allowed, guard.functions = entered.allowed, entered.functions
            if entered.module is module:
                return entered.active
        return False
