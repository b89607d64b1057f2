"""robosuite's tasks that play chunks: episodes, seeds, endings, states; and as gymnasium users meet them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

pytest.importorskip("robosuite")

from postbc.environments.gymnasium_interface import GymnasiumVectorEnv
from postbc.environments.robosuite import TASKS, make
from postbc.environments.robosuite.building import build, environment_arguments, numpy_seeded
from postbc.environments.robosuite.episodes import cube_size
from postbc.environments.robosuite.vector import RobosuiteChunkEnv
from postbc.errors import InputError
from postbc.seeding import EVALUATION_SEED

pytestmark = pytest.mark.simulator

FALL = 12  # index of the cube's height in Lift's flattened state: time, 7 arm, 2 fingers, x, y, z


@pytest.fixture(scope="module")
def lift() -> Any:
    env = make("Lift", 3, chunk=4)
    yield env
    env.close()


def smooth(count: int, num_envs: int, chunk: int, seed: int = 0) -> np.ndarray:
    """(count, N, T, 7) actions that move the arms about."""
    return np.random.default_rng(seed).uniform(-0.6, 0.6, (count, num_envs, 1, 7)) * np.ones((chunk, 1))


def rollout(env: RobosuiteChunkEnv, actions: np.ndarray) -> np.ndarray:
    return np.stack([env.step(a).observation["state"] for a in actions])


def with_cube_at(env: RobosuiteChunkEnv, heights: list[float]) -> np.ndarray:
    """Simulator states in which each environment's cube hangs in the air at a height (m); above 0.84 is success."""
    states = env.sim_states()
    states[:, FALL] = heights
    states[:, FALL + 1 : FALL + 5] = (1, 0, 0, 0)
    return states


# --- gymnasium's interface


@pytest.mark.parametrize("task", list(TASKS))
def test_registered_with_gymnasium(task: str) -> None:
    env = gymnasium.make_vec(f"postbc/{task}-v0", num_envs=2, chunk=3, horizon=9)
    assert isinstance(env, GymnasiumVectorEnv)
    assert env.single_observation_space.shape == (TASKS[task].observation_dim,)
    assert env.single_action_space.shape == (3, 7)
    assert (env.chunk, env.horizon, env.metadata["render_fps"]) == (3, 9, 20)
    observations, info = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    assert info["episode_seed"].dtype == np.int64
    observations, rewards, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observations)
    assert rewards.shape == terminated.shape == truncated.shape == (2,)
    shapes = {"success": (2,), "chunk_success": (2,), "num_steps": (2,), "step_rewards": (2, 3), "diverged": (2,)}
    for key, shape in shapes.items():
        assert info[key].shape == shape
        assert info[f"_{key}"].all()
    env.close()


@pytest.mark.filterwarnings("ignore:.*Box observation space.*infinity")
def test_gymnasiums_environment_check() -> None:
    env = gymnasium.make("postbc/Lift-v0", chunk=2, horizon=6)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


def test_gymnasiums_own_vectorisation_agrees() -> None:
    theirs = gymnasium.make_vec("postbc/Lift-v0", num_envs=2, vectorization_mode="sync", chunk=2)
    ours = gymnasium.make_vec("postbc/Lift-v0", num_envs=2, chunk=2)
    theirs.reset(seed=[5, 6])  # type: ignore[arg-type]
    ours.reset(seed=[5, 6])  # type: ignore[arg-type]
    for action in smooth(3, 2, 2):
        a, b = ours.step(action), theirs.step(action.astype(np.float32))
        np.testing.assert_allclose(a[0], b[0], atol=1e-6)
        np.testing.assert_allclose(a[1], b[1])
        assert a[4].keys() == b[4].keys()
    theirs.close()
    ours.close()


@pytest.mark.parametrize(("reward", "sums"), [("negative", [0.0, -4.0]), ("environment", [4.0, 0.0])])
def test_rewards(reward: str, sums: list[float]) -> None:
    env: Any = gymnasium.make_vec("postbc/Lift-v0", num_envs=2, chunk=4, terminate_on="never", reward=reward)
    env.reset(seed=0)
    env.env.set_sim_states(with_cube_at(env.env, [1.3, 0.83]))
    _, rewards, *_, info = env.step(np.zeros((2, 4, 7)))
    np.testing.assert_array_equal(rewards, sums)
    np.testing.assert_array_equal(info["step_rewards"].sum(1), sums)


