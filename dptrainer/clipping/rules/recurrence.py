"""One direction of one recurrent layer, as an autograd function of its input projections.

The gradient of the projections, which autograd asks for anyway, is the gradient of the gates before their activation,
at every step: what the per-example gradients of all weights follow from. Hochreiter & Schmidhuber (1997) and Cho et al.
(2014), in PyTorch's variants and order of gates.

Everything that does not depend on the state is done for all steps at once, so that a step is one product and a few
operations on [k, B, H], gate by gate, so that each of them is contiguous. Sequences of unequal length are handled as
PyTorch packs them, longest first: at step t the first ``sizes[t]`` rows are alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpbudget.errors import PrivacyViolation
from dptrainer.clipping.native import Kernels, kernels


@dataclass(frozen=True)
class Steps:
    """Which rows are alive at which step, and in which direction time runs.

    Attributes:
        sizes: [T] number of rows at each step, not increasing.
        reverse: whether the state runs from the last step to the first.
    """

    sizes: tuple[int, ...]
    reverse: bool = False

    @property
    def length(self) -> int:
        """T."""
        return len(self.sizes)

    @property
    def batch(self) -> int:
        """B."""
        return self.sizes[0]

    @property
    def uniform(self) -> bool:
        """Whether all sequences are equally long."""
        return self.sizes[-1] == self.batch

    @cached_property
    def order(self) -> range:
        """The steps as time runs."""
        return range(self.length - 1, -1, -1) if self.reverse else range(self.length)

    @cached_property
    def _places(self) -> Tensor:
        """[N] where each packed row lies in [T * B]."""
        return torch.cat([torch.arange(n) + t * self.batch for t, n in enumerate(self.sizes)])

    def pad(self, rows: Tensor) -> Tensor:
        """[N, w] -> [T, B, w], with zeros where a sequence has ended."""
        if self.uniform:
            return rows.view(self.length, self.batch, rows.shape[1])
        padded = rows.new_zeros(self.length * self.batch, rows.shape[1])
        padded.index_copy_(0, self._places.to(rows.device), rows)
        return padded.view(self.length, self.batch, rows.shape[1])

    def pack(self, padded: Tensor) -> Tensor:
        """[T, B, w] -> [N, w]."""
        flat = padded.reshape(self.length * self.batch, padded.shape[2])
        return flat if self.uniform else flat[self._places.to(padded.device)]

    def by_gate(self, padded: Tensor, gates: int) -> Tensor:
        """[T, B, kH] -> a view [T, k, B, H]."""
        return padded.view(self.length, self.batch, gates, -1).transpose(1, 2)

    def alive(self, steps: Tensor, dim: int = 0) -> list[Tensor]:
        """[T, ...] -> the T slices, cut to the rows that are alive; rows are dimension ``dim`` of a slice."""
        slices = steps.unbind(0)
        if self.uniform:
            return list(slices)
        return [one.narrow(dim, 0, n) for one, n in zip(slices, self.sizes, strict=True)]

    def states(self, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Two views [T, B, H] of one buffer, the states before and after each step, with the initial ones in place."""
        if self.uniform:
            buffer = initial.new_empty(self.length + 1, *initial.shape)
            buffer[-1 if self.reverse else 0] = initial
        else:  # in reverse a short sequence begins later, from its initial state
            buffer = initial.expand(self.length + 1, *initial.shape).clone()
        return (buffer[1:], buffer[:-1]) if self.reverse else (buffer[:-1], buffer[1:])

    def final(self, after: Tensor) -> Tensor:
        """[B, H]: each sequence's state after its last step in time."""
        if self.reverse:
            return after[0].clone()
        if self.uniform:
            return after[-1].clone()
        lengths = torch.zeros(self.batch, dtype=torch.long)
        for n in self.sizes:
            lengths[:n] += 1
        return after[lengths.to(after.device) - 1, torch.arange(self.batch, device=after.device)]


