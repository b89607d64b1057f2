"""The one adapter: chunks of actions in any gymnasium `VectorEnv` of single steps, however it begins its next episodes.

gymnasium's vector environments differ in what happens at an episode's end (`metadata["autoreset_mode"]`): the next episode begins in
the same step (its last observation and info are in `final_obs` and `final_info`), in the next step (which then is no step but a
reset), or when it is told to. Outward all are alike: an ended environment waits for :meth:`ChunkAdapter.reset`, and its last
observation is its own. Meanwhile whatever happens inside it, where it has to be stepped along with the others, is thrown away.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from postbc.data.episodes import is_image
from postbc.environments.chunk import ChunkStep, Observations, Termination, check_chunks, check_options, check_reset
from postbc.environments.saving import StateSaver
from postbc.environments.spaces import ActionBox, ObservationReader
from postbc.environments.success import Success, SuccessReader
from postbc.errors import InputError, NotFiniteError, require


@contextlib.contextmanager
def foreign_code(what: str, doing: str) -> Iterator[None]:
    """Whatever the environment `what` raises in `doing` is an :class:`InputError` that names both, and the line it comes from."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise InputError(
            "The environment has failed.", key=doing, found=f"{type(error).__name__}: {error}"[:500] + where,
            expected=f"a {doing} of {what} that raises nothing", remedy="mend the environment",
        ) from error  # fmt: skip


