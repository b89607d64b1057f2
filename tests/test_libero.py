"""LIBERO's tasks against LIBERO itself: episodes, goals, images; and as environments that play chunks."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postbc import cli
from postbc.agents.base import load_agent
from postbc.data import libero_tasks as tasks
from postbc.data.belonging import Facts
from postbc.data.normalization import Normalization
from postbc.environments import find_environment, libero_environment
from postbc.environments.libero import KITCHEN, find_tasks, make
from postbc.errors import InputError
from postbc.evaluation import evaluate
from postbc.files import load_tree, save_tree
from postbc.policies.base import About, policy_class, save_policy
from postbc.schemas import plain
from postbc.seeding import make_generator
from postbc.stages.evaluate import Evaluate, evaluate_stage

here = tasks.installed() is not None
needs_libero = pytest.mark.skipif(not here, reason="needs LIBERO: pip install 'postbc[libero]'")
DRAWER, BOWL, STOVE = KITCHEN[0], KITCHEN[8], KITCHEN[14]  # one a scene


def smooth(count: int, num_envs: int, chunk: int, seed: int = 0) -> np.ndarray:
    """(count, N, T, 7) actions that move the arms about."""
    return np.random.default_rng(seed).uniform(-0.6, 0.6, (count, num_envs, 1, 7)) * np.ones((chunk, 1))


def rollout(env: Any, actions: np.ndarray) -> np.ndarray:
    return np.stack([env.step(a).observation["state"] for a in actions])


# --- names


def test_the_sixteen_are_known_without_libero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "installed", lambda: None)
    assert [task.name for task in find_tasks("kitchen")] == list(KITCHEN)
    assert find_tasks(DRAWER) == find_tasks(f"libero_90/{DRAWER}") == find_tasks("kitchen")[:1]
    assert find_environment(f"libero/{DRAWER}-pixels").name == f"libero/{DRAWER}-pixels"
    for name in ("kitchn", "libero_goal", "KITCHEN_SCENE3_turn_on_the_stov"):
        with pytest.raises(InputError, match=r"known without LIBERO(.|\n)*pip install 'postbc\[libero\]'"):
            find_environment(f"libero/{name}")
    for check in (find_environment("libero/kitchen").check, lambda: make(DRAWER)):
        with pytest.raises(InputError, match=r"LIBERO is not installed(.|\n)*pip install 'postbc\[libero\]'"):
            check()  # type: ignore[operator]


def test_an_unknown_task_lists_close_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (None, tasks.VERSION) if here else (None,):
        monkeypatch.setattr(tasks, "installed", lambda found=found: found)
        with pytest.raises(InputError, match="KITCHEN_SCENE3_turn_on_the_stove"):
            find_environment("libero/KITCHEN_SCENE3_turn_on_the_oven")
    with pytest.raises(InputError, match="libero/kitchen"):
        find_environment("libero")


def test_another_packaging_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "installed", lambda: "0.0.9")
    with pytest.raises(InputError, match="Another version of LIBERO"):
        find_environment("libero/kitchen").check()


@needs_libero
def test_other_suites() -> None:
    goal = find_tasks("libero_goal")
    assert len(goal) == 10
    assert find_tasks(goal[3].name) == find_tasks(f"libero_goal/{goal[3].name}") == (goal[3],)
    assert len(find_tasks("libero_90")) == 90
    (ninth,) = find_tasks("KITCHEN_SCENE9_turn_on_the_stove")
    assert (ninth.suite, ninth.of, ninth.sentence) == ("libero_90", 90, "turn on the stove")
    with pytest.raises(InputError, match="close"):
        find_tasks(f"libero_goal/{DRAWER}")
    kitchen = find_tasks("kitchen")
    assert all(task.bddl.is_file() and len(task.init_states()) == 50 for task in kitchen)
    assert kitchen[11].sentence == "stack the middle black bowl on the back black bowl"  # the file's own sentence is another


def test_some_of_the_sixteen() -> None:
    some = find_tasks("kitchen/14+3")
    assert some == find_tasks(f"kitchen/{STOVE}+{KITCHEN[3]}") == (find_tasks("kitchen")[3], find_tasks("kitchen")[14])
    environment = find_environment("libero/kitchen/3+14-pixels64")
    assert environment.name == "libero/kitchen/3+14-pixels64"
    for name, words in (
        ("16", "no such task"),
        ("3+3", "twice"),
        ("", "no such task"),
        ("KITCHEN_SCENE3_turn_on", "turn_on_the_stove"),
    ):
        with pytest.raises(InputError, match=words):
            find_environment(f"libero/kitchen/{name}")


# --- against LIBERO


def official(task: str, seed: int, **options: Any) -> Any:
    """LIBERO's own environment at the beginning of an episode of its evaluation."""
    from postbc.environments.libero.loading import import_libero
    from postbc.environments.robosuite.building import numpy_seeded

    (found,) = find_tasks(task)
    control_env = import_libero().OffScreenRenderEnv.__mro__[1]
    options = {"has_offscreen_renderer": False, "use_camera_obs": False} | options
    env = control_env(bddl_file_name=str(found.bddl), ignore_done=True, **options)
    with numpy_seeded(seed):
        env.reset()
    states = found.init_states()
    env.set_init_state(states[seed % len(states)])
    for _ in range(5):
        env.step([0.0] * 7)
    return env