def _gate_major(projected: Tensor, gates: int, steps: Steps, order: Sequence[int] | None = None) -> Tensor:
    """[N, kH] -> a new [T, k, B, H], gates possibly in another order."""
    padded = steps.by_gate(steps.pad(projected), gates)
    made = padded.new_empty(padded.shape)
    for place, gate in enumerate(order or range(gates)):
        made[:, place] = padded[:, gate]
    return made


def _by_gate(weight: Tensor, gates: int) -> Tensor:
    """[kH, P] -> [k, P, H], contiguous: products with it give gates from states."""
    return weight.view(gates, -1, weight.shape[1]).transpose(1, 2).contiguous()


def _for_gates(states: Tensor, gates: int, steps: Steps) -> list[Tensor]:
    """[T, B, P] -> T views [k, B, P]."""
    return steps.alive(states.unsqueeze(1).expand(-1, gates, -1, -1), dim=1)


def _buffer(like: Tensor, width: int, steps: Steps) -> Tensor:
    """[T, B, width]; zeros where sequences have ended."""
    make = like.new_empty if steps.uniform else like.new_zeros
    made: Tensor = make(steps.length, steps.batch, width)
    return made


def _once(ctx: Any) -> tuple[Tensor, ...]:
    """What forward saved, which backward overwrites.

    Raises:
        PrivacyViolation: (DP031) it did so before.
    """
    if ctx.spent:
        raise PrivacyViolation(
            "backward() reached a recurrent layer twice within one private step.",
            hint="call backward() once per step.",
            code="DP031",
        )
    ctx.spent = True
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    return saved


class LSTM(torch.autograd.Function):
    """(projected [N, 4H], h0 [B, P], c0 [B, H], w_hh [4H, P], w_hr [P, H] or None, shift [N, P] or None, steps, notes).

    Gives (output [N, P], h_n [B, P], c_n [B, H]). ``shift`` is zero and added to the projected states: its gradient is
    theirs. ``notes`` receives "before": the state before each step, and "unprojected": the states that w_hr projects.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, h0: Tensor, c0: Tensor, w_hh: Tensor, w_hr: Tensor | None, shift: Tensor | None,
        steps: Steps, notes: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """One product and six element-wise operations a step."""
        order = [0, 1, 3, 2]  # i, f, o, g: three to squash alike
        gates, weight = _gate_major(projected, 4, steps, order), _by_gate(w_hh, 4)[order]
        before, after = steps.states(h0)
        c_before, c_after = steps.states(c0)
        squashed = _buffer(c0, c0.shape[1], steps)
        unprojected = after if w_hr is None else _buffer(c0, c0.shape[1], steps)
        whole, states = steps.alive(gates, 1), _for_gates(before, 4, steps)
        three, (i, f, o, g) = steps.alive(gates[:, :3], 1), [steps.alive(gate) for gate in gates.unbind(1)]
        c_old, c_new, tanh_c, u, h = map(steps.alive, (c_before, c_after, squashed, unprojected, after))
        compiled = kernels(gates) if steps.uniform and w_hr is None else None
        for t in steps.order:
            whole[t].baddbmm_(states[t], weight)
            if compiled is not None:
                compiled.lstm_forward(whole[t], c_old[t], c_new[t], tanh_c[t], h[t])
                continue
            three[t].sigmoid_()
            g[t].tanh_()
            torch.mul(f[t], c_old[t], out=c_new[t]).addcmul_(i[t], g[t])
            torch.tanh(c_new[t], out=tanh_c[t])
            torch.mul(o[t], tanh_c[t], out=u[t])
            if w_hr is not None:
                torch.mm(u[t], w_hr.t(), out=h[t])
        ctx.steps, ctx.spent, ctx.compiled = steps, False, compiled
        ctx.save_for_backward(gates, c_before, squashed, w_hh, w_hr)
        notes["before"] = before
        if w_hr is not None:
            notes["unprojected"] = unprojected
        return steps.pack(after).clone(), steps.final(after), steps.final(c_after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The slopes of all steps first; then a step is one product and seven element-wise operations."""
        gates, c_before, tanh_c, w_hh, w_hr = _once(ctx)
        steps: Steps = ctx.steps
        if ctx.compiled is not None:
            return _lstm_backward(ctx.compiled, (gates, c_before, tanh_c), w_hh, steps, grads)
        i, f, o, g = gates.unbind(1)
        # In place of what is not needed any more: first touching 16 MB costs as much as twenty steps.
        scratch = o * tanh_c
        torch.addcmul(o, scratch, tanh_c, value=-1, out=tanh_c)  # o (1 - tanh^2 c)
        torch.addcmul(scratch, scratch, o, value=-1, out=o)  # o (1 - o) tanh c
        torch.mul(i, g, out=scratch)
        torch.addcmul(i, scratch, g, value=-1, out=g)  # i (1 - g^2)
        torch.addcmul(scratch, scratch, i, value=-1, out=i)  # i (1 - i) g
        torch.addcmul(c_before, c_before, f, value=-1, out=c_before)  # (1 - f) c, the factor f follows in the loop
        del scratch
        found = _buffer(gates, w_hh.shape[0], steps)
        columns = steps.by_gate(found, 4)
        slope_ig, slope_f, slope_o = steps.alive(gates[:, ::3], 1), steps.alive(c_before), steps.alive(o)
        to_ig, to_f, to_o = steps.alive(columns[:, 0:3:2], 1), steps.alive(columns[:, 1]), steps.alive(columns[:, 3])
        whole, through, forget = steps.alive(found), steps.alive(tanh_c), steps.alive(f)
        incoming, shifted = steps.alive(steps.pad(grads[0])), _buffer(gates, w_hh.shape[1], steps)
        kept = steps.alive(shifted)
        dh, dc = grads[1].clone(), grads[2].clone()
        for t in reversed(steps.order):
            n = steps.sizes[t]
            h, c = (dh, dc) if steps.uniform else (dh[:n], dc[:n])
            h.add_(incoming[t])
            u = h
            if w_hr is not None:
                kept[t].copy_(h)
                u = h @ w_hr
            c.addcmul_(u, through[t])
            torch.mul(slope_o[t], u, out=to_o[t])
            torch.mul(slope_ig[t], c, out=to_ig[t])
            c.mul_(forget[t])
            torch.mul(slope_f[t], c, out=to_f[t])
            torch.mm(whole[t], w_hh, out=h)
        shift = None if w_hr is None else steps.pack(shifted)
        return steps.pack(found), dh, dc, None, None, shift, None, None


