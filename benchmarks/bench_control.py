"""Control steps a second: our vector environment against robosuite's `env.step` behind gymnasium's AsyncVectorEnv.

Both execute chunks of 4 actions and deliver observations, rewards and success; robosuite gets one process a core, we one thread a core.
The measurements alternate (ours, theirs, ours, theirs, …) and medians are compared, so that whatever else the machine does hits both.

    python benchmarks/bench_control.py
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium
import numba
import numpy as np
from numpy.typing import NDArray

from postbc.environments.robosuite import TASKS, make
from postbc.environments.robosuite.building import environment_arguments
from postbc.environments.robosuite.libmujoco import call
from postbc.environments.robosuite.loading import import_robosuite
from postbc.environments.robosuite.native_control import Controller, Physics, control_substep
from postbc.environments.robosuite.simulation import NativeSimulation

CHUNK, NUM_ENVS, ROUNDS = 4, 8, 5
UNIT = "control steps/s"


class RobosuiteChunkEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """robosuite as DSRL and DPPO wrap it: a chunk of actions, low-dimensional observation, summed reward."""

    def __init__(self, task: str) -> None:
        robosuite = import_robosuite()
        self.env = robosuite.make(TASKS[task].robosuite_name, hard_reset=False, **environment_arguments({}))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (TASKS[task].observation_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (CHUNK, 7), np.float32)

    def _vector(self, observation: dict[str, Any]) -> NDArray[np.float32]:
        keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state")
        return np.concatenate([observation[key] for key in keys]).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        return self._vector(self.env.reset()), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        total, success = 0.0, False
        for single in action:
            observation, reward, _, _ = self.env.step(single)
            total += reward - 1.0
            success = success or bool(self.env._check_success())
        return self._vector(observation), total, False, False, {"success": success}


def rate(env: Any, steps: int, seed: int, chunk: int = CHUNK) -> float:
    """Control steps a second over `steps` vector steps of smooth random actions."""
    random = np.random.default_rng(seed)
    actions = 0.5 * random.uniform(-1, 1, (steps // 5 + 1, env.num_envs, 1, 7)).astype(np.float32)
    start = time.perf_counter()
    for t in range(steps):
        env.step(np.repeat(actions[t // 5], chunk, axis=1))
    return steps * env.num_envs * chunk / (time.perf_counter() - start)


def alternate(ours: Callable[[int], float], theirs: Callable[[int], float], rounds: int = ROUNDS) -> tuple[float, float]:
    """Medians of alternating measurements."""
    pairs = [(ours(k), theirs(k)) for k in range(rounds)]
    a, b = zip(*pairs)
    return statistics.median(a), statistics.median(b)


def entry(ours: float, theirs: float, what: str) -> dict[str, Any]:
    return {"ours": ours, "theirs": theirs, "unit": UNIT, "ratio": ours / theirs, "what": what}


def against_robosuite(task: str) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = make(task, NUM_ENVS, chunk=CHUNK, terminate_on="never", num_threads=cores)
    theirs = gymnasium.vector.AsyncVectorEnv([lambda: RobosuiteChunkEnv(task)] * cores, context="spawn")
    try:
        ours.reset(np.arange(NUM_ENVS))
        theirs.reset(seed=0)
        rate(ours, 2, 0), rate(theirs, 1, 0)  # compile
        a, b = alternate(lambda k: rate(ours, 25, k), lambda k: rate(theirs, 10, k))
    finally:
        ours.close()
        theirs.close()
    return entry(
        a, b, f"{task}, chunk {CHUNK}: {NUM_ENVS} environments on {cores} threads / AsyncVectorEnv with {cores} processes"
    )


def thread_scaling(task: str = "Lift") -> dict[str, Any]:
    two, one = (make(task, NUM_ENVS, chunk=CHUNK, terminate_on="never", num_threads=n) for n in (2, 1))
    two.reset(np.arange(NUM_ENVS)), one.reset(np.arange(NUM_ENVS))
    rate(two, 2, 0), rate(one, 2, 0)
    a, b = alternate(lambda k: rate(two, 20, k), lambda k: rate(one, 20, k), rounds=7)
    both, single = alternate(lambda _: spin_rate(2), lambda _: spin_rate(1))
    two.close(), one.close()
    what = (
        f"{task}, {NUM_ENVS} environments: 2 threads / 1 thread (a loop that only counts scales {both / single:.2f}x here, now)"
    )
    return entry(a, b, what)


@numba.njit(nogil=True)
def _spin(count: int) -> float:
    total = 1.0
    for _ in range(count):
        total = total * 1.0000001 + 1e-9
    return total


def spin_rate(threads: int, count: int = 100_000_000) -> float:
    """Additions a second of threads that share nothing: how far two threads can get on this machine as it is now."""
    _spin(1)
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_spin, [count] * threads))
    return threads * count / (time.perf_counter() - start)


@numba.njit(nogil=True)
def _record(physics: Physics, controller: Controller, actions: NDArray[np.float64], controls: NDArray[np.float64]) -> None:
    n = 0
    for action in actions:
        for k in range(controller.arm.substeps):
            control_substep(physics, controller, action, k == 0)
            controls[n] = physics.ctrl
            n += 1


@numba.njit(nogil=True)
def _bare(physics: Physics, controls: NDArray[np.float64]) -> None:
    for n in range(len(controls)):
        physics.ctrl[:] = controls[n]
        call(physics.step1, physics.model, physics.data)
        call(physics.step2, physics.model, physics.data)


def fraction_of_mj_step(task: str = "Lift", steps: int = 100) -> dict[str, Any]:
    """One thread; the same trajectory, with the controller and without (its torques replayed)."""
    env = make(task, 1, chunk=CHUNK, num_threads=1)
    env.reset([0])
    simulation = env.simulations[0]
    assert isinstance(simulation, NativeSimulation)
    random = np.random.default_rng(0)
    actions = np.repeat(0.5 * random.uniform(-1, 1, (steps // 5, 7)), 5, axis=0)
    physics, controller = simulation.control.physics, simulation.control.controller
    controls = np.zeros((steps * controller.arm.substeps, simulation.model.nu))
    successes, state = np.zeros(steps, bool), simulation.get_state()

    def ours(_: int) -> float:
        simulation.set_state(state)
        start = time.perf_counter()
        simulation.run(actions, False, successes)
        return steps / (time.perf_counter() - start)

    def theirs(_: int) -> float:
        simulation.set_state(state)
        start = time.perf_counter()
        _bare(physics, controls)
        return steps / (time.perf_counter() - start)

    _record(physics, controller, actions, controls)
    ours(0), theirs(0)
    a, b = alternate(ours, theirs, rounds=9)
    env.close()
    return entry(
        a, b, f"{task}, one thread: control, observation and success / mj_step1 + mj_step2 alone on the same trajectory"
    )


def run() -> dict[str, dict[str, Any]]:
    """Every figure of the control loop."""
    results = {f"control_steps_{task.lower()}": against_robosuite(task) for task in TASKS}
    results["control_thread_scaling"] = thread_scaling()
    results["control_fraction_of_mj_step"] = fraction_of_mj_step()
    return results


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