def observed(env: Any, objects: Any) -> np.ndarray:
    """What LIBERO's sensors say of the simulation as it stands."""
    found = env.env._get_observations(force_update=True)
    parts = ("_pos", "_quat", "_to_robot0_eef_pos", "_to_robot0_eef_quat")
    keys = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", *(name + part for name in objects for part in parts)]
    return np.concatenate([np.ravel(found[key]) for key in keys])


@pytest.mark.simulator
@needs_libero
@pytest.mark.parametrize("task", [DRAWER, BOWL, STOVE])
def test_an_official_episode_is_liberos(task: str) -> None:
    """Initial state, fixtures as drawn, no-ops, 100 actions open loop."""
    seed = 10**9 + 7
    env, theirs = make(task, terminate_on="never"), official(task, seed)
    env.reset([seed])
    ours: Any = env.simulations[0]
    data, model = theirs.sim.data._data, theirs.sim.model._model
    for body, mocap in ours.scene.fixtures.values():
        np.testing.assert_array_equal(ours.data.mocap_pos[mocap], model.body_pos[body])
        np.testing.assert_array_equal(ours.data.mocap_quat[mocap], model.body_quat[body])
    np.testing.assert_allclose(ours.data.qpos, data.qpos, rtol=0, atol=1e-12)
    random = np.random.default_rng(0)
    for n in range(100):
        action = np.r_[random.uniform(-0.5, 0.5, 3), random.uniform(-0.3, 0.3, 3), random.choice([-1, 1])]
        done, step = theirs.step(action)[2], env.step(action[None, None])
        assert bool(done) == bool(step.success[0])
        if n % 20 == 19:
            np.testing.assert_allclose(ours.data.qpos, data.qpos, rtol=0, atol=1e-6)
            expected = observed(theirs, ours.scene.objects)
            np.testing.assert_allclose(step.observation["state"][0, : len(expected)], expected, rtol=0, atol=1e-6)
    theirs.close()


def scattered(scene: Any, goal: Any, states: np.ndarray, count: int, seed: int) -> Any:
    """Yields simulations in which what the goal speaks of is about where it has to be."""
    import mujoco

    from postbc.environments.libero.goals import IN_SITE, JOINT, ON_OBJECT
    from postbc.environments.robosuite.native_control import Physics

    random, model, data = np.random.default_rng(seed), scene.model, scene.env.sim.data._data
    physics, goals = Physics.of(model, data), goal.conditions
    for _ in range(count):
        mujoco.mj_resetData(model, data)
        scene.place_fixtures(data, int(random.integers(2**32)))
        data.qpos[:] = states[random.integers(len(states)), 1 : 1 + model.nq]
        mujoco.mj_forward(model, data)
        for kind, index, body, bounds, size in zip(*goals):
            if kind == JOINT:
                end = bounds[np.isfinite(bounds)][0]
                data.qpos[index] = random.choice(
                    [end, np.nextafter(end, 9), np.nextafter(end, -9), end + random.normal(0, 0.05)]
                )
                continue
            if kind == ON_OBJECT:
                target = data.xpos[index] + random.uniform(-1, 1, 3) * (0.04, 0.04, 0.0) + (0, 0, random.uniform(-0.01, 0.05))
            else:
                reach = 1.3 * np.abs(data.site_xmat[index].reshape(3, 3) @ size)
                target = data.site_xpos[index] + random.uniform(-1, 1, 3) * reach
                target[2] += 0.0 if kind == IN_SITE else random.uniform(0, 0.12)
            address = model.jnt_qposadr[model.body_jntadr[body]]
            data.qpos[address : address + 3] = target
        data.qvel[:] = 0
        for _ in range(3):
            for _ in range(random.integers(1, 40)):
                mujoco.mj_step(model, data)
            yield physics, data


@pytest.mark.simulator
@needs_libero
def test_goals_are_liberos_on_thousands_of_states() -> None:
    env = make("kitchen")
    held, total = np.zeros(16, int), 0
    for k, playable in enumerate(env.playing[0]._tasks):
        theirs = playable.scene.env
        from postbc.environments.libero.loading import parse_problem

        theirs.parsed_problem["goal_state"] = parse_problem(env.tasks[k].bddl)["goal_state"]
        for physics, data in scattered(playable.scene, playable.goal, playable.states, 60, k):
            expected = bool(theirs._check_success())
            assert playable.goal(physics, data) == expected, KITCHEN[k]
            held[k] += expected
            total += 1
    assert total == 16 * 180
    assert (held > 0).all(), held
    assert (held < 180).all()
    env.close()


@pytest.mark.simulator
@needs_libero
@pytest.mark.parametrize("task", [BOWL, STOVE])
def test_images_are_robosuites_and_culling_changes_no_pixel(task: str) -> None:
    env = opened(lambda: make(task, 2, chunk=3, images=True, terminate_on="never"))
    assert env.shapes == {
        "image.agentview": (3, 128, 128), "image.wrist": (3, 128, 128), "state": (9,), "language": (16,),
    }  # fmt: skip
    theirs: Any = official(task, 3, has_offscreen_renderer=True)
    theirs.sim.render(camera_name="agentview", height=128, width=128)  # its EGL is ended after ours
    first = env.reset([3, 4])
    for chunk in (None, *smooth(2, 2, 3)):
        observation = first if chunk is None else env.step(chunk).observation
        for action in [] if chunk is None else chunk[0]:
            theirs.step(action)
        for name, camera in (("image.agentview", "agentview"), ("image.wrist", "robot0_eye_in_hand")):
            expected = theirs.sim.render(camera_name=camera, height=128, width=128)[::-1].astype(int)
            difference = np.abs(observation[name][0].transpose(1, 2, 0) - expected)
            assert difference.max() <= 1  # the two simulations differ by 1e-8
            assert (difference > 0).any(-1).sum() < 20
        for i, simulation in enumerate(env.playing):
            renderer = simulation.scene.renderer
            assert renderer.culls
            simulation.scene.show_burners(simulation.data)
            for name, camera in env._cameras.items():
                renderer.culls = False
                whole = renderer.frame(simulation.data, 128, 128, camera, lagging=True)
                renderer.culls = True
                np.testing.assert_array_equal(observation[name][i].transpose(1, 2, 0), whole)
            assert not (~renderer._visible(simulation.data, 0, 1.0)).all()
    context = theirs.sim._render_context_offscreen
    context.gl_ctx.make_current()  # robosuite frees what it drew with in whatever OpenGL context is current: in ours, some time
    context.con.free()
    theirs.close()
    env.close()


def opened(build: Any) -> Any:
    """What needs OpenGL, or a skip where there is none."""
    try:
        return build()
    except InputError as error:
        if "cannot render" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.simulator
