"""Push-T: a disc pushes a T onto its outline, by gym-pusht 0.1's physics, seeds and success (Diffusion Policy's task).

Stepping is gym-pusht's to the bit; what its `step` spends most time on, the share of the outline that is covered, is computed directly.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from postbc.data import pusht
from postbc.environments.chunk import (
    ChunkStep,
    Observations,
    Termination,
    check_chunks,
    check_options,
    check_reset,
)
from postbc.environments.registry import ENDLESS, Environment
from postbc.errors import InputError, require

Observed = Literal["keypoints", "state", "pixels"]
HORIZON, FPS = 300, 10
SIZE = 512.0
"""Pixels of the window, and the range of an action."""
SUCCESS = 0.95
"""Share of the outline that has to be covered."""
HUMAN = 0.75
"""What all 206 human demonstrations end above (0.77 to 0.90, median 0.85): gym-pusht's own 0.95 is beyond the demonstrator."""
GOAL = (256.0, 256.0, math.pi / 4)
"""x, y, angle of the outline."""
SUBSTEPS, DT, STIFFNESS, DAMPING = 10, 0.01, 100, 20
PIXELS = 96
#: The T's two rectangles in its own frame, as (x low, y low, x high, y high), and its area.
RECTANGLES = [(*pusht.CORNERS[k : k + 4].min(0), *pusht.CORNERS[k : k + 4].max(0)) for k in (0, 4)]
AREA = sum((c - a) * (d - b) for a, b, c, d in RECTANGLES)
#: name -> (name of the environment, state_keys)
VARIANTS: dict[Observed, tuple[str, tuple[str, ...]]] = {
    "keypoints": ("postbc/PushT", pusht.STATE_KEYS),
    "state": ("postbc/PushT-state", ("state",)),
    "pixels": ("postbc/PushT-pixels", ("agent_pos",)),
}


