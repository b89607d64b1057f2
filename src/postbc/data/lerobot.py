"""Reader of LeRobotDataset v3 (see :mod:`postbc.data.lerobot_files` for the layout): numbers into memory, frames stay in their files.

::

    observation.state, observation.environment_state   "state"            next.reward or next.success   rewards
    observation.images.<camera>                        "image.<camera>"   next.done                     dones
    observation.image                                  "image.top"        simulator_state (ours)        states
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

import postbc.data.pusht as pusht
from postbc.data.episodes import Dataset, Episode, check_filters, choose
from postbc.data.lazy import LazyArray
from postbc.data.lerobot_files import INFO, NUMBERING, LeRobotFolder, is_number
from postbc.data.robomimic import KEYS, Listing
from postbc.errors import InputError, require
from postbc.schemas import Seed, later, read_json, schema

STATE, ENVIRONMENT_STATE, ACTION = "observation.state", "observation.environment_state", "action"
REWARD, SUCCESS, DONE, SIMULATOR = "next.reward", "next.success", "next.done", "simulator_state"
#: What our writer adds, and LeRobot ignores.
OURS = "meta/postbc.json"
#: Parts of a state that are the robot's own; others are the environment's, which LeRobot's diffusion and ACT ask for without cameras.
OWN = ("robot", "agent", "joint", "eef", "gripper")


@schema
class StatePart:
    """Where one part of "state" is."""

    key: str
    """Its name in the house (robot0_eef_pos)."""
    feature: str
    """LeRobot's feature that holds it."""
    start: Annotated[int, Field(ge=0, lt=2**20)]
    """Its first number there."""
    width: Annotated[int, Field(ge=1, lt=2**20)]


@schema
class EpisodeFacts:
    """What LeRobot has no place for."""

    name: str
    operator: str | None = None
    episode_seed: Seed | None = None
    simulator_width: Annotated[int, Field(ge=1, lt=2**20)] | None = later(None)
    """Numbers of its simulator's state, of which the feature has as many as the widest episode."""


@schema
class Ours:
    """The file that our writer adds, so that nothing is lost on the way back."""

    kind: str
    environment: dict[str, Any]
    state: tuple[StatePart, ...]
    filters: dict[str, tuple[str, ...]]
    episodes: tuple[EpisodeFacts, ...]
    tasks: tuple[str, ...] = later(())
    """Names in the order of the one-hot."""


