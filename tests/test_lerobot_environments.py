"""LeRobot's environments by name: as LeRobot makes and shows them (make test-lerobot), and what is said without it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest

from postbc.environments import find_environment
from postbc.errors import InputError

needs_lerobot = pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="needs LeRobot: make test-lerobot")
STATES = "lerobot:pusht/PushT-v0?obs_type=environment_state_agent_pos"


def test_without_lerobot_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lerobot", "lerobot.envs", "lerobot.envs.configs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"postbc\[lerobot\]"):
        find_environment("lerobot:pusht/PushT-v0")


@needs_lerobot
def test_what_lerobot_does_not_know() -> None:
    for name, said in (
        ("lerobot:nothing/x", r"no such type.*pusht"), ("lerobot:pusht/PushT-v0?obs=3", r"unrecognized.*--env\.obs=3"),
        ("lerobot:pusht?episode_length=many", r"env\.episode_length"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"(?s){said}"):
            find_environment(name)


def theirs(seed: int, **options: Any) -> Any:
    """gym-pusht itself."""
    pytest.importorskip("gym_pusht")
    env = gymnasium.make("gym_pusht/PushT-v0", max_episode_steps=6, **options)
    observation, _ = env.reset(seed=seed)
    return env, observation


@needs_lerobot
def test_a_packages_environment() -> None:
    """gym-pusht by LeRobot: its states in the order of LeRobot's datasets, rewards, limit and last observation; episodes by seed."""
    plain = [theirs(seed, obs_type="environment_state_agent_pos") for seed in (3, 4)]
    environment = find_environment(f"{STATES}&episode_length=6")
    assert (environment.horizon, environment.fps) == (6, 10)
    env = environment.make(2, chunk=4, horizon=6, terminate_on="success")
    assert (dict(env.shapes), env.action_dim) == ({"state": (18,)}, 2)

    def state(observation: Any) -> np.ndarray:
        return np.concatenate([observation["agent_pos"], observation["environment_state"]])

    np.testing.assert_allclose(env.reset([3, 4])["state"], np.stack([state(o) for _, o in plain]), rtol=1e-6)
    rng = np.random.default_rng(0)
    for steps in (4, 2):
        chunk = rng.uniform(100, 400, (2, 4, 2))
        step = env.step(chunk)
        for i, (one, _) in enumerate(plain):
            played = [one.step(action) for action in chunk[i, :steps]]
            np.testing.assert_allclose(step.rewards[i, :steps], [reward for _, reward, _, _, _ in played], rtol=1e-6)
            np.testing.assert_allclose(step.observation["state"][i], state(played[-1][0]), rtol=1e-6)
        assert step.num_steps.tolist() == [steps] * 2
        assert step.truncated.tolist() == [steps == 2] * 2
    again = env.reset([4, 3], np.array([True, False]))["state"]
    np.testing.assert_allclose(again[0], state(theirs(4, obs_type="environment_state_agent_pos")[1]), rtol=1e-6)
    env.close()


@needs_lerobot
def test_cameras() -> None:
    """A frame is the environment's, byte for byte, and called as a dataset of LeRobot's would be."""
    _, plain = theirs(5, obs_type="pixels_agent_pos")
    environment = find_environment("lerobot:pusht")
    env = environment.make(1, chunk=1, horizon=5, terminate_on="success")
    assert dict(env.shapes) == {"state": (2,), "image.top": (3, 96, 96)}
    np.testing.assert_array_equal(env.reset([5])["image.top"][0], np.moveaxis(plain["pixels"], -1, 0))
    assert environment.scene is not None
    film = environment.scene()
    film.reset([5])
    assert film.render_frame(0, 0, 0).ndim == 3  # type: ignore[attr-defined]
    for made in (env, film):
        made.close()


@needs_lerobot
def test_a_plugins_vector_environment_and_success() -> None:
    """Ours in LeRobot and back again: the same states, rewards and successes as without that way."""
    pytest.importorskip("gym_pusht")
    there_and_back, plain = find_environment("lerobot:postbc/PushT?episode_length=8"), find_environment("PushT")
    envs = [e.make(2, chunk=2, horizon=8, terminate_on="never") for e in (there_and_back, plain)]
    for a, b in zip(*(env.reset([1, 2]).items() for env in envs), strict=True):
        assert a[0] == b[0]
        np.testing.assert_array_equal(a[1], b[1])
    for _ in range(4):
        chunk = np.random.default_rng(1).uniform(100, 400, (2, 2, 2))
        ours, direct = (env.step(chunk) for env in envs)
        np.testing.assert_allclose(ours.observation["state"], direct.observation["state"], rtol=1e-5)  # actions of 32 bits
        np.testing.assert_allclose(ours.rewards, direct.rewards, atol=1e-5)
        np.testing.assert_array_equal(ours.successes, direct.successes)
    assert ours.truncated.all()
    for env in envs:
        env.close()


class Walk(gymnasium.Env):  # type: ignore[type-arg]
    """Goes where it is told from a place that the seed says, for three steps; solved beyond 10."""

    observation_space = gymnasium.spaces.Dict({"place": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)})
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.uniform(0, 1, 2), 0
        return {"place": self.place}, {}

    def step(self, action: Any) -> Any:
        self.place, self.steps = self.place + action, self.steps + 1
        return {"place": self.place}, 0.0, False, self.steps == 3, {"is_success": bool(self.place[0] > 10)}


@needs_lerobot
def test_processors_and_frozen_environments() -> None:
    """What a plugin's processors do to observations and actions is done; what LeRobot freezes at an episode's end begins its next."""
    from lerobot.envs.configs import EnvConfig
    from lerobot.envs.utils import freeze_after_episode_end

    if "postbc_walk" not in EnvConfig.get_known_choices():

        @EnvConfig.register_subclass("postbc_walk")
        @dataclasses.dataclass
        class Config(EnvConfig):
            episode_length: int | None = None
            speed: float = 1.0

            @property
            def gym_kwargs(self) -> dict[str, Any]:
                return {}

            def create_envs(self, n_envs: int, use_async_envs: bool = False) -> Any:
                made = gymnasium.vector.SyncVectorEnv([freeze_after_episode_end(Walk)] * n_envs)
                return {"walk": dict.fromkeys(range(2 if self.task == "both" else 1), made)}

            def get_env_processors(self) -> Any:
                return (
                    lambda batch: {"observation.state": batch["observation.place"].float() + 100},
                    lambda played: {"action": played["action"] * self.speed},
                )

    with pytest.raises(InputError, match="no limit of steps"):
        find_environment("lerobot:postbc_walk")
    with pytest.raises(InputError, match="more than one task"):
        find_environment("lerobot:postbc_walk/both?episode_length=3").make(1, chunk=1, horizon=3, terminate_on="success")
    env = find_environment("lerobot:postbc_walk?episode_length=3&speed=2").make(2, chunk=2, horizon=3, terminate_on="success")
    first = env.reset([1, 2])["state"]
    expected = np.stack([np.random.default_rng(np.random.SeedSequence(s)).uniform(0, 1, 2) for s in (1, 2)])
    np.testing.assert_allclose(first, expected + 100, rtol=1e-6)
    for _ in range(2):
        env.step(np.full((2, 2, 2), 0.5))
        step = env.step(np.full((2, 2, 2), 0.25))
        assert step.truncated.all()
        np.testing.assert_allclose(step.observation["state"], first + 2 * (0.5 + 0.5 + 0.25), rtol=1e-6)
        np.testing.assert_allclose(env.reset([1, 2])["state"], first)
    assert not np.allclose(env.reset([3, 4])["state"], first)
    env.close()
