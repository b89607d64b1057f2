"""A replay buffer: a ring of packed rows on the device, sampled by a generator of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postbc.agents.base import Batch
from postbc.errors import require

FIRST = 2**16  # rows that memory is taken for at once


class Replay:
    """Ring buffer of at most `capacity` transitions; memory is taken as it fills.

    Args:
        capacity: transitions.
        feature_dim: F.
        action_dim: D.
        device: where the rows are.
    """

    def __init__(self, capacity: int, feature_dim: int, action_dim: int, device: str | torch.device = "cpu") -> None:
        require(capacity >= 1, "A replay buffer holds at least one transition.", key="buffer_size", found=capacity)
        self.capacity = capacity
        # one row [s ‖ a ‖ s' ‖ r ‖ discount]: a batch is one gather instead of five
        self.widths = (feature_dim, action_dim, feature_dim, 1, 1)
        self.rows = torch.empty(min(capacity, FIRST), sum(self.widths), device=device)
        self.size = self.position = 0

    def __len__(self) -> int:
        """Transitions that can be sampled."""
        return self.size

    def _reserve(self, rows: int) -> None:
        """Memory for `rows` rows, and for twice as many as before where it has to grow."""
        if rows > len(self.rows):
            larger = self.rows.new_empty(min(self.capacity, max(rows, 2 * len(self.rows))), self.rows.shape[1])
            larger[: self.size] = self.rows[: self.size]
            self.rows = larger

    def add(self, batch: Batch) -> None:
        """Append n transitions, overwriting the oldest when full."""
        rows = torch.cat((*batch[:3], batch.reward.unsqueeze(-1), batch.discount.unsqueeze(-1)), -1)[-self.capacity :]
        self._reserve(min(self.size + len(rows), self.capacity))
        first = min(len(rows), self.capacity - self.position)
        self.rows[self.position : self.position + first] = rows[:first]
        self.rows[: len(rows) - first] = rows[first:]
        self.position = (self.position + len(rows)) % self.capacity
        self.size = min(self.size + len(rows), self.capacity)

    def remember(self, batch: Batch, played: Tensor, ended: Tensor) -> None:
        """One vector step of the online loop: the transitions where anything was `played` (N,)."""
        self.add(batch if bool(played.all()) else Batch(*(part[played] for part in batch)))

    def batch(self, index: Tensor) -> Batch:
        """The rows `index` (B,) as a batch."""
        parts = self.rows.index_select(0, index).split(self.widths, -1)
        return Batch(parts[0], parts[1], parts[2], parts[3].squeeze(-1), parts[4].squeeze(-1))

    def sample(self, generator: torch.Generator, batch: int) -> Batch:
        """`batch` transitions, uniform with replacement."""
        require(self.size, "The replay buffer is empty.")
        return self.batch(torch.randint(self.size, (batch,), generator=generator, device=self.rows.device))

    def state_dict(self) -> dict[str, Any]:
        """The filled part (a view: cheap until it is written) and the position."""
        return {"rows": self.rows[: self.size], "position": self.position, "capacity": self.capacity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        rows, position = state["rows"], int(state["position"])
        require(
            state["capacity"] == self.capacity and rows.shape[1:] == self.rows.shape[1:] and len(rows) <= self.capacity
            and position == (len(rows) if len(rows) < self.capacity else position) and 0 <= position <= self.capacity,
            "The replay buffer of the checkpoint has another size.", key="replay",
            found=f"shape {tuple(rows.shape)}, capacity {state['capacity']}, position {position}",
            expected=f"shape (·, {self.rows.shape[1]}), capacity {self.capacity}",
        )  # fmt: skip
        self.size = 0
        self._reserve(len(rows))
        self.size, self.position = len(rows), position
        self.rows[: self.size] = rows


class NStepReplay(Replay):
    """A replay buffer of n-step transitions: (s_t, a_t, s_{t+m}, Σ_{k<m} Π_{j<k} γ_{t+j}·r_{t+k}, Π_{k<m} γ_{t+k}), m = n, or less
    where the episode ends before.

    Args:
        steps: n; 1 is :class:`Replay`.
        num_envs: N, whose transitions come one vector step after another.
    """

    def __init__(
        self, capacity: int, feature_dim: int, action_dim: int, device: str | torch.device = "cpu", *, steps: int, num_envs: int
    ) -> None:
        super().__init__(capacity, feature_dim, action_dim, device)
        self.steps, self.num_envs = steps, num_envs
        self.open: list[tuple[Batch, Tensor]] = []  # the last vector steps, oldest first: rows so far, (N,) which wait for more

    def remember(self, batch: Batch, played: Tensor, ended: Tensor) -> None:
        """One vector step: the transitions that are whole by now are added, the oldest first."""
        waiting = [(extend(rows, batch, mask & played), mask) for rows, mask in self.open] + [(batch, played)]
        self.open = []
        for age, (rows, mask) in zip(reversed(range(len(waiting))), waiting, strict=True):
            whole = mask & ended if age + 1 < self.steps else mask
            if bool(whole.any()):
                self.add(Batch(*(part[whole] for part in rows)))
            if age + 1 < self.steps:
                self.open.append((rows, mask & ~ended))

    def state_dict(self) -> dict[str, Any]:
        """The rows, and the transitions that are not whole yet."""
        return {**super().state_dict(), "open": [{"rows": list(rows), "mask": mask} for rows, mask in self.open]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        super().load_state_dict(state)
        device = self.rows.device
        self.open = [(Batch(*(part.to(device) for part in o["rows"])), o["mask"].to(device)) for o in state["open"]]
        fits = len(self.open) < self.steps and all(m.shape == (self.num_envs,) == r.reward.shape for r, m in self.open)
        require(fits, "The open transitions of the checkpoint are others.", key="memory/open", found=len(self.open))


def extend(rows: Batch, following: Batch, mask: Tensor) -> Batch:
    """`rows` longer by the transitions that follow them, where `mask` (N,) says so."""
    return Batch(
        rows.features, rows.action, torch.where(mask.unsqueeze(-1), following.next_features, rows.next_features),
        torch.where(mask, rows.reward + rows.discount * following.reward, rows.reward),
        torch.where(mask, rows.discount * following.discount, rows.discount),
    )  # fmt: skip
