"""Where and how numbers are computed: device, precision, threads, compilation; chosen once a stage, and recorded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from postbc.errors import require
from postbc.schemas import schema


@schema
class Compute:
    """Where a stage computes."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda where there is one, else cpu (recorded as what was chosen)."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of matrix products; parameters, optimisers and losses stay float32. auto: bfloat16 where the device multiplies it in hardware.
    float32 is that of convolutions too (no TF32)."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads of a seed's process. Results may differ in the last bits between numbers of threads."""
    compile: bool = False
    """Compile the update (torch.compile; on cuda captured as one graph): the same numbers to rounding."""

    def resolved(self) -> Compute:
        """Without `auto`. InputError if the device is not there."""
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        require(
            there[device], "There is no such device here.", key="device", found=device,
            expected=", ".join(name for name, found in there.items() if found), remedy="leave --device out to take what is there",
        )  # fmt: skip
        precision = self.precision
        if precision == "auto":
            precision = "bfloat16" if has_fast_bfloat16(device) else "float32"
        return replace(self, device=device, precision=precision)

    def start(self) -> torch.device:
        """Set this process's number of threads, and cuDNN to full and repeatable float32; the device."""
        torch.set_num_threads(self.threads)
        chosen = self.resolved()
        torch.backends.cudnn.allow_tf32 = chosen.precision != "float32"
        torch.backends.cudnn.deterministic = True
        return torch.device(chosen.device)

    @property
    def captures(self) -> bool:
        """Whether :meth:`compiled` records a CUDA graph."""
        return self.compile and self.resolved().device == "cuda"

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products in the chosen precision."""
        chosen = self if self.precision == "float32" else self.resolved()
        if chosen.precision == "float32":
            yield
            return
        with torch.autocast(chosen.device, torch.bfloat16):
            yield

    def compiled(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """`update` as it is, or compiled where that was asked for (on cuda: captured as one graph).

        It takes tensors of the same shapes at every call, changes networks and optimisers in place, and draws no random numbers; what
        it returns is good until the next call.
        """
        if not self.compile:
            return update
        return _Captured(update) if self.captures else torch.compile(update)


class _Captured:
    """A function recorded as one CUDA graph: its kernels are launched at once, without Python between them.

    The first calls run as they are, aside, so that libraries and optimisers make what they need before the recording.
    """

    WARM_UP = 3

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0
        self.inputs: list[torch.Tensor] = []
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *tensors: torch.Tensor) -> Any:
        self.calls += 1
        if self.calls <= self.WARM_UP:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                result = self.function(*tensors)
            torch.cuda.current_stream().wait_stream(aside)
            return result
        if self.graph is None:
            self.inputs, self.graph = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function(*self.inputs)
        shapes, recorded = ([tuple(tensor.shape) for tensor in of] for of in (tensors, self.inputs))
        require(shapes == recorded, "A graph is of the shapes that it was recorded with.", key="compute.compile", found=shapes,
                expected=recorded, remedy="give the update batches of one size, or leave --compile out")  # fmt: skip
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.result


def has_fast_bfloat16(device: str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; elsewhere it would be emulated, slowly."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return False
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
