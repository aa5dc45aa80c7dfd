"""One compiled graph of a private forward pass: checked as every eager pass is, and rewritten so that it records.

The compiler hands over the graph of torch functions that the model calls, with the marks of our hooks in it
(:mod:`dptrainer.clipping.marks`). It is gone through once for every form of its inputs, on tensors without data and
under the guard of the eager engine, which therefore refuses here what it refuses there. What is compiled and run is the
same graph, in which each layer's output has a tap added to it, a tensor of zeros, and which returns each layer's inputs
besides. The gradient of a tap is the gradient of the layer's output, and all else is as in the eager engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.guard import ParameterGuard, same_mark
from dptrainer.clipping.layout import Layer
from dptrainer.clipping.marks import enter, leave
from dptrainer.clipping.recording import (
    Call,
    Session,
    hooked,
    note_shared,
    one_row,
    overwritten,
    per_example_output,
)

#: A graph of torch functions -> what is run in its place, called like it.
Compile = Callable[[fx.GraphModule], Callable[..., Any]]


class NotCompilable(Exception):
    """This forward pass cannot be recorded from a compiled graph; it is right when it runs uncompiled."""


@dataclass(frozen=True)
class _Slot:
    """Stands for a value in the arguments of a layer: an input of the graph (``given``), or something it returns."""

    given: bool
    place: int


@dataclass(frozen=True)
class Recorded:
    """One layer call of a graph.

    Attributes:
        index: the layer's number.
        inputs: its (args, kwargs), with slots for what the graph computes.
        output: the node of what it returned.
    """

    index: int
    inputs: Any
    output: fx.Node


@dataclass(frozen=True)
class _Tap:
    """Shape, type and device of a layer's output for one form of the inputs; whether one row served all examples."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    expanded: bool


class RecordingGraph:
    """A graph in the place of the compiled forward pass; called with the inputs that the compiler found.

    Args:
        module: the graph, with marks.
        layers: module and layer by number.
        session: -> the open batch.
        allowed: -> parameters whose layer is running around the whole graph, by identity.
        compile: how the rewritten graph is compiled; it need not be called before the first batch.
        model: whose buffers tell what all examples share.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        layers: Sequence[tuple[nn.Module, Layer]],
        session: Callable[[], Session],
        allowed: Callable[[], frozenset[int]],
        compile: Compile,
        model: nn.Module,
    ) -> None:
        self._module, self._layers, self._session, self._allowed = module, layers, session, allowed
        self._model, self._compile = model, compile
        self._rewritten = _rewritten(module)
        self._fast: Callable[..., Any] | None = None
        self._taps: dict[tuple[object, ...], list[_Tap]] = {}

    def __call__(self, *given: Any) -> Any:
        """Outputs of the graph; the layer calls of the open batch are recorded.

        Raises:
            PrivacyViolation: what the eager engine would refuse.
            NotCompilable: the graph holds what nobody can look into.
        """
        session = self._session()
        form = (session.batch_size, self._allowed(), *map(_form, given))
        new = form not in self._taps
        if new:
            self._taps[form] = self._study(given, session)
        taps = self._taps[form]
        calls: list[Call] = []
        zeros = [_zeros(tap, _Receiver(calls, place)) for place, tap in enumerate(taps)]
        if self._fast is None:
            self._mark_dynamic(given, zeros)
            self._fast = self._compile(self._rewritten.module)
        with _without_word_of_leaves() if new else nullcontext():  # compiled for this form
            returned = self._fast(*given, *zeros)
        outputs = returned[: self._rewritten.outputs]
        extra = returned[self._rewritten.outputs :]

        def value(part: Any) -> Any:
            return (given if part.given else extra)[part.place] if isinstance(part, _Slot) else part

        for recorded, tap in zip(self._rewritten.calls, taps, strict=True):
            module, layer = self._layers[recorded.index]
            inputs = fx.node.map_aggregate(recorded.inputs, value)
            call = Call(session, module, layer, inputs, keep=True, ruled=True)
            call.expanded = tap.expanded
            call.grads.append(None)
            calls.append(call)
        session.calls += calls
        for output in outputs:
            # Taps are left out of autograd.grad(loss, x), which is a backward pass all the same.
            if isinstance(output, Tensor) and output.grad_fn is not None and all(output is not x for x in given):
                output.register_hook(lambda grad: session.note_backward(None))  # type: ignore[no-untyped-call]
        return outputs

    def _mark_dynamic(self, given: Sequence[Any], zeros: Sequence[Tensor]) -> None:
        """Dimensions that the compiler takes for variable here are variable for the backend from its first call on."""
        nodes = [node for node in self._module.graph.nodes if node.op == "placeholder"]
        nodes += [recorded.output for recorded in self._rewritten.calls]
        for node, tensor in zip(nodes, [*given, *zeros], strict=True):
            known = node.meta.get("example_value")
            if isinstance(known, Tensor) and isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                dims = [place for place, size in enumerate(known.shape) if type(size) is not int]
                torch._dynamo.maybe_mark_dynamic(tensor, dims)

    def _study(self, given: Sequence[Any], session: Session) -> list[_Tap]:
        """Goes through the graph as the eager engine goes through the model, without data.

        Raises:
            PrivacyViolation: as the eager engine.
            NotCompilable: something in it cannot be looked into, or computed without data.
        """
        walk = _Walk(self._module, self._layers, session, self._model, self._allowed())
        try:
            return walk(given)
        except (PrivacyViolation, NotCompilable):
            raise
        except Exception as error:  # whatever torch functions raise that cannot do without data
            raise NotCompilable(f"{type(error).__name__}: {error}") from error


@contextmanager
def _without_word_of_leaves() -> Iterator[None]:
    """The compiler looks at ``.grad`` of its inputs, and torch warns that taps, which are no leaves, have none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield


