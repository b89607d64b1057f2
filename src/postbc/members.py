"""Training members one by one, each on one thread: multilayer perceptrons with a written-out backward pass, Adam, a pool of threads.

Members are independent of each other. A wide one is trained fastest alone, several steps in a row: its activations, parameters and
moments then stay in the cache, its products need no synchronisation, and its numbers depend neither on the other members nor on the
number of threads. Narrow networks are better computed as one stack (:mod:`postbc.nn`), as are all on a GPU.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)

Layers = Sequence[Sequence[Tensor]]
tanh_backward = torch.ops.aten.tanh_backward.grad_input
threshold_backward = torch.ops.aten.threshold_backward.grad_input
layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default

MINUS_ONE = torch.tensor(-1.0)

WIDE = 2**14  # B·H, rows times width, from which a network is computed alone rather than in a stack


def number_of_parts(members: int, batch: int, width: int, device: str | torch.device = "cpu") -> int:
    """Into how many parts training is divided: one a member, or a single one for all where they are better stacked."""
    return members if batch * width >= WIDE and torch.device(device).type == "cpu" else 1


def split(module: N, parts: int) -> list[N]:
    """Modules of the same kind over consecutive shares of the stacked parameters, in the same memory.

    They follow changes of the parameters' values in place, as `load_state_dict` makes them.
    """
    if parts == 1:
        return [module]
    shares = {id(p): p.data.chunk(parts) for p in module.parameters()}
    memos = ({name: nn.Parameter(share[k]) for name, share in shares.items()} for k in range(parts))
    copies = [copy.deepcopy(module, memo) for memo in memos]
    for part in copies:
        for mine, whole in zip(part.parameters(), module.parameters(), strict=True):
            mine.requires_grad_(whole.requires_grad)
    return copies


# -- threads -------------------------------------------------------------------------------------------------------------------
_pool: tuple[int, ThreadPoolExecutor] | None = None


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def each(work: Callable[[int, int], T], members: int, rounds: int = 1, stride: int = 1) -> list[T]:
    """work(m, 0), work(m, 1), ..., work(m, rounds − 1) in this order for every member m; returns what the last round gave.

    torch's number of threads is shared by the members: a thread takes the member that waits longest and does `stride` rounds of it,
    with products of one thread. Two members on two threads take less than two threads on one member after the other, whose matrices
    are too small to be divided well.
    """
    results: list[Any] = [None] * members
    threads, grad, inference = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    if min(threads, members) < 2:
        for m in range(members):
            for r in range(rounds):
                results[m] = work(m, r)
        return results
    global _pool
    if _pool is None or _pool[0] != threads:
        _pool = (threads, ThreadPoolExecutor(threads, "postbc-members", torch.set_num_threads, (1,)))
    waiting = deque((m, 0) for m in range(members))

    def some() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):  # both are a thread's own
            while waiting:
                try:
                    m, done = waiting.popleft()
                except IndexError:  # another thread was faster
                    return
                until = min(done + stride, rounds)
                for r in range(done, until):
                    results[m] = work(m, r)
                if until < rounds:
                    waiting.append((m, until))

    torch.set_num_threads(1)  # part of it (MKL's) holds for the whole process
    try:
        running = [_pool[1].submit(some) for _ in range(min(threads, members))]
        for thread in running:
            thread.result()
    finally:
        torch.set_num_threads(threads)
    return results


# -- multilayer perceptrons ----------------------------------------------------------------------------------------------------
class Chain(torch.autograd.Function):
    """Multilayer perceptrons (M, B, i) -> (M, B, o), member by member, as one node of the graph with the backward pass written out.

    Linear → [LayerNorm] → Tanh or ReLU is what ensembles and finetuners train. Both activations are differentiated from their output,
    torch's layer-norm kernel does its three gradients in one pass, and gradients that nobody asked for are not computed.

    Args:
        x: inputs.
        tanh: activation; otherwise ReLU.
        eps: of LayerNorm; None: there is none.
        dtype: of the products. Parameters, gradients, inputs and outputs keep their own.
        layers: the parameters a member (:func:`per_member`).
        parameters: weight, bias [, gain, shift], ... in the layers' order, stacked; left out, they get no gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tanh: bool, eps: float | None, dtype: torch.dtype, layers: Layers, *parameters: Tensor
    ) -> Tensor:
        keep = any(ctx.needs_input_grad)
        output = x.new_empty(*x.shape[:2], layers[0][-1].shape[-1])

        kept: list[Tensor] = []
        for inputs, mine, filled in zip(x, layers, output, strict=True):
            if dtype != x.dtype:
                inputs, mine = inputs.to(dtype), [p.to(dtype) for p in mine]
            saved = _forward(inputs, tanh, eps, mine, filled, keep)
            kept += [inputs, *mine, *saved] if keep else []
        if keep:
            ctx.save_for_backward(*kept)
            ctx.layout = (tanh, eps, dtype, x.dtype, len(layers[0]), [p.shape for p in parameters])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.layout is None:
            raise RuntimeError("a chain is differentiated once: its memory has been given back")
        tanh, eps, dtype, own, count, shapes = ctx.layout
        everything, members = ctx.saved_tensors, len(gradient)
        share, wanted = len(everything) // members, any(ctx.needs_input_grad[5:])  # of the parameters: all or none
        gradients = [gradient.new_empty(shape, dtype=own) for shape in shapes] if wanted else []
        filled = per_member(gradients, eps) if wanted else [()] * members
        inner = gradient.new_empty(members, *everything[0].shape, dtype=own) if ctx.needs_input_grad[0] else None

        for m in range(members):
            x, *rest = everything[m * share : (m + 1) * share]
            _backward(
                gradient[m].to(dtype), x, rest[count:], tanh, eps, rest[:count], filled[m], None if inner is None else inner[m]
            )
        ctx.layout = None
        nothing: list[Tensor | None] = [None] * len(shapes)
        return inner, None, None, None, None, *(gradients if wanted else nothing)