def import_gym_pusht() -> Any:
    """gym-pusht's environment class.

    Raises:
        InputError: not installed, or its libraries cannot be imported here.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("gym_pusht.envs.pusht").PushTEnv
    except Exception as error:  # pygame and OpenCV fail with exceptions of their own
        missing = isinstance(error, ModuleNotFoundError)
        remedy = (
            "pip install 'postbc[pusht]'" if missing else "reinstall gym-pusht: pip install --force-reinstall 'postbc[pusht]'"
        )
        raise InputError("Push-T cannot be imported.", found=f"{type(error).__name__}: {error}", remedy=remedy) from error


def pusht_environment(observation: Observed = "keypoints", covered: float = SUCCESS) -> Environment:
    """Push-T with the observation of `PushTChunkEnv`, solved where a share above `covered` of the outline is covered."""
    name, keys = VARIANTS[observation]
    name += "" if covered == SUCCESS else "-human"

    def make(num_envs: int, *, chunk: int, horizon: int, terminate_on: Termination) -> PushTChunkEnv:
        return PushTChunkEnv(
            num_envs, chunk=chunk, horizon=horizon, terminate_on=terminate_on, observation=observation, covered=covered
        )

    def check() -> None:
        import_gym_pusht()

    def scene() -> PushTChunkEnv:
        return make(1, chunk=1, horizon=ENDLESS, terminate_on="never")

    return Environment(name, make, HORIZON, 8, FPS, lambda: pusht.ENVIRONMENT, check, scene, keys)


class PushTChunkEnv:
    """N environments (a :class:`postbc.environments.chunk.ChunkEnv`), one after the other in this process.

    Args:
        num_envs, chunk, horizon, terminate_on: as in :class:`postbc.environments.adapter.ChunkAdapter`; no episode ends by itself.
        observation: "keypoints": {"state": agent x, y and the T's 8 corners (18)}; "state": {"state": agent x, y, block x, y, angle
            (5)}; "pixels": {"image.top": (3, 96, 96) uint8, "state": agent x, y}, drawn once a chunk.

        covered: share of the outline that a success covers; gym-pusht's by default.

    Actions (2,) are where the disc shall go, in pixels (0 to 512, clipped), at 10 Hz. Rewards are the share of the outline that is
    covered, of 0.95, at most 1. An episode's seed decides its first state, as `reset(seed=…)` of gym-pusht does.

    Raises:
        InputError: an argument that cannot be used, or gym-pusht is missing.
    """

    action_dim, chooses_episodes, fps = 2, True, FPS

    def __init__(
        self,
        num_envs: int = 1,
        *,
        chunk: int = 8,
        horizon: int = HORIZON,
        terminate_on: Termination = "success",
        observation: Observed = "keypoints",
        covered: float = SUCCESS,
    ) -> None:
        check_options(num_envs, chunk, horizon, terminate_on)
        require(
            observation in VARIANTS,
            "There is no such observation.",
            key="observation",
            found=observation,
            expected=", ".join(VARIANTS),
        )
        self.num_envs, self.chunk, self.horizon, self.terminate_on = num_envs, chunk, horizon, terminate_on
        self.observation, self.covered = observation, covered
        widths = {"keypoints": 18, "state": 5, "pixels": 2}
        image = {"image.top": (3, PIXELS, PIXELS)} if observation == "pixels" else {}
        self.shapes: Mapping[str, tuple[int, ...]] = {**image, "state": (widths[observation],)}
        cls = import_gym_pusht()
        self._envs = [cls(obs_type="state", observation_width=PIXELS, observation_height=PIXELS) for _ in range(num_envs)]
        for env in self._envs:
            env.reset(seed=0)
        self.seeds = np.zeros(num_envs, np.int64)
        self._played: list[list[tuple[float, float]]] = [[] for _ in range(num_envs)]  # since the episode began
        self._waiting, self._started = np.ones(num_envs, bool), np.zeros(num_envs, bool)
        self._frames = np.zeros((num_envs, 3, PIXELS, PIXELS), np.uint8)
        self._draws = True

    def set_drawing(self, on: bool) -> None:
        """Whether pictures are drawn from now on; while they are not, observations hold the former ones."""
        self._draws = on

    # --- episodes

    def reset(self, seeds: Sequence[int] | NDArray[Any], mask: NDArray[np.bool_] | None = None) -> Observations:
        numbers, chosen = check_reset(self.num_envs, seeds, mask)
        for i in np.flatnonzero(chosen):
            self.seeds[i], self._waiting[i], self._started[i] = numbers[i], False, True
            self._envs[i].reset(seed=int(numbers[i]))
            self._played[i] = []
        return self._observe(chosen)

    def step(self, chunks: NDArray[np.floating[Any]]) -> ChunkStep:
        """Play a chunk (T, 2) in each environment that is not waiting. InputError: another shape than (N, T, 2), or not finite."""
        n, t = self.num_envs, self.chunk
        commands = np.clip(check_chunks(chunks, (n, t, 2), self._started), 0.0, SIZE)
        rewards, successes, executed = np.zeros((n, t)), np.zeros((n, t), bool), np.zeros(n, np.int64)
        running = ~self._waiting
        for i in np.flatnonzero(running):
            for k in range(min(t, self.horizon - len(self._played[i]))):
                self._move(int(i), *commands[i, k].tolist())
                covered = coverage(*self._block(int(i)))
                rewards[i, k], successes[i, k] = min(covered / SUCCESS, 1.0), covered > self.covered
                executed[i] += 1
                if successes[i, k] and self.terminate_on == "success":
                    break
        ending = {"success": successes.any(1), "chunk_success": successes.all(1), "never": np.zeros(n, bool)}
        terminated = running & ending[self.terminate_on]
        truncated = running & ~terminated & (np.array([len(played) for played in self._played]) >= self.horizon)
        self._waiting |= terminated | truncated
        return ChunkStep(self._observe(executed > 0), rewards, successes, executed, terminated, truncated, np.zeros(n, bool))

    def _move(self, i: int, x: float, y: float) -> None:
        """`PushTEnv.step` up to its reward: the disc is drawn to (x, y) by a damped spring."""
        env = self._envs[i]
        agent, space = env.agent, env.space
        for _ in range(SUBSTEPS):
            (px, py), (vx, vy) = agent.position, agent.velocity
            ax, ay = STIFFNESS * (x - px) + DAMPING * (0.0 - vx), STIFFNESS * (y - py) + DAMPING * (0.0 - vy)
            agent.velocity = (vx + ax * DT, vy + ay * DT)
            space.step(DT)
        self._played[i].append((x, y))

    def _block(self, i: int) -> tuple[float, float, float]:
        block = self._envs[i].block
        return (*block.position, block.angle)

    # --- observations

    def states(self) -> NDArray[np.float64]:
        """(N, 5) agent x, y, block x, y, angle in [0, 2π): the demonstrations' `state`."""
        return np.array([[*env.agent.position, *env.block.position, env.block.angle % (2 * np.pi)] for env in self._envs])

    def _observe(self, changed: NDArray[np.bool_]) -> Observations:
        states = self.states()
        if self.observation == "keypoints":
            return {"state": pusht.observation(states)}
        if self.observation == "state":
            return {"state": states.astype(np.float32)}
        for i in np.flatnonzero(changed) if self._draws else ():
            self._frames[i] = np.moveaxis(self._envs[i]._render(), -1, 0)
        return {"image.top": self._frames.copy(), "state": states[:, :2].astype(np.float32)}

    def render_frame(self, i: int = 0, height: int = 256, width: int = 256) -> NDArray[np.uint8]:
        """Environment i from above, (H, W, 3) uint8."""
        env = self._envs[i]
        env.visualization_height, env.visualization_width = height, width
        return np.asarray(env.render(), np.uint8)

    # --- states

    def get_state(self) -> dict[str, Any]:
        """Seeds, and the actions since: the physics (its contacts remember impulses) is only had again by playing them."""
        played = {str(i): np.array(actions, np.float64).reshape(-1, 2) for i, actions in enumerate(self._played)}
        return {"seeds": self.seeds.copy(), "waiting": self._waiting.copy(), "played": played}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`get_state`, bit for bit; takes a sixth of a millisecond an action that was played."""
        count = len(state["seeds"])
        require(count == self.num_envs, "The state is of another number of environments.", found=count, expected=self.num_envs)
        self.reset(state["seeds"])
        for i in range(count):
            for x, y in np.asarray(state["played"][str(i)]).tolist():
                self._move(i, x, y)
        self._waiting[:] = state["waiting"]
        self._observe(np.ones(count, bool))

    def close(self) -> None:
        for env in self._envs:
            env.close()


def coverage(x: float, y: float, angle: float) -> float:
    """The share of the outline that the T at this pose (pixels, rad) covers: of each pair of rectangles, the area common to both."""
    gx, gy, ga = GOAL
    if (x - gx) ** 2 + (y - gy) ** 2 > 300.0**2:  # no point of the T is further than 125 from its origin
        return 0.0
    cos, sin = math.cos(angle - ga), math.sin(angle - ga)
    c, s = math.cos(ga), math.sin(ga)
    ox, oy = c * (x - gx) + s * (y - gy), c * (y - gy) - s * (x - gx)  # in the outline's frame
    total = 0.0
    for left, low, right, high in RECTANGLES:
        corners = ((left, low), (right, low), (right, high), (left, high))
        polygon = [(ox + cos * u - sin * v, oy + sin * u + cos * v) for u, v in corners]
        for box in RECTANGLES:
            total += _common_area(polygon, box)
    return total / AREA


def _common_area(polygon: list[tuple[float, float]], box: Sequence[float]) -> float:
    """Area of a convex polygon (counter-clockwise) within an upright box: cut by each side in turn (Sutherland and Hodgman 1974)."""
    for axis in (0, 1):
        values = [point[axis] for point in polygon]
        if max(values) <= box[axis] or min(values) >= box[axis + 2]:
            return 0.0
    for axis, limit, sign in ((0, box[0], 1.0), (1, box[1], 1.0), (0, box[2], -1.0), (1, box[3], -1.0)):
        kept: list[tuple[float, float]] = []
        previous = polygon[-1]
        before = sign * (previous[axis] - limit)
        for point in polygon:
            now = sign * (point[axis] - limit)
            if (now > 0) != (before > 0):
                share = before / (before - now)
                kept.append((previous[0] + share * (point[0] - previous[0]), previous[1] + share * (point[1] - previous[1])))
            if now > 0:
                kept.append(point)
            previous, before = point, now
        if len(kept) < 3:
            return 0.0
        polygon = kept
    area = 0.0
    (ax, ay) = polygon[-1]
    for bx, by in polygon:
        area += ax * by - bx * ay
        ax, ay = bx, by
    return 0.5 * area
