"""An agent played as LeRobot plays: one action at a time, of a queue that is filled a chunk at a time; raw units in and out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from postbc.agents.base import Agent
from postbc.data.episodes import COORDINATES
from postbc.errors import require
from postbc.lerobot.features import Features
from postbc.policies.base import Observation
from postbc.seeding import make_generator


class Player:
    """What LeRobot's `reset`, `select_action` and `predict_action_chunk` come down to.

    Its random numbers are `postbc evaluate`'s: as many environments' first episodes are what that plays. A policy that reads the
    posterior's coordinates draws new ones at every reset.

    Args:
        agent: on its device.
        features: what it reads (:func:`postbc.lerobot.features.features_of_agent`).
        seed: of its random numbers.
        n_action_steps: how many actions of a chunk are played before the next is decided; default all.

    Raises:
        InputError: more actions than a chunk has.
    """

    def __init__(self, agent: Agent, features: Features, seed: int = 0, n_action_steps: int | None = None) -> None:
        self.agent, self.features = agent, features
        self.n_action_steps = agent.chunk if n_action_steps is None else n_action_steps
        require(1 <= self.n_action_steps <= agent.chunk, "A chunk does not have so many actions.", key="n_action_steps",
                found=n_action_steps, expected=f"1 to {agent.chunk}")  # fmt: skip
        self.generator = make_generator(seed, "evaluation/acting", agent.device)
        self.reset()

    def reset(self) -> None:
        """An episode begins: nothing is left of the one before but the state of the random numbers."""
        self._seen: deque[Observation] = deque(maxlen=self.agent.observation_steps)
        self._queue: deque[Tensor] = deque()
        self._coordinates: Tensor | None = None

    def select_action(self, batch: Mapping[str, Any]) -> Tensor:
        """LeRobot's batch of B states -> the next raw actions (B, A); every batch is looked at, each `n_action_steps`-th decides.

        Raises:
            InputError: a batch that does not hold what the agent reads, or of another size than the one before.
        """
        self._observe(batch)
        if not self._queue:
            self._queue.extend(self._decide()[:, : self.n_action_steps].unbind(1))
        return self._queue.popleft()

    def predict_action_chunk(self, batch: Mapping[str, Any]) -> Tensor:
        """LeRobot's batch of B states -> the raw chunk (B, T, A) that begins here; the queue is left alone."""
        self._observe(batch)
        return self._decide()

    def _observe(self, batch: Mapping[str, Any]) -> None:
        observation = dict(self.features.read(batch, self.agent.device))
        size = _size(observation)
        before = _size(self._seen[-1]) if self._seen else size
        require(size == before, "The number of states has changed within an episode.", key="batch", found=size, expected=before,
                remedy="call reset() between episodes")  # fmt: skip
        if COORDINATES in self.agent.shapes:
            if self._coordinates is None:
                shape = (size, *self.agent.shapes[COORDINATES])
                self._coordinates = torch.randn(shape, generator=self.generator, device=self.agent.device)
            observation[COORDINATES] = self._coordinates
        self._seen.append(observation)

    def _decide(self) -> Tensor:
        seen = [self._seen[0]] * (self.agent.observation_steps - len(self._seen)) + list(self._seen)
        stacked = {name: torch.stack([o[name] for o in seen], 1) for name in seen[0]} if len(seen) > 1 else seen[0]
        return self.agent.act(stacked, self.generator)


def _size(observation: Observation) -> int:
    return len(next(iter(observation.values())))