class _Source:
    """A folder with what its names mean in the house."""

    def __init__(self, path: str | Path) -> None:
        self.folder = LeRobotFolder(path)
        file, n = self.folder.path / OURS, len(self.folder.starts)
        self.ours = read_json(file, Ours) if file.is_file() else None
        if self.ours is not None:
            require(len(self.ours.episodes) == n, "The dataset has been changed since postbc wrote it.", file=file, key="episodes",
                    found=len(self.ours.episodes), expected=n, remedy="remove this file: names and filters are lost then")  # fmt: skip
        self.facts = self.ours.episodes if self.ours else tuple(EpisodeFacts(f"demo_{i}") for i in range(n))
        self.names = tuple(facts.name for facts in self.facts)
        self.filters = dict(self.ours.filters) if self.ours else self._splits()
        check_filters(self.filters, self.names, str(path))

    def _splits(self) -> dict[str, tuple[str, ...]]:
        """LeRobot's splits, "0:50", where they leave something out."""
        found = {}
        for key, text in self.folder.splits.items():
            match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", str(text))
            members = self.names[int(match[1]) : int(match[2])] if match else ()
            if 0 < len(members) < len(self.names):
                found[str(key)] = members
        return found

    def numeric(self) -> list[str]:
        """Features that can be observed as numbers."""
        return [
            name for name, feature in self.folder.features.items()
            if is_number(feature) and name not in (*NUMBERING, ACTION, SIMULATOR)
            and not name.startswith("next.")
        ]  # fmt: skip

    def parts(self, keys: Sequence[str] | None) -> tuple[StatePart, ...]:
        """What makes "state": of `keys`, or by default ours, or LeRobot's two states."""
        known = {part.key: part for part in self.ours.state} if self.ours else {}
        width = {name: int(np.prod(self.folder.features[name]["shape"])) for name in self.numeric()}
        if keys is None and known:
            return tuple(known.values())
        if keys is None:
            two = [name for name in (STATE, ENVIRONMENT_STATE) if name in width]
            if self._is_pusht(width):
                return tuple(StatePart(key, name, 0, width[name]) for key, name in zip(pusht.STATE_KEYS, two))
            keys = two
        whole = {name: StatePart(name, name, 0, n) for name, n in width.items()}
        for key in keys:
            require(key in known or key in whole, "The observations have other names.", file=self.folder.path / INFO,
                    key="observation_keys", found=key, expected=f"some of {', '.join([*known, *whole])}", remedy=KEYS)  # fmt: skip
        return tuple(known.get(key) or whole[key] for key in keys)

    def _is_pusht(self, width: Mapping[str, int]) -> bool:
        """gym-pusht's state and keypoints at its rate: what `lerobot/pusht_keypoints` has."""
        action = self.folder.features.get(ACTION, {}).get("shape")
        found = (width.get(STATE), width.get(ENVIRONMENT_STATE), action, self.folder.fps)
        return found == (*pusht.STATE_DIMS, [2], 10.0)

    def camera(self, key: str) -> tuple[str, str]:
        """Name in the house and feature of a camera, by either name."""
        known = {camera_name(name): name for name in self.folder.cameras}
        name = key if key in known else f"image.{key}" if f"image.{key}" in known else camera_name(key)
        require(name in known, "There is no such camera.", file=self.folder.path / INFO, key="image_keys", found=key,
                expected=f"some of {', '.join(self.folder.cameras) or 'none: the dataset has no cameras'}")  # fmt: skip
        feature = self.folder.features[known[name]]
        shape, depth = feature["shape"], (feature.get("info") or {}).get("is_depth_map") or feature.get("is_depth_map")
        require(len(shape) == 3 and {shape[0], shape[2]} & {1, 3} and not depth, "The camera's frames are of a kind that is not read.",
                file=self.folder.path / INFO, key=f"features: {known[name]}", found=repr(feature)[:200],
                expected="colours or grey, (H, W, C)")  # fmt: skip
        return name, known[name]


def camera_name(feature: str) -> str:
    """LeRobot's name of a camera -> ours: observation.images.wrist -> image.wrist, observation.image -> image.top."""
    short = feature.removeprefix("observation.").removeprefix("images.")
    return "image.top" if short == "image" else f"image.{short.removeprefix('image.')}"


def feature_name(key: str) -> str:
    """Our name of a camera -> LeRobot's."""
    return f"observation.images.{key.removeprefix('image.')}"


def state_parts(keys: Sequence[str], widths: Sequence[int]) -> tuple[StatePart, ...]:
    """Which feature holds which part of a state: the robot's own, the environment's; a part with a feature's name, that feature."""
    own = [any(word in key for word in OWN) for key in keys]
    ends: dict[str, int] = {}
    parts = []
    for key, width, mine in zip(keys, widths, own):
        feature = key if key.startswith("observation.") else STATE if mine or not any(own) else ENVIRONMENT_STATE
        parts.append(StatePart(key, feature, ends.get(feature, 0), int(width)))
        ends[feature] = ends.get(feature, 0) + int(width)
    return tuple(parts)


def list_lerobot(path: str | Path) -> Listing:
    """Names of the episodes and filters, and which task each is of."""
    source = _Source(path)
    tasks = {name: "; ".join(tasks) for name, tasks in zip(source.names, source.folder.tasks) if any(tasks)}
    return Listing(source.names, source.filters, tasks)


def describe_lerobot(path: str | Path) -> str:
    """What of the dataset would be used for what, in a sentence a line."""
    source = _Source(path)
    features, tasks = source.folder.features, sorted({task for tasks in source.folder.tasks for task in tasks})
    reward = SUCCESS if SUCCESS in features else REWARD if REWARD in features else None
    lines = [
        f"LeRobotDataset v3, {source.folder.fps:g} frames a second",
        "state: " + (" + ".join(dict.fromkeys(part.feature for part in source.parts(None))) or "nothing")
        + f" (of {', '.join(source.numeric()) or 'nothing'})",
        "cameras: " + (", ".join(f"{k} ({camera_name(k)}, {features[k]['dtype']})" for k in source.folder.cameras) or "none"),
        f"actions: {ACTION}; rewards, which say what success is: {reward or 'none'}; ends: {DONE if DONE in features else 'unknown'}",
        f"tasks: {'; '.join(repr(task) for task in tasks[:5])}" + (f" and {len(tasks) - 5} more" if len(tasks) > 5 else ""),
    ]  # fmt: skip
    return "\n".join(lines)


