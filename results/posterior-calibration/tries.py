"""Share of initial states that a policy solves at least once in k tries: `python tries.py OUTPUT.json POLICY [POLICY ...] [--tries 8]`.

A try has other noise of the policy and, for a coherent one, other coordinates: the episode's own, rotated, which are as normal as they.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from postbc.agents.base import load_agent
from postbc.data.episodes import COORDINATES
from postbc.evaluation import evaluate
from postbc.files import write_json


class Rotated:
    """A coherent agent that reads its coordinates rotated, in each try by another orthogonal matrix (none in the first)."""

    def __init__(self, agent: Any, number: int) -> None:
        self._agent, size = agent, agent.shapes[COORDINATES][0]
        drawn = np.random.default_rng(number).normal(size=(size, size))
        self._rotation = torch.as_tensor(np.linalg.qr(drawn)[0] if number else np.eye(size), dtype=torch.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def act(self, observation: Any, generator: torch.Generator) -> torch.Tensor:
        """As the agent's."""
        return self._agent.act({**observation, COORDINATES: observation[COORDINATES] @ self._rotation}, generator)


def main() -> None:
    """Play every policy's tries and write successes (tries, episodes), and the shares solved within 1 … k tries."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("policies", nargs="+", type=Path)
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--environment", default="postbc/Lift")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    for path in map(str, chosen.policies):
        if path in found:
            continue
        agent, about = load_agent(path)
        tries = []
        for k in range(chosen.tries):
            player = Rotated(agent, k) if COORDINATES in agent.shapes else agent
            seed = (about.seed or 0) + 1_000_000 * k
            tries.append(evaluate(player, chosen.environment, episodes=chosen.episodes, agent_seed=seed).outcomes())
        solved = np.maximum.accumulate(np.stack(tries), 0).mean(1)
        found[path] = {"successes": np.stack(tries).astype(int).tolist(), "solved_within": solved.tolist()}
        write_json(chosen.output, found)
        print(path, " ".join(f"{share:.2f}" for share in solved), flush=True)


if __name__ == "__main__":
    main()