def _lstm_backward(
    compiled: Kernels, saved: tuple[Tensor, ...], w_hh: Tensor, steps: Steps, grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """One product and one pass a step."""
    found = _buffer(saved[0], w_hh.shape[0], steps)
    gates, c_before, tanh_c = (tensor.unbind(0) for tensor in saved)
    incoming = steps.pad(grads[0].contiguous())
    dh, dc = (grad.clone(memory_format=torch.contiguous_format) for grad in grads[1:])
    for t in reversed(steps.order):
        compiled.lstm_backward((gates[t], c_before[t], tanh_c[t]), incoming[t], dh, dc, found[t])
        torch.mm(found[t], w_hh, out=dh)
    return steps.pack(found), dh, dc, None, None, None, None, None


class GRU(torch.autograd.Function):
    """(projected [N, 3H], h0 [B, H], w_hh [3H, H], b_hn [H] or None, steps, notes) -> (output [N, H], h_n [B, H]).

    The biases of the gates r and z belong to ``projected``; that of n is inside the product with r. ``notes`` receives
    "before" and "reset": r at every step, by which the gradient at the product differs from that at ``projected``.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, h0: Tensor, w_hh: Tensor, b_hn: Tensor | None, steps: Steps,
        notes: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Two products and four element-wise operations a step."""
        hidden = h0.shape[1]
        gates, weight = _gate_major(projected, 3, steps), _by_gate(w_hh, 3)
        before, after = steps.states(h0)
        recurrent = _buffer(h0, hidden, steps)
        inner = h0.new_zeros(hidden) if b_hn is None else b_hn
        two, (r, z, n) = steps.alive(gates[:, :2], 1), [steps.alive(gate) for gate in gates.unbind(1)]
        states, old, new = _for_gates(before, 2, steps), steps.alive(before), steps.alive(after)
        product = steps.alive(recurrent)
        for t in steps.order:
            two[t].baddbmm_(states[t], weight[:2]).sigmoid_()
            torch.addmm(inner, old[t], weight[2], out=product[t])
            n[t].addcmul_(r[t], product[t]).tanh_()
            torch.lerp(n[t], old[t], z[t], out=new[t])
        ctx.steps = steps
        ctx.save_for_backward(gates, before, recurrent, w_hh)
        notes["before"], notes["reset"] = before, gates[:, 0]
        return steps.pack(after).clone(), steps.final(after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """As for the LSTM; the product sees the gradient of n times r."""
        gates, before, recurrent, w_hh = ctx.saved_tensors
        steps: Steps = ctx.steps
        r, z, n = gates.unbind(1)
        width = r.shape[2]
        slopes, inner = torch.empty_like(gates), _buffer(gates, 3 * width, steps)
        d_r, d_z, d_n = slopes.unbind(1)
        torch.addcmul(z, z, z, value=-1, out=d_z).mul_(before - n)
        torch.mul(n, n, out=d_n).neg_().add_(1).mul_(1 - z)
        torch.addcmul(r, r, r, value=-1, out=d_r).mul_(recurrent).mul_(d_n)
        d_n.mul_(r)  # as the product with the state sees it
        slope, to = steps.alive(slopes, 1), steps.alive(steps.by_gate(inner, 3), 1)
        every = steps.alive(inner)
        keep, incoming = steps.alive(z), steps.alive(steps.pad(grads[0]))
        totals = _buffer(gates, width, steps)
        total = steps.alive(totals)
        dh = grads[1].clone()
        for t in reversed(steps.order):
            h = dh if steps.uniform else dh[: steps.sizes[t]]
            torch.add(h, incoming[t], out=total[t])
            torch.mul(slope[t], total[t], out=to[t])
            torch.mul(total[t], keep[t], out=h)
            h.addmm_(every[t], w_hh)
        # At the projections of the input the gradient of n is without r.
        found = torch.cat([inner[:, :, : 2 * width], (1 - n.square()).mul_(1 - z).mul_(totals)], 2)
        return steps.pack(found), dh, None, None, None, None


class Elman(torch.autograd.Function):
    """(projected [N, H], h0 [B, H], w_hh [H, H], relu, steps, notes) -> (output [N, H], h_n [B, H]). Elman (1990)."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, h0: Tensor, w_hh: Tensor, relu: bool, steps: Steps, notes: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One product and one element-wise operation a step."""
        before, after = steps.states(h0)
        old, new, given = map(steps.alive, (before, after, steps.pad(projected)))
        squash = torch.Tensor.relu_ if relu else torch.Tensor.tanh_
        for t in steps.order:
            squash(torch.addmm(given[t], old[t], w_hh.t(), out=new[t]))
        ctx.steps, ctx.relu = steps, relu
        ctx.save_for_backward(after, w_hh)
        notes["before"] = before
        return steps.pack(after).clone(), steps.final(after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One product and two element-wise operations a step."""
        after, w_hh = ctx.saved_tensors
        steps: Steps = ctx.steps
        found = (after > 0).to(after.dtype) if ctx.relu else 1 - after.square()
        if not steps.uniform:
            found = steps.pad(steps.pack(found))  # zero where a sequence has ended
        every, incoming = steps.alive(found), steps.alive(steps.pad(grads[0]))
        dh = grads[1].clone()
        for t in reversed(steps.order):
            h = dh if steps.uniform else dh[: steps.sizes[t]]
            h.add_(incoming[t])
            every[t].mul_(h)
            torch.mm(every[t], w_hh, out=h)
        return steps.pack(found), dh, None, None, None, None
