"""The forward pass of a whole model through ``torch.compile``, recorded for clipping.

What is compiled is ``model.forward``, all of it in one graph or not at all, by the backend that the program chose for
its model. :mod:`dptrainer.clipping.graph` checks each graph and records from it. Where that is not possible the forward
pass runs as it is, under the hooks of the engine: slower, and with the same sums.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from dptrainer.clipping.graph import NotCompilable, RecordingGraph
from dptrainer.clipping.layout import Layer
from dptrainer.clipping.marks import Marks, enter, leave
from dptrainer.clipping.recording import Hook, Session


@dataclass(frozen=True)
class Settings:
    """How the program has its model compiled.

    Attributes:
        backend: name or function; ``mode`` and ``options`` are part of it.
        dynamic: whether sizes are variable; None leaves it to the compiler.
    """

    backend: Any = "inductor"
    dynamic: bool | None = None


def settings_of(compiled: object) -> Settings:
    """The settings of a module or function that came from ``torch.compile``; torch's own where they are not found."""
    held = [getattr(compiled, "dynamo_ctx", None)]
    held += [cell.cell_contents for cell in getattr(compiled, "__closure__", None) or () if _filled(cell)]
    context = next((value for value in held if callable(getattr(value, "callback", None))), None)
    if context is None:
        return Settings()
    backend = context.callback
    while True:  # from what calls it to the backend itself, by the names that this has had in torch
        inner = getattr(backend, "_torchdynamo_orig_backend", getattr(backend, "_torchdynamo_orig_callable", None))
        if inner is None:
            return Settings(backend, getattr(context, "_dynamic", None))
        backend = inner


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _call(model: Any, args: Any, kwargs: Any) -> Any:
    if not torch.compiler.is_dynamo_compiling():  # a constant in what is compiled; the guard is not watching here
        raise NotCompilable("the compiler was told to leave code as it is")
    return model.forward(*args, **kwargs)