class _Receiver:
    """Hands a gradient on to a call that is recorded after its tap was made."""

    def __init__(self, calls: list[Call], place: int) -> None:
        self._calls, self._place = calls, place

    def __call__(self, grad: Tensor) -> None:
        self._calls[self._place].receiver(0)(grad)


def _form(given: Any) -> object:
    """What the walk through a graph depends on, of one of its inputs."""
    if isinstance(given, nn.Parameter):
        if given.requires_grad:  # those of the model do not, while it runs
            raise PrivacyViolation(
                "the model uses a trainable parameter that is not part of it; its gradient would be neither clipped "
                "nor noised.",
                hint="put it into the model, or freeze it.",
                code="DP031",
            )
        return id(given), given.shape
    return (given.shape, given.dtype) if isinstance(given, Tensor) else given


def _zeros(tap: _Tap, receive: Callable[[Tensor], None]) -> Tensor:
    """A tensor of zeros, of a single number in memory, whose gradient is handed over."""
    return hooked(torch.zeros((), dtype=tap.dtype, device=tap.device).expand(tap.shape), receive)


@dataclass(frozen=True)
class _Rewritten:
    """The graph that is run, how many of its outputs are the model's, and its layer calls in order."""

    module: fx.GraphModule
    outputs: int
    calls: list[Recorded]


def _rewritten(module: fx.GraphModule) -> _Rewritten:
    """The same graph with taps as further inputs and the inputs of layers as further outputs, and without marks."""
    nodes = list(module.graph.nodes)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    places = {node: place for place, node in enumerate(n for n in nodes if n.op == "placeholder")}
    for node in places:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    left = [node for node in nodes if node.target is leave]
    taps = {node: graph.placeholder(f"tap_{place}") for place, node in enumerate(left)}
    calls, extra, outputs = list[Recorded](), dict[fx.Node, int](), ()

    def slot(node: fx.Node) -> Any:
        while node.target is enter:
            node = node.args[1]  # type: ignore[assignment]  # by its signature
        return _Slot(True, places[node]) if node in places else _Slot(False, extra.setdefault(node, len(extra)))

    for node in nodes:
        if node.op == "output":
            outputs = fx.node.map_arg(node.args[0], copies.__getitem__)
        elif node.target is enter:
            copies[node] = copies[node.args[1]]
        elif node.target is leave:
            index, output, args, kwargs = node.args
            copies[node] = graph.call_function(torch.add, (copies[output], taps[node]))
            calls.append(Recorded(index, fx.node.map_arg((args, kwargs), slot), output))
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    # Detached: nothing outside differentiates them, and the backward pass would add a zero for each.
    further = [graph.call_method("detach", (copies[n],)) if _is_tensor(n) else copies[n] for n in extra]
    graph.output((*outputs, *further))
    graph.lint()
    return _Rewritten(fx.GraphModule(module, graph), len(outputs), calls)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


