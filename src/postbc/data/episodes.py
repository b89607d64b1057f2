"""Episodes of named observations, validated: what everything else in the house is trained on and measured with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from postbc.data.lazy import LazyArray, SparseFrames
from postbc.errors import InputError, require

#: robomimic's low-dimensional keys in its order; concatenated 3 + 4 + 2 + 10 (Lift) or 14 (Can, Square) = 19 or 23 numbers.
LOW_DIM_KEYS: tuple[str, ...] = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")

#: Name of the observation that holds a posterior's coordinates g (R,), where a policy is conditioned on them.
COORDINATES = "posterior"

Frames = np.ndarray | LazyArray | SparseFrames
Observed = Mapping[str, Frames]


def is_image(name: str) -> bool:
    """Whether an observation of this name holds frames (C, H, W) uint8 rather than numbers."""
    return name.startswith("image.")


def _array(values: Any, dtype: type, key: str, ndim: int) -> np.ndarray:
    """`values` as a contiguous array of `dtype` with `ndim` axes and finite numbers; InputError names `key` otherwise."""
    require(not np.iscomplexobj(values), "Complex numbers cannot be used.", key=key, expected="real numbers")
    try:
        with np.errstate(over="ignore"):  # said below, with its place
            array: np.ndarray = np.ascontiguousarray(values, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise InputError("The values are not numbers of one shape.", key=key, found=str(error)) from error
    require(np.ndim(values) == ndim, "The array has the wrong number of axes.", key=key, found=f"shape {np.shape(values)}",
            expected=f"{ndim} axes, time first")  # fmt: skip
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        raise InputError(
            f"The array holds NaN or infinite values (as {np.dtype(dtype).name}).", key=key,
            found=f"{len(bad)} of {array.size} values, the first is {np.asarray(values)[tuple(bad[0])]} at index "
            f"{tuple(int(i) for i in bad[0])}", expected="finite numbers",
            remedy="repair or drop this episode; nothing is interpolated for you",
        )  # fmt: skip
    return array


def _frames(values: Any, key: str) -> Frames:
    frames = values if isinstance(values, LazyArray | SparseFrames) else np.ascontiguousarray(values)
    require(frames.dtype == np.uint8 and len(frames.shape) == 4 and min(frames.shape[1:]) >= 1,
            "An image observation has one frame a step.", key=key, found=f"{frames.dtype} of shape {tuple(frames.shape)}",
            expected="uint8 of shape (N, C, H, W)")  # fmt: skip
    return frames


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode of N steps; `observations[...][t]` and `states[t]` are before `actions[t]`, rewards and dones after it.

    Arrays are converted to the dtypes below. InputError for lengths that disagree, zero steps, NaN or infinite values.
    """

    observations: Observed
    """Name -> one row a step, raw units: "state" (N, S) float32, "image.<camera>" (N, C, H, W) uint8 (maybe a `LazyArray`,
    or `SparseFrames`),
    "language" (N, E) float32."""
    actions: np.ndarray
    """(N, A) float32, raw units: the controller's input, [-1, 1] for robosuite."""
    rewards: np.ndarray | None = None
    """(N,) float32; None: unknown."""
    dones: np.ndarray | None = None
    """(N,) bool; None: unknown."""
    states: np.ndarray | None = None
    """(N, Ds) float64 flattened simulator states [time, qpos, qvel], or None."""
    name: str = "demo_0"
    """Name inside the file; filters refer to it."""
    operator: str | None = None
    """Who or what produced it."""
    episode_seed: int | None = None
    """Seed of the simulator's episode where known: it decides what the state leaves out (the size of Lift's cube)."""
    task: str | None = None
    """Which of the dataset's tasks it is of, by name or as an instruction in words, where the data say so."""

    def __post_init__(self) -> None:
        observed = {}
        require(len(self.observations), "An episode needs at least one observation.", key=self.name, found="none")
        for key, values in self.observations.items():
            place = f"{self.name}/{key}"
            observed[key] = _frames(values, place) if is_image(key) else _array(values, np.float32, place, 2)
        object.__setattr__(self, "observations", MappingProxyType(observed))
        specs: list[tuple[str, type, int]] = [
            ("actions", np.float32, 2), ("rewards", np.float32, 1), ("dones", np.bool_, 1), ("states", np.float64, 2),
        ]  # fmt: skip
        lengths = {key: len(values) for key, values in observed.items()}
        for key, dtype, ndim in specs:
            if getattr(self, key) is not None:
                object.__setattr__(self, key, _array(getattr(self, key), dtype, f"{self.name}/{key}", ndim))
                lengths[key] = len(getattr(self, key))
        require(set(lengths.values()) != {0}, "The episode has no steps.", key=self.name, found="0 steps", expected="at least 1",
                remedy="remove it from the data")  # fmt: skip
        require(len(set(lengths.values())) == 1, "The arrays of an episode disagree about its length.", key=self.name,
                found=", ".join(f"{key}: {n}" for key, n in lengths.items()), expected="one entry a step in each",
                remedy="drop the episode, or cut the arrays to the steps that all of them have")  # fmt: skip
        require(self.actions.shape[1] >= 1, "An action has at least one number.", key=f"{self.name}/actions", found="width 0")

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy cannot be pickled
        parts = (self.actions, self.rewards, self.dones, self.states, self.name, self.operator, self.episode_seed, self.task)
        return Episode, (dict(self.observations), *parts)

    def __len__(self) -> int:
        """Number of steps N."""
        return len(self.actions)

    @property
    def state(self) -> np.ndarray:
        """(N, S) float32; S is 0 where the observation holds frames alone."""
        return np.asarray(self.observations.get("state", np.zeros((len(self), 0), np.float32)))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Episodes of one task, or of several of one robot, with what is needed to interpret them."""

    episodes: tuple[Episode, ...]
    """At least one, all with the same observations and A, names distinct."""
    state_keys: tuple[str, ...] = ()
    """Names of the parts that are concatenated into "state", in order; by default the one name "state"."""
    state_dims: tuple[int, ...] = ()
    """Width of each part; their sum is S. Empty: one key, all of it."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """robomimic's `env_args`: env_name, env_version, type, env_kwargs; empty when it is unknown."""
    filters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Filter key -> names of episodes (robomimic's `mask`)."""
    source: str = "arrays"
    """Where they came from: a path, or a word."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks that "language" tells apart, in its order; by default the episodes' own, sorted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "episodes", tuple(self.episodes))
        require(self.episodes, "There are no episodes.", file=self.source, found=0, expected="at least 1")
        first = self.episodes[0]
        widths = self.shapes
        for episode in self.episodes:
            found = {key: tuple(values.shape[1:]) for key, values in episode.observations.items()}
            if found != widths or episode.actions.shape[1] != first.actions.shape[1]:
                self._differs(episode, found, widths)
        total = widths.get("state", (0,))[0]
        if "state" in widths and not self.state_keys:
            object.__setattr__(self, "state_keys", ("state",))
        if not self.state_dims and len(self.state_keys) == 1:
            object.__setattr__(self, "state_dims", (total,))
        dims = tuple(int(d) for d in self.state_dims)
        require(len(dims) == len(self.state_keys) and sum(dims) == total, "The state keys do not describe the states.",
                file=self.source, key="state_keys", found=f"{dict(zip(self.state_keys, dims))} for states of width {total}",
                expected="one width a key, with the state's width as their sum")  # fmt: skip
        if not self.tasks:
            object.__setattr__(self, "tasks", tuple(sorted({e.task for e in self.episodes if e.task is not None})))
        known: set[str] = set()
        listed, some = set(self.tasks), ", ".join(self.tasks[:5])[:300]
        for episode in self.episodes:
            require(episode.name not in known, "Two episodes have the same name.", file=self.source, key=episode.name,
                    expected="distinct names")  # fmt: skip
            known.add(episode.name)
            require(episode.task is None or episode.task in listed, "An episode is of a task that is not listed.", file=self.source,
                    key=episode.name, found=episode.task, expected=f"one of {len(listed)}: {some}")  # fmt: skip
        require(len(listed) == len(self.tasks), "A task is listed twice.", file=self.source, key="tasks")
        check_filters(self.filters, self.names, self.source)

    def _differs(self, episode: Episode, found: Mapping[str, Any], widths: Mapping[str, Any]) -> None:
        first = self.episodes[0]
        a, b = {**found, "actions": episode.actions.shape[1:]}, {**widths, "actions": first.actions.shape[1:]}
        key = next(key for key in {**b, **a} if a.get(key) != b.get(key))
        raise InputError(
            "Episodes differ in width.", file=self.source, key=f"{episode.name}/{key}", found=f"shape {a.get(key, 'none')}",
            expected=f"shape {b.get(key, 'none')}, as in {first.name}", remedy="keep only episodes of one robot and one controller",
        )  # fmt: skip

    @classmethod
    def from_arrays(
        cls,
        observations: Sequence[np.ndarray | Observed],
        actions: Sequence[np.ndarray],
        *,
        rewards: Sequence[np.ndarray] | None = None,
        dones: Sequence[np.ndarray] | None = None,
        states: Sequence[np.ndarray] | None = None,
        names: Sequence[str] | None = None,
        operators: Sequence[str | None] | None = None,
        state_keys: Sequence[str] = (),
        state_dims: Sequence[int] = (),
        environment: Mapping[str, Any] | None = None,
        filters: Mapping[str, Sequence[str]] | None = None,
        source: str = "arrays",
    ) -> Dataset:
        """From plain numpy: an episode is one (N_i, S) array of states, or a dict of named observations, and (N_i, A) actions.

        Rewards and dones are unknown unless given; names default to `demo_0`, `demo_1`, ….
        """
        given = {"observations": observations, "rewards": rewards, "dones": dones, "states": states, "names": names,
                 "operators": operators}  # fmt: skip
        for key, values in given.items():
            require(values is None or len(values) == len(actions), "The lists differ in length.", key=key,
                    found=None if values is None else len(values), expected=f"{len(actions)}, as many as actions")  # fmt: skip

        def of(values: Sequence[Any] | None, i: int, otherwise: Any = None) -> Any:
            return otherwise if values is None else values[i]

        return cls(
            tuple(
                Episode(
                    x if isinstance(x, Mapping) else {"state": x}, actions[i], of(rewards, i), of(dones, i), of(states, i),
                    of(names, i, f"demo_{i}"), of(operators, i),
                )
                for i, x in enumerate(observations)
            ),
            tuple(state_keys),
            tuple(state_dims),
            dict(environment or {}),
            {key: tuple(members) for key, members in (filters or {}).items()},
            source,
        )  # fmt: skip

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def __iter__(self) -> Iterator[Episode]:
        return iter(self.episodes)

    def __getitem__(self, index: int) -> Episode:
        return self.episodes[index]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of one observation: {"state": (S,), "image.top": (C, H, W)}."""
        return {key: tuple(int(n) for n in values.shape[1:]) for key, values in self.episodes[0].observations.items()}

    @property
    def action_dim(self) -> int:
        """A."""
        return int(self.episodes[0].actions.shape[1])

    @property
    def num_steps(self) -> int:
        """Steps of all episodes together."""
        return sum(len(episode) for episode in self.episodes)

    @property
    def lengths(self) -> np.ndarray:
        """(len(self),) int64 steps of each episode."""
        return np.array([len(episode) for episode in self.episodes], dtype=np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(episode.name for episode in self.episodes)

    @property
    def states(self) -> np.ndarray:
        """(num_steps, S) float32 all "state" observations, episode after episode."""
        return np.concatenate([episode.state for episode in self.episodes])

    @property
    def actions(self) -> np.ndarray:
        """(num_steps, A) float32 all actions, episode after episode."""
        return np.concatenate([episode.actions for episode in self.episodes])

    def keep(self, names: Iterable[str]) -> Dataset:
        """The episodes of these names, in this object's order, and what is left of the filters."""
        wanted = set(names)
        filters = {key: tuple(name for name in members if name in wanted) for key, members in self.filters.items()}
        return replace(
            self, episodes=tuple(e for e in self.episodes if e.name in wanted),
            filters={key: members for key, members in filters.items() if members},
        )  # fmt: skip

    def select(self, filter_key: str) -> Dataset:
        """The episodes of one filter (robomimic's `mask/<filter_key>`), in order. InputError if unknown or empty."""
        return self.keep(choose(self.names, self.filters, filter_key, self.source))

    @property
    def task_of(self) -> dict[str, str]:
        """Episode -> its task, of those that have one."""
        return {episode.name: episode.task for episode in self.episodes if episode.task is not None}

    def count_tasks(self) -> dict[str, int]:
        """Task -> number of its episodes, in the order of `tasks`, without those that have none."""
        counted = Counter(self.task_of.values())
        return {task: counted[task] for task in self.tasks if task in counted}

    def subset(self, n: int, seed: int) -> Dataset:
        """`n` episodes drawn without replacement by `seed`, in this object's order; see :func:`draw`."""
        return self.keep(draw(self.names, n, seed, self.source, self.task_of))


def pieces_of(dataset: Dataset, size: int) -> list[range]:
    """Episodes on end of at most `size` bytes of observations and actions together; one that is larger is a piece of its own."""
    sizes = [sum(values.nbytes for values in e.observations.values()) + e.actions.nbytes for e in dataset]
    pieces, begin, total = [], 0, 0
    for i, more in enumerate(sizes):
        if i > begin and total + more > size:
            pieces.append(range(begin, i))
            begin, total = i, 0
        total += more
    return [*pieces, range(begin, len(sizes))]


def check_filters(filters: Mapping[str, Sequence[str]], names: Sequence[str], source: str) -> None:
    """InputError if a filter names an episode that is not there."""
    known = set(names)
    for key, members in filters.items():
        for name in members:
            require(name in known, "A filter names a demonstration that is not there.", file=source, key=f"mask/{key}",
                    found=repr(name), expected=f"one of the {len(names)} demonstrations, {names[0]} to {names[-1]}",
                    remedy="remove the name from the mask, or restore the demonstration")  # fmt: skip


def choose(names: Sequence[str], filters: Mapping[str, Sequence[str]], filter_key: str, source: str) -> list[str]:
    """The names of one filter, in the order of `names`. InputError if the filter is unknown or empty."""
    require(filter_key in filters, "There is no such filter.", file=source, key=f"mask/{filter_key}",
            found=f"filters {sorted(filters)}" if filters else "no filters at all",
            remedy="choose one of those found, or leave the filter out to use every demonstration")  # fmt: skip
    wanted = set(filters[filter_key])
    require(wanted, "The filter selects no demonstration.", file=source, key=f"mask/{filter_key}", found="an empty list")
    check_filters({filter_key: filters[filter_key]}, names, source)
    return [name for name in names if name in wanted]


def draw(names: Sequence[str], n: int, seed: int, source: str, task_of: Mapping[str, str] | None = None) -> list[str]:
    """`n` of the names without replacement, in their order; of several tasks equally many each (some one more).

    The first n of one permutation, so that with one seed a smaller subset lies inside every larger one (paper, figure on the number of
    demonstrations: the curves then differ by added data only). InputError if there are fewer than n.
    """
    require(1 <= n <= len(names), "Cannot draw that many demonstrations.", file=source, key="number of demonstrations",
            found=f"{n} asked for, {len(names)} there", expected=f"1 to {len(names)}",
            remedy="ask for fewer, or use a larger file or another filter")  # fmt: skip
    require(seed >= 0, "A seed is not negative.", key="seed", found=seed, expected=">= 0")
    before: dict[str | None, int] = {}  # drawn of each task
    turns = []
    for i in np.random.default_rng(seed).permutation(len(names)).tolist():
        task = (task_of or {}).get(names[i])
        before[task] = before.get(task, 0) + 1
        turns.append((before[task], i))
    turns.sort(key=lambda turn: turn[0])  # the first of each task, in the permutation's order, then the second ones
    return [names[i] for i in sorted(i for _, i in turns[:n])]
