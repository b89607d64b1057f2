"""DSRL on Lift to 0.9, the whole run: ours against stable-baselines3's SAC over the same policy and robosuite behind AsyncVectorEnv.

    python -m benchmarks.bench_lift_to_90 POLICY [STEPS_TO_90]

POLICY is a policy of `postbc pretrain` for Lift, STEPS_TO_90 where its DSRL run reaches 0.9 (default 50,000). Both sides run on one and
the same core: `STEPS` environment steps (counted in whole chunks), of which `INITIAL` are rollouts of the policy, then an evaluation of
`EPISODES` episodes. Episodes end alike on both sides: while training at the first success, while evaluating after a chunk of successful
steps, else at the horizon; the next begins by a reset. Both do the same updates (one equals the other's, tests/test_dsrl.py), so both
need as many steps. The time to STEPS_TO_90 is what was measured, continued at the rate of learning, with an evaluation of 50 episodes
every 10,000 steps: an extrapolation from `STEPS`. Evaluations get shorter as a policy gets better; here all are as long as the one that
was measured.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray
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
            while online.vector_steps * ENVS * CHUNK < steps:
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


class Episodes(RobosuiteChunkEnv):
    """robosuite in chunks, with our episodes: a reward of −1 a step until success; the horizon ends them, or what `ends` says.

    Args:
        task: Lift, Can, Square.
        ends: the first successful step, or a chunk of nothing else.
    """

    def __init__(self, task: str, ends: Literal["success", "chunk_success"]) -> None:
        super().__init__(task)
        self.ends, self.steps = ends, 0

    def reset(self, **options: Any) -> tuple[NDArray[np.float32], dict[str, Any]]:
        self.steps = 0
        return super().reset(**options)

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        successes: list[bool] = []
        for single in action:
            observation = self.env.step(single)[0]
            successes.append(bool(self.env._check_success()))
            self.steps += 1
            if self.steps == HORIZON or (self.ends == "success" and successes[-1]):
                break
        over = any(successes) if self.ends == "success" else len(successes) == len(action) and all(successes)
        truncated = not over and self.steps == HORIZON
        return self._vector(observation), sum(successes) - float(len(successes)), over, truncated, {}


def reference(policy: Any) -> tuple[float, float, float]:
    """The same of stable-baselines3 and robosuite."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecEnv

    dim = CHUNK * 7

    class NoiseEnv(VecEnv):
        """An action is the latent noise over the magnitude; an observation the policy's features."""

        def __init__(self, ends: Literal["success", "chunk_success"]) -> None:
            makers = [lambda: Episodes("Lift", ends)] * ENVS
            self.inner = AsyncVectorEnv(makers, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)
            box = gymnasium.spaces.Box(-np.inf, np.inf, (policy.feature_dim,), np.float32)
            super().__init__(ENVS, box, gymnasium.spaces.Box(-1, 1, (dim,), np.float32))
            self.features = torch.zeros(ENVS, policy.feature_dim)
            self.chunks = np.zeros((ENVS, CHUNK, 7), np.float32)

        @torch.no_grad()
        def encode(self, observation: np.ndarray) -> torch.Tensor:
            features: torch.Tensor = policy.encode({"state": torch.as_tensor(observation, dtype=torch.float32)})
            return features

        def reset(self) -> np.ndarray:
            self.features = self.encode(self.inner.reset(seed=0)[0])
            return self.features.numpy()

        @torch.no_grad()
        def step_async(self, actions: np.ndarray) -> None:
            noise = torch.as_tensor(actions * CONFIG.action_magnitude).view(-1, CHUNK, 7)
            self.chunks = policy.normalization.unnormalize_action(policy.sample(self.features, noise=noise)).numpy()

        def step_wait(self) -> Any:
            observation, reward, terminated, truncated, last = self.inner.step(self.chunks.clip(-1, 1).astype(np.float32))
            self.features, done = self.encode(observation), terminated | truncated
            infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(t)} for t in truncated]
            for i in np.flatnonzero(done):
                infos[i]["terminal_observation"] = self.encode(last["final_obs"][i][None])[0].numpy()
            return self.features.numpy(), reward.astype(np.float32), done, infos

        def close(self) -> None:
            self.inner.close()

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

    env, clock = NoiseEnv("success"), Clock()
    model = SAC(
        "MlpPolicy", env, learning_rate=CONFIG.lr, gamma=CONFIG.discount, batch_size=256, train_freq=1, gradient_steps=CONFIG.utd,
        learning_starts=INITIAL // CHUNK, ent_coef="auto_0.2", target_entropy=0.0, device="cpu", buffer_size=100_000,
        policy_kwargs={"net_arch": [CONFIG.hidden] * CONFIG.layers, "activation_fn": activation},
    )  # fmt: skip
    env.reset()
    begin = time.perf_counter()
    model.learn(STEPS // CHUNK, callback=clock)
    end = time.perf_counter()

    env.close()
    evaluated = NoiseEnv("chunk_success")
    evaluated.reset()
    play = lambda: [evaluate_policy(model, evaluated, EPISODES, deterministic=False, warn=False), None][1]  # noqa: E731
    found = timed(play)
    evaluated.close()
    return clock.learning - begin, end - clock.learning, found


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Inside, this process and those that it starts have one core; afterwards what it had before."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def lift_to_90(path: Path, steps_to_90: int = 50_000) -> dict[str, object]:
    """Seconds of the whole run, extrapolated."""
    torch.set_num_threads(1)
    policy = load_policy(path)

    def whole(times: tuple[float, float, float]) -> float:
        initial, learning, evaluation = times
        rate = learning / (STEPS - INITIAL)
        return initial / INITIAL * 16_000 + rate * (steps_to_90 - 16_000) + evaluation / EPISODES * 50 * (steps_to_90 // 10_000)

    with one_core():
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