class _Walk:
    """One pass through a graph on tensors without data, under the guard."""

    def __init__(
        self,
        module: fx.GraphModule,
        layers: Sequence[tuple[nn.Module, Layer]],
        session: Session,
        model: nn.Module,
        allowed: frozenset[int],
    ) -> None:
        self._module, self._layers, self._model, self._allowed = module, layers, model, allowed
        self._names = {id(parameter): name for name, parameter in session.trainable.items()}
        self._scratch = Session(session.batch_size, {}, lambda call, size: ())
        self._fakes = FakeTensorMode()
        self._fake: dict[int, Tensor] = {}
        self._running: list[tuple[int, frozenset[int]]] = []
        self._inputs: list[tuple[str, Tensor, int]] = []
        self._taps: list[_Tap] = []

    def __call__(self, given: Sequence[Any]) -> list[_Tap]:
        """A tap for each layer call."""
        mode = self._fakes
        values = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in given]
        self._fake = {id(real): fake for real, fake in zip(given, values, strict=True) if isinstance(fake, Tensor)}
        trained = {name: self._fake[key] for key, name in self._names.items() if key in self._fake}
        buffers = [self._fake[id(buffer)] for buffer in self._model.buffers() if id(buffer) in self._fake]
        held = [*buffers, *(fake for fake in self._fake.values() if isinstance(fake, nn.Parameter))]
        before = [fake._version for fake in held]
        guard = ParameterGuard(trained, buffers)  # type: ignore[arg-type]  # fakes of parameters are parameters
        guard.allowed = self._alike(self._allowed)
        enabled = torch.is_grad_enabled()
        with mode, guard:
            try:
                self._go(values, guard, buffers)
            finally:
                torch.set_grad_enabled(enabled)
        if self._running:
            raise NotCompilable("a layer begins in the graph and does not end in it")
        if [fake._version for fake in held] != before:
            raise NotCompilable("a buffer or parameter changes in the graph")
        for name, tensor, version in self._inputs:
            if tensor._version != version:
                raise overwritten(name)
        return self._taps

    def _alike(self, identities: frozenset[int]) -> frozenset[int]:
        return frozenset(id(self._fake[key]) for key in identities if key in self._fake)

    def _go(self, values: Sequence[Any], guard: ParameterGuard, buffers: list[Tensor]) -> None:
        given, found = iter(values), dict[fx.Node, Any]()
        for node in self._module.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
            if node.op == "placeholder":
                found[node] = next(given)
            elif node.op == "get_attr":
                found[node] = self._constant(node)
            elif node.op == "call_method":
                found[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif node.op == "call_function":
                found[node] = self._function(node.target, args, kwargs, guard, buffers)
            elif node.op != "output":
                raise NotCompilable(f"the graph calls a module ({node.target})")

    def _constant(self, node: fx.Node) -> Any:
        value: Any = self._module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
            raise NotCompilable(f"the graph holds a {type(value).__name__}")
        return self._fakes.from_tensor(value)

    def _function(
        self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], guard: ParameterGuard, buffers: list[Tensor]
    ) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise NotCompilable(f"the graph holds {target.__name__}, which the guard cannot look into")
        if target is enter:
            self._running.append((args[0], guard.allowed))
            guard.allowed = guard.allowed | self._alike(self._layers[args[0]][1].ids)
            return args[1]
        if target is leave:
            index, guard.allowed = self._running.pop() if self._running else (-1, guard.allowed)
            if index != args[0]:
                raise NotCompilable("a layer ends in the graph that has not begun in it")
            return self._left(index, args[1], (args[2], args[3]), buffers)
        return target(*args, **kwargs)

    def _left(self, index: int, output: Any, inputs: tuple[Any, Any], buffers: list[Tensor]) -> Tensor:
        """What the eager engine would make of the output of a layer, which is recorded."""
        module, layer = self._layers[index]
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise NotCompilable(f'layer "{layer.name}" returns no tensor of real numbers')
        with torch._C.DisableTorchFunction():
            session = self._scratch
            note_shared(session, module, inputs, buffers)
            expanded = one_row(module, inputs) and session.batch_size > 1 and session.shared.get(module, False)
            shaped = per_example_output(session, layer, inputs, output, expand=expanded)
            self._inputs += [(layer.name, t, t._version) for t in tree_leaves(inputs) if isinstance(t, Tensor)]
            self._taps.append(_Tap(shaped.shape, shaped.dtype, shaped.device, expanded))
            return same_mark(shaped, shaped.clone())
