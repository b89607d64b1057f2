"""Control steps a second on LIBERO: ours against LIBERO's own environment behind gymnasium's AsyncVectorEnv, without cameras and with;
and the memory that environments of three scenes take, with cameras.

Both execute the paper's chunks of 4 actions and deliver observations, rewards and success; LIBERO gets one process a core, we one
thread a core. LIBERO draws its cameras at every step, as its evaluation does; ours are drawn where a chunk ends. Measurements
alternate. Memory is the largest that a process of its own held: eight of our environments, or eight of LIBERO's, in one process.

    python -m benchmarks libero
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from benchmarks.bench_control import alternate, entry, rate
from postbc.environments.libero import KITCHEN, find_tasks, make
from postbc.environments.libero.loading import import_libero

TASK, CHUNK, SIZE = KITCHEN[3], 4, 128
ENVS = 8


class LiberoEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """LIBERO's own environment: a chunk of actions, robot state or two cameras, success; it begins as its evaluation does."""

    def __init__(self, images: bool, name: str = TASK) -> None:
        control_env = import_libero().OffScreenRenderEnv.__mro__[1]
        (task,) = find_tasks(name)
        self.env, self.images = control_env(
            bddl_file_name=str(task.bddl), has_offscreen_renderer=images, use_camera_obs=images, camera_heights=SIZE,
            camera_widths=SIZE, ignore_done=True,
        ), images  # fmt: skip
        self.states = task.init_states()
        self.action_space = gymnasium.spaces.Box(-1, 1, (CHUNK, 7), np.float32)
        shape, kind = ((2, SIZE, SIZE, 3), np.uint8) if images else ((9,), np.float32)
        self.observation_space = gymnasium.spaces.Box(0 if images else -np.inf, 255 if images else np.inf, shape, kind)

    def _observed(self, observation: dict[str, Any]) -> NDArray[Any]:
        if self.images:
            return np.stack([observation[f"{camera}_image"][::-1] for camera in ("agentview", "robot0_eye_in_hand")])
        keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        return np.concatenate([observation[key] for key in keys]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray[Any], dict[str, Any]]:
        self.env.reset()
        self.env.set_init_state(self.states[(seed or 0) % len(self.states)])
        for _ in range(5):
            observation = self.env.step([0.0] * 7)[0]
        return self._observed(observation), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        success = False
        for single in action:
            observation, _, done, _ = self.env.step(single)
            success = success or bool(done)
        return self._observed(observation), float(success), False, False, {"success": success}

    def close(self) -> None:
        self.env.close()


def against_libero(images: bool, steps: tuple[int, int], num_envs: int = ENVS) -> dict[str, Any]:
    """`steps`: vector steps of ours and of theirs in each measurement."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    theirs = gymnasium.vector.AsyncVectorEnv([lambda: LiberoEnv(images)] * cores, context="spawn")
    ours = make(
        TASK, num_envs, chunk=CHUNK, terminate_on="never", horizon=10**9, num_threads=cores, images=images, image_size=SIZE
    )
    try:
        ours.reset(np.arange(num_envs))
        theirs.reset(seed=0)
        rate(ours, 1, 0, CHUNK), rate(theirs, 1, 0, CHUNK)  # compile, open contexts
        a, b = alternate(lambda k: rate(ours, steps[0], k, CHUNK), lambda k: rate(theirs, steps[1], k, CHUNK))
    finally:
        ours.close()
        theirs.close()
    what = f"two {SIZE}² cameras" if images else "states"
    return entry(
        a, b, f"{TASK}, chunk {CHUNK}, {what}: {num_envs} environments on {cores} threads / {cores} processes of LIBERO's"
    )


def our_memory() -> float:
    """Bytes of this process with eight environments of all sixteen tasks, in all three scenes, each drawn once."""
    env = make("kitchen", ENVS, chunk=CHUNK, terminate_on="never", images=True, image_size=SIZE)
    env.reset(2 * np.arange(ENVS))  # the seed says the task: 0, 2, …, 14
    env.step(np.zeros((ENVS, CHUNK, 7)))
    return largest()


def their_memory() -> float:
    """The same of LIBERO's own."""
    envs = [LiberoEnv(True, KITCHEN[2 * k]) for k in range(ENVS)]
    for env in envs:
        env.reset(seed=0)
        env.step(np.zeros((CHUNK, 7), np.float32))
    return largest()


def largest() -> float:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory() -> dict[str, Any]:
    """Environments a GiB, so that more is better here, too."""

    def alone(measure: Callable[[], float]) -> float:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return ENVS / (pool.apply(measure) / 2**30)

    what = f"{ENVS} environments of three scenes with two {SIZE}² cameras, one process"
    return entry(alone(our_memory), alone(their_memory), what) | {"unit": "environments/GiB"}


def run() -> dict[str, dict[str, Any]]:
    """All figures."""
    return {
        "libero_states": against_libero(False, (10, 6)),
        "libero_images": against_libero(True, (4, 4)),
        "libero_memory": memory(),
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
