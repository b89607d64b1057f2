"""Push-T is gym-pusht's: physics to the bit, coverage to rounding, seeds, pictures; states come back; the human data belong to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postbc.data import pusht
from postbc.environments import find_environment
from postbc.environments.pusht import PushTChunkEnv, coverage, import_gym_pusht
from postbc.errors import InputError

pytest.importorskip("gym_pusht")
HUMAN = Path(__file__).parents[2] / "shared" / "data" / "pusht_cchi_v7_replay.zarr.zip"  # not ours to ship; see its README


def wander(count: int, n: int, chunk: int, seed: int = 0) -> np.ndarray:
    """(count, N, T, 2) targets that push the block about."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(120, 400, (count, n, 1, 2)) + rng.uniform(-20, 20, (count, n, chunk, 2))).astype(np.float32)


def test_a_step_is_gym_pushts() -> None:
    env, reference = PushTChunkEnv(2, chunk=4, horizon=200, terminate_on="never"), import_gym_pusht()(obs_type="state")
    chunks = wander(12, 2, 4)
    for i, seed in enumerate((3, 10**9)):
        env.reset([3, 10**9])
        first, _ = reference.reset(seed=seed)
        np.testing.assert_array_equal(env.states()[i], first)
        for chunk in chunks:
            step = env.step(chunk)
            for k, action in enumerate(chunk[i]):
                state, reward, _, _, info = reference.step(action)
                assert step.rewards[i, k] == pytest.approx(reward, abs=1e-9)
                assert step.successes[i, k] == info["is_success"]
            np.testing.assert_array_equal(env.states()[i], state)
        keys = reference.get_keypoints(reference._block_shapes).ravel()
        np.testing.assert_allclose(step.observation["state"][i, 2:], keys, atol=1e-3)


def test_coverage_is_shapelys() -> None:
    reference = import_gym_pusht()()
    reference.reset(seed=0)
    rng = np.random.default_rng(0)
    poses = rng.normal([256, 256, np.pi / 4], [30, 30, 0.4], (200, 3))
    poses[:50] = rng.uniform([0, 0, -9], [512, 512, 9], (50, 3))
    poses[50:60] = rng.normal([256, 256, np.pi / 4], [1e-3, 1e-3, 1e-4], (10, 3))
    found = []
    for x, y, angle in poses:
        reference.block.angle = angle
        reference.block.position = (x, y)
        found.append(reference._get_coverage())
        assert coverage(*reference.block.position, reference.block.angle) == pytest.approx(found[-1], abs=1e-9)
    assert coverage(256, 256, np.pi / 4) == pytest.approx(1)
    assert max(found) > 0.95 > 0.5 > np.median(found) > 0 == min(found)


def solved(env: PushTChunkEnv, i: int) -> None:
    """Put the block of environment i onto its outline."""
    env._envs[i]._set_state(np.array([100.0, 100.0, 256.0, 256.0, np.pi / 4]))
    env._envs[i].block.position = (256.0, 256.0)


def test_success_and_endings() -> None:
    env = PushTChunkEnv(2, chunk=3, horizon=7)
    env.reset([1, 2])
    solved(env, 0)
    stay = np.full((2, 3, 2), 100.0)
    step = env.step(stay)
    assert step.terminated.tolist() == [True, False]
    assert step.num_steps.tolist() == [1, 3]
    assert step.rewards[0].tolist() == [1, 0, 0]
    for expected in (3, 1):
        step = env.step(stay)
        assert step.num_steps.tolist() == [0, expected]
    assert step.truncated.tolist() == [False, True]
    whole = PushTChunkEnv(1, chunk=3, terminate_on="chunk_success")
    whole.reset([1])
    solved(whole, 0)
    step = whole.step(stay[:1])
    assert step.num_steps.tolist() == [3]
    assert step.chunk_success.tolist() == step.terminated.tolist() == [True]