def test_seeds_of_successive_episodes_are_never_evaluations() -> None:
    env: Any = gymnasium.make_vec("postbc/Lift-v0", num_envs=3, horizon=1)
    assert env.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.SAME_STEP
    first = env.reset(seed=4)[1]["episode_seed"]
    following = [env.step(np.zeros((3, 1, 7)))[4]["episode_seed"] for _ in range(3)]
    np.testing.assert_array_equal(following[0], first)  # of the episode that was stepped
    assert len(np.unique(following)) == 9
    derived = [np.random.SeedSequence([4, i, k]).generate_state(1)[0] % EVALUATION_SEED for k in range(3) for i in range(3)]
    np.testing.assert_array_equal(np.ravel(following), derived)
    np.testing.assert_array_equal(env.reset(seed=4)[1]["episode_seed"], first)
    as_list = env.reset(seed=[4, 5, 4])[1]["episode_seed"]
    assert as_list[0] == as_list[2] != as_list[1]
    assert (env.reset()[1]["episode_seed"] != as_list).all()
    chosen = env.reset(options={"reset_mask": np.array([False, True, False]), "seeds": [1, 2, 3]})[1]
    assert chosen["episode_seed"][1] == 2
    assert chosen["_episode_seed"].tolist() == [False, True, False]
    for wrong in ({"seeds": [0, 1, 2**32]}, {"seeds": [1]}, {"reset_mask": np.ones(2, bool)}):
        with pytest.raises(InputError):
            env.reset(options=wrong)


def test_the_next_episode_begins_in_the_step_that_ends_one() -> None:
    env: Any = gymnasium.make_vec("postbc/Lift-v0", num_envs=2, chunk=4, horizon=6)
    env.reset(seed=0)
    _, _, _, truncated, info = env.step(np.zeros((2, 4, 7)))
    assert not truncated.any()
    assert "final_obs" not in info
    observations, rewards, terminated, truncated, info = env.step(np.zeros((2, 4, 7)))
    assert truncated.all()
    assert not terminated.any()
    np.testing.assert_array_equal(rewards, [-2, -2])
    assert info["_final_obs"].all()
    assert info["final_info"]["num_steps"].tolist() == [2, 2]
    assert info["final_info"]["_num_steps"].all()
    for i in range(2):
        assert info["final_obs"][i].shape == (19,)
        assert (info["final_obs"][i] != observations[i]).any()
    np.testing.assert_array_equal(observations, make("Lift", 2).reset(env._seeds.current)["state"])


# --- initial states


@pytest.mark.parametrize("task", list(TASKS))
def test_a_seed_gives_the_state_that_robosuites_own_reset_gives(task: str) -> None:
    import robosuite

    reference = robosuite.make(TASKS[task].robosuite_name, **environment_arguments({}))  # hard_reset=True, its default
    env = make(task, 1)
    for seed in (0, 7, 2**32 - 1):
        with numpy_seeded(seed):
            expected = reference.reset()
        observations = env.reset([seed])["state"]
        flat = reference.sim.get_state().flatten()
        np.testing.assert_array_equal(env.sim_states()[0], flat)
        keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state")
        np.testing.assert_allclose(observations[0], np.concatenate([expected[key] for key in keys]), atol=1e-6)
        ours, theirs = env.simulations[0].model, reference.sim.model._model
        for field in ("geom_size", "geom_rbound", "geom_aabb", "body_mass", "body_inertia", "body_subtreemass", "body_invweight0",
                      "dof_invweight0", "dof_M0", "geom_friction"):  # fmt: skip
            np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field), rtol=1e-12, atol=1e-18, err_msg=field)
        assert ours.stat.meaninertia == theirs.stat.meaninertia


def test_drawing_leaves_numpys_global_generator_alone(lift: RobosuiteChunkEnv) -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    lift.reset([1, 2, 3])
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002


def test_an_episode_depends_on_its_seed_alone() -> None:
    a, b = make("Lift", 3, chunk=2, num_threads=1), make("Lift", 2, chunk=2, num_threads=4)
    a.reset([0, 1, 2])
    rollout(a, smooth(5, 3, 2))  # a history that must not matter
    a.reset([3, 4, 5])
    b.reset([5, 3])
    actions = smooth(4, 1, 2, seed=9)
    ours, others = rollout(a, np.repeat(actions, 3, 1)), rollout(b, np.repeat(actions, 2, 1))
    np.testing.assert_array_equal(ours[:, 2], others[:, 0])
    np.testing.assert_array_equal(ours[:, 0], others[:, 1])


def test_a_mask_resets_only_those_named(lift: RobosuiteChunkEnv) -> None:
    lift.reset([7, 8, 9])
    before = rollout(lift, smooth(2, 3, 4))[-1]
    after = lift.reset(np.array([1, 2, 3]), np.array([False, True, False]))["state"]
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] != before[1]).any()
    assert lift.seeds.tolist() == [7, 2, 9]


