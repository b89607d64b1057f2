"""Share of initial states that a policy solves at least once in k tries.

`python tries.py OUTPUT.json SETTING/ARM POLICY [POLICY ...] [--tries 8]`.

Each policy plays its own environment. A try has other noise of the policy and, for a coherent one, other coordinates of each episode.
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
from postbc.stages.evaluate import environment_of


class Redrawn:
    """A coherent agent that reads other coordinates in each try: standard normal numbers, a function of the episode and the try.

    The episode is known by the coordinates that its seed gave it; the first try has those.

    Args:
        agent: reads coordinates (n, R), or (n, time, R), the same at all times.
        number: of the try, from 0.
    """

    def __init__(self, agent: Any, number: int) -> None:
        self._agent, self._number = agent, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def act(self, observation: Any, generator: torch.Generator) -> torch.Tensor:
        """As the agent's."""
        own = observation[COORDINATES]
        if self._number == 0:
            return self._agent.act(observation, generator)
        drawn = [self._drawn(row) for row in own.reshape(len(own), -1, own.shape[-1])[:, 0].float().cpu().numpy()]
        other = torch.from_numpy(np.stack(drawn)).to(own).reshape(len(own), *[1] * (own.ndim - 2), -1).expand_as(own)
        return self._agent.act({**observation, COORDINATES: other}, generator)

    def _drawn(self, own: np.ndarray) -> np.ndarray:
        episode = own.astype(np.float32).view(np.uint32).tolist()
        return np.random.default_rng((self._number, *episode)).standard_normal(len(own), np.float32)


def main() -> None:
    """Play every policy's tries and write successes (a try, a digit an episode), and the shares solved within 1 … k tries."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("of", help="what the policies are: mixed/alpha-1")
    parser.add_argument("policies", nargs="+", type=Path)
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=100)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    for path in chosen.policies:
        agent, about = load_agent(path)
        name = f"{chosen.of}/{about.seed}"
        if name in found:
            continue
        environment = environment_of(None, about, path)
        tries = []
        for k in range(chosen.tries):
            player = Redrawn(agent, k) if COORDINATES in agent.shapes else agent
            seed = (about.seed or 0) + 1_000_000 * k
            tries.append(evaluate(player, environment, episodes=chosen.episodes, agent_seed=seed).outcomes())
        solved = np.maximum.accumulate(np.stack(tries), 0).mean(1)
        found[name] = {
            "environment": environment.name,
            "successes": ["".join(map(str, outcomes.astype(int))) for outcomes in tries],
            "solved_within": solved.tolist(),
        }
        write_json(chosen.output, found)
        print(name, " ".join(f"{share:.2f}" for share in solved), flush=True)


if __name__ == "__main__":
    main()
