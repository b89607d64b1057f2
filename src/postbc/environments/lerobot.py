"""Environments that LeRobot knows, its own and its plugins': "lerobot:TYPE/TASK", made and observed as by `lerobot-eval`.

`?` and LeRobot's own options of that type may follow, with `&` between: "lerobot:pusht/PushT-v0?obs_type=environment_state_agent_pos".
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping
from dataclasses import make_dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space, create_empty_array
from numpy.typing import NDArray

from postbc.data.lerobot import ACTION, ENVIRONMENT_STATE, STATE, camera_name
from postbc.environments.adapter import foreign_code
from postbc.environments.chunk import Observations
from postbc.environments.registry import Environment, from_vector_env
from postbc.errors import InputError, require

PREFIX = "lerobot:"


def import_lerobot(module: str = "lerobot.envs") -> Any:
    """A module of LeRobot. InputError: it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError("LeRobot is not installed, or cannot be imported.", found=str(error)[:200],
                         remedy="pip install 'postbc[lerobot]' (Python 3.12 and up)") from None  # fmt: skip


def environment_config(name: str) -> Any:
    """LeRobot's configuration of TYPE, TYPE/TASK, TYPE/TASK?option=value&…; its plugins are imported first.

    Raises:
        InputError: no LeRobot, no such type, or options that it does not take.
    """
    kinds = import_lerobot("lerobot.envs.configs").EnvConfig
    import_lerobot("lerobot.utils.import_utils").register_third_party_plugins()
    place, _, options = name.partition("?")
    kind, _, task = place.partition("/")
    known = list(kinds.get_known_choices())
    require(kind in known, "LeRobot knows no such type of environment.", key="environment", found=PREFIX + name,
            expected=f"{PREFIX}TYPE/TASK, TYPE one of {', '.join(known)}", remedy="install its plugin, lerobot_env_…")  # fmt: skip
    given = [("task", task)] * bool(task) + parse_qsl(options, keep_blank_values=True)
    words = [f"--env.type={kind}", *(f"--env.{option}={value}" for option, value in given)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return importlib.import_module("draccus").parse(make_dataclass("Asked", [("env", kinds)]), args=words).env
    except (Exception, SystemExit) as error:  # its parser ends the program, its configurations raise what they like
        found = said.getvalue().strip().splitlines()[-1:] or [f"{type(error).__name__}: {error}"]
        raise InputError("LeRobot does not take these options.", key="environment", found=found[0][:300],
                         expected=f"what `lerobot-eval {words[0]} --help` lists") from None  # fmt: skip


class NamedVectorEnv(VectorWrapper):
    """A vector environment of LeRobot's with our names: "state" (observation.state, observation.environment_state), "image.<camera>".

    Observations go the way that they go to a policy of LeRobot's, through its conversion and the environment's own processor; actions
    come back through the environment's.

    Args:
        env: LeRobot's.
        config: that it was made of.

    Raises:
        InputError: there is neither a state nor a camera.
    """

    def __init__(self, env: VectorEnv, config: Any) -> None:
        super().__init__(env)
        utils = import_lerobot("lerobot.envs.utils")
        self._convert, self._new_rollout = utils.preprocess_observation, utils.NEW_ROLLOUT_OPTION
        self._before, self._after = config.get_env_processors()
        blank = self._named(create_empty_array(env.single_observation_space, 1, np.zeros))
        require(blank, "There is nothing to observe.", key="environment", found=str(env.single_observation_space)[:300],
                expected=f"{STATE}, {ENVIRONMENT_STATE}, observation.images.…")  # fmt: skip
        self.single_observation_space = spaces.Dict({name: _box(value) for name, value in blank.items()})
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def _named(self, observation: Any) -> Observations:
        with foreign_code("LeRobot", "observation"):
            batch: Mapping[str, Any] = self._before(self._convert(observation))
            states = [batch[key].numpy() for key in (STATE, ENVIRONMENT_STATE) if key in batch]
            cameras = {key: batch[key] for key in batch if key.startswith("observation.image") and batch[key].ndim == 4}
            named = {"state": np.concatenate(states, 1).astype(np.float32)} if states else {}
            return named | {
                camera_name(key): (frames.numpy() * 255).round().astype(np.uint8) for key, frames in cameras.items()
            }

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Observations, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options={**(options or {}), self._new_rollout: True})
        return self._named(observation), info

    def step(self, actions: NDArray[Any]) -> tuple[Observations, Any, Any, Any, dict[str, Any]]:
        played = self._after({ACTION: torch.from_numpy(np.asarray(actions))})[ACTION].numpy()
        observation, reward, terminated, truncated, info = self.env.step(played)
        if "final_obs" in info:
            last = [None if one is None else self._last(one) for one in info["final_obs"]]
            info = {**info, "final_obs": last}
        return self._named(observation), reward, terminated, truncated, info

    def _last(self, observation: Any) -> Observations:
        return {name: value[0] for name, value in self._named(_batched(observation)).items()}


def _batched(observation: Any) -> Any:
    """An observation of one environment as a batch of one."""
    if isinstance(observation, Mapping):
        return {key: _batched(value) for key, value in observation.items()}
    return np.asarray(observation)[None]


def _box(example: NDArray[Any]) -> spaces.Box:
    """The space of what (1, …) is an example of."""
    bytes_ = example.dtype == np.uint8
    return spaces.Box(0 if bytes_ else -np.inf, 255 if bytes_ else np.inf, example.shape[1:], example.dtype.type)


def lerobot_environment(name: str) -> Environment:
    """An environment by LeRobot's names, TYPE/TASK?option=value: what `lerobot-eval --env.type=TYPE --env.task=TASK` plays in.

    Raises:
        InputError: no LeRobot; a type or options that it does not know; no limit of steps.
    """
    config = environment_config(name)
    limit = getattr(config, "episode_length", None)
    require(limit is not None, "This environment has no limit of steps.", key="environment", found=PREFIX + name,
            remedy=f"say it: {PREFIX}TYPE/TASK?episode_length=300")  # fmt: skip

    def factory(num_envs: int) -> VectorEnv:
        made = import_lerobot("lerobot.envs.factory").make_env(config, n_envs=num_envs, use_async_envs=False)
        several = {f"{suite} {number}": env for suite, tasks in made.items() for number, env in tasks.items()}
        require(len(several) == 1, "This is more than one task.", key="environment", found=", ".join(several)[:300], expected="one",
                remedy=f"choose one of them by its options: {PREFIX}libero/SUITE?task_ids=[3]")  # fmt: skip
        return NamedVectorEnv(next(iter(several.values())), config)

    facts = {"env_name": PREFIX + name, "env_version": None, "type": 2, "env_kwargs": {"control_freq": config.fps}}
    made = from_vector_env(
        factory,
        name=PREFIX + name,
        horizon=int(limit or 0),
        chunk=1,
        fps=round(config.fps),
        facts=facts,
        scene=partial(factory, 1),
    )
    return replace(made, check=lambda: import_lerobot() and None)