def read_lerobot(
    path: str | Path,
    *,
    filter_key: str | None = None,
    names: Iterable[str] | None = None,
    observation_keys: Sequence[str] | None = None,
    image_keys: Sequence[str] = (),
    parts: Iterable[str] = (),
    environment: Mapping[str, Any] | None = None,
) -> Dataset:
    """Read a LeRobotDataset v3 from a local folder. Frames stay in their files.

    Args:
        path: folder with meta/info.json.
        filter_key: read only this split, or filter of ours.
        names: read only these episodes (demo_0, demo_1, …, or as they were called before we wrote the dataset).
        observation_keys: features that make "state" (further axes flattened); default observation.state and
            observation.environment_state, where they are there.
        image_keys: cameras, by LeRobot's names or ours.
        parts: which of rewards, dones and states to read where they are there. `next.success` is what rewards are, where it is there.
        environment: stands in for what the dataset does not say; its rate is known.
    """
    source = _Source(path)
    folder, features = source.folder, source.folder.features
    wanted = set(source.names if filter_key is None else choose(source.names, source.filters, filter_key, str(path)))
    if names is not None:
        asked = set(names)
        require(asked <= set(source.names), "There is no such episode.", file=path, key="names",
                found=sorted(asked - set(source.names))[:5])  # fmt: skip
        wanted &= asked
    require(wanted, "There are no episodes.", file=path, found=0, expected="at least 1")
    require(ACTION in features, "The dataset has no actions.", file=folder.path / INFO, key="features", found=sorted(features)[:20],
            expected=ACTION)  # fmt: skip
    state, cameras = source.parts(observation_keys), [source.camera(key) for key in image_keys]
    require(state or cameras, "There is nothing to observe.", file=path, key="observation_keys",
            found=f"cameras {', '.join(folder.cameras) or 'none'}", remedy=f"{KEYS}, or cameras: --data.image-keys KEY …")  # fmt: skip
    reward = SUCCESS if SUCCESS in features else REWARD
    optional = {part: name for part, name in (("rewards", reward), ("dones", DONE), ("states", SIMULATOR))
                if part in set(parts) and name in features}  # fmt: skip
    needed = list(dict.fromkeys([*(part.feature for part in state), ACTION, *optional.values()]))
    made = []
    for i, columns in folder.numbers(needed, [i for i, name in enumerate(source.names) if name in wanted]):
        facts, start = source.facts[i], folder.starts[i]
        rows = (start, start + len(columns[ACTION]))
        observed: dict[str, Any] = {}
        if state:
            observed["state"] = np.concatenate([columns[p.feature][:, p.start : p.start + p.width] for p in state], 1)
        for name, feature in cameras:
            shape = features[feature]["shape"]
            observed[name] = LazyArray(
                path,
                feature,
                rows=rows,
                shape=(len(folder), *shape),
                channels_last=shape[2] in (1, 3) or shape[0] not in (1, 3),
            )
        more = {
            part: columns[name][:, : facts.simulator_width] if part == "states" else columns[name][:, 0]
            for part, name in optional.items()
        }
        try:
            made.append(
                Episode(observed, columns[ACTION], **more, name=facts.name, operator=facts.operator, episode_seed=facts.episode_seed,
                        task="; ".join(folder.tasks[i]) or None)
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"{error}\n  file: {path}") from None
    if environment is None:
        known = pusht.ENVIRONMENT if [part.key for part in state] == list(pusht.STATE_KEYS) else {
            "env_kwargs": {"control_freq": folder.fps}
        }  # fmt: skip
        environment = source.ours.environment if source.ours else known
    kept = {episode.name for episode in made}
    filters = {key: tuple(name for name in members if name in kept) for key, members in source.filters.items()}
    filters = {key: members for key, members in filters.items() if members or not source.filters[key]}
    return Dataset(
        tuple(made), tuple(p.key for p in state), tuple(p.width for p in state), dict(environment), filters, str(path),
        tasks=source.ours.tasks if source.ours else (),
    )  # fmt: skip
