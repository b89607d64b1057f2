"""Many of LIBERO's environments in one process, of one task or of several, which play chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postbc.data.libero_tasks import HORIZON, IMAGE, family, find_tasks, vocabulary
from postbc.environments.chunk import Observations, Termination, check_options
from postbc.environments.libero.goals import Goal
from postbc.environments.libero.loading import parse_problem
from postbc.environments.libero.rendering import CAMERAS
from postbc.environments.libero.scenes import HAND, Layout, find_scene
from postbc.environments.libero.simulation import LiberoSimulation, Playable
from postbc.environments.robosuite.building import environment_arguments
from postbc.environments.robosuite.native_control import control_step
from postbc.environments.robosuite.tasks import VERSION
from postbc.environments.robosuite.vector import SimulatedChunkEnv, check_threads, say_if_it_compiles
from postbc.errors import require


class LiberoChunkEnv(SimulatedChunkEnv):
    """N environments of LIBERO's tasks (a :class:`postbc.environments.chunk.ChunkEnv`).

    Observations: "state" (N, S) float32: robot0_eef_pos 3, robot0_eef_quat 4 (x, y, z, w), robot0_gripper_qpos 2; for each object
    14 as in LIBERO (position, quaternion, both in the hand's frame); the joints of drawers and knobs, and 3 for the position of each
    fixture; with several tasks, one-hot, which. "language" (N, E) float32, one-hot, which of `vocabulary`. Some of the kitchens'
    tasks ("kitchen/3+14") are observed as all of them are. With `images`, "state" is the first 9 numbers, and there are
    "image.agentview" and "image.wrist" (N, 3, size, size) uint8, upright, drawn where a chunk ends (so with chunk 1 at every step).
    Actions are chunks (N, T, 7) of OSC_POSE at 20 Hz, clipped to ±1. Rewards are 1 for a success, else 0.

    An episode's seed decides its task, its initial state, and where its fixtures stand: see
    :class:`postbc.environments.libero.simulation.LiberoSimulation`.

    Args:
        name: see :func:`postbc.environments.libero.find_tasks`.
        num_envs: N.
        chunk, horizon, terminate_on, num_threads: as in :class:`postbc.environments.robosuite.vector.RobosuiteChunkEnv`.
        images: whether cameras are observed, and not the objects.
        image_size: pixels of a side.

    Attributes:
        tasks: those that are played.
        vocabulary: names of the tasks that "language" tells apart.

    Raises:
        InputError: an argument that cannot be used, a task that nobody knows, or one whose goal is not read.
    """

    def __init__(
        self,
        name: str,
        num_envs: int = 1,
        *,
        chunk: int = 1,
        horizon: int = HORIZON,
        terminate_on: Termination = "success",
        num_threads: int | None = None,
        images: bool = False,
        image_size: int = IMAGE,
    ) -> None:
        check_options(num_envs, chunk, horizon, terminate_on)
        threads = check_threads(num_threads)
        good = isinstance(image_size, int) and 8 <= image_size <= 4096
        require(good, "An image has a size.", key="image_size", found=image_size, expected="8 to 4096 pixels")
        self.tasks, together = find_tasks(name), find_tasks(family(name))
        self.vocabulary = vocabulary(self.tasks)
        self._language = np.eye(len(self.vocabulary), dtype=np.float32)[[task.index for task in self.tasks]]
        scenes = [find_scene(task.bddl) for task in self.tasks]
        which = np.eye(len(together)) if len(together) > 1 else np.zeros((1, 0))
        playable = [
            Playable(
                scene, Goal(scene.env, parse_problem(task.bddl)["goal_state"]), task.init_states(), which[together.index(task)]
            )
            for task, scene in zip(self.tasks, scenes)
        ]
        # of the objects, which cameras stand for, all scenes of the family have a place
        layout = Layout(scenes if images else [find_scene(task.bddl) for task in together])
        say_if_it_compiles(control_step)
        simulations = [LiberoSimulation(playable, layout) for _ in range(num_envs)]
        state_dim = HAND if images else len(simulations[0].observation)
        super().__init__(
            f"libero/{name}", simulations, state_dim,
            chunk=chunk, horizon=horizon, terminate_on=terminate_on, num_threads=threads,
        )  # fmt: skip
        self.playing: list[LiberoSimulation] = simulations
        self._size, self._cameras = image_size, CAMERAS if images else {}
        frame = (3, image_size, image_size)
        self.shapes = {**dict.fromkeys(self._cameras, frame), **self.shapes, "language": self._language.shape[1:]}
        self._frames = {name: np.zeros((num_envs, *frame), np.uint8) for name in self._cameras}

    @property
    def task_names(self) -> list[str]:
        """(N,) of the tasks that the environments are in."""
        return [self.tasks[simulation.task].name for simulation in self.playing]

    def _observations(self, moved: NDArray[np.bool_]) -> Observations:
        for i in np.flatnonzero(moved) if self._cameras and self._draws else ():
            for name, camera in self._cameras.items():
                self._frames[name][i] = np.moveaxis(self.draw(int(i), self._size, self._size, camera, lagging=True), -1, 0)
        state = super()._observations(moved)["state"][:, : self.shapes["state"][0]]
        language = self._language[[simulation.task for simulation in self.playing]]
        return {**{name: frames.copy() for name, frames in self._frames.items()}, "state": state, "language": language}

    def draw(self, i: int, height: int, width: int, camera: str, *, lagging: bool) -> NDArray[np.uint8]:
        """As `render_frame`; `lagging`: of the poses as they are, a substep older than the joints, as observations are."""
        simulation = self.playing[i]
        scene, data = simulation.scene, simulation.data
        scene.show_burners(data)
        return scene.renderer.frame(data, height, width, camera, lagging=lagging)

    def render_frame(self, i: int = 0, height: int = 256, width: int = 256, camera: str = "agentview") -> NDArray[np.uint8]:
        """Environment i as a camera sees it: (H, W, 3) uint8, upright, without a display.

        Raises:
            InputError: no OpenGL for rendering without a display, or an unknown camera.
        """
        return self.draw(i, height, width, camera, lagging=False)

    def get_state(self) -> dict[str, Any]:
        """As above, with the frames of the cameras."""
        return super().get_state() | {"frames": {name: frames.copy() for name, frames in self._frames.items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`, bit for bit.

        Raises:
            InputError: the state is of other tasks, cameras or another number of environments.
        """
        sizes = {name: np.shape(frames) for name, frames in state["frames"].items()}
        here = {name: frames.shape for name, frames in self._frames.items()}
        require(sizes == here, "The state is of other cameras.", key="images", found=sizes, expected=here)
        super().set_state(state)
        for name, frames in self._frames.items():
            frames[:] = state["frames"][name]

    def sim_states(self) -> list[NDArray[np.float64]]:
        """robosuite's flattened states (Ds,) [time, qpos, qvel], N; their lengths differ by scene."""
        return [np.concatenate([[s.data.time], s.data.qpos, s.data.qvel]) for s in self.playing]

    def env_args(self) -> dict[str, Any]:
        """robomimic's `env_args`: {env_name, env_version, type, env_kwargs}, plain data for JSON."""
        return environment_facts(self.name)


def environment_facts(name: str) -> dict[str, Any]:
    """robomimic's `env_args` of an environment by its name here."""
    arguments = environment_arguments({"initialization_noise": None})
    return {"env_name": name, "env_version": VERSION, "type": 1, "env_kwargs": arguments}