# --- endings


def test_success_and_rewards_without_an_end() -> None:
    env = make("Lift", 3, chunk=4, terminate_on="never")
    env.reset([0, 1, 2])
    env.set_sim_states(with_cube_at(env, [1.3, 0.83, 0.83]))
    step = env.step(np.zeros((3, 4, 7)))
    np.testing.assert_array_equal(step.rewards, step.successes)
    assert step.success.tolist() == step.chunk_success.tolist() == [True, False, False]
    assert not step.ended.any()


def test_termination_on_the_first_success_stops_the_chunk() -> None:
    env = make("Lift", 2, chunk=4, terminate_on="success")
    env.reset([0, 1])
    env.set_sim_states(with_cube_at(env, [1.3, 0.83]))
    step = env.step(np.zeros((2, 4, 7)))
    assert step.terminated.tolist() == [True, False]
    assert not step.truncated.any()
    assert step.num_steps.tolist() == [1, 4]
    assert step.chunk_success.tolist() == [False, False]
    np.testing.assert_array_equal(step.rewards, [[1, 0, 0, 0], [0, 0, 0, 0]])


def test_termination_on_a_chunk_of_successes_waits_for_a_whole_one() -> None:
    env = make("Lift", 2, chunk=4, terminate_on="chunk_success")
    env.reset([0, 1])
    env.set_sim_states(with_cube_at(env, [1.3, 0.862]))  # the second falls below 0.84 within the chunk
    step = env.step(np.zeros((2, 4, 7)))
    assert step.success.tolist() == [True, True]
    assert step.chunk_success.tolist() == step.terminated.tolist() == [True, False]
    assert step.num_steps.tolist() == [4, 4]


def test_the_horizon_truncates_within_a_chunk_and_an_ended_environment_waits() -> None:
    env = make("Lift", 2, chunk=2, horizon=3)
    env.reset([0, 1])
    env.step(np.zeros((2, 2, 7)))
    env.reset([0, 8], np.array([False, True]))
    ended = env.step(np.zeros((2, 2, 7)))
    assert ended.truncated.tolist() == [True, False]
    assert ended.num_steps.tolist() == [1, 2]
    waiting = env.step(np.full((2, 2, 7), 0.5))
    assert waiting.truncated.tolist() == [False, True]  # the second only now
    assert waiting.num_steps.tolist() == [0, 1]
    np.testing.assert_array_equal(waiting.observation["state"][0], ended.observation["state"][0])


def test_environments_without_an_episode_wait() -> None:
    env = make("Lift", 2, chunk=2)
    env.reset([4, 0], np.array([True, False]))
    assert env.step(np.zeros((2, 2, 7))).num_steps.tolist() == [2, 0]


def test_actions_are_clipped() -> None:
    env = make("Lift", 2, chunk=2)
    env.reset([1, 1])
    actions = np.random.default_rng(0).uniform(-3, 3, (2, 7))
    observations = env.step(np.stack([actions, np.clip(actions, -1, 1)])).observation["state"]
    np.testing.assert_array_equal(observations[0], observations[1])


# --- robosuite's own step behind the same interface


