"""Batches of windows, whose frames threads read from their files while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from postbc.data.windows import Windows

READERS = 2
"""Threads that read."""
AHEAD = 4
"""Batches that are read before they are asked for."""
Frames = dict[str, Tensor]


def read_ahead(
    windows: Windows, batches: Iterable[Tensor], device: str | torch.device
) -> Generator[dict[str, Tensor], None, None]:
    """Named raw observations on `device` of each of `batches` (windows (B,) int64), in their order.

    Frames that are in files stay bytes until the device, and are copied to a CUDA device from pinned memory, on a stream of their own,
    while it computes; at most `AHEAD` batches wait, there. Where frames are in memory, nothing is read ahead. The numbers are those of
    `windows.observation`.
    """
    device = torch.device(device)
    if not windows.reads_files:
        for rows in batches:
            yield {name: value.to(device) for name, value in windows.observation(rows).items()}
        return
    on_gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if on_gpu else None

    def aside() -> AbstractContextManager[object]:
        """What a GPU draws and copies does not wait for what it computes."""
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def read(rows: Tensor) -> tuple[Tensor, Frames, Any]:
        with aside():
            rows = rows.cpu()
        frames = windows.read(rows, pinned=on_gpu)
        with aside():
            moved = {name: value.to(device, non_blocking=True).contiguous() for name, value in frames.items()}
            return rows, moved, None if stream is None else stream.record_event()

    drawn = iter(batches)
    waiting: deque[Future[tuple[Tensor, Frames, Any]]] = deque()
    readers = ThreadPoolExecutor(READERS, "postbc-read")
    try:
        while True:
            with aside():
                while len(waiting) < AHEAD and (more := next(drawn, None)) is not None:
                    waiting.append(readers.submit(read, more))
            if not waiting:
                return
            rows, moved, copied = waiting.popleft().result()
            if copied is not None:
                computing = torch.cuda.current_stream(device)
                computing.wait_event(copied)
                for value in moved.values():
                    value.record_stream(computing)  # its memory is free again only when that is through with it
            yield {name: value.to(device) for name, value in windows.observation(rows, moved).items()}
    finally:
        readers.shutdown(wait=True, cancel_futures=True)


class Batches:
    """Batches in the order in which a generator draws them, read ahead; the generator itself is no further than what was asked for.

    Args:
        windows: of the demonstrations.
        draw: generator -> windows (B,) int64, or (n, B) for n batches.
        generator: of the order; a checkpoint holds its state.
        device: where observations are wanted.
    """

    def __init__(
        self, windows: Windows, draw: Callable[[torch.Generator], Tensor], generator: torch.Generator, device: torch.device
    ) -> None:
        self.windows, self.draw, self.generator, self.device = windows, draw, generator, device
        self._rows: deque[Tensor] = deque()
        self._observations = read_ahead(windows, self._draws(), device)

    def restart(self) -> None:
        """Begin again where the generator, whose state was changed, is now; or read no more."""
        self._observations.close()
        self._rows.clear()
        self._observations = read_ahead(self.windows, self._draws(), self.device)

    def _draws(self) -> Iterator[Tensor]:
        ahead = self.generator.clone_state()
        while True:
            yield from torch.atleast_2d(self.draw(ahead))

    def next(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The next batch: windows (B,) and their raw observations, on the device."""
        observation = next(self._observations)  # which begins where the generator is
        if not self._rows:
            self._rows.extend(torch.atleast_2d(self.draw(self.generator)))
        return self._rows.popleft().to(self.device), observation
