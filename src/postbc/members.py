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
from typing import Any, TypeVar

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


# -- Adam ----------------------------------------------------------------------------------------------------------------------
@torch.jit.ignore  # type: ignore[untyped-decorator]
def adam(
    values: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor], count: Tensor, lr: float
) -> None:
    """torch's fused step, the `count`-th, in place. TorchScript would not see what it changes, so it leaves it to Python."""
    torch._fused_adam_(
        values, gradients, first, second, [], [count] * len(values),
        amsgrad=False, beta1=0.9, beta2=0.999, lr=lr, weight_decay=0.0, eps=1e-8, maximize=False,
    )  # fmt: skip


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
        self._steps = [torch.zeros((), device=part[0].device) for part in self._values]

    def step(self, loss: Tensor, part: int = 0) -> None:
        """One step of a part on `loss` (m,), summed over its members so that their gradients stay apart.

        Gradients are taken for the optimiser's parameters alone: the actor's loss, say, costs no gradients of the critics' weights.
        """
        gradients = torch.autograd.grad(loss.sum(), self.parts[part])
        values, first, second, count = self.of(part)
        count += 1
        adam(values, list(gradients), first, second, count, self.lr)

    def of(self, part: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """A part's parameters, their first and second moments, and its count of steps, all to be changed in place."""
        return self._values[part], self._first[part], self._second[part], self._steps[part]

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """The state of torch.optim.Adam over the whole stack: index of the parameter -> step, exp_avg, exp_avg_sq."""
        moments = zip(zip(*self._first, strict=True), zip(*self._second, strict=True), strict=True)
        return {
            k: {"step": self._steps[0].clone(), "exp_avg": torch.cat(first), "exp_avg_sq": torch.cat(second)}
            for k, (first, second) in enumerate(moments)
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
                self._steps[part].copy_(entry["step"])