class ChunkAdapter:
    """N environments of single steps as a :class:`postbc.environments.chunk.ChunkEnv`.

    Args:
        env: any gymnasium `VectorEnv`; see :class:`postbc.environments.spaces.ObservationReader` for its observations. Actions are
            clipped to its box.
        chunk: T.
        horizon: actions of an episode until it is truncated, unless the environment ends it before.
        terminate_on: "success": the first successful action ends the episode, and its chunk; "chunk_success": the first chunk whose
            T actions are all successful does; "never": only the environment itself.
        success: see :class:`postbc.environments.success.SuccessReader`.
        single_resets: whether `env.reset` takes a seed for each environment and options={"reset_mask": (N,) bool}, as those of
            `SyncVectorEnv` and `AsyncVectorEnv` do, in every autoreset mode. Default: those two, and whatever leaves resetting to its
            user. Without, episodes are those that the environment begins by itself (`chooses_episodes` is False).
        name: what messages call it; default the vector environment's class.

    Raises:
        InputError: spaces that are not read, or an environment that does not say how it resets, or cannot serve.
    """

    def __init__(
        self,
        env: VectorEnv,
        chunk: int,
        *,
        horizon: int,
        terminate_on: Termination = "success",
        success: Success = "auto",
        single_resets: bool | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or type(env).__name__
        n = self.num_envs = int(env.num_envs)
        check_options(n, chunk, horizon, terminate_on)
        self.env: Any = env
        self.chunk, self.horizon, self.terminate_on = chunk, horizon, terminate_on
        self.mode = _autoreset_mode(env)
        self._gymnasiums = isinstance(env.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        self._single = self._gymnasiums or self.mode == AutoresetMode.DISABLED if single_resets is None else single_resets
        self.chooses_episodes = self._single or n == 1
        require(self.chooses_episodes or self.mode != AutoresetMode.NEXT_STEP,
                "This vector environment begins an episode a step late, and all at once or none.", key="env", found=type(env).__name__,
                remedy="use gymnasium.vector.SyncVectorEnv or AsyncVectorEnv, or autoreset in the same step")  # fmt: skip
        late = (
            self.mode == AutoresetMode.NEXT_STEP
            and isinstance(env.unwrapped, AsyncVectorEnv)
            and not env.unwrapped.shared_memory
        )
        require(not late, "gymnasium's AsyncVectorEnv without shared memory resets environments twice.", key="shared_memory",
                found=False, remedy="give shared_memory=True, or autoreset_mode=AutoresetMode.DISABLED")  # fmt: skip
        self._read, self._box = ObservationReader(env.single_observation_space), ActionBox(env.single_action_space)
        self._success, self._saver = SuccessReader(success), StateSaver(env) if self._single else None
        self.shapes: Mapping[str, tuple[int, ...]] = self._read.shapes
        self.action_dim = self._box.dim
        self._began = False  # the first reset is of all
        self._running, self._steps = np.zeros(n, bool), np.zeros(n, np.int64)
        self._inner_over = np.zeros(n, bool)  # an episode of the environment's is over, and it has not begun another
        self._renewed = np.zeros(n, bool)  # since an episode ended outward the environment has begun another by itself
        self._observation: Observations = {k: np.zeros((n, *s), _dtype(k)) for k, s in self.shapes.items()}
        self._latest = self._observation  # the environment's own, which may be of an episode that nobody plays

    # --- episodes

    def reset(self, seeds: Sequence[int] | np.ndarray, mask: NDArray[np.bool_] | None = None) -> Observations:
        """Begin episodes in the environments of `mask` (N,) (default all), with these seeds where the environment lets choose.

        Raises:
            InputError: an environment that only resets all at once should begin another episode in the middle of one.
        """
        numbers, chosen = check_reset(self.num_envs, seeds, mask)
        others = self._running & ~chosen
        if self._began and others.any() and not self._single:
            unfinished = np.flatnonzero(chosen & ~self._renewed).tolist()
            require(not unfinished, "An episode has to begin, and this vector environment is in the middle of its own.", key="env",
                    found=f"environments {unfinished} of {type(self.env).__name__}, which cannot be reset by themselves",
                    remedy="let it end its episodes on success and at the horizon, or use SyncVectorEnv or AsyncVectorEnv")  # fmt: skip
            latest = self._latest
        else:
            latest = self._reset_inside(chosen, [int(s) if on else None for s, on in zip(numbers, chosen)])
            if others.any() and not self._gymnasiums:
                self._check_untouched(latest, others)
        for name, value in self._observation.items():
            value[chosen] = latest[name][chosen]
        self._running[chosen], self._steps[chosen], self._renewed[chosen] = True, 0, False
        return self._copy()

    def _reset_inside(self, mask: NDArray[np.bool_], seeds: list[int | None]) -> Observations:
        """Reset the environments of `mask`, or all if that is not possible or this is the first time; what it observes now."""
        partly = self._single and self._began and not mask.all()
        with foreign_code(self.name, "reset"):
            if self._single:
                batch, _ = self.env.reset(
                    seed=seeds, options={"reset_mask": mask.copy()} if partly else None
                )  # it pops the mask
            else:
                batch, _ = self.env.reset(seed=next((s for s in seeds if s is not None), None))
            self._latest = self._read(batch)
        self._inner_over[mask if partly else slice(None)] = False
        self._began = True
        self._check_finite(self._latest, mask, 0)
        return self._latest

    def _check_finite(self, observation: Observations, mask: NDArray[np.bool_], later: int) -> None:
        for name, value in observation.items():
            bad = mask & ~np.isfinite(value.reshape(len(value), -1)).all(1) if value.dtype != np.uint8 else mask & False
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                raise NotFiniteError(
                    "The environment's observation is not finite.", key=name, remedy="mend the environment",
                    found=f"NaN or infinite in environment {i} of {self.name}, step {(int(self._steps[i]) + 1) * later} of its episode",
                )  # fmt: skip

    def _check_untouched(self, latest: Observations, others: NDArray[np.bool_]) -> None:
        same = all(
            np.array_equal(latest[k][others], v[others], equal_nan=v.dtype != np.uint8) for k, v in self._observation.items()
        )
        require(same, "This vector environment resets environments that it was not told to.", key="reset_mask",
                found=type(self.env).__name__, expected='reset(options={"reset_mask": …}) resets those of the mask only',
                remedy="mend its reset, or give single_resets=False")  # fmt: skip

    # --- stepping

    def step(self, chunks: NDArray[np.floating[Any]]) -> ChunkStep:
        """Play one chunk in each environment that is not waiting for its reset.

        Raises:
            InputError: chunks of another shape than (N, T, A) or not finite; or an episode has ended, and success was never reported.
        """
        n, t = self.num_envs, self.chunk
        commands = self._box.clip(check_chunks(chunks, (n, t, self.action_dim), self._running | self._began))
        rewards, successes, executed = np.zeros((n, t)), np.zeros((n, t), bool), np.zeros(n, np.int64)
        terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
        playing = self._running.copy()
        for k in range(t):
            if not playing.any():
                break
            reward, success, ended, cut = self._step_inside(commands[:, k], playing)
            rewards[playing, k], successes[playing, k] = reward[playing], success[playing]
            executed += playing
            self._steps += playing
            terminated |= playing & (ended | (success if self.terminate_on == "success" else False))
            truncated |= playing & (cut | (self._steps >= self.horizon))
            playing &= ~(terminated | truncated)
        if self.terminate_on == "chunk_success":
            terminated |= self._running & successes.all(1)
        truncated &= ~terminated
        over = terminated | truncated
        self._running &= ~over
        if over.any():
            self._success.require_reported()
        return ChunkStep(self._copy(), rewards, successes, executed, terminated, truncated, np.zeros(n, bool))

    def _step_inside(
        self, action: NDArray[np.floating[Any]], playing: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """One step of the environment, `playing` (N,) with their actions (N, A); reward, success, terminated, truncated, (N,) each."""
        if self.mode == AutoresetMode.DISABLED and self._inner_over.any():  # who waits would keep the others from being stepped
            self._reset_inside(self._inner_over.copy(), [None] * self.num_envs)
        action = np.where(playing[:, None], action, self._box.idle).astype(self._box.dtype)
        with foreign_code(self.name, "step"):
            batch, reward, terminated, truncated, info = self.env.step(action)
            terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
            self._latest = self._read(batch)
        over, same_step = terminated | truncated, self.mode == AutoresetMode.SAME_STEP
        for name, value in self._observation.items():
            value[playing] = self._latest[name][playing]
        if same_step:
            self._take_final(info, playing & over)
        self._renewed |= over if same_step else self._inner_over
        self._inner_over = over & (not same_step)
        self._check_finite(self._observation, playing, 1)
        reward = np.asarray(reward)
        good = reward.dtype.kind in "biuf" and bool(np.isfinite(reward[playing]).all())
        require(good, "The environment's reward is no finite number.", key="reward", found=reward[playing].tolist()[:10],
                expected="finite numbers", remedy="mend the environment")  # fmt: skip
        reward = reward.astype(float)
        return reward, self._success(info, reward, terminated, over, playing, same_step), terminated, truncated

    def _take_final(self, info: Mapping[str, Any], ended: NDArray[np.bool_]) -> None:
        last = info.get("final_obs", info.get("final_observation"))
        for i in np.flatnonzero(ended):
            require(last is not None and last[i] is not None, "An episode ended, and its last observation is nowhere.", key="final_obs",
                    found=f"info of {type(self.env).__name__}: {', '.join(k for k in info if k[0] != '_')}",
                    remedy="put it where gymnasium has it, or take another autoreset mode")  # fmt: skip
            with foreign_code(self.name, "final_obs"):
                final = self._read.single(last[i])  # type: ignore[index]
            for name, value in final.items():
                self._observation[name][i] = value[0]

    def _copy(self) -> Observations:
        return {name: value.copy() for name, value in self._observation.items()}

    # --- states

    def get_state(self) -> dict[str, Any] | None:
        """Everything that the future depends on; None where the environments have no `get_state` and `set_state`."""
        with foreign_code(self.name, "get_state"):
            inside = self._saver.get() if self._saver is not None and self._began else None
        if inside is None:
            return None
        own = {"running": self._running, "steps": self._steps, "inner_over": self._inner_over}
        own = {key: value.copy() for key, value in own.items()}
        return {"inside": inside, "reported": self._success.reported, "observation": self._copy(), **own}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`get_state`."""
        require(len(state["running"]) == self.num_envs, "The state is of another number of environments.", found=len(state["running"]),
                expected=self.num_envs)  # fmt: skip
        if self._saver is None:
            raise InputError("These environments cannot be put into a state.", found=type(self.env).__name__)
        if not self._saver.whole:  # episodes of their own for those that wait, and whatever a first reset sets up
            self._reset_inside(np.ones(self.num_envs, bool), [None] * self.num_envs)
        with foreign_code(self.name, "set_state"):
            self._saver.set(state["inside"])
        self._began, self._success.reported = True, bool(state["reported"])
        self._running[:], self._steps[:] = state["running"], state["steps"]
        if self._saver.whole:
            self._inner_over[:] = state["inner_over"]
        for name, value in self._observation.items():
            value[:] = state["observation"][name]

    # ---

    def render_frame(self, i: int = 0, height: int = 0, width: int = 0) -> NDArray[np.uint8]:
        """Environment i as it draws itself, (H, W, 3) uint8, in its own size.

        Raises:
            InputError: it was not made with render_mode "rgb_array".
        """
        with foreign_code(self.name, "render"):
            frames: Any = self.env.render()
        good = isinstance(frames, tuple | list) and isinstance(frames[i], np.ndarray) and frames[i].ndim == 3
        require(good, "This environment draws no frames.", key="render_mode", found=self.env.render_mode, expected="rgb_array")
        return np.asarray(frames[i], np.uint8)[..., :3]

    def close(self) -> None:
        with foreign_code(self.name, "close"):
            self.env.close()


def _dtype(name: str) -> type:
    return np.uint8 if is_image(name) else np.float32


def _autoreset_mode(env: VectorEnv) -> AutoresetMode:
    found = (env.metadata or {}).get("autoreset_mode")
    try:
        return AutoresetMode(found)
    except ValueError:
        raise InputError(
            "A vector environment has to say when it begins its next episodes.", key='metadata["autoreset_mode"]', found=found,
            expected=", ".join(f"AutoresetMode.{mode.name}" for mode in AutoresetMode),
        ) from None  # fmt: skip
