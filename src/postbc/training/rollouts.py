"""Rollouts as data: playing a pretrained policy into a robomimic file, and recorded episodes of any source as chunk transitions."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postbc.agents.base import Batch, about_of
from postbc.data.belonging import Facts, check_belongs
from postbc.data.episodes import COORDINATES, LOW_DIM_KEYS, Dataset, Episode, is_image
from postbc.data.language import LANGUAGE, with_language
from postbc.data.readers import read_dataset
from postbc.data.robomimic import write_robomimic
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
from postbc.progress import progress, say
from postbc.robot.recorded import is_session, read_session, session_digest
from postbc.runs import Checkpoints, Run, digest
from postbc.seeding import episode_seed, make_generator
from postbc.training.results import check_policy, require_finite_actions, to_device

ROLLOUTS_FILE = "rollouts.hdf5"
STREAM = 20_251  # of the episodes' seeds
FRAMES = 256  # encoded at once


# -- collect ---------------------------------------------------------------------------------------------------------------------
class Collector:
    """N environments that play episodes with the policy, one control step at a time, so that every step is recorded.

    Whole chunks are executed (also the steps after the first success), so that every recorded chunk is one that the policy meant.

    Args:
        policy: of normalised units.
        env: N environments with chunk 1 that never terminate; observations (N, To, ...) for a policy with `observation_steps` > 1.
        episodes: how many.
        seed: of the episodes and of the policy's noise.
        device: of the policy.
    """

    def __init__(self, policy: Policy, env: ChunkEnv, episodes: int, seed: int, device: str | torch.device = "cpu") -> None:
        self.policy, self.env, self.episodes, self.seed, self.device = policy, env, episodes, seed, torch.device(device)
        self.generator = make_generator(seed, "rollouts/acting", device)
        self.started = 0  # episodes begun
        self.current = np.full(env.num_envs, -1, np.int64)  # number of the episode that is running, −1: none
        self.observation: dict[str, np.ndarray] = {}
        self.partial: list[dict[str, list[Any]]] = [{} for _ in self.current]
        self.tasks: dict[int, str] = {}  # of the episodes, where the environment names them
        self.finished: dict[int, dict[str, np.ndarray]] = {}

    @property
    def done(self) -> int:
        """Episodes finished."""
        return len(self.finished)

    @property
    def success(self) -> float:
        """Share of the finished episodes that solved the task."""
        return float(np.mean([e["rewards"].any() for e in self.finished.values()]))

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
        require_finite_actions(raw, sum(len(e["rewards"]) for e in self.finished.values()))
        running, success = self.current >= 0, np.zeros(len(self.current), bool)
        for t in range(self.policy.chunk):
            before, states = self.observation, self._states()
            step = self.env.step(raw[:, t : t + 1])
            self.observation = step.observation
            for i in np.flatnonzero(running & (step.num_steps > 0)):
                values = {name: self._newest(before[name][i]) for name in self.policy.shapes}
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
            self.finished[int(self.current[i])] = {name: np.stack(values) for name, values in self.partial[i].items()}
            self.current[i], self.partial[i] = -1, {}

    def dataset(self, environment: Environment, source: str) -> Dataset:
        """The finished episodes, in order; `mask/success` and `mask/failure` say how they ended.

        `dones` marks termination (success) alone: an episode that ran into the time limit has none.
        """
        episodes, filters = [], {"success": [], "failure": []}  # type: ignore[var-annotated]
        for number, parts in sorted(self.finished.items()):
            dones, name = np.zeros(len(parts["rewards"]), bool), f"demo_{number}"
            solved = dones[-1] = bool((parts["rewards"] > 0).any())
            filters["success" if solved else "failure"].append(name)
            observations = {key: parts[key] for key in self.policy.shapes if key != COORDINATES}  # the episode's seed says them
            seed = episode_seed(STREAM, self.seed, number) if self.env.chooses_episodes else None
            episodes.append(
                Episode(
                    observations, parts["actions"], parts["rewards"], dones, parts.get("states"), name, episode_seed=seed,
                    task=self.tasks.get(number),
                )
            )  # fmt: skip
        keys, dims = _state_layout(self.policy, environment)
        named = {key: tuple(names) for key, names in filters.items() if names}
        tasks = tuple(getattr(self.env, "vocabulary", ())) if self.tasks else ()
        return Dataset(tuple(episodes), keys, dims, dict(environment.facts()), named, source, tasks)

    def state_dict(self) -> dict[str, Any]:
        """Everything, running episodes included."""
        return {
            "env": self.env.get_state(), "generator": generator_state(self.generator), "started": self.started, "current": self.current,
            "observation": self.observation, "finished": self.finished, "tasks": {str(k): name for k, name in self.tasks.items()},
            "partial": [{name: np.stack(values) for name, values in p.items()} for p in self.partial],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`; an environment that cannot say its state begins the running episodes again, with a warning."""
        set_generator_state(self.generator, state["generator"])
        self.started, self.current[:] = int(state["started"]), state["current"]
        self.finished = {int(k): {name: np.array(v) for name, v in e.items()} for k, e in state["finished"].items()}
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
    horizon: int, device: str | torch.device = "cpu", checkpoint_seconds: float = 60.0,
) -> Path:  # fmt: skip
    """Play `episodes` episodes in a run that is open; rollouts.hdf5 appears at the end. Goes on from the run's loaded `state`."""
    path, n = run.directory / ROLLOUTS_FILE, min(num_envs, episodes)
    if path.exists():
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
        collector = Collector(policy, env, episodes, seed, device)
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
                    checkpoints.save(collector.done, {"collector": collector.state_dict()})
        write_robomimic(path, collector.dataset(environment, str(path)))
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
        for warning in check_belongs(
            Facts.of_dataset(dataset), expected_facts, file=str(path), allow_version_mismatch=allow_version_mismatch
        ):
            say(f"note: {warning}")
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


@torch.no_grad()
def encode_all(dataset: Dataset, policy: Policy, device: str | torch.device = "cpu") -> Tensor:
    """(num_steps, F) of every frame what learners see of its features, episode after episode, each encoded once."""
    windows = Windows(dataset, 1, observation_steps=policy.observation_steps, device=device)
    rows = torch.arange(len(windows), device=device).split(FRAMES)
    seen = seen_dim(policy)
    return torch.cat([policy.encode({name: windows.observation(r)[name] for name in policy.shapes})[:, :seen] for r in rows])


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
    parts = [n_step(transitions(e, s, policy.chunk, discount, config), steps) for e, s in zip(dataset, successes, strict=True)]
    require(
        sum(map(len, parts)), "The rollouts hold no transition.", file=dataset.source,
        found=f"{dataset.num_steps} steps in {len(dataset)} episodes", expected=f"episodes longer than a chunk ({policy.chunk} steps)",
    )  # fmt: skip
    firsts = np.cumsum(dataset.lengths) - dataset.lengths

    def joined(name: str, shift: bool = False) -> Tensor:
        values = [getattr(part, name) + (first if shift else 0) for part, first in zip(parts, firsts, strict=True)]
        return torch.as_tensor(np.concatenate(values), device=device)

    features = encode_all(dataset, encoder or policy, device)
    action = policy.normalization.normalize_action(joined("action")).flatten(1)
    batch = Batch(
        features[joined("row", True)], action, features[joined("next_row", True)], joined("reward"), joined("discount")
    )
    return batch, {"episodes": len(dataset), "env_steps": dataset.num_steps, "success": solved / len(dataset)}
