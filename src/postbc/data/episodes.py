"""Demonstrations in memory: validated arrays, one :class:`Trajectory` an episode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from postbc.errors import InputError

#: robomimic's low-dimensional keys in its order; concatenated 3 + 4 + 2 + 10 (Lift) or 14 (Can, Square) = 19 or 23 numbers.
LOW_DIM_KEYS: tuple[str, ...] = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")


def _array(values: Any, dtype: type, key: str, ndim: int) -> np.ndarray:
    """``values`` as a contiguous array of ``dtype`` with ``ndim`` axes and finite numbers; InputError names ``key`` otherwise."""
    try:
        array: np.ndarray = np.ascontiguousarray(values, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise InputError("The values are not numbers of one shape.", key=key, found=str(error)) from error
    if np.ndim(values) != ndim:
        raise InputError(
            "The array has the wrong number of axes.",
            key=key,
            found=f"shape {np.shape(values)}",
            expected=f"{ndim} axes, time first",
        )
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        value = np.asarray(values)[tuple(bad[0])]
        raise InputError(
            "The array holds NaN or infinite values.",
            key=key,
            found=f"{len(bad)} of {array.size} values, the first is {value} at index {tuple(int(i) for i in bad[0])}",
            expected="finite numbers",
            remedy="repair or drop this trajectory; nothing is interpolated for you",
        )
    return array


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One episode of N steps; ``observations[t]`` and ``states[t]`` are before ``actions[t]``, rewards and dones after it.

    Arrays are converted to the dtypes below. Raises InputError for lengths that disagree, zero steps, NaN or infinite values.
    """

    observations: np.ndarray
    """(N, S) float32, raw units (metres, unit quaternions x y z w)."""
    actions: np.ndarray
    """(N, A) float32, raw units: the controller's input, [-1, 1] for robosuite."""
    rewards: np.ndarray
    """(N,) float32."""
    dones: np.ndarray
    """(N,) bool."""
    states: np.ndarray | None = None
    """(N, Ds) float64 flattened simulator states [time, qpos, qvel], or None."""
    name: str = "demo_0"
    """Name inside the file; filters refer to it."""
    operator: str | None = None
    """Who or what produced it."""
    episode_seed: int | None = None
    """Seed of the simulator's episode where known: it decides what the state leaves out (the size of Lift's cube)."""

    def __post_init__(self) -> None:
        specs: list[tuple[str, type, int]] = [
            ("observations", np.float32, 2),
            ("actions", np.float32, 2),
            ("rewards", np.float32, 1),
            ("dones", np.bool_, 1),
            ("states", np.float64, 2),
        ]
        for key, dtype, ndim in specs:
            if getattr(self, key) is not None:
                object.__setattr__(self, key, _array(getattr(self, key), dtype, f"{self.name}/{key}", ndim))
        lengths = {key: len(getattr(self, key)) for key, _, _ in specs if getattr(self, key) is not None}
        if lengths["actions"] == 0 and set(lengths.values()) == {0}:
            raise InputError(
                "The trajectory has no steps.",
                key=self.name,
                found="0 steps",
                expected="at least 1",
                remedy="remove it from the data",
            )
        if len(set(lengths.values())) > 1:
            raise InputError(
                "The arrays of a trajectory disagree about its length.",
                key=self.name,
                found=", ".join(f"{key}: {n}" for key, n in lengths.items()),
                expected="one entry a step in each",
                remedy="drop the trajectory, or cut the arrays to the steps that all of them have",
            )

    def __len__(self) -> int:
        """Number of steps N."""
        return len(self.actions)


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """Trajectories of one task with what is needed to interpret them."""

    trajectories: tuple[Trajectory, ...]
    """At least one, all with the same S and A, names distinct."""
    observation_keys: tuple[str, ...] = ("observation",)
    """Names of the parts that are concatenated into an observation."""
    observation_dims: tuple[int, ...] = ()
    """Width of each part; their sum is S. Empty: one key, all of it."""
    environment: dict[str, Any] = field(default_factory=dict)
    """robomimic's ``env_args``: env_name, env_version, type, env_kwargs; empty when there is no simulator."""
    filters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Filter key -> names of trajectories (robomimic's ``mask``)."""
    source: str = "arrays"
    """Where they came from: a path, or a word."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "trajectories", tuple(self.trajectories))
        if not self.trajectories:
            raise InputError("There are no trajectories.", file=self.source, found=0, expected="at least 1")
        first = self.trajectories[0]
        for part in ("observations", "actions"):
            width = getattr(first, part).shape[1]
            for trajectory in self.trajectories[1:]:
                found = getattr(trajectory, part).shape[1]
                if found != width:
                    raise InputError(
                        "Trajectories differ in width.",
                        file=self.source,
                        key=f"{trajectory.name}/{part}",
                        found=f"width {found}",
                        expected=f"width {width}, as in {first.name}",
                        remedy="keep only trajectories of one robot and one controller",
                    )
        if not self.observation_dims and len(self.observation_keys) == 1:
            object.__setattr__(self, "observation_dims", (self.observation_dim,))
        if len(self.observation_dims) != len(self.observation_keys) or sum(self.observation_dims) != self.observation_dim:
            raise InputError(
                "The observation keys do not describe the observations.",
                file=self.source,
                key="observation_keys",
                found=f"{dict(zip(self.observation_keys, self.observation_dims))} for observations of width {self.observation_dim}",
                expected="one width a key, with the observation's width as their sum",
            )
        names = [trajectory.name for trajectory in self.trajectories]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise InputError(
                "Two trajectories have the same name.", file=self.source, key=repeated[0], expected="distinct names"
            )
        known = set(names)
        for key, members in self.filters.items():
            for name in members:
                if name not in known:
                    raise InputError(
                        "A filter names a demonstration that is not there.",
                        file=self.source,
                        key=f"mask/{key}",
                        found=repr(name),
                        expected=f"one of the {len(names)} demonstrations, {names[0]} to {names[-1]}",
                        remedy="remove the name from the mask, or restore the demonstration",
                    )

    @classmethod
    def from_arrays(
        cls,
        observations: Sequence[np.ndarray],
        actions: Sequence[np.ndarray],
        *,
        rewards: Sequence[np.ndarray] | None = None,
        dones: Sequence[np.ndarray] | None = None,
        states: Sequence[np.ndarray] | None = None,
        names: Sequence[str] | None = None,
        operators: Sequence[str | None] | None = None,
        observation_keys: Sequence[str] = ("observation",),
        observation_dims: Sequence[int] = (),
        environment: dict[str, Any] | None = None,
        filters: dict[str, Sequence[str]] | None = None,
        source: str = "arrays",
    ) -> Demonstrations:
        """From plain numpy: one (N_i, S) observation array and one (N_i, A) action array a trajectory.

        Rewards default to 0 with 1 at the last step, dones to True at the last step, names to ``demo_0``, ``demo_1``, ….
        """
        n = len(actions)
        given = {
            "observations": observations, "rewards": rewards, "dones": dones, "states": states, "names": names, "operators": operators
        }  # fmt: skip
        for key, values in given.items():
            if values is not None and len(values) != n:
                raise InputError("The lists differ in length.", key=key, found=len(values), expected=f"{n}, as many as actions")

        def last(i: int) -> np.ndarray:
            return np.arange(len(actions[i])) == len(actions[i]) - 1

        trajectories = tuple(
            Trajectory(
                observations=observations[i],
                actions=actions[i],
                rewards=last(i) if rewards is None else rewards[i],
                dones=last(i) if dones is None else dones[i],
                states=None if states is None else states[i],
                name=f"demo_{i}" if names is None else names[i],
                operator=None if operators is None else operators[i],
            )
            for i in range(n)
        )
        return cls(
            trajectories,
            tuple(observation_keys),
            tuple(observation_dims),
            dict(environment or {}),
            {key: tuple(members) for key, members in (filters or {}).items()},
            source,
        )

    def __len__(self) -> int:
        """Number of trajectories."""
        return len(self.trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    def __getitem__(self, index: int) -> Trajectory:
        return self.trajectories[index]

    @property
    def observation_dim(self) -> int:
        """S."""
        return int(self.trajectories[0].observations.shape[1])

    @property
    def action_dim(self) -> int:
        """A."""
        return int(self.trajectories[0].actions.shape[1])

    @property
    def num_steps(self) -> int:
        """Steps of all trajectories together."""
        return sum(len(trajectory) for trajectory in self.trajectories)

    @property
    def lengths(self) -> np.ndarray:
        """(len(self),) int64 steps of each trajectory."""
        return np.array([len(trajectory) for trajectory in self.trajectories], dtype=np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(trajectory.name for trajectory in self.trajectories)

    @property
    def observations(self) -> np.ndarray:
        """(num_steps, S) all observations, trajectory after trajectory."""
        return np.concatenate([trajectory.observations for trajectory in self.trajectories])

    @property
    def actions(self) -> np.ndarray:
        """(num_steps, A) all actions, trajectory after trajectory."""
        return np.concatenate([trajectory.actions for trajectory in self.trajectories])

    def _keep(self, names: set[str]) -> Demonstrations:
        kept = tuple(trajectory for trajectory in self.trajectories if trajectory.name in names)
        filters = {key: tuple(name for name in members if name in names) for key, members in self.filters.items()}
        return replace(self, trajectories=kept, filters={key: members for key, members in filters.items() if members})

    def select(self, filter_key: str) -> Demonstrations:
        """The trajectories of one filter (robomimic's ``mask/<filter_key>``), in order. InputError if unknown or empty."""
        if filter_key not in self.filters:
            raise InputError(
                "There is no such filter.",
                file=self.source,
                key=f"mask/{filter_key}",
                found=f"filters {sorted(self.filters)}" if self.filters else "no filters at all",
                remedy="choose one of those found, or leave the filter out to use every demonstration",
            )
        if not self.filters[filter_key]:
            raise InputError(
                "The filter selects no demonstration.", file=self.source, key=f"mask/{filter_key}", found="an empty list"
            )
        return self._keep(set(self.filters[filter_key]))

    def subset(self, n: int, seed: int) -> Demonstrations:
        """``n`` trajectories drawn without replacement by ``seed``, in this object's order.

        The first n of one permutation, so that with one seed a smaller subset lies inside every larger one (paper, figure on the number
        of demonstrations: the curves then differ by added data only). InputError if there are fewer than n.
        """
        if not 1 <= n <= len(self):
            raise InputError(
                "Cannot draw that many demonstrations.",
                file=self.source,
                key="number of demonstrations",
                found=f"{n} asked for, {len(self)} there",
                expected=f"1 to {len(self)}",
                remedy="ask for fewer, or use a larger file or another filter",
            )
        if seed < 0:
            raise InputError("A seed is not negative.", key="seed", found=seed, expected=">= 0")
        chosen = np.random.default_rng(seed).permutation(len(self))[:n]
        return self._keep({self.trajectories[int(i)].name for i in chosen})
