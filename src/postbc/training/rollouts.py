"""Rollouts as data: playing a pretrained policy into a robomimic file, and recorded episodes of any source as chunk transitions."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from postbc.agents.base import Batch, about_of
from postbc.data.belonging import Facts, check_belongs
from postbc.data.convert import parts_of
from postbc.data.episodes import COORDINATES, LOW_DIM_KEYS, Dataset, Episode, is_image
from postbc.data.language import LANGUAGE, with_language
from postbc.data.lazy import SparseFrames
from postbc.data.readers import read_dataset
from postbc.data.robomimic import read_robomimic, write_robomimic
from postbc.data.success import step_successes
from postbc.data.transitions import TransitionConfig, n_step, transitions
from postbc.data.windows import Windows
from postbc.devices import Compute
from postbc.environments.chunk import ChunkEnv, tasks_of
from postbc.environments.coordinates import coordinates_of_episode
from postbc.environments.registry import Environment, find_environment
from postbc.environments.stacked import make_stacked
from postbc.errors import require
from postbc.nn import generator_state, set_generator_state
from postbc.policies.base import Policy, policy_fingerprint, seen_dim
from postbc.posterior.features import window_features
from postbc.progress import note, progress
from postbc.robot.recorded import is_session, read_session, session_digest
from postbc.runs import Checkpoints, Run, digest
from postbc.seeding import episode_seed, make_generator
from postbc.training.results import check_policy, require_finite_actions, to_device

ROLLOUTS_FILE = "rollouts.hdf5"
STREAM = 20_251  # of the episodes' seeds
FRAMES = 256  # encoded at once


# -- collect ---------------------------------------------------------------------------------------------------------------------
class Finished(NamedTuple):
    """What is remembered of an episode that has ended."""

    steps: int
    solved: bool


class Collector:
    """N environments that play episodes with the policy, one control step at a time, so that every step is recorded.

    Whole chunks are executed (also the steps after the first success), so that every recorded chunk is one that the policy meant.
    Finished episodes wait in memory until :meth:`put_aside` writes them into files of their own; a state holds what is in flight.

    Args:
        policy: of normalised units.
        env: N environments with chunk 1 that never terminate; observations (N, To, ...) for a policy with `observation_steps` > 1.
        episodes: how many.
        seed: of the episodes and of the policy's noise.
        environment: what `env` is made of.
        parts: the folder of those files.
        device: of the policy.
        frames_every: steps of a chunk between two whose frames are recorded, its first step included; where the environment draws
            them, the others are not drawn. It divides the policy's chunk.
    """

    def __init__(
        self, policy: Policy, env: ChunkEnv, episodes: int, seed: int, environment: Environment, parts: Path,
        device: str | torch.device = "cpu", frames_every: int = 1,
    ) -> None:  # fmt: skip
        self.policy, self.env, self.episodes, self.seed, self.device = policy, env, episodes, seed, torch.device(device)
        self.environment, self.parts, self.every = environment, parts, frames_every
        self.keys, self.dims = _state_layout(policy, environment)
        self.generator = make_generator(seed, "rollouts/acting", device)
        self.started = 0  # episodes begun
        self.current = np.full(env.num_envs, -1, np.int64)  # number of the episode that is running, −1: none
        self.observation: dict[str, np.ndarray] = {}
        self.partial: list[dict[str, list[Any]]] = [{} for _ in self.current]
        self.tasks: dict[int, str] = {}  # of the episodes, where the environment names them
        self.finished: dict[int, Finished] = {}
        self.in_memory: dict[int, Episode] = {}

    @property
    def done(self) -> int:
        """Episodes finished."""
        return len(self.finished)

    @property
    def success(self) -> float:
        """Share of the finished episodes that solved the task."""
        return float(np.mean([episode.solved for episode in self.finished.values()]))

    def _begin(self) -> None:
        mask, seeds = np.zeros(len(self.current), bool), np.zeros(len(self.current), np.int64)
        for i in np.flatnonzero(self.current < 0):
            if self.started < self.episodes:
                self.current[i], mask[i] = self.started, True
                self.started += 1
        self._reset(mask, seeds)

    def _reset(self, mask: np.ndarray, seeds: np.ndarray) -> None:
        for i in np.flatnonzero(mask):
            seeds[i] = episode_seed(STREAM, self.seed, int(self.current[i]))
            self.partial[i] = {}
        if mask.any():
            self.observation = self.env.reset(seeds, mask)
            names = tasks_of(self.env)
            self.tasks |= {int(self.current[i]): str(names[i]) for i in np.flatnonzero(mask) if names[i] is not None}

    def _states(self) -> np.ndarray | None:
        """(N, Ds) the simulator's states, where it has them."""
        return self.env.sim_states() if hasattr(self.env, "sim_states") else None

    def chunk(self) -> None:
        """Begin episodes where there is room, then play one chunk in every environment."""
        self._begin()
        seen = {name: torch.as_tensor(self.observation[name]).to(self.device) for name in self.policy.shapes}
        with torch.no_grad():
            chunk = self.policy.sample(self.policy.encode(seen), generator=self.generator)
            raw = self.policy.normalization.unnormalize_action(chunk).cpu().numpy()
        require_finite_actions(raw, sum(episode.steps for episode in self.finished.values()))
        running, success = self.current >= 0, np.zeros(len(self.current), bool)
        for t in range(self.policy.chunk):
            before, states = self.observation, self._states()
            if self.every > 1 and hasattr(self.env, "set_drawing"):
                self.env.set_drawing((t + 1) % self.every == 0)
            step = self.env.step(raw[:, t : t + 1])
            self.observation = step.observation
            for i in np.flatnonzero(running & (step.num_steps > 0)):
                recorded = (name for name in self.policy.shapes if t % self.every == 0 or not is_image(name))
                values = {name: self._newest(before[name][i]) for name in recorded}
                values |= {"actions": raw[i, t], "rewards": np.float32(step.successes[i, 0])}
                if states is not None:
                    values["states"] = states[i]
                for name, value in values.items():
                    self.partial[i].setdefault(name, []).append(np.array(value))
            success |= running & step.success
            ended = running & step.ended
            self._end(ended)
            running &= ~ended
        self._end(running & success)

    def _newest(self, observation: np.ndarray) -> np.ndarray:
        return observation[-1] if self.policy.observation_steps > 1 else observation

    def _end(self, ended: np.ndarray) -> None:
        for i in np.flatnonzero(ended):
            number, parts = int(self.current[i]), {name: np.stack(values) for name, values in self.partial[i].items()}
            episode = self._episode(number, parts)
            self.finished[number] = Finished(len(episode), bool(parts["rewards"].any()))
            self.in_memory[number] = episode
            self.current[i], self.partial[i] = -1, {}

    def _episode(self, number: int, parts: Mapping[str, np.ndarray]) -> Episode:
        """`dones` marks termination (success) alone: an episode that ran into the time limit has none."""
        length = len(parts["actions"])
        dones = np.zeros(length, bool)
        dones[-1] = parts["rewards"].any()
        observations = {
            key: SparseFrames(parts[key], length, self.every) if is_image(key) and self.every > 1 else parts[key]
            for key in self.policy.shapes
            if key != COORDINATES and (key != LANGUAGE or number not in self.tasks)  # the episode's seed and its task say them
        }  # fmt: skip
        seed = episode_seed(STREAM, self.seed, number) if self.env.chooses_episodes else None
        return Episode(
            observations, parts["actions"], parts["rewards"], dones, parts.get("states"), f"demo_{number}", episode_seed=seed,
            task=self.tasks.get(number),
        )  # fmt: skip

    def _dataset(self, episodes: Iterable[Episode], source: Path, filters: Mapping[str, tuple[str, ...]]) -> Dataset:
        tasks = tuple(getattr(self.env, "vocabulary", ())) if self.tasks else ()
        return Dataset(tuple(episodes), self.keys, self.dims, dict(self.environment.facts()), filters, str(source), tasks)

    def _file(self, number: int) -> Path:
        return self.parts / f"{number}.hdf5"

    def put_aside(self) -> None:
        """Write the finished episodes that are in memory, each into its file, durably; the memory is free again.

        One that a run which was killed had written before is written again, the same to the bit.
        """
        for number, episode in self.in_memory.items():
            write_robomimic(self._file(number), self._dataset([episode], self._file(number), {}))
        self.in_memory.clear()

    def dataset(self, source: Path) -> Dataset:
        """The finished episodes, in order; `mask/success` and `mask/failure` say how they ended. Frames stay in their files."""
        images = [name for name in self.policy.shapes if is_image(name)]

        def episode(number: int) -> Episode:
            if number in self.in_memory:
                return self.in_memory[number]
            return read_robomimic(self._file(number), observation_keys=self.keys, image_keys=images, check_actions=False)[0]

        names = {
            key: tuple(f"demo_{number}" for number, ended in sorted(self.finished.items()) if ended.solved == solved)
            for key, solved in (("success", True), ("failure", False))
        }
        filters = {key: found for key, found in names.items() if found}
        return self._dataset(map(episode, sorted(self.finished)), source, filters)

    def state_dict(self) -> dict[str, Any]:
        """What is in flight, and which episodes have been put aside."""
        return {
            "env": self.env.get_state(), "generator": generator_state(self.generator), "started": self.started, "current": self.current,
            "observation": self.observation, "finished": {str(k): list(episode) for k, episode in self.finished.items()},
            "tasks": {str(k): name for k, name in self.tasks.items()},
            "partial": [{name: np.stack(values) for name, values in p.items()} for p in self.partial],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`; an environment that cannot say its state begins the running episodes again, with a warning."""
        set_generator_state(self.generator, state["generator"])
        self.started, self.current[:] = int(state["started"]), state["current"]
        self.finished = {int(k): Finished(int(steps), bool(solved)) for k, (steps, solved) in state["finished"].items()}
        lost = [self._file(k) for k in sorted(self.finished) if not self._file(k).is_file()]
        require(not lost, "An episode that was put aside is not there.", file=lost[0] if lost else self.parts,
                found=f"{len(lost)} of {len(self.finished)} missing",
                remedy="put the files back, or choose another --output")  # fmt: skip
        self.tasks = {int(k): str(name) for k, name in state.get("tasks", {}).items()}
        if state["env"] is None:
            warnings.warn("This environment cannot restore its state: running episodes begin again.", stacklevel=2)
            self._reset(self.current >= 0, np.zeros(len(self.current), np.int64))
        else:
            self.env.set_state(state["env"])
            self.observation = {name: np.array(v) for name, v in state["observation"].items()}
            self.partial = [{name: list(v) for name, v in p.items()} for p in state["partial"]]


def _state_layout(policy: Policy, environment: Environment) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and widths of the parts of "state": those of the policy's data, robomimic's four, or one name for all."""
    width = policy.shapes["state"][0] if "state" in policy.shapes else 0
    facts = about_of(policy).facts or {}
    keys, dims = tuple(facts.get("state_keys") or ()), tuple(facts.get("state_dims") or ())
    if not width:
        return (), ()
    if keys and len(keys) == len(dims) and sum(dims) == width:
        return keys, dims
    if environment.state_keys == LOW_DIM_KEYS and width in (19, 23):
        return LOW_DIM_KEYS, (3, 4, 2, width - 9)
    return ("state",), (width,)


def collect(
    policy: Policy, environment: Environment, episodes: int, run: Run, state: Mapping[str, Any], *, seed: int, num_envs: int,
    horizon: int, device: str | torch.device = "cpu", checkpoint_seconds: float = 60.0, frames_every: int = 1,
) -> Path:  # fmt: skip
    """Play `episodes` episodes in a run that is open; rollouts.hdf5 appears at the end. Goes on from the run's loaded `state`.

    At a checkpoint finished episodes are put aside, in `.rollouts.hdf5.parts`, so that neither the memory nor a checkpoint holds more
    than what is in flight. Frames are recorded at every `frames_every`-th step of a chunk (of each step for a policy that looks at
    several).
    """
    path, n = run.directory / ROLLOUTS_FILE, min(num_envs, episodes)
    parts = parts_of(path)
    if path.exists():  # a kill may have come between it and this
        shutil.rmtree(parts, ignore_errors=True)
        return path
    env = make_stacked(
        environment.make,
        n,
        shapes=policy.shapes,
        observation_steps=policy.observation_steps,
        chunk=1,
        horizon=horizon,
        terminate_on="never",
    )
    try:
        every = frames_every if policy.observation_steps == 1 else 1
        collector = Collector(policy, env, episodes, seed, environment, parts, device, every)
        if "collector" in state:
            with run.restoring():
                collector.load_state_dict(state["collector"])
        checkpoints = Checkpoints(run, checkpoint_seconds)
        with progress("rollouts", episodes, collector.done) as bar:
            while collector.done < episodes:
                before = collector.done
                collector.chunk()
                if collector.done > before:
                    bar.advance(collector.done - before, success=collector.success)
                if checkpoints.due:
                    collector.put_aside()
                    checkpoints.save(collector.done, {"collector": collector.state_dict()})
        write_robomimic(path, collector.dataset(path))
        shutil.rmtree(parts, ignore_errors=True)
    finally:
        env.close()
    return path


def collect_rollouts(
    policy: Policy,
    environment: Environment | str,
    episodes: int,
    output: str | Path,
    *,
    seed: int = 0,
    num_envs: int = 10,
    horizon: int | None = None,
    compute: Compute | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
) -> Path:
    """Play `episodes` episodes of the pretrained policy into OUTPUT/rollouts.hdf5 (robomimic's layout, failures included).

    Raises:
        InputError: the policy cannot play there, or `output` holds another run.
    """
    environment = find_environment(environment) if isinstance(environment, str) else environment
    compute = (compute or Compute()).resolved()
    device = compute.start()
    policy = to_device(policy, device)
    limit = environment.horizon if horizon is None else horizon
    check_policy(policy, environment, limit)
    recorded = {
        "environment": environment.name,
        "seed": seed,
        "episodes": episodes,
        "num_envs": num_envs,
        "horizon": horizon,
    }
    with Run(output, recorded, resume=resume, inputs={"policy": policy_fingerprint(policy)}) as run:
        found = run.load()
        path = collect(
            policy, environment, episodes, run, found[1] if found else {}, seed=seed, num_envs=num_envs, horizon=limit, device=device,
            checkpoint_seconds=checkpoint_seconds,
        )  # fmt: skip
        run.finish()
    return path


# -- recorded episodes -----------------------------------------------------------------------------------------------------------
def read_rollouts(
    path: str | Path,
    policy: Policy,
    observation_keys: Sequence[str] | None = None,
    allow_version_mismatch: bool = False,
    ours: bool = False,
    names: Iterable[str] | None = None,
) -> Dataset:
    """Rollouts of any source that belong to `policy` (a real robot's need no `env_args`); `ours` were collected with it.

    Of a session of `postbc robot rollout` those that have not been discarded, as they were labelled.

    All episodes, or those of `names`.

    Raises:
        InputError: the file cannot be used, or is of another task, robot, controller, version or size than the policy.
    """
    state, facts = "state" in policy.shapes, about_of(policy).facts
    own = (facts or {}).get("state_keys") or None
    keys: Sequence[str] | None = (observation_keys or own) if state else ()
    session = is_session(path)
    of_session = Path(path).name == "episodes" and is_session(Path(path).parent)
    require(not of_session, "These are the episodes of a session without their labels.", file=path,
            remedy=f"give the session's folder: {Path(path).parent}")  # fmt: skip
    dataset = (read_session if session else read_dataset)(
        path, names=names, observation_keys=keys, image_keys=[name for name in policy.shapes if is_image(name)], check_actions=False,
        parts=("rewards", "dones"), environment={},
    )  # fmt: skip
    if LANGUAGE in policy.shapes:
        dataset = with_language(dataset)
    if COORDINATES in policy.shapes:
        dataset = _with_coordinates(dataset, policy.shapes[COORDINATES][0], ours or session)
    for what, found, expected in (
        *((f"observations ({name})", dataset.shapes.get(name), tuple(shape)) for name, shape in policy.shapes.items()),
        ("actions", dataset.action_dim, policy.action_dim),
    ):  # fmt: skip
        require(
            found == expected, f"The rollouts' {what} are not the policy's.", file=path, key=what, found=found, expected=expected,
            remedy="use rollouts of this policy's task and robot",
        )  # fmt: skip
    if facts is not None and not ours:
        expected_facts = Facts.from_dict(facts, "the policy")
        found_facts = Facts.of_dataset(dataset)
        note(check_belongs(found_facts, expected_facts, file=str(path), allow_version_mismatch=allow_version_mismatch))
    return dataset


def rollouts_digest(path: str | Path) -> str:
    """Of what is learnt from: a file's content, or a session's episodes and labels."""
    return session_digest(path) if is_session(path) else digest(path)


def _with_coordinates(dataset: Dataset, size: int, ours: bool) -> Dataset:
    """With a coherent policy's coordinates: those that `ours` were played with, which their seeds say; 0, the demonstrator's, else."""
    episodes = []
    for episode in dataset:
        require(episode.episode_seed is not None or not ours, "A coherent policy's coordinates come from the seeds of its episodes.",
                file=dataset.source, key=f"{episode.name} attribute episode_seed", found="none",
                remedy="use an environment whose episodes seeds decide")  # fmt: skip
        g = coordinates_of_episode(episode.episode_seed or 0, size) if ours else np.zeros(size, np.float32)
        episodes.append(replace(episode, observations={**episode.observations, COORDINATES: np.tile(g, (len(episode), 1))}))
    return replace(dataset, episodes=tuple(episodes))


def encode_rows(dataset: Dataset, policy: Policy, rows: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """(n, F) what learners see of steps `rows` (n,) int64 on the CPU, counted episode after episode; each is encoded once."""
    windows = Windows(dataset, 1, observation_steps=policy.observation_steps, device=device)
    used, place = torch.unique(rows, return_inverse=True)
    seen = seen_dim(policy)

    def encode(observation: Mapping[str, Tensor]) -> Tensor:
        return policy.encode({name: observation[name] for name in policy.shapes})[:, :seen]

    return window_features(windows, encode, FRAMES, used)[place.to(windows.device)]


def transition_batch(
    dataset: Dataset,
    policy: Policy,
    discount: float,
    config: TransitionConfig,
    device: str | torch.device = "cpu",
    ours: bool = False,
    steps: int = 1,
    encoder: Policy | None = None,
) -> tuple[Batch, dict[str, float]]:
    """All transitions of `dataset` in normalised units, and what they are: episodes, env_steps, success.

    With returns over up to `steps` chunks; with features of `encoder` where it is not the policy's own.

    Raises:
        InputError: no step was successful (unless the rollouts are `ours`), or there is not one transition: nothing could be learnt.
    """
    successes = step_successes(dataset, config.success)
    solved = sum(bool(s.any()) for s in successes)
    require(
        solved or ours, "There is no success among the rollouts: nothing to learn from.", file=dataset.source, key="rewards",
        found=f"0 of {len(dataset)} episodes succeed",
        remedy="use more rollouts, or a policy that sometimes succeeds; of a robot's session look at the labels (postbc robot label); "
        "of other files say what success is (transitions.success)",
    )  # fmt: skip
    if any(isinstance(values, SparseFrames) for values in dataset[0].observations.values()):
        config = replace(config, tail="pad")  # a last chunk cannot begin earlier, where nothing was drawn
    parts = [n_step(transitions(e, s, policy.chunk, discount, config), steps) for e, s in zip(dataset, successes, strict=True)]
    require(
        sum(map(len, parts)), "The rollouts hold no transition.", file=dataset.source,
        found=f"{dataset.num_steps} steps in {len(dataset)} episodes", expected=f"episodes longer than a chunk ({policy.chunk} steps)",
    )  # fmt: skip
    firsts = np.cumsum(dataset.lengths) - dataset.lengths

    def joined(name: str) -> Tensor:
        return torch.as_tensor(np.concatenate([getattr(part, name) for part in parts]))

    first = torch.as_tensor(np.repeat(firsts, list(map(len, parts))))
    row, discounts = first + joined("row"), joined("discount")
    following = torch.where(discounts > 0, first + joined("next_row"), row)  # after a terminal step nothing counts
    features, next_features = encode_rows(dataset, encoder or policy, torch.cat([row, following]), device).chunk(2)
    action = policy.normalization.normalize_action(joined("action").to(device)).flatten(1)
    batch = Batch(features, action, next_features, joined("reward").to(device), discounts.to(device))
    return batch, {"episodes": len(dataset), "env_steps": dataset.num_steps, "success": solved / len(dataset)}