@pytest.mark.parametrize("task", list(TASKS))
def test_native_and_robosuite_agree(task: str) -> None:
    native, reference = make(task, 1, chunk=2), make(task, 1, chunk=2, native=False)
    np.testing.assert_allclose(native.reset([3])["state"], reference.reset([3])["state"], atol=1e-6)
    for action in smooth(5, 1, 2):
        a, b = native.step(action), reference.step(action)
        np.testing.assert_allclose(a.observation["state"], b.observation["state"], atol=2e-5)
        for name in ("rewards", "successes", "num_steps", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    ours, theirs = native.set_sim_states(native.sim_states()), reference.set_sim_states(native.sim_states())
    np.testing.assert_allclose(ours["state"], theirs["state"], atol=1e-6)


# --- threads, states


def test_threads_do_not_matter() -> None:
    actions = smooth(7, 8, 2)
    runs = []
    for threads in (1, 8):
        env = make("Lift", 8, chunk=2, horizon=14, num_threads=threads)
        env.reset(np.arange(8))
        runs.append(rollout(env, actions))
        env.close()
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("steps", [0, 3])
def test_resuming_is_bit_for_bit(task: str, steps: int) -> None:
    env, other = (make(task, 2, chunk=2, horizon=10) for _ in range(2))
    env.reset([5, 6])
    for action in smooth(steps, 2, 2):
        env.step(action)
    state = _through_disk(env.get_state())
    actions = smooth(7, 2, 2, seed=1)
    expected = rollout(env, actions)  # over the end of the episode
    other.reset([8, 9])
    other.set_state(state)
    np.testing.assert_array_equal(rollout(other, actions), expected)
    np.testing.assert_array_equal(other.sim_states(), env.sim_states())
    assert other.seeds.tolist() == [5, 6]


@pytest.mark.parametrize("steps", [0, 2])
def test_resuming_robosuites_own_step(steps: int) -> None:
    env, other = (make("Lift", 1, native=False) for _ in range(2))
    env.reset([5])
    for action in smooth(steps, 1, 1):
        env.step(action)
    other.reset([6])
    other.set_state(env.get_state())
    actions = smooth(4, 1, 1, seed=1)
    np.testing.assert_allclose(rollout(other, actions), rollout(env, actions), atol=1e-9)  # the cubes were compiled apart


def _through_disk(state: Any) -> Any:
    """A nested dict's leaves as arrays, numbers and strings: nothing else may be in it."""
    if isinstance(state, Mapping):
        return {key: _through_disk(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        assert state.dtype != object
        return np.frombuffer(state.tobytes(), state.dtype).reshape(state.shape).copy()
    assert isinstance(state, (str, int, float, bool))
    return json.loads(json.dumps(state))


def test_a_state_of_another_environment_is_refused(lift: RobosuiteChunkEnv) -> None:
    lift.reset([0, 1, 2])
    with pytest.raises(InputError, match="another vector environment"):
        make("Lift", 2).set_state(lift.get_state())


def test_simulator_states_come_back() -> None:
    env = make("Lift", 3)
    env.reset([0, 1, 2])
    rollout(env, smooth(5, 3, 1))
    states = env.sim_states()
    env.reset([3, 4, 5])
    observations = env.set_sim_states(states[[2, 0]], [0, 1])
    assert observations["state"].shape == (2, 19)
    np.testing.assert_array_equal(env.sim_states()[:2], states[[2, 0]])
    with pytest.raises(InputError, match="shape"):
        env.set_sim_states(states[:, :-1])


def test_a_thread_has_one_model_and_a_size_changes_nothing_else_in_it() -> None:
    import mujoco

    from postbc.environments.robosuite import episodes

    def values(model: mujoco.MjModel) -> dict[str, np.ndarray]:
        named = {f"stat.{name}": np.array(getattr(model.stat, name)) for name in dir(model.stat) if name[0] != "_"}
        arrays = ((name, getattr(model, name)) for name in dir(model) if name[0] != "_")
        return named | {name: a.copy() for name, a in arrays if isinstance(a, np.ndarray)}

    env = make("Lift", 4, num_threads=2)
    env.reset([0, 1, 2, 3])
    a, b = values(env.simulations[0].model), values(env.simulations[1].model)
    assert env.simulations[0].model is env.simulations[3].model  # in one thread
    sized = {*episodes.SIZED, *(f"stat.{name}" for name in episodes.SIZED_STATISTICS)}
    numbers = {name for name in a if a[name].dtype.kind in "fiub"}
    assert {name for name in numbers if not np.array_equal(a[name], b[name], equal_nan=True)} == sized
    again = values(env.simulations[0].model)  # after another simulation's turn
    assert all(np.array_equal(a[name], again[name], equal_nan=True) for name in numbers)
    alone = make("Lift", 1)
    alone.reset([0])
    fresh = values(alone.simulations[0].model)  # written by one resize instead of several
    assert all(np.array_equal(a[name], fresh[name], equal_nan=True) for name in numbers)


def test_the_model_can_be_compiled_again(lift: RobosuiteChunkEnv) -> None:
    import mujoco

    lift.reset([0, 1, 2])
    sizes = [cube_size(s.env, s.model) for s in lift.simulations]
    assert len({tuple(size) for size in sizes}) == 3  # robosuite draws it with every hard reset
    mujoco.MjModel.from_xml_string("<mujoco/>")  # MuJoCo saves the XML that was compiled last, whoever asks
    for i in range(2):
        model = mujoco.MjModel.from_xml_string(lift.model_xml(i))
        for name in ("geom_size", "body_mass", "body_inertia", "dof_armature", "actuator_gainprm"):
            np.testing.assert_allclose(getattr(model, name), getattr(lift.simulations[i].model, name), rtol=1e-12, err_msg=name)


def test_env_args_are_plain_and_make_the_environment(lift: RobosuiteChunkEnv) -> None:
    import robosuite

    arguments = json.loads(json.dumps(lift.env_args()))
    assert arguments["env_name"] == "Lift"
    assert arguments["env_version"] == "1.4.0"
    assert arguments["type"] == 1
    env = robosuite.make(arguments["env_name"], **arguments["env_kwargs"])
    assert env.action_dim == 7


# --- what goes wrong


def test_a_diverging_simulation_ends_its_episode_only() -> None:
    env, calm = make("Lift", 3, chunk=2), make("Lift", 3, chunk=2)
    for e in (env, calm):
        e.reset([0, 123, 2])
        e.set_sim_states(e.sim_states())
    states = env.sim_states()
    states[1, 1 + env.simulations[1].model.nq] = 1e13
    env.set_sim_states(states[[1]], [1])
    env.seeds[1] = 123
    with pytest.warns(RuntimeWarning, match="environment 1 .* seed 123") as caught:
        step = env.step(np.zeros((3, 2, 7)))
    assert len(caught) == 1
    assert step.diverged.tolist() == step.truncated.tolist() == [False, True, False]
    assert not step.terminated.any()
    assert np.isfinite(step.observation["state"]).all()
    np.testing.assert_array_equal(
        step.observation["state"][[0, 2]], calm.step(np.zeros((3, 2, 7))).observation["state"][[0, 2]]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.step(np.zeros((3, 2, 7)))  # said once
        env.reset([0, 9, 0], np.array([False, True, False]))
        step = env.step(np.zeros((3, 2, 7)))
    assert not step.truncated.any()
    assert not step.diverged.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "Juggle"}, "no such robosuite task"),
        ({"num_envs": 0}, "num_envs"),
        ({"chunk": 0}, "chunk"),
        ({"horizon": 0}, "horizon"),
        ({"num_threads": 0}, "num_threads"),
        ({"terminate_on": "boredom"}, "termination"),
        ({"env_kwargs": {"control_freq": 10}}, "20 Hz"),
        ({"env_kwargs": {"controller_configs": ["one", "two"]}}, "One robot has one controller"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**({"task": "Lift"} | arguments))
    with pytest.raises(InputError, match="no such reward"):
        gymnasium.make_vec("postbc/Lift-v0", num_envs=1, reward="dense")


def test_a_controller_in_a_list_is_the_controller() -> None:
    arguments = environment_arguments({})["controller_configs"]
    a, b = (make("Lift", 1, env_kwargs={"controller_configs": value}) for value in (arguments, [arguments]))
    assert a.env_args() == b.env_args()


def test_calls_that_cannot_be_served(lift: RobosuiteChunkEnv) -> None:
    with pytest.raises(InputError, match="before reset"):
        make("Lift", 1).step(np.zeros((1, 1, 7)))
    lift.reset([0, 1, 2])
    with pytest.raises(InputError, match="shape"):
        lift.step(np.zeros((3, 7)))
    with pytest.raises(InputError, match=r"not finite[\s\S]*\[1\]"):
        lift.step(np.where(np.arange(3)[:, None, None] == 1, np.nan, np.zeros((3, 4, 7))))
    with pytest.raises(InputError, match="out of range"):
        lift.reset([0, 1, 2**32])
    with pytest.raises(InputError, match="mask"):
        lift.reset([0, 1, 2], np.ones(2, bool))


# --- frames


def test_frames(lift: RobosuiteChunkEnv) -> None:
    lift.reset([0, 1, 2])
    try:
        frame = lift.render_frame(0, 64, 96)
    except InputError as error:
        assert "MUJOCO_GL" in str(error)  # noqa: PT017
        pytest.skip("no OpenGL")
    assert frame.shape == (64, 96, 3)
    assert frame.dtype == np.uint8
    assert frame.std() > 10
    assert (lift.render_frame(1, 64, 96) != frame).any()
    with pytest.raises(InputError, match="agentview"):
        lift.render_frame(0, 64, 96, camera="periscope")


def test_rendering_changes_nothing(lift: RobosuiteChunkEnv) -> None:
    lift.reset([0, 1, 2])
    state, action = lift.get_state(), smooth(1, 3, 4)[0]
    expected = lift.step(action).observation["state"]
    lift.set_state(state)
    try:
        lift.render_frame(0)
    except InputError:
        pytest.skip("no OpenGL")
    np.testing.assert_array_equal(lift.step(action).observation["state"], expected)


def test_building_is_the_same_every_time() -> None:
    a, b = build(TASKS["Lift"], {}), build(TASKS["Lift"], {})
    np.testing.assert_array_equal(a.cube.size, b.cube.size)
