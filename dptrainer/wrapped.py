"""Models that come from ``torch.compile``: what the program calls, and the model inside that is trained.

Private batches go to the clipping engine, which has the forward pass compiled in its own way; everything else, an
evaluation for example, goes where the program sent it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.bookkeeping import BookKeeping
from dptrainer.clipping.compiled import CompiledForward, settings_of, without_global_hooks
from dptrainer.clipping.engine import plain
from dptrainer.clipping.recording import Hook
from dptrainer.probe import Call
from dptrainer.rehearsal import rehearse

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TWICE = r"Using `torch\.compile\(module\)` when there are global hooks"


class Entry:
    """Stands where a compiled model is entered, ``forward`` of the wrapper or the compiled call of the model itself.

    Attributes:
        shown: what the program calls.
        original: what stood there.
        forward: the compiled forward pass of private batches.
        engine: of the private training, once there is one.

    Raises:
        PrivacyViolation: (DP019) a wrapper has hooks.
    """

    def __init__(self, shown: nn.Module) -> None:
        self.shown, self.model = shown, plain(shown)
        self._place = "_compiled_call_impl" if shown is self.model else "forward"
        held = vars(shown)[self._place]
        self.original: Callable[..., Any] = held.original if isinstance(held, Entry) else held
        self.forward = CompiledForward(self.model, settings_of(self.original if shown is self.model else shown))
        self.engine: BookKeeping | None = None
        self._placed = False
        self.forward.look = self._refuse_untested
        self._refuse_untested()

    def _refuse_untested(self) -> None:
        """What a wrapper does around the model is neither tested nor watched.

        Raises:
            PrivacyViolation: (DP019) it has hooks, or another ``forward`` than it had at set-up.
        """
        exchanged = self._placed and vars(self.shown).get(self._place) is not self
        wrapper = self.shown
        while wrapper is not self.model and not exchanged:
            exchanged = any(not isinstance(hook, Hook) for name in _HOOKS for hook in vars(wrapper)[name].values())
            wrapper = wrapper._orig_mod  # type: ignore[assignment]  # a module
        if exchanged:
            raise PrivacyViolation(
                "what torch.compile returned has hooks of its own, or its forward was exchanged; nobody tests them.",
                hint="register hooks on the model that was given to torch.compile, and compile it before its private "
                "training is set up.",
                code="DP019",
            )

    def attach(
        self, engine: BookKeeping, calls: Sequence[Call], rows: int | None, note: Callable[[str], None] | None
    ) -> None:
        """From now on private batches go to ``engine``; see :func:`~dptrainer.rehearsal.rehearse`."""
        self.engine = engine
        self.forward.rows = rows
        self.forward.rehearse = partial(rehearse, engine, self.forward, self.model, calls, rows, note)
        self.forward.ready()
        vars(self.shown)[self._place], self._placed = self, True
        if self.shown is not self.model:  # our global hooks know the wrapper, and pass over it
            warnings.filterwarnings("ignore", _TWICE, UserWarning)

    def release(self) -> None:
        """Gives the model back as it was."""
        self.engine, self._placed = None, False
        if vars(self.shown).get(self._place) is self:
            vars(self.shown)[self._place] = self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model."""
        if self.engine is None or not self.engine.batch_is_open:
            with without_global_hooks():
                return self.original(*args, **kwargs)
        self._refuse_untested()
        return self.engine.call(*args, **kwargs)


def entry_of(model: nn.Module) -> Entry | None:
    """The entry of a model that was compiled as a whole; None for any other."""
    inside = plain(model)
    if inside is not model or getattr(model, "_compiled_call_impl", None) is not None:
        return Entry(model)
    return None
