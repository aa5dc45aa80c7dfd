"""RNN, GRU, LSTM and their cells: the gradient of the gates before activation serves all weights of a direction.

With g_t that gradient, x_t the input and h_t the state, dW_ih = sum_t g_t x_t^T, dW_hh = sum_t g_t h_{t-1}^T and both
biases get sum_t g_t. Where autograd obtains g_t is in :mod:`dptrainer.clipping.rules.recurrence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dptrainer.clipping.per_example import Dense, PerExample
from dptrainer.clipping.products import Products
from dptrainer.clipping.rules import recurrence, traced_rule
from dptrainer.clipping.rules.recurrence import Steps

if TYPE_CHECKING:
    from dptrainer.clipping.trace import Trace

#: Contributions by local parameter name.
Parts = Iterator[tuple[str, PerExample]]


def _uses(trace: Trace, uses: Sequence[tuple[Tensor | None, Callable[[], PerExample]]]) -> Parts:
    """Contributions of those parameters that are trained now."""
    for parameter, contribution in uses:
        name = trace.name(parameter)
        if name is not None:
            yield name, contribution()


# ---------------------------------------------------------------------- whole sequences


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> tuple[Tensor, ...]:
    """The function's output and final states."""
    found: tuple[Tensor, ...] = function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return found


@dataclass(frozen=True)
class _Weights:
    """Parameters of one direction of one layer."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None

    @classmethod
    def split(cls, flat: Sequence[Tensor], biases: bool, directions: int) -> list[_Weights]:
        """One for each layer and direction, from PyTorch's flat list."""
        size = len(flat) // directions
        found = []
        for start in range(0, len(flat), size):
            w_ih, w_hh, *rest = flat[start : start + size]
            b_ih, b_hh = rest[:2] if biases else (None, None)
            found.append(cls(w_ih, w_hh, b_ih, b_hh, rest[-1] if len(rest) in (1, 3) else None))
        return found

    def all(self) -> tuple[Tensor | None, ...]:
        """All of them."""
        return self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr

    def bias(self, mode: str) -> Tensor | None:
        """What is added to the projections of the input: both biases, but not that inside the product of a GRU."""
        if self.b_ih is None or self.b_hh is None:
            return None
        if mode != "GRU":
            return self.b_ih + self.b_hh
        outside = self.b_hh.clone()
        outside[2 * self.w_hh.shape[1] :] = 0
        return self.b_ih + outside


