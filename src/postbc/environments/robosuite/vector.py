"""Many robosuite environments in one process, which play chunks: a pool of threads, each running whole chunks without Python.

:class:`SimulatedChunkEnv` is what LIBERO's environments share with these.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postbc.environments.chunk import ChunkStep, Observations, Termination, check_chunks, check_options, check_reset
from postbc.environments.robosuite import building
from postbc.environments.robosuite.episodes import Models, unsupported_reset
from postbc.environments.robosuite.native_control import unsupported
from postbc.environments.robosuite.rendering import Renderer
from postbc.environments.robosuite.simulation import NativeSimulation, RobosuiteSimulation, Simulation, run_chunk
from postbc.environments.robosuite.tasks import ACTION_DIM, CONTROL_FREQ, VERSION, Task, find_task
from postbc.errors import require
from postbc.progress import say


class SimulatedChunkEnv:
    """N simulations that play chunks (a :class:`postbc.environments.chunk.ChunkEnv`), stepped together by a pool of threads.

    Rewards are robosuite's: 1 for a success, else 0. Observations are {"state": (N, S) float32}, what the simulations observe.

    Args:
        name: of the task or tasks; a saved state fits environments of this name.
        simulations: N.
        state_dim: S.
        chunk, horizon, terminate_on, num_threads: see :class:`RobosuiteChunkEnv`.
    """

    chooses_episodes = True
    fps = CONTROL_FREQ

    def __init__(
        self,
        name: str,
        simulations: Sequence[Simulation],
        state_dim: int,
        *,
        chunk: int,
        horizon: int,
        terminate_on: Termination,
        num_threads: int,
    ) -> None:
        self.name, self.simulations, self.num_envs = name, list(simulations), len(simulations)
        self.chunk, self.horizon, self.terminate_on = chunk, horizon, terminate_on
        self.action_dim = ACTION_DIM
        self.shapes: Mapping[str, tuple[int, ...]] = {"state": (state_dim,)}
        self._pool = ThreadPoolExecutor(num_threads, "postbc-simulation")
        self.seeds = np.full(self.num_envs, -1, np.int64)  # of the episode that each environment is in; -1: none of ours
        self._steps = np.zeros(self.num_envs, np.int64)
        self._waiting, self._started = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        self._draws = True

    def set_drawing(self, on: bool) -> None:
        """Whether frames of cameras are drawn from now on; while they are not, observations hold the former ones."""
        self._draws = on

    @property
    def action_limit(self) -> NDArray[np.float64]:
        """(A,) actions are clipped to ± this; absolute poses, in metres and radians, are not clipped."""
        limit = np.ones(self.action_dim)
        if not self.simulations[0].env.robots[0].controller.use_delta:
            limit[:6] = np.inf
        return limit

    # --- episodes

    def reset(self, seeds: Sequence[int] | NDArray[Any], mask: NDArray[np.bool_] | None = None) -> Observations:
        """Begin the episodes `seeds` (N,) in the environments of `mask` (N,) (default all): a seed alone decides the first state."""
        seeds, mask = check_reset(self.num_envs, seeds, mask)
        chosen = np.flatnonzero(mask)
        self.seeds[chosen] = seeds[chosen]
        self._each(self._begin, chosen)
        return self._observations(mask)

    def _begin(self, i: int) -> None:
        self.simulations[i].reset(int(self.seeds[i]))
        self._steps[i], self._started[i], self._waiting[i] = 0, True, False

    def step(self, chunks: NDArray[np.floating[Any]]) -> ChunkStep:
        """Play one chunk (T, 7) in each environment that is not waiting for its reset.

        Raises:
            InputError: chunks of another shape than (N, T, 7) or not finite, or an environment that was never reset.
        """
        commands = check_chunks(chunks, (self.num_envs, self.chunk, self.action_dim), self._started)
        n, t = self.num_envs, self.chunk
        successes, executed, diverged = np.zeros((n, t), bool), np.zeros(n, np.int64), np.zeros(n, bool)

        def run(i: int) -> None:
            remaining = self.horizon - int(self._steps[i])
            executed[i], diverged[i] = self.simulations[i].run(
                commands[i, :remaining], self.terminate_on == "success", successes[i]
            )

        running = self._started & ~self._waiting
        self._each(run, np.flatnonzero(running))
        self._steps += executed
        happened = np.arange(t) < executed[:, None]
        ending = {"success": successes.any(1), "chunk_success": successes.all(1), "never": np.zeros(n, bool)}
        terminated = running & ending[self.terminate_on] & ~diverged
        truncated = running & ~terminated & (diverged | (self._steps >= self.horizon))
        self._waiting |= terminated | truncated
        for i in np.flatnonzero(diverged):
            warnings.warn(
                f"{self.name}: the simulation diverged in environment {i} at step {self._steps[i]} of the episode with seed "
                f"{self.seeds[i]}; that episode ends, its last observation is the last finite one",
                RuntimeWarning,
                stacklevel=2,
            )
        rewards = np.where(happened, successes, 0.0)
        observation = self._observations(running & ~diverged)
        return ChunkStep(observation, rewards, successes, executed, terminated, truncated, diverged)

    def _each(self, function: Callable[[int], None], indices: NDArray[np.integer[Any]]) -> None:
        if len(indices) == 1:
            function(int(indices[0]))
        else:
            list(self._pool.map(function, indices.tolist()))

    def _observations(self, moved: NDArray[np.bool_]) -> Observations:
        """Of all; `moved` (N,): which of them have changed."""
        return {"state": self.full_state()}

    def full_state(self) -> NDArray[np.float32]:
        """(N, S) all that the simulations observe, the object included, whatever an agent is shown."""
        return np.stack([simulation.observation for simulation in self.simulations]).astype(np.float32)

    # --- states

    def get_state(self) -> dict[str, Any]:
        """Everything that the future depends on: nested dicts of arrays and numbers, for `set_state`."""
        return {
            "task": self.name,
            "seeds": self.seeds.copy(),
            "steps": self._steps.copy(),
            "waiting": self._waiting.copy(),
            "started": self._started.copy(),
            "simulations": {str(i): simulation.get_state() for i, simulation in enumerate(self.simulations)},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`, bit for bit.

        Raises:
            InputError: the state is of another task or another number of environments.
        """
        found, here = (f"{len(state['simulations'])} × {state['task']}", f"{self.num_envs} × {self.name}")
        require(found == here, "The state is of another vector environment.", found=found, expected=here)
        self.seeds[:], self._steps[:] = state["seeds"], state["steps"]
        self._waiting[:], self._started[:] = state["waiting"], state["started"]
        for i, simulation in enumerate(self.simulations):
            simulation.set_state(state["simulations"][str(i)])

    def model_xml(self, i: int = 0) -> str:
        """The MJCF of environment i's model."""
        return self.simulations[i].model_xml()

    def close(self) -> None:
        self._pool.shutdown()


