"""Chunk transitions of recorded episodes: what an offline learner is trained on. Rows are indices: features are computed once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from postbc.data.episodes import Episode
from postbc.data.success import SuccessRule
from postbc.errors import require
from postbc.schemas import Count, schema


@schema
class TransitionConfig:
    """How episodes become chunk transitions."""

    reward: Literal["sparse", "negative"] = "sparse"
    """A step earns 1 at success and else 0 (paper: Robomimic, robot), or 0 and else −1 (paper: LIBERO)."""
    success: SuccessRule = "auto"
    """What recorded rewards say: zero-one, minus-one-zero, a number that a success reaches; auto: one of the first two, if it fits."""
    termination: Literal["success", "dones"] = "success"
    """What ends an episode for good: the first success; or also a step marked done (a failure that a person ended, say)."""
    stride: Count | None = None
    """Steps between the starts of two transitions; default the chunk: those that were executed. 1 uses every window."""
    tail: Literal["align", "pad"] = "align"
    """A last chunk that does not fit into a terminated episode: begin it earlier, or repeat the last action."""
    chunk_reward: Literal["sum", "discounted"] = "sum"
    """Reward of a chunk: Σ r_i or Σ γ^i r_i, up to the terminal step."""
    chunk_discount: Literal["once", "per_step"] = "once"
    """Discount of a chunk: γ or γ^(steps executed)."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """K chunk transitions of one episode."""

    row: np.ndarray
    """(K,) int64 step of the observation, the first action's."""
    action: np.ndarray
    """(K, T, A) float32 raw chunk."""
    next_row: np.ndarray
    """(K,) int64 step of the observation after it."""
    reward: np.ndarray
    """(K,) float32."""
    discount: np.ndarray
    """(K,) float32, 0 where the episode terminated."""

    def __len__(self) -> int:
        return len(self.row)


def transitions(episode: Episode, successes: np.ndarray, chunk: int, discount: float, config: TransitionConfig) -> Transitions:
    """Chunk transitions of one episode.

    Nothing after the terminal step is used. An episode that ended otherwise ran out of time: its value goes on, but robomimic's layout
    has no observation after the last action, so that the chunks that would need it are left out.

    Args:
        episode: N steps, raw units.
        successes: (N,) bool from :func:`postbc.data.success.step_successes`.
        chunk: T.
        discount: γ.

    Raises:
        InputError: the ends are asked for (`termination="dones"`) and unknown.
    """
    length, stride = len(episode), config.stride or chunk
    require(config.termination == "success" or episode.dones is not None, "The data does not say where episodes ended.",
            key=f"{episode.name}/dones", remedy="choose the termination 'success'")  # fmt: skip
    terminal = successes | episode.dones if config.termination == "dones" and episode.dones is not None else successes
    end = int(np.argmax(terminal)) if terminal.any() else None  # the terminal step
    rewards = successes.astype(np.float64) - (1.0 if config.reward == "negative" else 0.0)
    starts: list[int] = []
    for i in range(0, length if end is None else end + 1, stride):
        if end is not None and i + chunk > end:
            starts.append(max(length - chunk, 0) if config.tail == "align" and i + chunk > length else i)
            if stride >= chunk or i + chunk > length:
                break
        elif i + chunk < length:
            starts.append(i)
    row = np.array(list(dict.fromkeys(starts)), dtype=np.int64)
    reward, factor = np.zeros(len(row), np.float32), np.zeros(len(row), np.float32)
    for k, i in enumerate(row.tolist()):
        over = end is not None and i + chunk > end
        taken = (end - i + 1) if over and end is not None else chunk
        weights = discount ** np.arange(taken) if config.chunk_reward == "discounted" else np.ones(taken)
        reward[k] = float(rewards[i : i + taken] @ weights)
        factor[k] = 0.0 if over else discount ** (taken if config.chunk_discount == "per_step" else 1)
    action = episode.actions[np.minimum(row[:, None] + np.arange(chunk), length - 1)]
    return Transitions(row, action, np.minimum(row + chunk, length - 1), reward, factor)


def n_step(found: Transitions, steps: int) -> Transitions:
    """The transitions of an episode with returns over up to `steps` chunks, as :class:`postbc.agents.replay.NStepReplay` makes them.

    One grows by the transition that begins where it ends, as long as there is one; that needs a stride that divides the chunk.
    """
    index = {row: k for k, row in enumerate(found.row.tolist())}
    reward, discount, next_row = found.reward.copy(), found.discount.copy(), found.next_row.copy()
    for _ in range(steps - 1):
        following = np.array([index.get(row, -1) for row in next_row.tolist()], np.int64)
        on = (following >= 0) & (discount > 0)
        reward[on] += discount[on] * found.reward[following[on]]
        discount[on] *= found.discount[following[on]]
        next_row[on] = found.next_row[following[on]]
    return replace(found, reward=reward, discount=discount, next_row=next_row)