@dataclass(frozen=True)
class _Direction:
    """One direction of one layer, in one call."""

    trace: Trace
    mode: str
    weights: _Weights
    steps: Steps
    unsorted: Tensor | None
    inputs: Sequence[Tensor]

    def run(self, rows: Tensor, initial: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[N, d] and the initial states [B, H] -> [N, H] and the final states."""
        weights, steps = self.weights, self.steps
        site = self.trace.site(self.inputs, steps.batch) if self.trace.trains(*weights.all()) else None
        tap: Callable[[Tensor], Tensor] = (lambda value: value) if site is None else site.tap
        notes: dict[str, Tensor] = {}
        projected = tap(F.linear(rows, weights.w_ih, weights.bias(self.mode)))
        h0 = initial[0]
        if self.mode == "LSTM":
            shift = None if weights.w_hr is None else tap(rows.new_zeros(rows.shape[0], h0.shape[1]))
            output, *final = _apply(
                recurrence.LSTM, projected, h0, initial[1], weights.w_hh, weights.w_hr, shift, steps, notes
            )
        elif self.mode == "GRU":
            b_hn = None if weights.b_hh is None else weights.b_hh[2 * h0.shape[1] :]
            output, *final = _apply(recurrence.GRU, projected, h0, weights.w_hh, b_hn, steps, notes)
        else:
            output, *final = _apply(
                recurrence.Elman, projected, h0, weights.w_hh, self.mode == "RNN_RELU", steps, notes
            )
        if site is not None:
            given = rows.detach()
            site.answer(lambda grads: self._answer(given, notes, grads))
        return output, final

    def _rows(self, padded: Tensor) -> Tensor:
        """[T, B, w] -> [B, T, w] in the order of the batch, in the type of the sums."""
        by_example = padded.to(self.trace.dtype).transpose(0, 1)
        return by_example if self.unsorted is None else by_example[self.unsorted]

    def _answer(self, given: Tensor, notes: dict[str, Tensor], grads: Sequence[Tensor | None]) -> Parts:
        if grads[0] is None:
            return
        weights, padded = self.weights, self.steps.pad(grads[0])
        outer = self._rows(padded)
        inner = outer
        if self.mode == "GRU":
            hidden = weights.w_hh.shape[1]
            inner = self._rows(torch.cat([padded[..., : 2 * hidden], padded[..., 2 * hidden :] * notes["reset"]], 2))
        summed = Dense(outer.sum(1))
        yield from _uses(
            self.trace,
            [
                (weights.w_ih, lambda: Products(outer, self._rows(self.steps.pad(given)))),
                (weights.w_hh, lambda: Products(inner, self._rows(notes["before"]))),
                (weights.b_ih, lambda: summed),
                (weights.b_hh, lambda: summed if inner is outer else Dense(inner.sum(1))),
            ],
        )
        if weights.w_hr is not None and grads[1] is not None:
            shift = self._rows(self.steps.pad(grads[1]))
            yield from _uses(self.trace, [(weights.w_hr, lambda: Products(shift, self._rows(notes["unprojected"])))])


@dataclass(frozen=True)
class _Sequences:
    """The input as rows, longest sequence first at every step, and how to give the output back."""

    rows: Tensor
    sizes: tuple[int, ...]
    packed: bool
    batch_first: bool
    unsorted: Tensor | None

    @classmethod
    def read(cls, trace: Trace, data: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> _Sequences:
        """From the arguments of the torch function, and of the layer where they tell the order of the examples."""
        if batch_sizes is not None:
            given = next(leaf for leaf in (*trace.args, *trace.kwargs.values()) if isinstance(leaf, PackedSequence))
            return cls(data, tuple(int(n) for n in batch_sizes), True, False, given.unsorted_indices)
        time_major = data.transpose(0, 1) if batch_first else data
        length, batch, width = time_major.shape
        if length == 0:
            raise ValueError("a sequence must have at least one step")
        return cls(time_major.reshape(length * batch, width), (batch,) * length, False, batch_first, None)

    def restore(self, rows: Tensor) -> Tensor:
        """The output in the form of the input."""
        if self.packed:
            return rows
        time_major = rows.view(len(self.sizes), self.sizes[0], rows.shape[1])
        return time_major.transpose(0, 1) if self.batch_first else time_major


_FUNCTIONS: tuple[Any, ...] = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


@traced_rule(nn.LSTM, nn.GRU, nn.RNN, functions=_FUNCTIONS, parameters=lambda layer: layer._flat_weights_names)
def recurrent(trace: Trace, data: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """All layers and directions. Same result as the function that it stands for, up to rounding.

    Autocast is off inside: the result has the type of the weights.

    Args:
        trace: the call of the layer.
        data: [T, B, d], [B, T, d] or packed [N, d].
        *arguments: the rest, as torch.lstm takes it for padded or for packed sequences.
    """
    first, *rest = arguments
    packed = isinstance(first, Tensor) and not first.is_floating_point()
    hx, flat, biases, layers, dropout, train, two_ways = rest[:7] if packed else (first, *rest[:6])
    mode, directions = str(trace.module.mode), 1 + two_ways
    weights = _Weights.split(flat, biases, layers * directions)
    with torch.autocast(data.device.type, enabled=False):
        kind = weights[0].w_ih.dtype
        sequences = _Sequences.read(trace, data.to(kind), first if packed else None, not packed and bool(rest[6]))
        states = [state.to(kind) for state in (hx if mode == "LSTM" else (hx,))]
        rows, finals = sequences.rows, []
        given = len(trace.args) + len(trace.kwargs) > 1  # initial states that PyTorch fills in are no one's
        inputs = [data, *(hx if mode == "LSTM" else (hx,))] if given else [data]
        for layer in range(layers):
            outputs = []
            for way in range(directions):
                index = layer * directions + way
                steps = Steps(sequences.sizes, reverse=bool(way))
                direction = _Direction(trace, mode, weights[index], steps, sequences.unsorted, inputs)
                output, final = direction.run(rows, [state[index] for state in states])
                outputs.append(output)
                finals.append(final)
            rows = torch.cat(outputs, 1) if two_ways else outputs[0]
            if layer < layers - 1 and dropout and train:
                rows = F.dropout(rows, dropout, True)
        return sequences.restore(rows), *(torch.stack(list(state)) for state in zip(*finals, strict=True))


# ---------------------------------------------------------------------- cells


_CELLS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_Cell = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _use(trace: Trace, weight: Tensor, bias: Tensor | None, given: Tensor, grad: Tensor | None) -> Parts:
    """What ``F.linear(given, weight, bias)`` contributes at one step."""
    if grad is not None:
        yield from _uses(
            trace,
            [
                (weight, lambda: Products(grad.unsqueeze(1), given.to(trace.dtype).unsqueeze(1))),
                (bias, lambda: Dense(grad)),
            ],
        )


def _projections(trace: Trace, given: Tensor, state: Tensor, weights: _Cell) -> tuple[Tensor, Tensor]:
    """Both projections of a cell, each tapped."""
    w_ih, w_hh, b_ih, b_hh = weights
    site = trace.site((given, state), given.shape[0])
    from_input = site.tap(F.linear(given.to(w_ih.dtype), w_ih, b_ih))
    from_state = site.tap(F.linear(state.to(w_hh.dtype), w_hh, b_hh))
    x, h = given.detach(), state.detach()

    def answer(grads: Sequence[Tensor | None]) -> Parts:
        yield from _use(trace, w_ih, b_ih, x, grads[0])
        yield from _use(trace, w_hh, b_hh, h, grads[1])

    site.answer(answer)
    return from_input, from_state


@traced_rule(nn.LSTMCell, functions=(torch.lstm_cell,), parameters=lambda _: _CELLS)
def lstm_cell(trace: Trace, given: Tensor, hx: Sequence[Tensor], *weights: Any) -> tuple[Tensor, Tensor]:
    """One step of an LSTM."""
    with torch.autocast(given.device.type, enabled=False):
        from_input, from_state = _projections(trace, given, hx[0], weights)
        i, f, g, o = (from_input + from_state).chunk(4, 1)
        c = f.sigmoid() * hx[1].to(f.dtype) + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


@traced_rule(nn.GRUCell, functions=(torch.gru_cell,), parameters=lambda _: _CELLS)
def gru_cell(trace: Trace, given: Tensor, hx: Tensor, *weights: Any) -> Tensor:
    """One step of a GRU."""
    with torch.autocast(given.device.type, enabled=False):
        from_input, from_state = _projections(trace, given, hx, weights)
        r, z, n = from_input.chunk(3, 1)
        h_r, h_z, h_n = from_state.chunk(3, 1)
        new = torch.tanh(n + torch.sigmoid(r + h_r) * h_n)
        return torch.lerp(new, hx.to(new.dtype), torch.sigmoid(z + h_z))


def _elman_cell(trace: Trace, given: Tensor, hx: Tensor, *weights: Any) -> Tensor:
    with torch.autocast(given.device.type, enabled=False):
        from_input, from_state = _projections(trace, given, hx, weights)
        total = from_input + from_state
        return total.relu() if trace.module.nonlinearity == "relu" else total.tanh()


traced_rule(nn.RNNCell, functions=(torch.rnn_tanh_cell, torch.rnn_relu_cell), parameters=lambda _: _CELLS)(_elman_cell)