class CompiledForward:
    """Stands for ``forward`` of a model while a private batch runs, once :meth:`restart` found that it may.

    Attributes:
        reason: why the model runs uncompiled; None while it runs compiled.
        rows: rows of every private batch; None where they vary. Then batches of one row run uncompiled: the compiler
            makes a graph of its own for one, and nobody shall wait for it in a batch that is private.
        rehearse: tries it out on synthetic records; called before the first batch of a model, and of a changed one.
        look: refuses what stands around the model and was not tested; called before each batch.
        marks: what tells the hooks of layers to leave marks.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self.marks = Marks()
        self.reason: str | None = "it was not tested yet"
        self.rehearse: Callable[[], object] | None = None
        self.look: Callable[[], object] | None = None
        self.rows: int | None = None
        self._untried = False
        self._layers: list[tuple[nn.Module, Layer]] = []
        self._fast: Callable[..., Any] | None = None
        self._session: Session | None = None
        self._allowed: frozenset[int] = frozenset()

    @property
    def sizes_are_open(self) -> bool:
        """Whether the program left it to the compiler which sizes are variable."""
        return self._settings.dynamic is None

    @property
    def sizes_are_fixed(self) -> bool:
        """Whether the program asked for a graph of its own for each size."""
        return self._settings.dynamic is False

    def takes(self, batch_size: int) -> bool:
        """Whether it runs batches of this size, here and now: a checkpointed forward pass is run again uncompiled."""
        return self.reason is None and (batch_size > 1 or self.rows == 1) and not _checkpointing()

    def forget(self) -> None:
        """The model is another one; what was compiled may be untrue of it."""
        self._fast = None

    def restart(self, layers: Sequence[tuple[nn.Module, Layer]]) -> None:
        """Prepares for a model with these layers, each marked by its place; keeps what was compiled for just these."""
        import torch._dynamo

        known = [(module, layer.ids) for module, layer in self._layers]
        if self._fast is not None and known == [(module, layer.ids) for module, layer in layers]:
            return
        self._layers, self.reason, self._untried = list(layers), _unsupported(layers), True
        torch.compiler.allow_in_graph(enter)  # type: ignore[no-untyped-call]  # torch does not annotate it
        torch.compiler.allow_in_graph(leave)  # type: ignore[no-untyped-call]
        self._fast = self._compiled_call(self._graph)

    def ready(self) -> None:
        """Has it tried out, if that was not done yet.

        Raises:
            PrivacyViolation: what was not tested stands around the model.
        """
        if self.look is not None:
            self.look()
        if not self._untried or self.rehearse is None:
            return
        before, self._untried = self.reason, False
        try:
            self.rehearse()
        except BaseException:  # someone interrupted it: it is yet to be tried out
            self.reason, self._untried = before, True
            raise

    def give_up(self, reason: str) -> None:
        """From now on the model runs uncompiled."""
        said = [line.strip() for line in reason.splitlines() if line.strip()]
        self.reason = " ".join(said[:2])[:300].rstrip(". ")

    def __call__(self, session: Session, allowed: frozenset[int], args: Any, kwargs: Any) -> Any:
        """The outputs of the model, its layer calls recorded in ``session``; nothing is recorded if it raises.

        Args:
            session: the open batch.
            allowed: parameters whose layer is running around ``forward``.
            args: positional arguments of ``forward``.
            kwargs: its arguments by name.

        Raises:
            NotCompilable: the forward pass did not run, and must be run uncompiled.
            PrivacyViolation: what the eager engine would refuse.
        """
        if self._fast is None or self.reason is not None:
            raise NotCompilable(self.reason or "it was not tested yet")
        self._session, self._allowed, self.marks.on = session, allowed, True
        try:
            with without_global_hooks(), self._numbers_fixed(), _sizes_unsaid():
                return self._fast(self._model, args, kwargs)
        except NotCompilable as error:
            self.give_up(str(error))
            raise
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self.give_up("it was compiled for too many sizes")  # the compiler names those of private batches
            raise NotCompilable(self.reason) from None
        except torch._dynamo.exc.TorchDynamoException as error:
            self.give_up(str(error))
            raise NotCompilable(str(error)) from error
        finally:
            self._session, self._allowed, self.marks.on = None, frozenset(), False

    def _numbers_fixed(self) -> AbstractContextManager[object]:
        """Under ``dynamic=True`` numbers, an ``eps`` for example, would be tensors, which have no value in the walk."""
        if not self._settings.dynamic:
            return nullcontext()
        patched: AbstractContextManager[object] = torch._dynamo.config.patch(specialize_float=True)
        return patched

    def _graph(self, module: Any, inputs: Any) -> RecordingGraph:
        """The backend that the compiler hands graphs to."""

        def compile(graph: Any) -> Callable[..., Any]:
            fast = self._compiled_call(self._settings.backend)
            return lambda *given: fast(graph, given, {})

        return RecordingGraph(module, self._layers, self._open, lambda: self._allowed, compile, self._model)

    def _compiled_call(self, backend: Any) -> Callable[..., Any]:
        """A compiled (module, args, kwargs) -> outputs."""
        # The compiler keeps its graphs with the code of the function: one of our own, which nobody else fills.
        own = types.FunctionType(_call.__code__.replace(), globals())
        return torch.compile(own, backend=backend, fullgraph=True, dynamic=self._settings.dynamic)

    def _open(self) -> Session:
        assert self._session is not None  # noqa: S101 - graphs are run by __call__ alone
        return self._session


@contextmanager
def _sizes_unsaid() -> Iterator[None]:
    """Within the block the compiler does not log why it compiles anew: one batch was of 33 rows, and another of 42."""
    loggers = [logging.getLogger(f"torch.{name}") for name in _TELL_SIZES]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


#: Loggers that name sizes of inputs in warnings and errors.
_TELL_SIZES = (
    "_dynamo.convert_frame",
    "_dynamo.guards",
    "_subclasses.fake_tensor",
    "fx.experimental.symbolic_shapes",
)


#: The hooks that tensors saved for a backward pass go through; not in every version of torch.
_saving: Callable[[bool], tuple[Any, ...] | None] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None
)


def _checkpointing() -> bool:
    """Whether what runs now will be run again within the backward pass."""
    return any(getattr(hook, "__module__", "") == "torch.utils.checkpoint" for hook in _saving(True) or ())


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Takes our hooks on all modules away meanwhile: they would be compiled too, and anew when they are gone."""
    tables = [getattr(torch_module, f"_global_{name}_hooks") for name in ("forward_pre", "forward")]
    before = [dict(table) for table in tables]
    for table in tables:
        for key in [key for key, hook in table.items() if isinstance(hook, Hook)]:
            del table[key]
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)


def _unsupported(layers: Sequence[tuple[nn.Module, Layer]]) -> str | None:
    """Why a model with these layers cannot be recorded from a graph."""
    for module, layer in layers:
        title = f'layer "{layer.name}" ({type(module).__name__})' if layer.name else "the model itself"
        if layer.rule is None:
            return f"{title} has no rule, and is run again for each example"
        if layer.rule.traced:
            return f"{title} is recorded inside, function by function"
    return None


@contextmanager
def standing_in(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block ``forward`` is called for ``model.forward``; :func:`stand_back` ends it sooner."""
    own = vars(model)
    before = own.get("forward")
    own["forward"] = _Stand(forward, before)
    try:
        yield
    finally:
        stand_back(model)


@dataclass(frozen=True)
class _Stand:
    forward: Callable[..., Any]
    before: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def stand_back(model: nn.Module) -> None:
    """Gives the model back the ``forward`` that it had; idempotent."""
    own = vars(model)
    stand = own.get("forward")
    if isinstance(stand, _Stand):
        del own["forward"]
        if stand.before is not None:
            own["forward"] = stand.before
