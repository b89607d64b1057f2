"""Rollouts as data: collecting them with a pretrained policy, and turning trajectories of any source into chunk transitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from postbc.demonstrations import LOW_DIM_KEYS, Demonstrations, Trajectory, read_robomimic, write_robomimic
from postbc.errors import InputError
from postbc.finetuning.replay import Batch
from postbc.finetuning.results import Checkpoints, check_sizes, fingerprint
from postbc.nn import generator_states, make_generators, set_generator_states
from postbc.policies.base import Policy
from postbc.progress import progress
from postbc.runs import Run

STREAM = 420  # of the generator of the policy's noise
PARTS = ("observations", "actions", "rewards", "states")


@dataclass(frozen=True)
class _Recorded:
    """What config.yaml of a collection holds."""

    episodes: int
    envs_per_member: int
    seeds: tuple[int, ...]
    policy: str


def episode_seed(seed: int, episode: int) -> int:
    """Seed of a rollout's initial state: a function of member seed and number, below 10⁹ (evaluation has those above)."""
    return int(np.random.SeedSequence([20_251, seed, episode]).generate_state(1)[0]) % 10**9


class Collector:
    """M·n environments that play episodes with the policy, one control step at a time, so that every step is recorded.

    Whole chunks are executed (also the steps after the first success), so that every recorded chunk is one that the policy meant.
    Member m's episodes depend on its seed and on n alone.

    Args:
        policy: M members with `normalization`.
        env: M·n environments with chunk 1 that never terminate, autoreset disabled, sparse reward.
    """

    def __init__(self, policy: Policy, env: VectorEnv, episodes: int, seeds: Sequence[int]) -> None:
        self.policy, self.env, self.episodes, self.seeds = policy, env, episodes, list(seeds)
        self.n = env.num_envs // policy.members
        self.normalization = policy.normalization  # type: ignore[attr-defined]
        self.generators = make_generators(seeds, STREAM)
        self.has_states = hasattr(env, "sim_states")
        self.started = np.zeros(policy.members, np.int64)  # episodes begun, a member
        self.current = np.full(env.num_envs, -1, np.int64)  # number of the episode that is running, −1: none
        self.observation: NDArray[np.float32] = np.zeros((env.num_envs, policy.observation_dim), np.float32)
        self.partial: list[dict[str, list[Any]]] = [{} for _ in self.current]
        self.finished: list[dict[int, dict[str, Any]]] = [{} for _ in self.seeds]

    @property
    def done(self) -> int:
        """Episodes finished, of all members."""
        return sum(map(len, self.finished))

    def _begin(self) -> None:
        mask, seeds = np.zeros(len(self.current), bool), np.zeros(len(self.current), np.int64)
        for i in np.flatnonzero(self.current < 0):
            m = int(i) // self.n
            if self.started[m] < self.episodes:
                self.current[i], mask[i] = self.started[m], True
                seeds[i] = episode_seed(self.seeds[m], int(self.started[m]))
                self.partial[i] = {name: [] for name in PARTS}
                self.started[m] += 1
        if mask.any():
            observation, _ = self.env.reset(options={"reset_mask": mask, "seeds": seeds})
            self.observation = np.array(observation, np.float32)

    def chunk(self) -> None:
        """Begin episodes where there is room, then play one chunk in every environment."""
        self._begin()
        observation = torch.as_tensor(self.observation).view(self.policy.members, self.n, -1)
        with torch.no_grad():
            chunk = self.policy.sample(self.normalization.normalize_observation(observation), generators=self.generators)
        raw = self.normalization.unnormalize_chunk(chunk).flatten(0, 1).numpy()
        running, success = self.current >= 0, np.zeros(len(self.current), bool)
        for t in range(self.policy.chunk):
            before, states = self.observation, self.env.sim_states() if self.has_states else None  # type: ignore[attr-defined]
            observation, _, _, truncated, info = self.env.step(raw[:, t : t + 1])
            self.observation = np.array(observation, np.float32)
            for i in np.flatnonzero(running):
                values = (before[i], raw[i, t], float(info["success"][i]), None if states is None else states[i])
                for name, value in zip(PARTS, values, strict=True):
                    self.partial[i][name].append(value)
            success |= running & np.asarray(info["success"], bool)
            ended = running & np.asarray(truncated, bool)
            self._end(ended)
            running &= ~ended
        self._end(running & success)

    def _end(self, ended: np.ndarray) -> None:
        for i in np.flatnonzero(ended):
            kept: dict[str, Any] = {k: np.array(v, np.float64 if k == "states" else np.float32) for k, v in self.partial[i].items()
                                    if k != "states" or self.has_states}  # fmt: skip
            self.finished[int(i) // self.n][int(self.current[i])] = kept
            self.current[i], self.partial[i] = -1, {}

    def demonstrations(self, member: int, source: str) -> Demonstrations:
        """A member's finished episodes, in order; `mask/success` and `mask/failure` say how they ended.

        `dones` marks termination (success) alone: an episode that ran into the time limit has none.
        """
        trajectories, filters = [], {"success": [], "failure": []}  # type: ignore[var-annotated]
        for number, parts in sorted(self.finished[member].items()):
            dones, name = np.zeros(len(parts["rewards"]), bool), f"demo_{number}"
            solved = bool((parts["rewards"] > 0).any())
            dones[-1] = solved
            filters["success" if solved else "failure"].append(name)
            trajectories.append(
                Trajectory(parts["observations"], parts["actions"], parts["rewards"], dones, parts.get("states"), name)
            )
        keys, dims = observation_layout(self.policy.observation_dim)
        environment = self.env.env_args() if hasattr(self.env, "env_args") else {}
        named = {key: tuple(names) for key, names in filters.items() if names}
        return Demonstrations(tuple(trajectories), keys, dims, environment, named, source)

    def state_dict(self) -> dict[str, Any]:
        """Everything, running episodes included."""
        return {
            "env": self.env.get_state(), "generators": generator_states(self.generators), "started": self.started,  # type: ignore[attr-defined]
            "current": self.current, "observation": self.observation, "finished": self.finished,
            "partial": [{k: np.array(v) for k, v in p.items() if k != "states" or self.has_states} for p in self.partial],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.env.set_state(state["env"])  # type: ignore[attr-defined]
        set_generator_states(self.generators, state["generators"])
        self.started, self.current = np.array(state["started"]), np.array(state["current"])
        self.observation, self.finished = np.array(state["observation"]), list(state["finished"])
        self.partial = [{k: list(v) for k, v in p.items()} for p in state["partial"]]
        for partial in self.partial:
            if partial and not self.has_states:
                partial["states"] = [None] * len(partial["rewards"])


def observation_layout(width: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and widths of an observation's parts: robomimic's four low-dimensional ones for 19 or 23 numbers."""
    return (LOW_DIM_KEYS, (3, 4, 2, width - 9)) if width in (19, 23) else (("observation",), (width,))


def rollout_file(directory: str | Path, seed: int) -> Path:
    """Where a member's rollouts are written."""
    return Path(directory) / f"rollouts_seed_{seed}.hdf5"


def collect_rollouts(
    policy: Policy,
    make_env: Callable[[int], VectorEnv],
    episodes: int,
    output: str | Path,
    *,
    envs_per_member: int = 10,
    seeds: Sequence[int] | None = None,
    checkpoint_seconds: float = 60.0,
) -> list[Path]:
    """Play `episodes` episodes with every member of the pretrained policy; one robomimic HDF5 file a seed. Resumes by itself.

    Args:
        make_env: N -> environments with chunk 1 that never terminate, autoreset disabled, sparse reward 0/1, `get_state`.
        output: directory; rollouts_seed_<seed>.hdf5 appear in it together, when all is done.
        seeds: one a member; default the policy's.

    Raises:
        InputError: sizes differ between policy and environment, or `output` holds another collection.
    """
    output, members = Path(output), list(seeds if seeds is not None else getattr(policy, "seeds", range(policy.members)))
    paths = [rollout_file(output, seed) for seed in members]
    n = min(envs_per_member, episodes)
    run = Run(output / "collection", _Recorded(episodes, n, tuple(members), fingerprint(policy)), resume=True, keep=1)
    if all(path.exists() for path in paths):
        return paths
    env = make_env(policy.members * n)
    try:
        check_sizes(policy, env)
        collector, checkpoints, found = (
            Collector(policy, env, episodes, members),
            Checkpoints(run, checkpoint_seconds),
            run.load(),
        )
        if found is not None:
            collector.load_state_dict(found[1])
        with progress("rollouts", policy.members * episodes, collector.done) as bar:
            while collector.done < policy.members * episodes:
                before = collector.done
                collector.chunk()
                if collector.done > before:
                    rate = np.mean([float((e["rewards"] > 0).any()) for own in collector.finished for e in own.values()])
                    bar.advance(collector.done - before, success=float(rate))
                if checkpoints.due:
                    checkpoints.save(collector.done, collector.state_dict())
        for m, path in enumerate(paths):
            write_robomimic(path, collector.demonstrations(m, str(path)))
    finally:
        env.close()
    run.drop_checkpoints()
    run.close()
    return paths


# -- transitions ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TransitionConfig:
    """How trajectories become chunk transitions."""

    reward: Literal["sparse", "negative"] = "sparse"
    """A step earns 1 at success and else 0 (paper: Robomimic, robot), or 0 and else −1 (paper: LIBERO)."""
    termination: Literal["success", "dones"] = "success"
    """What ends an episode for good: the first success; or also a step marked done (a failure that a person ended, say)."""
    stride: int | None = None
    """Steps between the starts of two transitions; default the chunk: those that were executed. 1 uses every window."""
    tail: Literal["align", "pad"] = "align"
    """A last chunk that does not fit into a terminated episode: begin it earlier, or repeat the last action."""
    chunk_reward: Literal["sum", "discounted"] = "sum"
    """Reward of a chunk: Σ r_i or Σ γ^i r_i, up to the terminal step."""
    chunk_discount: Literal["once", "per_step"] = "once"
    """Discount of a chunk: γ or γ^(steps executed)."""


def transitions(trajectory: Trajectory, chunk: int, discount: float, config: TransitionConfig) -> dict[str, np.ndarray]:
    """Chunk transitions of one trajectory, raw units: observation, action (K, T, A), next_observation, reward, discount (K,).

    A step counts as success where the recorded reward is positive. Nothing after the terminal step is used. An episode that ended
    otherwise ran out of time: its value goes on, but robomimic's layout has no observation after the last action, so that the
    chunks that would need it are left out.
    """
    length, stride = len(trajectory), config.stride or chunk
    success = trajectory.rewards > 0
    terminal = success | trajectory.dones if config.termination == "dones" else success
    end = int(np.argmax(terminal)) if terminal.any() else None  # the terminal step
    rewards = success.astype(np.float64) - (1.0 if config.reward == "negative" else 0.0)
    starts: list[int] = []
    for i in range(0, length if end is None else end + 1, stride):
        if end is not None and i + chunk > end:
            starts.append(max(length - chunk, 0) if config.tail == "align" and i + chunk > length else i)
            if stride >= chunk or i + chunk > length:
                break
        elif i + chunk < length:
            starts.append(i)
    rows = {name: [] for name in ("observation", "action", "next_observation", "reward", "discount")}  # type: ignore[var-annotated]
    for i in dict.fromkeys(starts):
        over = end is not None and i + chunk > end
        taken = (end - i + 1) if over and end is not None else chunk
        weights = discount ** np.arange(taken) if config.chunk_reward == "discounted" else np.ones(taken)
        rows["observation"].append(trajectory.observations[i])
        rows["action"].append(trajectory.actions[np.minimum(np.arange(i, i + chunk), length - 1)])
        rows["next_observation"].append(trajectory.observations[min(i + chunk, length - 1)])
        rows["reward"].append(float(rewards[i : i + taken] @ weights))
        rows["discount"].append(0.0 if over else discount ** (taken if config.chunk_discount == "per_step" else 1))
    return {name: np.array(values, np.float32) for name, values in rows.items()}


def member_batch(
    data: Demonstrations, policy: Policy, member: int, discount: float, config: TransitionConfig
) -> tuple[Batch, dict[str, float]]:
    """All transitions of `data` in the member's normalised units (1, K, ·), and what they are.

    Raises:
        InputError: sizes differ from the policy's, or there is not one transition.
    """
    for what, found, expected in (
        ("observation", data.observation_dim, policy.observation_dim),
        ("action", data.action_dim, policy.action_dim),
    ):
        if found != expected:
            raise InputError(
                f"The rollouts' {what}s are not the policy's.", file=data.source, key=f"{what}s", found=f"width {found}",
                expected=f"width {expected}", remedy="use rollouts of this policy's task and robot",
            )  # fmt: skip
    parts = [transitions(trajectory, policy.chunk, discount, config) for trajectory in data]
    rows = {
        name: torch.as_tensor(np.concatenate([p[name] for p in parts if len(p["reward"])] or [np.zeros(0)]))
        for name in parts[0]
    }
    if not len(rows["reward"]):
        raise InputError(
            "The rollouts hold no transition.", file=data.source, found=f"{data.num_steps} steps in {len(data)} episodes",
            expected=f"episodes longer than a chunk ({policy.chunk} steps)",
        )  # fmt: skip
    one = NormalizationOf(policy, member)
    batch = Batch(
        one.observation(rows["observation"]), one.chunk(rows["action"]), one.observation(rows["next_observation"]),
        rows["reward"].unsqueeze(0), rows["discount"].unsqueeze(0),
    )  # fmt: skip
    return batch, {
        "episodes": len(data), "env_steps": data.num_steps, "transitions": len(rows["reward"]),
        "success": float(np.mean([(t.rewards > 0).any() for t in data])), "terminal": float((rows["discount"] == 0).sum()),
    }  # fmt: skip


class NormalizationOf:
    """One member's share of a policy's normalisation."""

    def __init__(self, policy: Policy, member: int) -> None:
        self.tensors, self.member, self.members = policy.normalization, member, policy.members  # type: ignore[attr-defined]

    def observation(self, raw: torch.Tensor) -> torch.Tensor:
        """(K, S) -> (1, K, S)."""
        return self.tensors.normalize_observation(raw.expand(self.members, -1, -1))[self.member : self.member + 1]

    def chunk(self, raw: torch.Tensor) -> torch.Tensor:
        """(K, T, A) -> (1, K, T·A)."""
        whole = self.tensors.normalize_chunk(raw.expand(self.members, -1, -1, -1))
        return whole[self.member : self.member + 1].flatten(2)


def read_rollouts(path: str | Path, observation_keys: Sequence[str] | None = None) -> Demonstrations:
    """Rollouts of any source in robomimic's layout (a real robot's need no `env_args`). InputError if they cannot be used."""
    if observation_keys is None and Path(path).is_file() and h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:  # what `collect_rollouts` writes for other tasks than robosuite's
            group = next(iter(file["data"].values()), None) if isinstance(file.get("data"), h5py.Group) else None
            if isinstance(group, h5py.Group) and "obs/observation" in group:
                observation_keys = ("observation",)
    return read_robomimic(path, observation_keys=observation_keys, action_range=None, environment={})
