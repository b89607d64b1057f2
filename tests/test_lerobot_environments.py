"""LeRobot's environments by name: as LeRobot makes and shows them (make test-lerobot), and what is said without it."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

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
    gymnasium = pytest.importorskip("gymnasium")
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
    size = {"observation_width": 48, "observation_height": 32}
    _, plain = theirs(5, obs_type="pixels_agent_pos", **size)
    environment = find_environment("lerobot:pusht?" + "&".join(f"{k}={v}" for k, v in size.items()))
    env = environment.make(1, chunk=1, horizon=5, terminate_on="success")
    assert dict(env.shapes) == {"state": (2,), "image.top": (3, 32, 48)}
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
        np.testing.assert_array_equal(ours.observation["state"], direct.observation["state"])
        np.testing.assert_array_equal(ours.rewards, direct.rewards)
        np.testing.assert_array_equal(ours.successes, direct.successes)
    assert ours.truncated.all()
    for env in envs:
        env.close()


@needs_lerobot
def test_metaworld_as_lerobot_has_it() -> None:
    """An environment that LeRobot freezes at an episode's end, until a new rollout begins, begins its next when it is told to."""
    pytest.importorskip("metaworld")
    environment = find_environment("lerobot:metaworld/push-v3?episode_length=3")
    env = environment.make(1, chunk=3, horizon=3, terminate_on="success")
    assert dict(env.shapes) == {"state": (4,), "image.top": (3, 480, 480)}
    first = env.reset([1])["state"]
    for _ in range(2):
        step = env.step(np.ones((1, 3, 4)))
        assert step.truncated.all()
        assert not np.allclose(step.observation["state"], first)
        np.testing.assert_allclose(env.reset([1])["state"], first, atol=1e-6)
    env.close()
