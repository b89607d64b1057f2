"""DSRL on Lift to 0.9, the whole run: ours against stable-baselines3's SAC over the same policy and robosuite behind AsyncVectorEnv.

    python -m benchmarks.bench_lift_to_90 POLICY [STEPS_TO_90]

POLICY is a policy of `postbc pretrain` for Lift, STEPS_TO_90 where its DSRL run reaches 0.9 (default 50,000). Both sides run on one and
the same core: `STEPS` environment steps, of which `INITIAL` are rollouts of the policy, then an evaluation of `EPISODES` episodes. Both
do the same updates (one equals the other's, tests/test_dsrl.py), so both need as many steps; the time to STEPS_TO_90 is what was
measured, continued at the rate of learning, with an evaluation of 50 episodes every 10,000 steps.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch import nn

from benchmarks.bench_control import CHUNK, RobosuiteChunkEnv
from postbc.agents.dsrl import DSRL, DSRLConfig
from postbc.environments.registry import find_environment
from postbc.evaluation import evaluate
from postbc.policies import load_policy
from postbc.seeding import make_generator
from postbc.training.online import Online, OnlineConfig
from postbc.training.results import make_env

ENVS, INITIAL, STEPS, EPISODES, HORIZON = 8, 3200, 9600, 8, 300
CONFIG = DSRLConfig("sac", hidden=128, layers=2, utd=8, lr=6e-4, discount=0.95, init_temperature=0.2)


def ours(policy: Any) -> tuple[float, float, float]:
    """Seconds of the initial rollouts, of learning, of an evaluation."""
    environment = find_environment("postbc/Lift")
    training = OnlineConfig(budget_env_steps=10**6, num_envs=ENVS, initial_steps=INITIAL)
    env = make_env(environment, policy, ENVS, HORIZON, "success")
    evaluate(policy_agent(policy), environment, episodes=1, num_envs=1, progress=False)  # compiles the simulator
    online = Online(DSRL(CONFIG, policy, make_generator(0, "online/initialisation")), env, training, 0)

    def until(steps: int) -> Callable[[], None]:
        def run() -> None:
            while online.env_steps < steps:
                online.step()

        return run

    times = timed(until(INITIAL)), timed(until(STEPS))
    found = timed(lambda: [evaluate(online.agent(), environment, episodes=EPISODES, num_envs=ENVS, progress=False), None][1])
    env.close()
    return (*times, found)


def policy_agent(policy: Any) -> Any:
    from postbc.agents.base import PolicyAgent

    return PolicyAgent(policy)


def timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def reference(policy: Any) -> tuple[float, float, float]:
    """The same of stable-baselines3 and robosuite."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv

    inner = AsyncVectorEnv([lambda: RobosuiteChunkEnv("Lift")] * ENVS, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)
    dim = CHUNK * 7

    class NoiseEnv(VecEnv):
        """An action is the latent noise over the magnitude."""

        def __init__(self) -> None:
            box = gymnasium.spaces.Box(-np.inf, np.inf, (policy.feature_dim,), np.float32)
            super().__init__(ENVS, box, gymnasium.spaces.Box(-1, 1, (dim,), np.float32))
            self.features = torch.zeros(ENVS, policy.feature_dim)
            self.chunks = np.zeros((ENVS, CHUNK, 7), np.float32)

        @torch.no_grad()
        def encode(self, observation: np.ndarray) -> np.ndarray:
            self.features = policy.encode({"state": torch.as_tensor(observation, dtype=torch.float32)})
            return self.features.numpy()

        def reset(self) -> np.ndarray:
            return self.encode(inner.reset(seed=0)[0])

        @torch.no_grad()
        def step_async(self, actions: np.ndarray) -> None:
            noise = torch.as_tensor(actions * CONFIG.action_magnitude).view(-1, CHUNK, 7)
            self.chunks = policy.normalization.unnormalize_action(policy.sample(self.features, noise=noise)).numpy()

        def step_wait(self) -> Any:
            observation, reward, terminated, truncated, _ = inner.step(self.chunks.clip(-1, 1).astype(np.float32))
            done = terminated | truncated
            features = self.encode(observation)
            infos = [{"terminal_observation": features[i], "TimeLimit.truncated": bool(truncated[i])} for i in range(ENVS)]
            return features, reward.astype(np.float32), done, infos

        def close(self) -> None:
            inner.close()

        def get_attr(self, name: str, indices: Any = None) -> Any:
            return [None] * ENVS

        def set_attr(self, name: str, value: Any, indices: Any = None) -> None:
            pass

        def env_method(self, name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
            return []

        def env_is_wrapped(self, wrapper: Any, indices: Any = None) -> list[bool]:
            return [False] * ENVS

    def activation() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(CONFIG.hidden), nn.Tanh())

    class Clock(BaseCallback):
        began = learning = 0.0

        def _on_step(self) -> bool:
            if self.num_timesteps * CHUNK >= INITIAL and not self.learning:
                self.learning = time.perf_counter()
            return True

    env, clock = NoiseEnv(), Clock()
    model = SAC(
        "MlpPolicy", env, learning_rate=CONFIG.lr, gamma=CONFIG.discount, batch_size=256, train_freq=1, gradient_steps=CONFIG.utd,
        learning_starts=INITIAL // CHUNK, ent_coef="auto_0.2", target_entropy=0.0, device="cpu", buffer_size=100_000,
        policy_kwargs={"net_arch": [CONFIG.hidden] * CONFIG.layers, "activation_fn": activation},
    )  # fmt: skip
    env.reset()
    begin = time.perf_counter()
    model.learn(STEPS // CHUNK, callback=clock)
    end = time.perf_counter()

    def play() -> None:
        observation = env.reset()
        for _ in range(HORIZON // CHUNK * EPISODES // ENVS):
            observation = env.step(model.predict(observation)[0])[0]

    found = timed(play)
    env.close()
    return clock.learning - begin, end - clock.learning, found


def lift_to_90(path: Path, steps_to_90: int = 50_000) -> dict[str, object]:
    """Seconds of the whole run, extrapolated."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    policy = load_policy(path)

    def whole(times: tuple[float, float, float]) -> float:
        initial, learning, evaluation = times
        rate = learning / (STEPS - INITIAL)
        return initial / INITIAL * 16_000 + rate * (steps_to_90 - 16_000) + evaluation / EPISODES * 50 * (steps_to_90 // 10_000)

    parts = {"ours": ours(policy), "theirs": reference(policy)}
    a, b = whole(parts["ours"]), whole(parts["theirs"])
    return {
        "ours": a, "theirs": b, "unit": "s a run", "ratio": b / a, "parts": {k: [round(x, 2) for x in v] for k, v in parts.items()},
        "what": f"DSRL-SAC on Lift to {steps_to_90:,} steps (16,000 of rollouts, 50 episodes every 10,000), one core, against "
        "stable-baselines3's SAC over the same policy and robosuite behind AsyncVectorEnv; extrapolated from "
        f"{STEPS:,} steps and {EPISODES} episodes",
    }  # fmt: skip


def run() -> dict[str, dict[str, object]]:
    """For `make bench`: a policy that knows nothing costs as much as one that does."""
    try:
        import stable_baselines3  # noqa: F401
    except ImportError:
        print("lift_to_90 is left out: stable-baselines3 is not installed (pip install 'postbc[dev]')")
        return {}
    from postbc.data.normalization import Normalization
    from postbc.policies.base import save_policy
    from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy

    with tempfile.TemporaryDirectory() as folder:
        made = DiffusionPolicy(
            DiffusionConfig(hidden=256),
            {"state": (19,)},
            7,
            CHUNK,
            Normalization.identity(19, 7),
            make_generator(0, "policy/initialisation"),
        )
        save_policy(Path(folder) / "policy.safetensors", made)
        return {"lift_to_90": lift_to_90(Path(folder))}


if __name__ == "__main__":
    arguments = sys.argv[1:]
    figure = lift_to_90(Path(arguments[0]), *map(int, arguments[1:])) if arguments else run()["lift_to_90"]
    print(figure)