@pytest.mark.parametrize("observation", ["keypoints", "state", "pixels"])
def test_states_come_back_bit_for_bit(observation: Any) -> None:
    options: dict[str, Any] = {"chunk": 4, "horizon": 30, "terminate_on": "never", "observation": observation}
    env, other = PushTChunkEnv(2, **options), PushTChunkEnv(2, **options)
    env.reset([5, 6])
    for chunk in wander(5, 2, 4):
        env.step(chunk)
    other.set_state(env.get_state())
    for chunk in wander(5, 2, 4, seed=1):  # over the end
        a, b = env.step(chunk), other.step(chunk)
        np.testing.assert_array_equal(env.states(), other.states())
        for name in env.shapes:
            assert a.observation[name].shape[1:] == env.shapes[name]
            np.testing.assert_array_equal(a.observation[name], b.observation[name])
        assert a.truncated.tolist() == b.truncated.tolist()
    with pytest.raises(InputError, match="another number"):
        PushTChunkEnv(1).set_state(env.get_state())


def test_pictures_are_gym_pushts_and_show_where_things_are() -> None:
    env, reference = PushTChunkEnv(1, chunk=2, observation="pixels"), import_gym_pusht()(obs_type="pixels")
    observation = env.reset([4])
    first, _ = reference.reset(seed=4)
    np.testing.assert_array_equal(observation["image.top"][0], first.transpose(2, 0, 1))
    assert env.render_frame(0, 64, 80).shape == (64, 80, 3)
    before = env.states()
    env.render_frame()
    np.testing.assert_array_equal(env.states(), before)


def test_pictures_are_drawn_while_they_are_wanted() -> None:
    """Meanwhile they are the former ones; the game goes on, and the next picture is what it would have been."""
    envs = [PushTChunkEnv(1, chunk=2, observation="pixels", terminate_on="never") for _ in range(2)]
    first, _ = (env.reset([4])["image.top"] for env in envs)
    envs[1].set_drawing(False)
    drawn, held = (env.step(np.full((1, 2, 2), 400.0)).observation for env in envs)
    np.testing.assert_array_equal(held["image.top"], first)
    assert (drawn["image.top"] != first).any()
    np.testing.assert_array_equal(drawn["state"], held["state"])
    envs[1].set_drawing(True)
    again = [env.step(np.full((1, 2, 2), 100.0)).observation["image.top"] for env in envs]
    np.testing.assert_array_equal(*again)


def test_by_name() -> None:
    for name, keys, shapes in (
        ("PushT", pusht.STATE_KEYS, {"state": (18,)}),
        ("postbc/PushT-human", ("agent_pos", "keypoints"), {"state": (18,)}),
        ("postbc/PushT-state", ("state",), {"state": (5,)}),
        ("postbc/PushT-pixels", ("agent_pos",), {"image.top": (3, 96, 96), "state": (2,)}),
    ):
        environment = find_environment(name)
        environment.check()
        assert environment.state_keys == keys
        assert (environment.horizon, environment.fps, environment.facts()["env_name"]) == (300, 10, "PushT")
        assert environment.make(1, chunk=2, horizon=9, terminate_on="never").shapes == shapes
    with pytest.raises(InputError, match="no such observation"):
        PushTChunkEnv(observation="smell")  # type: ignore[arg-type]


@pytest.mark.skipif(not HUMAN.exists(), reason="the human demonstrations are not shipped")
def test_human_demonstrations_look_and_move_like_this() -> None:
    from postbc.data.zarr import read_zarr

    data = read_zarr(HUMAN, names=("demo_0",), observation_keys=("state",), episodes=206)
    episode = data.episodes[0]
    states, actions = np.asarray(episode.observations["state"], float), np.asarray(episode.actions, float)
    env = PushTChunkEnv(1, chunk=1, terminate_on="never", observation="state")
    env.reset([0])
    errors = []
    for before, action, after in zip(states[:60], actions[:60], states[1:61]):
        body = env._envs[0]
        body._setup()
        body.block.angle = before[4]
        body.agent.position, body.block.position = before[:2].tolist(), before[2:4].tolist()
        env.step(action[None, None])
        errors.append(np.abs(env.states()[0][2:4] - after[2:4]).max())
    assert np.median(errors) < 0.5  # pixels; velocities are not recorded


def test_how_much_must_be_covered_decides_success_alone() -> None:
    steps = []
    for covered in (0.95, -1.0):
        env = PushTChunkEnv(1, chunk=3, terminate_on="never", covered=covered)
        env.reset([3])
        steps.append(env.step(np.full((1, 3, 2), 256.0)))
    assert steps[1].successes.all()
    assert not steps[0].successes.any()
    np.testing.assert_array_equal(steps[0].rewards, steps[1].rewards)
    np.testing.assert_array_equal(steps[0].observation["state"], steps[1].observation["state"])