class RobosuiteChunkEnv(SimulatedChunkEnv):
    """N environments of one task (a :class:`postbc.environments.chunk.ChunkEnv`), stepped together by a pool of threads.

    Observations are {"state": (N, S) float32}: robot0_eef_pos 3, robot0_eef_quat 4, robot0_gripper_qpos 2, object 10 or 14, in raw
    units. Actions are chunks (N, T, 7) of raw robosuite actions at 20 Hz. Rewards are robosuite's: 1 for a success, else 0. An
    episode's seed s alone decides its initial state: that of `np.random.seed(s); env.reset()` in robosuite.

    Args:
        task: a name (ours or robosuite's), or a `Task`.
        num_envs: N.
        chunk: T, actions a step.
        horizon: control steps (not chunks) until truncation; the task's own by default.
        terminate_on: "success": the first successful action ends the episode, and its chunk; "chunk_success": the first chunk
            whose T actions are all successful does; "never".
        num_threads: of the pool; the number of processors by default. Results do not depend on it.
        native: step with the compiled loop; False steps with robosuite's own Python (slower by an order of magnitude).
            Where the loop cannot step the environment, a warning says why and robosuite's own step is used (`fallback`).
        env_kwargs: for `robosuite.make`, over ours (for example `controller_configs` with control_delta False).

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        task: str | Task,
        num_envs: int = 1,
        *,
        chunk: int = 1,
        horizon: int | None = None,
        terminate_on: Termination = "success",
        num_threads: int | None = None,
        native: bool = True,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.task = find_task(task)
        limit = self.task.horizon if horizon is None else horizon
        check_options(num_envs, chunk, limit, terminate_on)
        threads = check_threads(num_threads)
        self.env_kwargs = dict(env_kwargs or {})
        simulations, self.fallback = _simulations(self.task, num_envs, native, self.env_kwargs)
        super().__init__(
            self.task.name, simulations, self.task.observation_dim,
            chunk=chunk, horizon=limit, terminate_on=terminate_on, num_threads=threads,
        )  # fmt: skip
        self._renderer: Renderer | None = None

    # --- simulator states

    def sim_states(self) -> NDArray[np.float64]:
        """robosuite's flattened states (N, Ds) [time, qpos, qvel]."""
        return np.stack([np.concatenate([[s.data.time], s.data.qpos, s.data.qvel]) for s in self.simulations])

    def set_sim_states(self, states: NDArray[np.floating[Any]], indices: Sequence[int] | None = None) -> Observations:
        """Put environments into flattened states (n, Ds), as robomimic's `reset_to`, at step 0 of an episode with seed −1.

        The controller starts at rest in the state it is put into. Returns: observations of those n.
        """
        indices = list(range(self.num_envs)) if indices is None else [int(i) for i in indices]
        states = np.asarray(states, np.float64)
        expected = (len(indices), 1 + self.simulations[0].model.nq + self.simulations[0].model.nv)
        require(states.shape == expected, "Simulator states have the wrong shape.", found=states.shape, expected=expected)
        for i, state in zip(indices, states):
            self.simulations[i].set_sim_state(state)
            self._steps[i], self.seeds[i], self._started[i], self._waiting[i] = 0, -1, True, False
        chosen = np.isin(np.arange(self.num_envs), indices)
        return {name: values[indices] for name, values in self._observations(chosen).items()}

    # --- what the simulations are

    def env_args(self) -> dict[str, Any]:
        """robomimic's `env_args`: {env_name, env_version, type, env_kwargs}, plain data for JSON."""
        return environment_facts(self.task, self.env_kwargs)

    def render_frame(
        self, i: int = 0, height: int = 256, width: int = 256, camera: str = "agentview", lagging: bool = False
    ) -> NDArray[np.uint8]:
        """Environment i as a camera sees it: (H, W, 3) uint8, without a display.

        `lagging`: of the poses as they are, a substep older than the joints, as robosuite draws what `env.step` returns.

        Raises:
            InputError: no OpenGL for rendering without a display, or an unknown camera.
        """
        if self._renderer is None:
            self._renderer = Renderer()
        draw = self._renderer.frame_of_poses if lagging else self._renderer.frame
        return draw(self.simulations[i].model, self.simulations[i].data, height, width, camera)

    def close(self) -> None:
        super().close()
        if self._renderer is not None:
            self._renderer.close()


