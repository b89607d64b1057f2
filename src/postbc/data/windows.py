"""Action-chunk windows: what a chunked policy is trained on. Numbers wait on the device, frames in their file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from postbc.data.episodes import Dataset, Frames, is_image
from postbc.data.lazy import LazyArray, SparseFrames
from postbc.errors import require

#: Frames of all episodes together are kept in memory up to this many bytes.
CACHE = 2**30
Tail = Literal["drop", "pad", "mask"]


class Windows:
    """N windows of a dataset: the newest observations at a step and the T actions from there on, raw units.

    Episode after episode; no window crosses from one into another.

    Args:
        dataset: raw units.
        chunk: T >= 1.
        tail: "drop" keeps only windows that fit, N_i - T + 1 an episode (DPPO's `StitchedSequenceDataset`);
            "pad" starts a window at every step and repeats the episode's last action where it runs out; "mask" does so too, and
            what is repeated counts for nothing in the policy's loss (LeRobot's windows and `action_is_pad`).
        observation_steps: To >= 1 newest observations; before the episode's first one that one is repeated.
        device: where states, actions and what is returned are.

    Raises:
        InputError: an episode is shorter than the chunk under "drop" (it would vanish without a word).
    """

    def __init__(
        self,
        dataset: Dataset,
        chunk: int,
        *,
        tail: Tail = "drop",
        observation_steps: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        require(tail in ("drop", "pad", "mask"), "Unknown tail rule.", key="tail", found=repr(tail),
                expected="'drop', 'pad' or 'mask'")  # fmt: skip
        require(chunk >= 1, "A chunk has at least one action.", key="chunk", found=chunk, expected=">= 1")
        require(observation_steps >= 1, "A policy sees at least one observation.", key="observation_steps", found=observation_steps,
                expected=">= 1")  # fmt: skip
        self.chunk_size, self.tail, self.observation_steps = chunk, tail, observation_steps
        self.device, self.shapes, self.action_dim = torch.device(device), dataset.shapes, dataset.action_dim
        counts = dataset.lengths - (chunk - 1 if tail == "drop" else 0)
        short = int(np.argmin(counts))
        require(counts[short] >= 1, "An episode is shorter than the action chunk.", file=dataset.source,
                key=dataset.names[short], found=f"{len(dataset[short])} steps", expected=f"at least {chunk}",
                remedy="choose a smaller chunk, the tail rule 'pad', or leave this episode out")  # fmt: skip
        self.episode = np.repeat(np.arange(len(dataset)), counts)
        self.step = np.concatenate([np.arange(n) for n in counts])
        firsts = np.cumsum(dataset.lengths) - dataset.lengths
        first, last = firsts[self.episode], (firsts + dataset.lengths - 1)[self.episode]
        # rows of all episodes' steps, one after another: of the window's first action, and the first and last of its episode
        self._row, self._first, self._last = (
            torch.as_tensor(x, dtype=torch.int64, device=self.device) for x in (first + self.step, first, last)
        )
        self._starts = firsts
        self._numbers = {
            key: torch.as_tensor(np.concatenate([e.observations[key] for e in dataset]), device=self.device)
            for key in self.shapes if not is_image(key)
        }  # fmt: skip
        self._actions = torch.as_tensor(dataset.actions, device=self.device)
        self._frames: dict[str, list[Frames]] = {
            key: [e.observations[key] for e in dataset] for key in self.shapes if is_image(key)
        }
        size = sum(int(np.prod(f.shape, dtype=np.int64)) for frames in self._frames.values() for f in frames)
        whole = not any(isinstance(f, SparseFrames) for frames in self._frames.values() for f in frames)
        self._cache: dict[str, Tensor] | None = {} if size <= CACHE and whole else None
        self._channels_last = {
            key for key, frames in self._frames.items() if all(isinstance(f, LazyArray) and f.channels_last for f in frames)
        }
        self._host = self._row.cpu(), self._first.cpu()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.step)

    @property
    def rows(self) -> np.ndarray:
        """(N,) int64: each window's first step among all steps, episode after episode."""
        return np.asarray(self._host[0])

    @property
    def reads_files(self) -> bool:
        """Whether frames are not kept in memory, too many or not all there: :meth:`read` can be called ahead, by other threads too."""
        return bool(self._frames) and self._cache is None

    def _images(self, key: str, rows: Tensor) -> Tensor:
        """Frames (n, C, H, W) uint8 of global rows (n,), on the device."""
        if self._cache is None:
            return self._gathered(key, rows.cpu(), False).to(self.device).contiguous()
        if key not in self._cache:
            whole = np.concatenate([np.asarray(f[:]) for f in self._frames[key]])
            self._cache[key] = torch.as_tensor(whole, device=self.device)
        return self._cache[key][rows]

    def _gathered(self, key: str, rows: Tensor, pinned: bool) -> Tensor:
        """Frames (n, C, H, W) uint8 of global rows (n,), in memory, laid out as their files have them."""
        wanted, frames = rows.numpy(), self._frames[key]
        last = key in self._channels_last
        channels, height, width = self.shapes[key]
        stored = (height, width, channels) if last else (channels, height, width)
        buffer = torch.empty((len(wanted), *stored), dtype=torch.uint8, pin_memory=pinned)
        out = buffer.numpy()
        order = np.argsort(wanted, kind="stable")  # neighbours are read together
        episodes = np.searchsorted(self._starts, wanted[order], side="right") - 1
        cuts = np.flatnonzero(np.diff(episodes)) + 1
        for episode, places in zip(episodes[np.append(0, cuts)].tolist(), np.split(order, cuts)):
            array, steps = frames[episode], wanted[places] - self._starts[episode]
            if last:
                array.read_into(out, places, steps)  # type: ignore[union-attr]
            else:
                out[places] = array[steps]
        return buffer.permute(0, 3, 1, 2) if last else buffer

    def _steps(self, rows: Tensor, row: Tensor, first: Tensor) -> Tensor:
        """Global rows of the newest observations of windows (B,): (B,), or (B, To)."""
        if self.observation_steps == 1:
            return row[rows]
        back = torch.arange(1 - self.observation_steps, 1, device=rows.device)
        return torch.maximum(row[rows, None] + back, first[rows, None])

    def read(self, rows: Tensor, pinned: bool = False) -> dict[str, Tensor]:
        """Frames alone of windows (B,), in memory, for :meth:`observation`; for a GPU pinned, and laid out as their files have them."""
        steps = self._steps(rows, *self._host).reshape(-1)
        found = {key: self._gathered(key, steps, pinned) for key in self._frames}
        return found if pinned else {key: frames.contiguous() for key, frames in found.items()}

    def observation(self, rows: Tensor, frames: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Windows (B,) int64 -> named raw observations on the device, (B, ...), or (B, To, ...) when `observation_steps` > 1.

        `frames` are what :meth:`read` found for the same windows; by default they are read now.
        """
        rows = rows.to(self.device)
        return self._observed(self._steps(rows, self._row, self._first), frames or {})

    def next_observation(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Windows (B,) int64 -> what :meth:`observation` gives of the step after their chunks, and (B,) bool, whether the episode has
        that step; where it has none, of its last."""
        rows = rows.to(self.device)
        after = self._row + self.chunk_size
        steps = self._steps(rows, torch.minimum(after, self._last), self._first)
        return self._observed(steps, {}), (after <= self._last)[rows]

    def _observed(self, steps: Tensor, frames: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Global rows (B,) or (B, To) -> named raw observations."""
        flat = steps.reshape(-1)
        return {
            key: (
                self._numbers[key][flat] if not is_image(key) else frames[key] if key in frames else self._images(key, flat)
            ).unflatten(0, steps.shape)
            for key in self.shapes
        }  # fmt: skip

    def chunk(self, rows: Tensor) -> Tensor:
        """Windows (B,) int64 -> raw chunks (B, T, A)."""
        rows = rows.to(self.device)
        ahead = torch.arange(self.chunk_size, device=self.device)
        return self._actions[torch.minimum(self._row[rows, None] + ahead, self._last[rows, None])]

    def inside(self, rows: Tensor) -> Tensor | None:
        """Windows (B,) int64 -> (B, T) bool: which actions of their chunks the episode has; None where the loss counts all of them."""
        if self.tail != "mask":
            return None
        rows = rows.to(self.device)
        ahead = torch.arange(self.chunk_size, device=self.device)
        return self._row[rows, None] + ahead <= self._last[rows, None]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the contents: numbers, actions, chunking; of frames their shapes and each episode's first and last one."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            digest.update(repr((self.chunk_size, self.tail, self.observation_steps, self._starts.tolist())).encode())
            for key, values in (*sorted(self._numbers.items()), ("actions", self._actions)):
                digest.update(f"{key} {tuple(values.shape)}".encode())
                digest.update(np.ascontiguousarray(values.cpu().numpy(), dtype=np.float32).tobytes())
            ends = np.append(self._starts[1:], len(self._actions)) - 1
            for key in sorted(self._frames):
                digest.update(f"{key} {self.shapes[key]}".encode())
                for rows in (self._starts, ends):
                    digest.update(self._images(key, torch.as_tensor(rows, device=self.device)).cpu().numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint
