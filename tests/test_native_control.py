"""The compiled control loop against robosuite's own step."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("robosuite")

from postbc.environments.robosuite import TASKS, Task, libmujoco, make
from postbc.environments.robosuite.building import build, environment_arguments, numpy_seeded
from postbc.environments.robosuite.native_control import NativeControl, unsupported
from postbc.environments.robosuite.operational_space import rotation_of, solve
from postbc.errors import InputError

pytestmark = pytest.mark.simulator

ROOT = Path(__file__).parents[1]
HUMAN = ROOT.parent / "shared" / "data" / "lift_human36.hdf5"  # not ours to ship; see its README


def _check_control() -> ModuleType:
    """benchmarks/check_control.py, which runs the same comparisons at full size."""
    spec = importlib.util.spec_from_file_location("check_control", ROOT / "benchmarks" / "check_control.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_control = _check_control()


def controller(**changes: Any) -> dict[str, Any]:
    """`env_kwargs` with a changed controller configuration."""
    return {"controller_configs": environment_arguments({})["controller_configs"] | changes}


# --- algebra


@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_solve_is_the_inverse_applied(seed: int, start: int, size: int) -> None:
    random = np.random.default_rng(seed)
    root = random.standard_normal((9, 9))
    matrix, vector = root @ root.T + 0.1 * np.eye(9), random.standard_normal(9)
    block = slice(start, start + size)
    expected = vector.copy()
    expected[block] = np.linalg.pinv(matrix[block, block]) @ vector[block]
    solve(matrix, start, size, vector, np.zeros((9, 9)))
    np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-9 * np.linalg.cond(matrix))


def test_solve_of_a_singular_matrix_is_the_pseudo_inverse_applied() -> None:
    root = np.random.default_rng(0).standard_normal((6, 4))
    matrix, vector = root @ root.T, np.arange(6.0)
    expected = np.linalg.pinv(matrix) @ vector
    for factor in (np.zeros((6, 6)), np.full((6, 6), np.nan)):
        answer = vector.copy()
        solve(matrix, 0, 6, answer, factor)
        np.testing.assert_allclose(matrix @ answer, matrix @ expected, atol=1e-6)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_rotation_is_robosuites(vector: list[float]) -> None:
    from robosuite.utils.transform_utils import axisangle2quat, quat2mat

    matrix = np.zeros((3, 3))
    rotation_of(np.array(vector), matrix)
    np.testing.assert_allclose(matrix, quat2mat(axisangle2quat(np.array(vector))), atol=5e-7, rtol=0)  # float32 in both


# --- one control step


@pytest.mark.parametrize("task", list(TASKS))
def test_a_step_from_states_free_in_contact_and_grasping_is_robosuites(task: str) -> None:
    result = check_control.compare_states(task, 45)
    assert {"free", "contact", "grasp"} <= set(result)
    for kind, found in result.items():
        assert found["arm_qpos"]["max"] < (1e-6 if kind == "free" else 1e-4), kind
        # an object that rests has contacts too: where the solver stops depends, in a state of some, on the processor's rounding
        assert found["object_position"]["max"] < (1e-5 if kind == "free" else 1e-4), kind
        assert found["object_position"]["median"] < (1e-12 if kind == "free" else 1e-6), kind
        assert found["observation"]["max"] < 1e-4, kind  # its quaternions are those of objects in contact with the table
        assert found["success_flags_equal"] == found["states"], kind


@pytest.mark.parametrize(
    "changes",
    [
        {"control_delta": False},
        {"uncouple_pos_ori": False},
        {"kp": 80, "damping_ratio": 0.7, "output_max": [0.02] * 3 + [0.3] * 3},
        {"position_limits": [[-0.2, -0.1, 0.9], [0.0, 0.1, 1.0]]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_controller_settings(changes: dict[str, Any]) -> None:
    native, reference = (make("Lift", 1, native=flag, env_kwargs=controller(**changes)) for flag in (True, False))
    assert native.fallback is None
    start = native.reset([2])["state"]
    reference.reset([2])
    random = np.random.default_rng(0)
    for _ in range(8):
        action = random.uniform(-1.2, 1.2, 7)
        if changes.get("control_delta") is False:
            action[:3] = start[0, :3] + 0.05 * action[:3]
            action[3:6] = (np.pi, 0, 0) + 0.2 * action[3:6]
        ours, theirs = (env.step(action[None, None]).observation["state"] for env in (native, reference))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    limit = np.inf if changes.get("control_delta") is False else 1.0
    assert native.action_limit.tolist() == [limit] * 6 + [1.0]


def test_it_steps_any_environment_object_of_robosuite() -> None:
    ours, theirs = build(TASKS["Can"], {}), build(TASKS["Can"], {})
    for env in (ours, theirs):
        with numpy_seeded(3):
            env.reset()
        env.robots[0].gripper.current_action = np.zeros(1)
    control = NativeControl(ours)
    random = np.random.default_rng(1)
    for _ in range(5):
        action = random.uniform(-1, 1, 7)
        assert control.step(action)
        theirs.step(action)
    arm = control.controller.arm.qpos
    np.testing.assert_allclose(ours.sim.data.qpos[arm], theirs.sim.data.qpos[arm], atol=1e-6)


# --- what it does not implement


@pytest.mark.parametrize(
    ("env_kwargs", "reason"),
    [
        (lambda: {"controller_configs": _default("JOINT_POSITION")}, "JOINT_POSITION"),
        (lambda: {"controller_configs": _default("OSC_POSITION")}, "OSC_POSITION"),
        (lambda: controller(impedance_mode="variable_kp"), "impedance_mode"),
        (lambda: controller(interpolation="linear"), "interpolates"),
        (lambda: controller(orientation_limits=[[-1.0] * 3, [1.0] * 3]), "orientation_limits"),
        (lambda: {"gripper_types": "RethinkGripper"}, "RethinkGripper"),
    ],
    ids=["joint position", "position only", "variable impedance", "interpolation", "orientation limits", "gripper"],
)
def test_what_it_cannot_step_is_said(env_kwargs: Any, reason: str) -> None:
    env = build(TASKS["Lift"], env_kwargs())
    assert reason in str(unsupported(env))
    with pytest.raises(InputError, match=reason):
        NativeControl(env)


def _default(name: str) -> dict[str, Any]:
    from robosuite.controllers import load_controller_config

    return dict(load_controller_config(default_controller=name))


def test_what_it_cannot_step_robosuite_steps() -> None:
    with pytest.warns(RuntimeWarning, match="RethinkGripper"):
        env = make("Lift", 2, chunk=2, env_kwargs={"gripper_types": "RethinkGripper"})
    assert env.fallback is not None
    observation = env.reset([0, 1])["state"]
    after = env.step(np.full((2, 2, 7), 0.5)).observation["state"]
    assert after.shape == (2, 19)
    assert np.abs(after - observation).max() > 1e-3


def test_a_task_of_ones_own_is_stepped_by_robosuite() -> None:
    with pytest.warns(RuntimeWarning, match="success check"):
        env = make(Task("Stack", "Stack", 32, 23, 100), 1)
    assert env.reset([0])["state"].shape == (1, 32)
    assert not env.step(np.zeros((1, 1, 7))).success.any()


# --- when robosuite samples its observables


def test_an_observable_is_sampled_on_the_last_substep_of_every_step() -> None:
    from robosuite.utils.observables import Observable, sensor

    @sensor(modality="test")
    def count(cache: Any) -> np.ndarray:
        return np.array([substep, 0])

    substep = 0
    observable = Observable("count", count, sampling_rate=20)
    observable.update(0.002, {}, force=True)  # a reset
    for step in range(1500):
        for _ in range(25):
            substep += 1
            observable.update(0.002, {})
        assert observable.obs[0] == 25 * (step + 1)


# --- whole episodes


def test_scripted_episodes_end_alike() -> None:
    result = check_control.compare_episodes("Lift", 4)
    assert result["equal"] == 1
    assert result["success_native"] > 0.5


@pytest.mark.skipif(not HUMAN.exists(), reason="the human demonstrations are not shipped")
def test_human_demonstrations_replay_open_loop() -> None:
    result = check_control.replay(str(HUMAN), native=True, limit=12)
    assert result["succeeded"] >= 0.8 * result["demonstrations"]


# --- machine code on disk


def test_machine_code_comes_from_disk_and_holds_no_address() -> None:
    """Other processes, with libmujoco at other addresses, take the compiled code from the disk and compute the same."""
    program = (
        "import numpy as np; from postbc.environments.robosuite import make; env = make('Lift', 1); env.reset([0])\n"
        "from postbc.environments.robosuite import libmujoco; from postbc.environments.robosuite.simulation import run_chunk\n"
        "o = env.step(np.full((1, 1, 7), 0.3)).observation['state']\n"
        "print(sum(run_chunk.stats.cache_hits.values()), libmujoco.addresses('mj_step1')[0], o.tobytes().hex())"
    )
    env = make("Lift", 1)
    env.reset([0])
    here = env.step(np.full((1, 1, 7), 0.3)).observation["state"].tobytes().hex()
    found_at = {libmujoco.addresses("mj_step1")[0]}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        hits, address, observation = done.stdout.split()[-3:]
        assert (hits, observation) == ("1", here)
        found_at.add(int(address))
    assert len(found_at) > 1
