"""What one physical batch leaves behind: the calls of each layer, and the gradients that came back to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.guard import (
    depends_on_position_alone,
    every_module,
    now_examples,
    same_mark,
    shared_by_all,
)
from dptrainer.clipping.layout import Layer
from dptrainer.clipping.per_example import PerExample
from dptrainer.clipping.products import settled

#: How a traced call answers: gradients of its tapped values (None where none came) -> contributions by local name.
Answer = Callable[[Sequence[Tensor | None]], Iterable[tuple[str, PerExample]]]
#: A call and the number of rows -> what the call contributes, by local name.
PartsOf = Callable[["Call", int], Iterable[tuple[str, PerExample | None]]]

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


class Hook:
    """A hook that is inert in copies: a deep copy or a pickle of the model is a plain model without an engine."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Calls the engine, if there is one."""
        return None if self._function is None else self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def in_backward() -> bool:
    """Whether the autograd engine is running in this thread: the only reason is recomputation for checkpointing."""
    return backward_task() != -1


def backward_task() -> int:
    """Identity of the running backward pass, -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def refuse_batch_norm(model: nn.Module) -> None:
    """Checked at every forward: batch statistics are only harmless while the layer is in eval mode.

    Raises:
        PrivacyViolation: (DP010) names the layer.
    """
    for module in every_module(model):
        if module.training and isinstance(module, _BATCH_NORMS):
            name = next((name for name, found in model.named_modules() if found is module), "")
            raise PrivacyViolation(
                f'layer "{name}" ({type(module).__name__}) mixes examples.',
                hint="replace it by GroupNorm, or keep it frozen in eval mode with .eval().",
                code="DP010",
            )


def nested_rows(name: str) -> PrivacyViolation:
    """What is said of a layer that works on nested tensors, whose examples are of different shapes."""
    return PrivacyViolation(
        f'layer "{name}" is given a nested tensor, which no rule answers for.',
        hint="pad the records to one length, and mask what was added.",
        code="DP019",
    )


def overwritten(name: str) -> PrivacyViolation:
    """What is said of a layer whose input was overwritten after the call."""
    return PrivacyViolation(
        f'the input of layer "{name}" was changed in place after the layer had used it.',
        hint="replace the in-place operation (x += y) by x = x + y.",
        code="DP019",
    )


class Session:
    """One open physical batch.

    Attributes:
        batch_size: declared number of examples.
        trainable: name -> parameter, as they were at ``begin``.
        calls: the layer calls that still hold tensors: no gradient came yet, or it is answered at the end.
        coarse: name of a layer whose gradient came in half precision.
        recomputed: layers that ran without a graph and will be recorded in the recomputation (reentrant checkpointing).
        shared: layer -> whether all inputs of one row that it was given are shared by all examples. Only the forward
            pass can tell, and a recomputation must do the same.
        counts: how often each layer without a rule was recorded.
    """

    def __init__(self, batch_size: int, trainable: dict[str, nn.Parameter], parts_of: PartsOf) -> None:
        self.batch_size, self.trainable = batch_size, trainable
        self._parts_of = parts_of
        self.calls: list[Call] = []
        self.recomputed: set[nn.Module] = set()
        self.shared: dict[nn.Module, bool] = {}
        self.counts: dict[nn.Module, int] = {}
        self.open = True
        self.coarse: str | None = None
        self._found: dict[str, list[PerExample]] = {}
        self._failure: PrivacyViolation | None = None
        self._task: int | None = None
        self._within: dict[int, int] = {}
        #: When the last gradient came, by :func:`time.perf_counter`.
        self.latest = 0.0
        self._before = {name: (p.grad, 0 if p.grad is None else p.grad._version) for name, p in trainable.items()}

    def close(self) -> None:
        """Drops everything recorded."""
        self.open = False
        self.calls.clear()
        self._found.clear()
        self._before.clear()

    def answer(self, call: Call) -> None:
        """Lets the rule of a call answer as soon as its gradient is there, so that activations are freed meanwhile.

        What it refuses is kept for :meth:`contributions`: an error in the middle of autograd would leave a half-done
        pass behind.
        """
        if self._failure is None and self.batch_size > 0:
            try:
                call.check_inputs_unchanged()
                self._add(call)
            except PrivacyViolation as failure:
                self._failure = failure

    def _add(self, call: Call) -> None:
        """Books what a call contributes, under the model's names.

        Raises:
            PrivacyViolation: (DP019) a trainable parameter of the layer has no gradient, or one of another shape.
        """
        held = False
        for local, part in self._parts_of(call, self.batch_size):
            shape = call.layer.parameters[local].shape
            if part is None or part.shape != shape or part.batch_size != self.batch_size:
                raise PrivacyViolation(
                    f'the rule of layer "{call.layer.name}" gave no per-example gradient of shape '
                    f"{['B', *shape]} for its parameter {local!r}.",
                    hint="return a tensor [B, *parameter.shape] for every name in call.wanted.",
                    code="DP019",
                )
            self._found.setdefault(call.layer.names[local], []).append(part)
            held = held or part.holds_operands
        call.answered(held=held)

    def contributions(self) -> dict[str, list[PerExample]]:
        """Parameter name -> its contributions, one for each call of each layer that uses it.

        A call to which no gradient came back (a forward pass without backward, an unused branch) contributes nothing.

        Raises:
            PrivacyViolation: (DP030) a layer does not have one row per example; (DP019) a rule left a parameter out,
                or an input changed in place after it was used.
        """
        if self._failure is not None:
            raise self._failure
        found = self._found
        while self.calls:
            call = self.calls[-1]
            if not call.done and all(grad is None for grad in call.grads):
                self.calls.pop()
                continue
            call.check_inputs_unchanged()
            if not call.done:
                self._add(call)
            if self.calls and self.calls[-1] is call:  # it still reads its inputs, which were looked at just now
                self.calls.pop()
            if all(other.layer is not call.layer for other in self.calls):
                found |= {name: settled(found[name]) for name in call.layer.names.values() if name in found}
        return {name: settled(parts) for name, parts in found.items()}  # tied parameters may have been joined again

    def note_backward(self, recomputed_in: int | None) -> None:
        """Called for each gradient that arrives.

        Args:
            recomputed_in: the backward pass in which the call was recomputed; its gradient comes in a pass of its own
                within that one (reentrant checkpointing).

        Raises:
            PrivacyViolation: (DP031) the batch is closed, or this is its second backward pass.
        """
        if not self.open:
            raise PrivacyViolation(
                "backward() ran through a batch that is already finished or dropped.",
                hint="call backward() once, before the step.",
                code="DP031",
            )
        self.latest, task = time.perf_counter(), backward_task()
        if recomputed_in is not None and recomputed_in != task:
            self._within[task] = recomputed_in
        if self._task is None:
            self._task = task
        elif self._outermost(task) != self.task:
            raise PrivacyViolation(
                "backward() ran twice within one private step.",
                hint="add the losses and call backward() once; to split a batch pass physical_batch_size.",
                code="DP031",
            )

    @property
    def task(self) -> int | None:
        """Identity of the backward pass that gradients came from; None before there was one."""
        return None if self._task is None else self._outermost(self._task)

    def _outermost(self, task: int) -> int:
        while task in self._within:
            task = self._within[task]
        return task

    def require_backward(self, training: bool) -> None:
        """Refuses a step without a backward pass.

        Raises:
            PrivacyViolation: (DP031) no gradient arrived; (DP014) because the model is in eval mode.
        """
        if self._task is None and not training:
            raise _eval_mode()
        if self._task is None:
            raise PrivacyViolation(
                "no backward pass ran for this batch.",
                hint="call loss.backward() on a loss of model(...) in train mode, once per step.",
                code="DP031",
            )

    def refuse_coarse_mean(self) -> None:
        """Refuses half-precision gradients of a mean over the batch.

        Their rounding depends on the divisor, so one more record changes the contributions of all others by 2^-9 each:
        1.01 C with 257 records of an ordinary model in bfloat16, and more with more. Those of a sum do not.

        Raises:
            PrivacyViolation: (DP030) names the layer.
        """
        if self.coarse is not None:
            raise PrivacyViolation(
                f'layer "{self.coarse}" has half-precision gradients of a mean over the batch, whose rounding '
                "depends on the batch size; each record would move the gradients of all others.",
                hint='sum instead: reduction="sum" in the criterion and loss_reduction="sum".',
                code="DP030",
            )

    def refuse_bypass(self, training: bool) -> None:
        """Discards and refuses gradients that reached ``.grad`` past the engine: they are not clipped.

        Raises:
            PrivacyViolation: (DP031) names the parameter; (DP014) the model is in eval mode, so nothing was recorded.
        """
        bypassed = [
            name
            for name, p in self.trainable.items()
            if p.grad is not None
            and (p.grad is not self._before[name][0] or p.grad._version != self._before[name][1])
            and bool(p.grad.any())  # zero_grad(set_to_none=False) also counts as a write
        ]
        for name in bypassed:
            self.trainable[name].grad = None
        if bypassed and self._task is None and not training:
            raise _eval_mode()
        if bypassed:
            raise PrivacyViolation(
                f'an unclipped gradient reached parameter "{bypassed[0]}"; it was discarded.',
                hint="call the layers through model(...) in train mode, and move penalties on parameters (weight "
                "decay) from the loss to the optimizer.",
                code="DP031",
            )


def _eval_mode() -> PrivacyViolation:
    return PrivacyViolation(
        "the model is in eval mode, so no per-example gradient was recorded; nothing was released.",
        hint="call model.train() before the training loop (usually after validation).",
        code="DP014",
    )


class Call:
    """One recorded forward call of a layer or unit."""

    def __init__(
        self,
        session: Session,
        module: nn.Module,
        layer: Layer,
        inputs: tuple[Any, Mapping[str, Any]],
        *,
        keep: bool,
        ruled: bool = False,
    ) -> None:
        self.module, self.layer = module, layer
        self.recomputed_in = backward_task() if in_backward() else None
        self._session = session
        args, kwargs = inputs
        tensors = args
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):  # else spare a walk through nested structures
            tensors = [leaf for leaf in tree_flatten((args, dict(kwargs)))[0] if isinstance(leaf, Tensor)]
            args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        else:
            args = tuple(arg.detach() for arg in args)
        self.args, self.kwargs = args, kwargs
        # Detached tensors share the counter of those that the program holds.
        self._versions = [(t.detach(), t._version) for t in tensors if not t.is_inference()]
        self.outputs: list[Tensor] = []
        self.grads: list[Tensor | None] = []
        self.answer: Answer | None = None  # of a traced layer
        self.rows = 0
        self.expanded = False  # one row served all examples
        self.done = False
        self.ordinal = 0  # among the calls of a replayed layer
        self.autocast: tuple[str, torch.dtype] | None = None  # that it must be replayed under
        self._ruled = ruled
        self._kept = keep
        self._arrived: set[int] = set()

    def receiver(self, slot: int) -> Callable[[Tensor], None]:
        """The hook that takes the gradient of output ``slot``."""

        def receive(grad: Tensor) -> None:
            session = self._session
            session.note_backward(self.recomputed_in)
            if slot in self._arrived:
                raise PrivacyViolation(
                    f'backward() reached layer "{self.layer.name}" twice within one private step.',
                    hint="call backward() once per step.",
                    code="DP031",
                )
            self._arrived.add(slot)
            if not self._kept:
                return
            self.grads[slot] = grad.detach()
            if grad.is_floating_point() and grad.element_size() < 4:
                session.coarse = self.layer.name
            if self._ruled:
                session.answer(self)

        return receive

    def answered(self, *, held: bool) -> None:
        """Lets go of the tensors; the inputs are watched on if what was answered still reads them."""
        self.done = True
        self.args, self.kwargs, self.outputs, self.grads, self.answer = (), {}, [], [], None
        if not held:
            self._versions = []
            self._session.calls.remove(self)

    def check_inputs_unchanged(self) -> None:
        """Refuses inputs that were overwritten after the call: the gradient would be computed from other numbers.

        Raises:
            PrivacyViolation: (DP019) names the layer.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise overwritten(self.layer.name)