def per_member(tensors: Sequence[Tensor], eps: float | None) -> Layers:
    """Views of stacked parameters a member: weights (i, o); biases, gains and shifts (o,)."""
    per_layer = 2 if eps is None else 4
    views = [(t.detach().squeeze(1) if k % per_layer else t.detach()).unbind(0) for k, t in enumerate(tensors)]
    return list(zip(*views, strict=True))


def _forward(
    x: Tensor, tanh: bool, eps: float | None, parameters: Sequence[Tensor], output: Tensor, keep: bool
) -> list[Tensor]:
    """Fill `output` (B, o); returns (`keep`) each hidden layer's output, with LayerNorm [linear, mean, rstd] before it.

    tanh(z) is computed as 2·σ(2z) − 1, which takes a third of the time of torch's tanh and differs by at most its rounding at 1.
    """
    saved: list[Tensor] = []
    per_layer, twice = (2 if eps is None else 4), 2 if tanh else 1
    for k in range(0, len(parameters) - 2, per_layer):
        hidden = _take((len(x), parameters[k].shape[1]), x.dtype)
        if eps is None:
            torch.addmm(parameters[k + 1], x, parameters[k], beta=twice, alpha=twice, out=hidden)
            before = hidden
        else:
            linear = torch.addmm(parameters[k + 1], x, parameters[k], out=hidden)
            gain, shift = parameters[k + 2], parameters[k + 3]
            before, mean, rstd = torch.native_layer_norm(linear, gain.shape, gain, shift, eps)
            before = before.add_(before) if tanh else before
            if keep:
                saved += [linear, mean, rstd]
                hidden = _take(linear.shape, x.dtype)
        x = torch.sigmoid(before, out=hidden) if tanh else torch.clamp_min(before, 0, out=hidden)
        if tanh:
            torch.add(MINUS_ONE, x, alpha=2, out=x)
        saved.append(x)
    if x.dtype == output.dtype:
        torch.addmm(parameters[-1], x, parameters[-2], out=output)
    else:
        output.copy_(torch.addmm(parameters[-1], x, parameters[-2]))
    if keep:
        return saved
    _give(*saved)
    return []