def environment_facts(task: Task, env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """robomimic's `env_args` of a task."""
    arguments = building.environment_arguments(env_kwargs)
    return {"env_name": task.robosuite_name, "env_version": VERSION, "type": 1, "env_kwargs": arguments}


def _simulations(task: Task, num_envs: int, native: bool, env_kwargs: Mapping[str, Any]) -> tuple[list[Simulation], str | None]:
    """The simulations, and why they are not the compiled ones that were asked for, or None."""
    if not native:
        return [RobosuiteSimulation(task, building.build(task, env_kwargs)) for _ in range(num_envs)], None
    env = building.template(task, env_kwargs)
    unknown = None if task.robosuite_name in building.SENSORS else "its success check is not compiled"
    reason = unknown or unsupported(env) or unsupported_reset(env)
    if reason is None:
        say_if_it_compiles(run_chunk)
        models = Models(env)
        return [NativeSimulation(task, env, models) for _ in range(num_envs)], None
    message = f"{task.name} is stepped by robosuite's own Python, not by the compiled loop: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=4)
    return [RobosuiteSimulation(task, building.build(task, env_kwargs)) for _ in range(num_envs)], reason


def say_if_it_compiles(loop: Any) -> None:
    """Before the first step of this process: whether the machine code of a compiled `loop` is on the disk."""
    if loop.signatures or any(Path(loop.stats.cache_path or "").glob(f"*.{loop.__name__}-*.nbc")):
        return
    say("Compiling the simulator's control loop: about 20 seconds, once on this machine.", stderr=True)


def check_threads(num_threads: int | None) -> int:
    """Threads of a pool; the number of processors where none is asked for. InputError: fewer than one."""
    threads = _processors() if num_threads is None else num_threads
    require(threads >= 1, "num_threads must be at least 1.", key="num_threads", found=num_threads)
    return threads


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