class _Leaf(torch.autograd.Function):
    """Lets a tensor without a graph start one, and reports its gradient. In-place operations may follow it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        """Returns the tensor itself, marked as changed so that autograd does not treat it as a view."""
        ctx.receive = receive
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[None, None, None]:
        """Hands the gradient over; nothing lies below."""
        ctx.receive(grads[0])  # type: ignore[attr-defined]  # set in forward
        return None, None, None


def hooked(output: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
    """The tensor, whose gradient is handed to ``receive``; it starts a graph where it had none."""
    with torch._C.DisableTorchFunction():  # the guard has nothing to find here
        return same_mark(output, _hooked(output, receive))


def _hooked(output: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
    if output.requires_grad:
        base, shape = output._base, output.shape
        if base is None:
            # A tensor hook sees the gradient of the value before any later in-place operation.
            output.register_hook(receive)  # type: ignore[no-untyped-call]  # torch does not annotate it
        elif base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
            # Of a linear layer over positions, for example. An in-place operation on a view gives the view a new
            # history, without our hook, and leaves that of its base as it was.
            base.register_hook(lambda grad: receive(grad.reshape(shape)))  # type: ignore[no-untyped-call]  # likewise
        else:
            output = output.clone()
            output.register_hook(receive)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return output
    anchor = torch.zeros((), requires_grad=True)
    started: Tensor = _Leaf.apply(output.detach(), anchor, receive)  # type: ignore[no-untyped-call]
    return started


def tap(
    session: Session,
    module: nn.Module,
    layer: Layer,
    inputs: tuple[Any, Mapping[str, Any]],
    output: Any,
    *,
    keep: bool,
) -> Any:
    """Records a call and returns its output with the gradient hooked.

    Raises:
        PrivacyViolation: (DP030) the input has positions, not examples, in dimension 0.
    """
    with torch._C.DisableTorchFunction():  # each operation that the guard looks at costs as much again
        call = Call(session, module, layer, inputs, keep=keep, ruled=layer.rule is not None)
        if keep:
            session.calls.append(call)
        if layer.rule is not None:
            call.expanded = one_row(module, inputs) and session.batch_size > 1 and session.shared.get(module, False)
            output = per_example_output(session, layer, inputs, output, expand=call.expanded)
            call.grads.append(None)
            return hooked(output, call.receiver(0))
    call.ordinal, call.autocast = session.counts.get(module, 0), _autocast(layer)
    session.counts[module] = call.ordinal + int(keep)
    leaves, spec = tree_flatten(output)
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            call.outputs.append(leaf.detach())
            call.grads.append(None)
            if leaf.is_floating_point():
                # A copy: later in-place operations must not reach the output that the replay is compared with.
                leaves[position] = hooked(leaf.clone(), call.receiver(len(call.grads) - 1))
    return tree_unflatten(leaves, spec)


def _first(inputs: tuple[Any, Mapping[str, Any]]) -> Tensor | None:
    args = inputs[0]
    if args and isinstance(args[0], Tensor):
        return args[0]
    return next((t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)), None)


def one_row(module: nn.Module, inputs: tuple[Any, Mapping[str, Any]]) -> bool:
    """Whether a layer is given one row; that of a flat list of bags is no row."""
    first = _first(inputs)
    if (
        first is None
        or first.is_nested
        or first.dim() == 0
        or (first.dim() == 1 and isinstance(module, nn.EmbeddingBag))
    ):
        return False
    return first.shape[0] == 1


def note_shared(
    session: Session, module: nn.Module, inputs: tuple[Any, Mapping[str, Any]], buffers: Iterable[Tensor]
) -> None:
    """Notes, while the guard watches, whether a layer that is given one row is given what all examples share."""
    if session.batch_size > 1 and one_row(module, inputs):
        first = _first(inputs)
        shared = first is not None and shared_by_all(first, buffers)
        session.shared[module] = shared and session.shared.get(module, True)


def _autocast(layer: Layer) -> tuple[str, torch.dtype] | None:
    """Device and type of the autocast that a layer runs under."""
    device = next(iter(layer.parameters.values())).device.type
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def per_example_output(
    session: Session, layer: Layer, inputs: tuple[Any, Mapping[str, Any]], output: Tensor, *, expand: bool
) -> Tensor:
    """The output, expanded where one row serves all examples (position ids of shape [1, T])."""
    if output.is_nested:
        raise nested_rows(layer.name)
    first = _first(inputs)
    if first is None or first.dim() == 0 or output.dim() == 0:
        return output
    if expand and output.shape[0] == 1:
        expanded = output.expand(session.batch_size, *output.shape[1:])
        return now_examples(expanded if expanded.requires_grad else expanded.contiguous())
    if depends_on_position_alone(first) and first.shape[0] != 1:
        raise PrivacyViolation(
            f'layer "{layer.name}" is given positions {list(first.shape)} that all examples share, so its rows are not '
            "examples.",
            hint="give the positions a batch dimension of 1, arange(T).unsqueeze(0), or name the module that does this "
            "in replay=[module].",
            code="DP030",
        )
    return output