def _backward(
    gradient: Tensor, x: Tensor, saved: Sequence[Tensor], tanh: bool, eps: float | None, parameters: Sequence[Tensor],
    gradients: Sequence[Tensor], inner: Tensor | None,
) -> None:  # fmt: skip
    """Fill `gradients` (of the parameters; may be empty) and `inner` (of x; may be None); gives back `saved`."""
    per_layer, per_saved = (2, 1) if eps is None else (4, 4)
    for k in range(len(parameters) - 2, -1, -per_layer):
        layer = k // per_layer
        before = saved[layer * per_saved - 1] if layer else x  # this layer's input
        if gradients:
            _product(before.t(), gradient, gradients[k])
            torch.sum(gradient, 0, dtype=gradients[k].dtype, out=gradients[k + 1])
        if not layer:
            if inner is not None:
                _product(gradient, parameters[k].t(), inner)
            break
        above, gradient = gradient, torch.mm(gradient, parameters[k].t(), out=_take(before.shape, before.dtype))
        if eps is None and layer < len(saved):
            _give(above)
        if tanh:
            tanh_backward(gradient, before, grad_input=gradient)
        else:
            threshold_backward(gradient, before, 0, grad_input=gradient)
        _give(before)
        if eps is not None:
            linear, mean, rstd = saved[(layer - 1) * per_saved : (layer - 1) * per_saved + 3]
            at = k - per_layer + 2  # gain and shift of the layer below
            gain, wanted, inwards = parameters[at], bool(gradients), gradient
            gradient, of_gain, of_shift = layer_norm_backward(
                inwards, linear, gain.shape, mean, rstd, gain, parameters[at + 1], [True, wanted, wanted]
            )
            _give(inwards, linear)
            if wanted:
                gradients[at].copy_(of_gain)
                gradients[at + 1].copy_(of_shift)
    if eps is None and saved:
        _give(gradient)


class _Scratch(threading.local):
    """Each thread's tensors that are not in use: memory that was written a moment ago is still in the cache."""

    def __init__(self) -> None:
        self.free: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}


_scratch = _Scratch()


def _take(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor with anything in it; :func:`_give` it back, or leave it to the garbage collector."""
    free = _scratch.free.get((tuple(shape), dtype))
    return free.pop() if free and not torch.is_inference_mode_enabled() else torch.empty(shape, dtype=dtype)


def _give(*tensors: Tensor) -> None:
    if torch.is_inference_mode_enabled():  # such tensors cannot be used in training
        return
    if len(_scratch.free) > 16:  # sizes that vary
        _scratch.free.clear()
    for tensor in tensors:
        _scratch.free.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out <- a·b."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


# -- Adam ----------------------------------------------------------------------------------------------------------------------
class Adam:
    """torch's Adam in its fused form (one pass over memory instead of about ten), for the parts of a stack one by one.

    Args:
        parts: the parameters of each part.
        lr: step size.
    """

    def __init__(self, parts: Sequence[Sequence[Tensor]], lr: float) -> None:
        self.parts, self.lr = [list(part) for part in parts], lr
        self._values = [[p.detach() for p in part] for part in parts]
        self._first = [[torch.zeros_like(p) for p in part] for part in self._values]
        self._second = [[torch.zeros_like(p) for p in part] for part in self._values]
        self._steps = [[torch.zeros((), device=p.device) for p in part] for part in self._values]

    def step(self, loss: Tensor, part: int = 0) -> None:
        """One step of a part on `loss` (m,), summed over its members so that their gradients stay apart.

        Gradients are taken for the optimiser's parameters alone: the actor's loss, say, costs no gradients of the critics' weights.
        """
        gradients = torch.autograd.grad(loss.sum(), self.parts[part])
        torch._foreach_add_(self._steps[part], 1)
        torch._fused_adam_(
            self._values[part], gradients, self._first[part], self._second[part], [], self._steps[part],
            amsgrad=False, beta1=0.9, beta2=0.999, lr=self.lr, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """The state of torch.optim.Adam over the whole stack: index of the parameter -> step, exp_avg, exp_avg_sq."""
        moments = zip(self._steps[0], zip(*self._first, strict=True), zip(*self._second, strict=True), strict=True)
        return {
            k: {"step": step, "exp_avg": torch.cat(first), "exp_avg_sq": torch.cat(second)}
            for k, (step, first, second) in enumerate(moments)
        }

    def load_state_dict(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Undo :meth:`state_dict`; the tensors are copied."""
        count = len(self.parts)
        for k, entry in state.items():
            for part, first, second in zip(
                range(count), entry["exp_avg"].chunk(count), entry["exp_avg_sq"].chunk(count), strict=True
            ):
                self._first[part][int(k)].copy_(first)
                self._second[part][int(k)].copy_(second)
                self._steps[part][int(k)].copy_(entry["step"])
