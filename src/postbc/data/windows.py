"""Action-chunk windows: what a chunked policy is trained on. Numbers wait on the device, frames in their file."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from postbc.data.episodes import Dataset, is_image
from postbc.data.lazy import LazyArray
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
        self._frames: dict[str, list[np.ndarray | LazyArray]] = {
            key: [e.observations[key] for e in dataset] for key in self.shapes if is_image(key)
        }
        size = sum(int(np.prod(f.shape, dtype=np.int64)) for frames in self._frames.values() for f in frames)
        self._cache: dict[str, Tensor] | None = {} if size <= CACHE else None
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.step)

    def _images(self, key: str, rows: Tensor) -> Tensor:
        """Frames (n, C, H, W) uint8 of global rows (n,)."""
        if self._cache is not None:
            if key not in self._cache:
                whole = np.concatenate([np.asarray(f[:]) for f in self._frames[key]])
                self._cache[key] = torch.as_tensor(whole, device=self.device)
            return self._cache[key][rows]
        wanted, back = np.unique(rows.cpu().numpy(), return_inverse=True)
        episodes = np.searchsorted(self._starts, wanted, side="right") - 1
        parts = [
            np.asarray(self._frames[key][int(e)][wanted[episodes == e] - self._starts[e]]) for e in np.unique(episodes).tolist()
        ]
        return torch.as_tensor(np.concatenate(parts)[back.reshape(-1)]).to(self.device)

    def observation(self, rows: Tensor) -> dict[str, Tensor]:
        """Windows (B,) int64 -> named raw observations on the device, (B, ...), or (B, To, ...) when `observation_steps` > 1."""
        rows = rows.to(self.device)
        steps, to = self._row[rows], self.observation_steps
        if to > 1:
            back = torch.arange(1 - to, 1, device=self.device)
            steps = torch.maximum(steps[:, None] + back, self._first[rows, None])
        flat = steps.reshape(-1)
        return {
            key: (self._images(key, flat) if is_image(key) else self._numbers[key][flat]).unflatten(0, steps.shape)
            for key in self.shapes
        }

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
