"""A replay buffer for M seeds: a ring of packed rows, sampled by each seed's own generator."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from postbc.errors import InputError
from postbc.nn import Generators, randint


class Batch(NamedTuple):
    """Transitions of M members, normalised units. Views of one gathered block."""

    observation: Tensor
    """(M, B, S)."""
    action: Tensor
    """(M, B, D): a flattened chunk (DSRL-NA, IQL) or latent noise in [−1, 1] (DSRL-SAC)."""
    next_observation: Tensor
    """(M, B, S): for a truncated episode its own last observation, never the first of the next."""
    reward: Tensor
    """(M, B): reward of the chunk."""
    discount: Tensor
    """(M, B): what multiplies the next value: γ (or γ^steps), and 0 where the episode terminated."""

    def split(self, size: int) -> "list[Batch]":
        """Consecutive batches of `size` rows."""
        return [Batch(*part) for part in zip(*(whole.split(size, 1) for whole in self), strict=True)]

    def divide(self, parts: int) -> "list[Batch]":
        """Batches of consecutive members, equally many each."""
        return [Batch(*share) for share in zip(*(whole.chunk(parts) for whole in self), strict=True)]


class Replay:
    """Ring buffer of `capacity` transitions a member; memory is taken from the system only as it fills.

    Args:
        members: M.
        capacity: transitions a member.
        observation_dim: S.
        action_dim: D.
    """

    def __init__(self, members: int, capacity: int, observation_dim: int, action_dim: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be positive, found {capacity}")
        self.members, self.capacity = members, capacity
        # one row [s ‖ a ‖ s' ‖ r ‖ discount]: a batch is one gather instead of five
        self.widths = (observation_dim, action_dim, observation_dim, 1, 1)
        self.rows = torch.empty(members, capacity, sum(self.widths))
        self.size = self.position = 0
        self._sizes: list[int] | None = None

    def __len__(self) -> int:
        """Transitions a member that can be sampled."""
        return self.size

    def add(self, observation: Tensor, action: Tensor, next_observation: Tensor, reward: Tensor, discount: Tensor) -> None:
        """Append (M, n, S), (M, n, D), (M, n, S), (M, n), (M, n), overwriting the oldest rows when full."""
        rows = torch.cat((observation, action, next_observation, reward.unsqueeze(-1), discount.unsqueeze(-1)), -1)
        rows = rows[:, -self.capacity :]
        first = min(rows.shape[1], self.capacity - self.position)
        self.rows[:, self.position : self.position + first] = rows[:, :first]
        self.rows[:, : rows.shape[1] - first] = rows[:, first:]
        self.position = (self.position + rows.shape[1]) % self.capacity
        self.size = min(self.size + rows.shape[1], self.capacity)

    def batch(self, index: Tensor) -> Batch:
        """The rows `index` (M, B) as a batch."""
        offset = torch.arange(self.members).unsqueeze(1) * self.capacity
        rows = self.rows.view(-1, self.rows.shape[-1]).index_select(0, (index + offset).flatten())
        parts = rows.view(*index.shape, -1).split(self.widths, -1)
        return Batch(parts[0], parts[1], parts[2], parts[3].squeeze(-1), parts[4].squeeze(-1))

    def sample(self, generators: Generators, batch: int) -> Batch:
        """`batch` transitions a member, uniform with replacement, member m's drawn by `generators[m]`."""
        if not min(self.sizes):
            raise ValueError("the replay buffer is empty")
        return self.batch(randint(generators, self.sizes, batch))

    @property
    def sizes(self) -> list[int]:
        """Transitions of each member."""
        return self._sizes or [self.size] * self.members

    @classmethod
    def fixed(cls, members: Sequence[Batch]) -> "Replay":
        """A data set that does not grow: one batch of (1, K_m, ·) a member, their numbers K_m may differ."""
        sizes = [batch.reward.shape[1] for batch in members]
        first = members[0]
        replay = cls(len(members), max(sizes), first.observation.shape[-1], first.action.shape[-1])
        for m, batch in enumerate(members):
            rows = (batch.observation, batch.action, batch.next_observation, batch.reward[..., None], batch.discount[..., None])
            replay.rows[m, : sizes[m]] = torch.cat(rows, -1)[0]
        replay._sizes = sizes
        return replay

    def state_dict(self) -> dict[str, Any]:
        """The filled part (a view: cheap until it is written) and the position."""
        return {"rows": self.rows[:, : self.size], "position": self.position, "capacity": self.capacity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        rows = state["rows"]
        if state["capacity"] != self.capacity or rows.shape[::2] != self.rows.shape[::2]:
            raise InputError(
                "The replay buffer of the checkpoint has another size.", key="replay",
                found=f"shape {tuple(rows.shape)}, capacity {state['capacity']}",
                expected=f"shape ({self.members}, ·, {self.rows.shape[-1]}), capacity {self.capacity}",
            )  # fmt: skip
        self.size, self.position = rows.shape[1], int(state["position"])
        self.rows[:, : self.size] = rows
