"""Many robosuite environments in one process: a gymnasium `VectorEnv` whose actions are chunks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from postbc.environments import robosuite
from postbc.environments.episodes import Models, unsupported_reset
from postbc.environments.native_control import unsupported
from postbc.environments.rendering import Renderer
from postbc.environments.robosuite import CONTROL_FREQ, TASKS, Task
from postbc.environments.seeding import EpisodeSeeds, Seed
from postbc.environments.simulation import NativeSimulation, RobosuiteSimulation, Simulation
from postbc.errors import InputError

Reward = Literal["negative", "sparse"]
Termination = Literal["success", "chunk_success", "never"]
Autoreset = Literal["same_step", "disabled"]


class RobosuiteVectorEnv(gymnasium.vector.VectorEnv):
    """`num_envs` environments of one task, stepped together by a pool of threads.

    Observations are (N, S) float32: robot0_eef_pos 3, robot0_eef_quat 4, robot0_gripper_qpos 2, object 10 or 14, in raw units.
    Actions are (N, T, 7) float32 chunks of raw robosuite actions at 20 Hz; a chunk stops at the end of the episode.

    Args:
        task: a name in `TASKS`, or a `Task`.
        num_envs: N.
        chunk: T, actions a step.
        horizon: control steps (not chunks) until truncation; the task's own by default.
        reward: a sub-step earns success − 1 ("negative") or success ("sparse"); a step, the sum over its executed sub-steps.
        terminate_on: "success": the first successful sub-step ends the episode; "chunk_success": the first chunk whose T sub-steps
            are all successful does; "never".
        num_threads: of the pool; the number of processors by default. Results do not depend on it.
        native: step with the compiled loop; False steps with robosuite's own Python (slower by an order of magnitude).
            Where the loop cannot step the environment, a warning says why and robosuite's own step is used.
        autoreset: "same_step": an ended episode's environment is reset at once, its last observation is in `final_obs`;
            "disabled": it waits for `reset(options={"reset_mask": …})`, and stepping it meanwhile does nothing.
        env_kwargs: for `robosuite.make`, over ours (for example `controller_configs` with control_delta False).
    Raises:
        InputError: an argument that cannot be used, or robosuite 1.4.0 is missing.

    `step`'s info holds arrays, and gymnasium's masks `_key`: success (N,) any sub-step was; chunk_success (N,) all T were;
    num_steps (N,) sub-steps executed; step_rewards (N, T) padded with 0; diverged (N,); episode_seed (N,) of the episode that was
    stepped (`reset`'s info: that begins); final_obs and final_info where episodes ended, as gymnasium has them.
    """

    def __init__(
        self,
        task: str | Task,
        num_envs: int = 1,
        chunk: int = 1,
        horizon: int | None = None,
        reward: Reward = "negative",
        terminate_on: Termination = "success",
        num_threads: int | None = None,
        native: bool = True,
        autoreset: Autoreset = "same_step",
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.task = _task(task)
        self.num_envs, self.chunk = _positive("num_envs", num_envs), _positive("chunk", chunk)
        self.horizon = self.task.horizon if horizon is None else _positive("horizon", horizon)
        self.reward: Reward = _choice("reward", reward, ("negative", "sparse"))
        self.terminate_on: Termination = _choice("terminate_on", terminate_on, ("success", "chunk_success", "never"))
        self.autoreset: Autoreset = _choice("autoreset", autoreset, ("same_step", "disabled"))
        self.control_freq = CONTROL_FREQ
        self.env_kwargs = dict(env_kwargs or {})
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": CONTROL_FREQ,
            "autoreset_mode": AutoresetMode.SAME_STEP if autoreset == "same_step" else AutoresetMode.DISABLED,
        }
        self.simulations, self.fallback = _simulations(self.task, self.num_envs, native, self.env_kwargs)
        self.render_mode = "rgb_array"
        self.action_dim = self.task.action_dim
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (self.task.observation_dim,), np.float32)
        self.single_action_space = self._action_space()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        threads = _processors() if num_threads is None else _positive("num_threads", num_threads)
        self._pool = ThreadPoolExecutor(threads, "postbc-simulation")
        self._renderer: Renderer | None = None
        self._seeds = EpisodeSeeds(self.num_envs)
        self._steps = np.zeros(self.num_envs, np.int64)
        self._terminated, self._truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        self._started = np.zeros(self.num_envs, bool)

    def _action_space(self) -> gymnasium.spaces.Box:
        high = np.ones((self.chunk, self.action_dim), np.float32)
        if not self.simulations[0].env.robots[0].controller.use_delta:
            high[:, :6] = np.inf  # absolute poses in metres and radians, which robosuite does not clip
        return gymnasium.spaces.Box(-high, high, dtype=np.float32)

    # --- episodes

    def reset(self, *, seed: Seed = None, options: dict[str, Any] | None = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin new episodes.

        Args:
            seed: s: environment i's episodes k = 0, 1, … get seeds derived from (s, i, k); a list: from (seed[i], k); None: go on.
            options: `reset_mask` (N,) bool, which environments to reset (all by default); `seeds` (N,) ints in [0, 2³²), the very
                seeds of the episodes that begin. An episode's seed alone decides its initial state: it is the state of
                `np.random.seed(s); env.reset()` in robosuite.
        Returns: observations (N, S) float32; info with episode_seed (N,).
        """
        options = options or {}
        mask = np.array(options.get("reset_mask", np.ones(self.num_envs)), bool)
        if mask.shape != (self.num_envs,):
            raise InputError("reset_mask needs one entry an environment", found=mask.shape, expected=(self.num_envs,))
        self._seeds.restart(seed, mask)
        seeds = options.get("seeds")
        if seeds is not None and len(seeds) != self.num_envs:
            raise InputError("seeds needs one entry an environment", found=len(seeds), expected=self.num_envs)
        chosen = np.flatnonzero(mask)
        for i in chosen:
            if seeds is None:
                self._seeds.advance(int(i))
            else:
                self._seeds.choose(int(i), int(seeds[i]))
        self._each(self._begin, chosen)
        return self._observations(), self._masked({"episode_seed": self._seeds.current.copy()}, mask)

    def _begin(self, i: int) -> None:
        self.simulations[i].reset(int(self._seeds.current[i]))
        self._steps[i], self._started[i] = 0, True
        self._terminated[i] = self._truncated[i] = False

    # --- stepping

    def step(
        self, actions: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Execute one chunk (T, 7) in each environment; see the class for what comes back.

        Raises:
            InputError: actions (N, T, 7) of another shape or not finite, or an environment that was never reset.
        """
        commands: NDArray[np.float64] = np.ascontiguousarray(actions, np.float64)
        if commands.shape != self.action_space.shape:
            raise InputError("actions have the wrong shape", found=commands.shape, expected=self.action_space.shape)
        if not np.isfinite(commands).all():
            broken = np.flatnonzero(~np.isfinite(commands).all((1, 2))).tolist()
            raise InputError("actions are not finite", found=f"environments {broken}")
        if not self._started.all():
            raise InputError("step before reset", found=f"environments {np.flatnonzero(~self._started).tolist()}")
        n, t = self.num_envs, self.chunk
        successes, executed, diverged = np.zeros((n, t), bool), np.zeros(n, np.int64), np.zeros(n, bool)

        def run(i: int) -> None:
            remaining = self.horizon - int(self._steps[i])
            executed[i], diverged[i] = self.simulations[i].run(
                commands[i, :remaining], self.terminate_on == "success", successes[i]
            )

        running = ~(self._terminated | self._truncated)
        self._each(run, np.flatnonzero(running))
        self._steps += executed
        happened = np.arange(t) < executed[:, None]
        rewards = np.where(happened, successes - (1.0 if self.reward == "negative" else 0.0), 0.0)
        info = {
            "success": successes.any(1),
            "chunk_success": successes.all(1),
            "num_steps": executed,
            "step_rewards": rewards.astype(np.float32),
            "diverged": diverged,
            "episode_seed": self._seeds.current.copy(),
        }
        ending = {"success": info["success"], "chunk_success": info["chunk_success"], "never": np.zeros(n, bool)}
        self._terminated |= running & ending[self.terminate_on] & ~diverged
        self._truncated |= running & ~self._terminated & (diverged | (self._steps >= self.horizon))
        for i in np.flatnonzero(diverged):
            warnings.warn(
                f"{self.task.name}: the simulation diverged in environment {i} at step {self._steps[i]} of the episode with seed "
                f"{self._seeds.current[i]}; that episode ends, its last observation is the last finite one",
                RuntimeWarning,
                stacklevel=2,
            )
        terminated, truncated = self._terminated.copy(), self._truncated.copy()
        observations, info = self._observations(), self._masked(info, np.ones(n, bool))
        if self.autoreset == "same_step" and (ended := terminated | truncated).any():
            self._finish(observations, info, ended)
        return observations, rewards.sum(1), terminated, truncated, info

    def _finish(self, observations: NDArray[np.float32], info: dict[str, Any], ended: NDArray[np.bool_]) -> None:
        """Add `final_obs` and `final_info`, and begin the next episodes."""
        final_obs = np.full(self.num_envs, None, object)
        final_info = {key: value.copy() for key, value in info.items() if not key.startswith("_")}
        chosen = np.flatnonzero(ended)
        for i in chosen:
            final_obs[i] = observations[i].copy()
            self._seeds.advance(int(i))
        self._each(self._begin, chosen)
        observations[chosen] = self._observations()[chosen]
        info |= self._masked({"final_obs": final_obs, "final_info": self._masked(final_info, ended)}, ended)

    def _each(self, function: Callable[[int], None], indices: NDArray[np.integer[Any]]) -> None:
        if len(indices) == 1:
            function(int(indices[0]))
        else:
            list(self._pool.map(function, indices.tolist()))

    def _observations(self) -> NDArray[np.float32]:
        return np.stack([simulation.observation for simulation in self.simulations]).astype(np.float32)

    @staticmethod
    def _masked(values: dict[str, Any], mask: NDArray[np.bool_]) -> dict[str, Any]:
        return values | {f"_{key}": mask.copy() for key in values}

    # --- simulator states

    def sim_states(self) -> NDArray[np.float64]:
        """robosuite's flattened states (N, Ds) [time, qpos, qvel]."""
        return np.stack([np.concatenate([[s.data.time], s.data.qpos, s.data.qvel]) for s in self.simulations])

    def set_sim_states(self, states: NDArray[np.floating[Any]], indices: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Put environments into flattened states (n, Ds), as robomimic's `reset_to`, at step 0 of an episode with seed −1.

        The controller starts at rest in the state it is put into. Returns: observations (n, S).
        """
        indices = list(range(self.num_envs)) if indices is None else [int(i) for i in indices]
        states = np.asarray(states, np.float64)
        expected = (len(indices), 1 + self.simulations[0].model.nq + self.simulations[0].model.nv)
        if states.shape != expected:
            raise InputError("simulator states have the wrong shape", found=states.shape, expected=expected)
        for i, state in zip(indices, states):
            self.simulations[i].set_sim_state(state)
            self._steps[i], self._seeds.current[i], self._started[i] = 0, -1, True
            self._terminated[i] = self._truncated[i] = False
        return self._observations()[indices]

    def get_state(self) -> dict[str, Any]:
        """Everything that the future depends on: nested dicts of arrays and numbers, for `set_state`."""
        return {
            "task": self.task.name,
            "seeds": self._seeds.get_state(),
            "steps": self._steps.copy(),
            "terminated": self._terminated.copy(),
            "truncated": self._truncated.copy(),
            "started": self._started.copy(),
            "simulations": {str(i): simulation.get_state() for i, simulation in enumerate(self.simulations)},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`, bit for bit.

        Raises:
            InputError: the state is of another task or another number of environments.
        """
        if state["task"] != self.task.name or len(state["simulations"]) != self.num_envs:
            raise InputError(
                "the state is of another vector environment", found=f"{len(state['simulations'])} × {state['task']}",
                expected=f"{self.num_envs} × {self.task.name}",
            )  # fmt: skip
        self._seeds.set_state(state["seeds"])
        self._steps[:] = state["steps"]
        self._terminated[:], self._truncated[:], self._started[:] = state["terminated"], state["truncated"], state["started"]
        for i, simulation in enumerate(self.simulations):
            simulation.set_state(state["simulations"][str(i)])

    # --- what the simulations are

    def model_xml(self, i: int = 0) -> str:
        """The MJCF of environment i's model."""
        return self.simulations[i].model_xml()

    def env_args(self) -> dict[str, Any]:
        """robomimic's `env_args`: {env_name, env_version, type, env_kwargs}, plain data for JSON."""
        arguments = robosuite.environment_arguments(self.env_kwargs)
        return {"env_name": self.task.robosuite_name, "env_version": robosuite.VERSION, "type": 1, "env_kwargs": arguments}

    def render_frame(self, i: int = 0, height: int = 256, width: int = 256, camera: str = "agentview") -> NDArray[np.uint8]:
        """Environment i as a camera sees it: (H, W, 3) uint8, without a display.

        Raises:
            InputError: no OpenGL for rendering without a display, or an unknown camera.
        """
        if self._renderer is None:
            self._renderer = Renderer()
        return self._renderer.frame(self.simulations[i].model, self.simulations[i].data, height, width, camera)

    def render(self) -> tuple[NDArray[np.uint8], ...]:
        """A frame of each environment."""
        return tuple(self.render_frame(i) for i in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        self._pool.shutdown()
        if self._renderer is not None:
            self._renderer.close()


def make(task: str | Task, num_envs: int = 1, **kwargs: Any) -> RobosuiteVectorEnv:
    """A vector environment of `task`; the arguments are `RobosuiteVectorEnv`'s."""
    return RobosuiteVectorEnv(task, num_envs, **kwargs)


def _simulations(task: Task, num_envs: int, native: bool, env_kwargs: Mapping[str, Any]) -> tuple[list[Simulation], str | None]:
    """The simulations, and why they are not the compiled ones that were asked for, or None."""
    if native:
        env = robosuite.template(task, env_kwargs)
        unknown = None if task.robosuite_name in robosuite.SENSORS else "its success check is not compiled"
        reason = unknown or unsupported(env) or unsupported_reset(env)
        if reason is None:
            models = Models(env)
            return [NativeSimulation(task, env, models) for _ in range(num_envs)], None
        message = f"{task.name} is stepped by robosuite's own Python, not by the compiled loop: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    else:
        reason = None
    return [RobosuiteSimulation(task, robosuite.build(task, env_kwargs)) for _ in range(num_envs)], reason


def _task(task: str | Task) -> Task:
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise InputError("unknown task", found=task, expected=", ".join(TASKS))
    return TASKS[task]


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{name} must be at least 1", key=name, found=value)
    return int(value)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise InputError(f"{name} is not one of its choices", key=name, found=value, expected=", ".join(choices))
    return value