@needs_libero
def test_a_burner_is_shown_while_its_stove_is_on() -> None:
    env = opened(lambda: make(STOVE, images=True, terminate_on="never"))
    env.reset([0])
    simulation = env.playing[0]
    (burner,) = simulation.scene.burners
    colours = []
    for angle in (0.0, 1.0):
        state = np.r_[0.0, simulation.data.qpos, simulation.data.qvel]
        state[1 + burner.joint] = angle
        simulation.set_sim_state(state)
        assert env.step(np.zeros((1, 1, 7))).success.tolist() == [angle > 0.5]
        colours.append(env.render_frame(0, 64, 64)[..., 0].astype(int).sum())
    assert colours[1] > colours[0]
    env.close()


@pytest.mark.simulator
@needs_libero
def test_cameras_are_drawn_while_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile their frames are the former ones; a reset in which they are wanted draws again."""
    env = opened(lambda: make(STOVE, 2, images=True, image_size=16, terminate_on="never"))
    drawn: list[int] = []
    original = env.draw
    monkeypatch.setattr(env, "draw", lambda i, *args, **options: drawn.append(i) or original(i, *args, **options))
    first = env.reset([0, 1])
    assert drawn == [0, 0, 1, 1]
    env.set_drawing(False)
    step = env.step(np.full((2, 1, 7), 0.5))
    assert len(drawn) == 4
    np.testing.assert_array_equal(step.observation["image.wrist"], first["image.wrist"])
    assert (step.observation["state"] != first["state"]).any()
    env.set_drawing(True)
    env.step(np.full((2, 1, 7), 0.5))
    assert drawn[4:] == [0, 0, 1, 1]
    env.close()


# --- environments that play chunks


@pytest.fixture(scope="module")
def kitchen() -> Any:
    env = make("kitchen", 3, chunk=2, horizon=5, terminate_on="never")
    yield env
    env.close()


@pytest.mark.simulator
@needs_libero
def test_states_by_scene_and_of_several_tasks(kitchen: Any) -> None:
    widths = [make(task).shapes["state"] for task in (DRAWER, BOWL, STOVE)]
    assert widths == [(43,), (71,), (41,)]
    assert kitchen.shapes == {"state": (88,), "language": (16,)}
    seeds = [0, 5, 14 + 16 * 49]  # task s mod 16, initial state s div 16
    observation = kitchen.reset(seeds)
    assert kitchen.task_names == [KITCHEN[0], KITCHEN[5], KITCHEN[14]]
    np.testing.assert_array_equal(observation["language"], np.eye(16)[[0, 5, 14]])
    np.testing.assert_array_equal(observation["state"][:, -16:], np.eye(16)[[0, 5, 14]])
    simulation = kitchen.playing[2]
    np.testing.assert_allclose(simulation.data.qpos[:7], simulation.playable.states[49, 1:8], atol=0.02)
    alone = make(STOVE)
    alone.reset([49])
    simulation.scene.place_fixtures(alone.simulations[0].data, 14 + 16 * 49)
    np.testing.assert_array_equal(alone.simulations[0].data.mocap_pos, simulation.data.mocap_pos)
    state = observation["state"][2]
    ((body, _),) = simulation.scene.fixtures.values()
    np.testing.assert_array_equal(state[69:72], simulation.data.xpos[body].astype(np.float32))
    np.testing.assert_array_equal(state[37:65], 0)  # this scene has two objects
    assert state[68] == np.float32(simulation.data.qpos[simulation.scene.joints["flat_stove_1_button"]])


@pytest.mark.simulator
@needs_libero
def test_an_episode_depends_on_its_seed_alone(kitchen: Any) -> None:
    kitchen.reset([3, 8, 12])
    rollout(kitchen, smooth(2, 3, 2))  # a history that must not matter
    other = make("kitchen", 1, chunk=2, num_threads=1, terminate_on="never", horizon=5)
    actions = smooth(2, 1, 2, seed=9)
    for seed in (17, 30):
        kitchen.reset([seed + 2, seed, seed + 1])
        other.reset([seed])
        ours, alone = rollout(kitchen, np.repeat(actions, 3, 1)), rollout(other, actions)
        np.testing.assert_array_equal(ours[:, 1], alone[:, 0])
    other.close()


@pytest.mark.simulator
@needs_libero
def test_a_mask_the_horizon_and_an_ended_environment(kitchen: Any) -> None:
    kitchen.reset([1, 2, 3])
    before = kitchen.step(smooth(1, 3, 2)[0]).observation["state"]
    after = kitchen.reset([9, 9, 9], np.array([False, True, False]))["state"]
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] != before[1]).any()
    kitchen.step(smooth(1, 3, 2)[0])
    ended = kitchen.step(smooth(1, 3, 2)[0])
    assert ended.truncated.tolist() == [True, False, True]
    assert ended.num_steps.tolist() == [1, 2, 1]
    waiting = kitchen.step(smooth(1, 3, 2)[0])
    assert waiting.num_steps.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(waiting.observation["state"][[0, 2]], ended.observation["state"][[0, 2]])


@pytest.mark.simulator
@needs_libero
def test_success_ends_an_episode() -> None:
    env = make(STOVE, 2, chunk=3)
    env.reset([0, 1])
    simulation: Any = env.simulations[0]
    state = np.r_[0.0, simulation.data.qpos, simulation.data.qvel]
    state[1 + simulation.scene.joints["flat_stove_1_button"]] = 1.0
    simulation.set_sim_state(state)
    step = env.step(np.zeros((2, 3, 7)))
    assert step.terminated.tolist() == [True, False]
    assert step.num_steps.tolist() == [1, 3]
    np.testing.assert_array_equal(step.rewards, [[1, 0, 0], [0, 0, 0]])


@pytest.mark.simulator
@needs_libero
@pytest.mark.parametrize("images", [False, True])
def test_resuming_is_bit_for_bit(images: bool, kitchen: Any, tmp_path: Path) -> None:
    env, other = (
        opened(lambda: make("kitchen", 3, chunk=2, horizon=7, terminate_on="never", images=images, image_size=32))
        for _ in range(2)
    )
    env.reset([5, 6, 13])
    env.step(smooth(1, 3, 2)[0])
    save_tree(tmp_path / "state", {"env": env.get_state()})  # as checkpoints do
    state: Any = load_tree(tmp_path / "state")["env"]  # type: ignore[index]
    actions = smooth(4, 3, 2, seed=1)
    expected = [env.step(action).observation for action in actions]  # over the end of the episodes
    other.reset([14, 0, 7])  # in other scenes
    other.set_state(state)
    for action, observation in zip(actions, expected):
        found = other.step(action).observation
        for name, value in observation.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert other.seeds.tolist() == [5, 6, 13]
    with pytest.raises(InputError, match="other cameras" if images else "another vector environment"):
        kitchen.set_state(state) if images else make(DRAWER, 3).set_state(state)


@pytest.mark.simulator
@needs_libero
def test_a_diverged_simulation_ends_its_own_episode_only(kitchen: Any) -> None:
    kitchen.reset([0, 1, 2])
    kitchen.playing[1].data.qvel[:] = 1e12
    with pytest.warns(RuntimeWarning, match="diverged in environment 1"):
        step = kitchen.step(np.zeros((3, 2, 7)))
    assert step.diverged.tolist() == step.truncated.tolist() == [False, True, False]
    assert np.isfinite(step.observation["state"]).all()
    assert np.isfinite(kitchen.reset([0, 1, 2])["state"]).all()


@pytest.mark.simulator
@needs_libero
def test_arguments_that_cannot_be_used() -> None:
    for options, words in (
        ({"num_envs": 0}, "num_envs"),
        ({"num_envs": 1, "image_size": 0}, "An image has a size"),
        ({"num_envs": 1, "terminate_on": "sometimes"}, "termination"),
        ({"num_envs": 1, "num_threads": 0}, "num_threads"),
    ):
        with pytest.raises(InputError, match=words):
            make(DRAWER, **options)


@pytest.mark.simulator
@needs_libero
def test_the_facts_that_a_policy_must_share() -> None:
    for name in ("libero/kitchen", "libero/kitchen-pixels"):
        environment = find_environment(name)
        facts = Facts.of_env_args(environment.facts())
        assert (facts.environment, facts.version, facts.control_freq) == ("libero/kitchen", "1.4.0", 20)
        assert facts.controller is not None
        assert facts.controller["type"] == "OSC_POSE"
    assert make(DRAWER).env_args() == find_environment(f"libero/{DRAWER}").facts()
    assert libero_environment(DRAWER, images=True).state_keys == ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


@pytest.mark.simulator
@needs_libero
def test_a_policy_is_evaluated_and_filmed(tmp_path: Path) -> None:
    opened(lambda: make(STOVE, images=True)).close()
    facts = Facts.of_env_args(find_environment(f"libero/{STOVE}").facts())
    policy_of({"state": (41,)}, facts, tmp_path / "policy")
    chosen = Evaluate(tmp_path / "policy", tmp_path / "out", episodes=2, horizon=6, num_envs=2, videos=1)
    evaluation = evaluate_stage(chosen, 0)
    assert [episode.steps for episode in evaluation.episodes] == [6, 6]
    assert len(list((tmp_path / "out/seed_0/videos").iterdir())) == 1
    with pytest.raises(InputError, match="environment"):
        evaluate_stage(dataclasses.replace(chosen, environment="libero/kitchen", output=tmp_path / "no"), 0)


@pytest.mark.simulator
@needs_libero
def test_a_policy_that_sees_and_is_told_its_task_plays_all_tasks(tmp_path: Path) -> None:
    environment = opened(lambda: libero_environment("kitchen", images=True, image_size=32))
    opened(environment.check)
    shapes = {"image.wrist": (3, 32, 32), "state": (9,), "language": (16,)}
    policy_of(shapes, Facts.of_env_args(environment.facts()), tmp_path / "policy")
    agent, _ = load_agent(tmp_path / "policy")
    evaluation = evaluate(agent, environment, episodes=2, num_envs=2, horizon=4, progress=False)
    assert [episode.steps for episode in evaluation.episodes] == [4, 4]


def policy_of(shapes: dict[str, tuple[int, ...]], facts: Facts, directory: Path) -> None:
    """A small policy with random weights, saved in `directory`."""
    about = About(method="bc", seed=0, task=facts.environment, demonstrations=1, facts=plain(facts))
    cls = policy_class("diffusion")
    policy = cls(
        cls.Config(hidden=8, denoising_steps=4, inference_steps=2), shapes, 7, 2, Normalization.identity(shapes["state"][0], 7),
        make_generator(0, "policy/initialisation"), about=about,
    )  # fmt: skip
    directory.mkdir()
    save_policy(directory / "policy.safetensors", policy)


@pytest.mark.simulator
@needs_libero
def test_without_opengl_states_work_and_images_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import ctypes.util; ctypes.util.find_library = lambda name: None")
    program = (
        "from postbc.environments.libero import make\n"
        "from postbc.errors import InputError\n"
        f"env = make({STOVE!r}); print(env.reset([0])['state'].shape)\n"
        f"try: make({STOVE!r}, images=True)\n"
        "except InputError as error: print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *[p for p in sys.path if p]])
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert "(1, 41)" in done.stdout, done.stderr[-2000:]
    assert "cannot render without a display" in done.stdout
    assert "libegl1" in done.stdout


# --- scripted operators


@pytest.mark.simulator
@pytest.mark.slow
@needs_libero
def test_operators_demonstrate_every_task_and_number_of_environments_does_not_matter(tmp_path: Path) -> None:
    from postbc.data import read_robomimic, write_robomimic
    from postbc.environments.libero.collect import collect

    collection = collect("kitchen", 16, ["operator_g"], seed=1, num_envs=8)
    assert {name: kept for name, (kept, _) in collection.attempts.items()} == dict.fromkeys(KITCHEN, 1)
    assert sum(tried for _, tried in collection.attempts.values()) <= 20
    dataset = collection.dataset
    assert dataset.state_dims == (3, 4, 2, 79)
    assert dataset.environment["env_name"] == "libero/kitchen"
    for k, name in enumerate(KITCHEN):
        (episode,) = dataset.select(name)
        assert (episode.state[:, -16:] == np.eye(16)[k]).all()
        assert episode.task == name
        assert episode.episode_seed is not None
        assert episode.episode_seed % 16 == k
        assert episode.episode_seed < 10**9
        assert episode.rewards is not None
        assert episode.rewards[-1] == 1
    again = collect("kitchen", 16, ["operator_g"], seed=1, num_envs=5).dataset
    one, two = (write_robomimic(tmp_path / f"{i}.hdf5", found) for i, found in enumerate([dataset, again]))
    assert one.read_bytes() == two.read_bytes()
    assert [e.name for e in read_robomimic(one)] == [e.name for e in dataset]


@pytest.mark.simulator
@pytest.mark.slow
@needs_libero
@pytest.mark.parametrize(
    ("task", "operator", "seed"),
    [
        # half of a slow hand's speed hardly moves a drawer: its episodes ran out of time
        ("KITCHEN_SCENE1_open_the_top_drawer_of_the_cabinet_and_put_the_bowl_in_it", "operator_b", 777),
        # it touches the other for a moment while it is lowered: these episodes were stopped there, and counted as failed
        ("KITCHEN_SCENE2_stack_the_black_bowl_at_the_front_on_the_black_bowl_in_the_middle", "operator_b", 802),
    ],
)
def test_operators_do_what_they_once_failed_at(task: str, operator: str, seed: int) -> None:
    from postbc.environments.libero.collect import collect

    assert collect(task, 1, [operator], seed=seed, num_envs=1).attempts[operator] == (1, 1)


@pytest.mark.simulator
@needs_libero
def test_what_cannot_be_demonstrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from postbc.environments.libero.collect import collect

    with pytest.raises(InputError, match="No operator knows"):
        collect("KITCHEN_SCENE9_turn_on_the_stove", 1)
    with pytest.raises(InputError, match="hardly ever succeeds"):
        collect(STOVE, 1, ["operator_g"], horizon=3)
    arguments = ["demos", "collect", "--output", str(tmp_path / "stove.hdf5"), "--num", "1", "--task"]
    assert cli.main([*arguments, f"libero/{STOVE}", "--no-native"]) == 2
    assert "compiled loop" in capsys.readouterr().err
    assert cli.main([*arguments, f"libero/{STOVE}", "--operators", "operator_g"]) == 0
    assert "operator_g" in capsys.readouterr().out


@pytest.mark.simulator
@needs_libero
def test_demonstrations_with_cameras(tmp_path: Path) -> None:
    from postbc.data import read_robomimic

    opened(lambda: make(STOVE, images=True)).close()
    path = tmp_path / "stove.hdf5"
    arguments = ["demos", "collect", "--num", "1", "--operators", "operator_g"]
    assert cli.main([*arguments, "--output", str(path), "--task", f"libero/{STOVE}", "--images"]) == 0
    sized = [*arguments, "--output", str(tmp_path / "sized.hdf5"), "--image-size", "32"]
    assert cli.main([*sized, "--task", f"libero/{STOVE}", "--images"]) == 2  # recorded in LIBERO's own size
    assert cli.main(sized) == 2  # Lift, but no images to have a size
    assert not (tmp_path / "sized.hdf5").exists()
    assert cli.main([*sized, "--images"]) == 0
    cameras = ["agentview_image", "robot0_eye_in_hand_image"]
    lift = read_robomimic(tmp_path / "sized.hdf5", image_keys=cameras)
    assert lift.shapes["image.agentview"] == lift.shapes["image.robot0_eye_in_hand"] == (3, 32, 32)
    keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
    dataset = read_robomimic(path, observation_keys=keys, image_keys=["agentview_image", "wrist_image"])
    assert dataset.shapes == {"image.agentview": (3, 128, 128), "image.wrist": (3, 128, 128), "state": (9,)}
    assert dataset.state_keys == find_environment(f"libero/{STOVE}-pixels").state_keys
    env = make(STOVE, images=True)
    seed = dataset[0].episode_seed
    assert seed is not None
    np.testing.assert_array_equal(env.reset([seed])["image.wrist"][0], dataset[0].observations["image.wrist"][0])
    env.close()
