"""Training members one by one, each on one thread: parts of a stack, Adam, a pool of threads, torch calls without Python's lock.

Members are independent of each other. A wide one is trained fastest alone, several steps in a row: its activations, parameters and
moments then stay in the cache, its products need no synchronisation, and its numbers depend neither on the other members nor on the
number of threads. Narrow networks are better computed as one stack (:mod:`postbc.nn`), as are all on a GPU.
"""

import copy
import os
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)

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


# -- without Python's lock -----------------------------------------------------------------------------------------------------
def scripted(function: Callable[..., T]) -> Callable[..., T]:
    """`function` run by TorchScript, whose calls follow each other without Python's lock; the same numbers, to the bit.

    Threads that train a member each would hand the lock to each other at every call, which costs more than small calls do. The
    function keeps to TorchScript's part of Python. That is no longer developed, so a torch that lacks it runs the function as it is.
    """
    script = getattr(torch.jit, "script", None)
    if script is None:
        return function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return script(function)  # type: ignore[no-any-return]


# -- threads -------------------------------------------------------------------------------------------------------------------
_pool: tuple[int, ThreadPoolExecutor] | None = None


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def each(work: Callable[[int, slice], T], members: int, steps: int = 1, stride: int = 1) -> list[T]:
    """work(m, 0:stride), work(m, stride:2·stride), ... up to `steps` in this order for every member m; returns what the last gave.

    torch's number of threads is shared by the members: a thread takes the member that waits longest and does `stride` steps of it,
    with products of one thread. Two members on two threads take less than two threads on one member after the other, whose matrices
    are too small to be divided well.

    TorchScript runs what is written: left to itself, it would after a first call derive backward passes of its own, whose last bits
    differ, and a resumed training would not end as one never disturbed.
    """
    results: list[Any] = [None] * members
    rounds = [slice(first, first + stride) for first in range(0, steps, stride)]
    threads, grad, inference = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    if min(threads, members) < 2:
        with torch.jit.optimized_execution(False):
            for m in range(members):
                for round_ in rounds:
                    results[m] = work(m, round_)
        return results
    global _pool
    if _pool is None or _pool[0] != threads:
        _pool = (threads, ThreadPoolExecutor(threads, "postbc-members", torch.set_num_threads, (1,)))
    waiting = deque((m, 0) for m in range(members))

    def some() -> None:
        # all three are a thread's own
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad and not inference),
            torch.jit.optimized_execution(False),
        ):
            while waiting:
                try:
                    m, done = waiting.popleft()
                except IndexError:  # another thread was faster
                    return
                results[m] = work(m, rounds[done])
                if done + 1 < len(rounds):
                    waiting.append((m, done + 1))

    torch.set_num_threads(1)  # part of it (MKL's) holds for the whole process
    try:
        running = [_pool[1].submit(some) for _ in range(min(threads, members))]
        for thread in running:
            thread.result()
    finally:
        torch.set_num_threads(threads)
    return results


# -- Adam ----------------------------------------------------------------------------------------------------------------------
class AdamState(NamedTuple):
    """What a step changes in place, and its size."""

    values: list[Tensor]
    """The parameters' values."""
    first: list[Tensor]
    """Their first moments."""
    second: list[Tensor]
    """Their second moments."""
    steps: Tensor
    """() float: how many so far."""
    lr: float
    """Step size."""


@torch.jit.ignore  # type: ignore[untyped-decorator]
def fused_adam(
    values: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor], steps: Tensor, lr: float
) -> None:
    """torch's fused step. TorchScript would not see what it changes, so it leaves it to Python (tuples would get there slowly)."""
    steps += 1
    torch._fused_adam_(
        values, gradients, first, second, [], [steps] * len(values),
        amsgrad=False, beta1=0.9, beta2=0.999, lr=lr, weight_decay=0.0, eps=1e-8, maximize=False,
    )  # fmt: skip


@scripted
def adam(state: AdamState, gradients: list[Tensor]) -> None:
    """One step, in place."""
    fused_adam(state.values, gradients, state.first, state.second, state.steps, state.lr)


@scripted
def descend(state: AdamState, parameters: list[Tensor], loss: Tensor) -> None:
    """One step on `loss` (m,), summed over its members so that their gradients stay apart.

    Gradients are taken for `parameters` alone, whose state it is: the actor's loss, say, costs no gradients of the critics' weights.
    """
    gradients: list[Tensor] = []
    for gradient in torch.autograd.grad([loss.sum()], parameters):
        assert gradient is not None
        gradients.append(gradient)
    adam(state, gradients)


class Adam:
    """torch's Adam in its fused form (one pass over memory instead of about ten), for the parts of a stack one by one.

    Args:
        parts: the parameters of each part.
        lr: step size.
    """

    def __init__(self, parts: Sequence[Sequence[Tensor]], lr: float) -> None:
        self.parts = [list(part) for part in parts]
        self.states = []
        for part in self.parts:
            values = [p.detach() for p in part]
            first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
            self.states.append(AdamState(values, first, second, torch.zeros((), device=values[0].device), lr))

    def step(self, loss: Tensor, part: int = 0) -> None:
        """One step of a part on `loss` (m,)."""
        descend(self.states[part], self.parts[part], loss)

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """The state of torch.optim.Adam over the whole stack: index of the parameter -> step, exp_avg, exp_avg_sq."""
        return {
            k: {
                "step": self.states[0].steps.clone(),
                "exp_avg": torch.cat([state.first[k] for state in self.states]),
                "exp_avg_sq": torch.cat([state.second[k] for state in self.states]),
            }
            for k in range(len(self.parts[0]))
        }

    def load_state_dict(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Undo :meth:`state_dict`; the tensors are copied."""
        parts = len(self.parts)
        for k, entry in state.items():
            shares = zip(self.states, entry["exp_avg"].chunk(parts), entry["exp_avg_sq"].chunk(parts), strict=True)
            for mine, first, second in shares:
                mine.first[int(k)].copy_(first)
                mine.second[int(k)].copy_(second)
                mine.steps.copy_(entry["step"])
