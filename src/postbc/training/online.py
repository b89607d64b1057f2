"""DSRL's loop: base-policy rollouts, then collect, update, evaluate, checkpoint; every seed on its own count of environment steps.

The M seeds run in lockstep, in one vector environment of M·n, yet nothing of a seed depends on the others: its evaluations use its
actor as it was when *its* environment steps passed the milestone, and so does the agent that is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from postbc.errors import InputError
from postbc.evaluation import Actor, Evaluation, PolicyActor, evaluate
from postbc.finetuning.dsrl import DSRL, DSRLActor, DSRLConfig, make_actor
from postbc.finetuning.replay import Replay
from postbc.finetuning.results import (
    RESULTS_FILE,
    Checkpoints,
    check_sizes,
    fingerprint,
    outcome,
    select_seeds,
    write_results,
)
from postbc.nn import generator_states, make_generators, set_generator_states
from postbc.policies.base import Policy
from postbc.progress import progress
from postbc.runs import Run

MakeEnv = Callable[[int], VectorEnv]
STREAM = 400  # of the generators: 400 initialisation, 401 base policy, 402 acting, 403 batches, 404 the updates' noise


@dataclass(frozen=True)
class DSRLTraining:
    """Environment, budget and evaluation of a DSRL run (paper.md section 6; field.md A.1)."""

    budget_env_steps: int = 500_000
    """Environment steps a seed, the initial rollouts included."""
    num_envs: int = 4
    """Environments a seed; a vector step advances each by one chunk."""
    initial_steps: int = 24_000
    """Environment steps of rollouts with the base policy before learning starts (paper: 24000 Lift and Can, 32000 Square)."""
    eval_every: int = 48_000
    """Environment steps between evaluations (DSRL: 3000 vector steps of 4 chunks of 4)."""
    eval_episodes: int = 200
    """Episodes of the first and the last evaluation."""
    curve_episodes: int | None = None
    """Episodes of those between; default eval_episodes."""
    envs_per_member: int = 10
    """Environments a seed while evaluating."""
    deterministic_eval: bool = False
    """Evaluate tanh(mean) instead of a sample (DSRL: False)."""
    horizon: int | None = None
    """Environment steps of an episode; default the task's (300, 300, 400)."""
    reward: Literal["negative", "sparse"] = "negative"
    """A sub-step earns success − 1 (paper, DSRL) or success."""
    terminate_on: Literal["success", "chunk_success", "never"] = "success"
    """What ends a training episode besides the horizon. DSRL: "never"."""
    chunk_reward: Literal["sum", "discounted"] = "sum"
    """Reward of a chunk: Σ r_i (DSRL) or Σ γ^i r_i."""
    chunk_discount: Literal["once", "per_step"] = "once"
    """Discount of a chunk: γ (DSRL) or γ^(sub-steps executed)."""
    time_limit: Literal["bootstrap", "terminal"] = "bootstrap"
    """At the horizon: bootstrap from the last observation, or treat it as an end (DSRL as published)."""
    buffer_size: int = 10_000_000
    """Transitions a seed that the replay holds (bounded by what the budget can produce)."""
    log_every: int = 50
    """Vector steps between rows of metrics.csv."""
    checkpoint_seconds: float = 60.0
    """Least time between checkpoints; they never take more than about 5 % of the run."""

    def __post_init__(self) -> None:
        for name in ("budget_env_steps", "num_envs", "eval_every", "eval_episodes", "buffer_size", "log_every"):
            if getattr(self, name) < 1:
                raise InputError("A number must be at least 1.", key=name, found=getattr(self, name))


def chunk_returns(
    reward: np.ndarray, info: dict[str, Any], chunk: int, discount: float, training: DSRLTraining
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reward, discount and executed sub-steps of a vector step, each (N,); environments without sub-step info count whole chunks."""
    steps = np.asarray(info.get("num_steps", np.full(len(reward), chunk)), np.int64)
    if training.chunk_reward == "discounted" and "step_rewards" not in info:
        raise InputError("The environment does not say the rewards of sub-steps.", key="info['step_rewards']",
                         remedy="use chunk_reward 'sum'")  # fmt: skip
    if training.chunk_reward == "discounted":
        reward = np.asarray(info["step_rewards"], float) @ discount ** np.arange(chunk)
    discounts = discount**steps if training.chunk_discount == "per_step" else np.full(len(reward), discount)
    return reward, discounts, steps


def true_next(observation: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """The observations that the actions led to (N, S): the last of the old episode where an environment was reset in the same step."""
    following = np.array(observation, np.float32)
    for i in np.flatnonzero(info.get("_final_obs", np.zeros(len(following), bool))):
        following[i] = info["final_obs"][i]
    return following


class DSRLTrainer:
    """Everything that a run consists of, one vector step at a time; `state_dict` is complete, so that a run resumes bit for bit.

    Args:
        policy: frozen, M members, with `normalization`.
        env: M·n environments, member-major, resetting in the same step.
        seeds: one a member: initialisation, exploration, batches and episodes.
    """

    def __init__(
        self, policy: Policy, env: VectorEnv, config: DSRLConfig, training: DSRLTraining, seeds: Sequence[int]
    ) -> None:
        self.policy, self.env, self.config, self.training, self.seeds = policy, env, config, training, list(seeds)
        self.normalization = policy.normalization  # type: ignore[attr-defined]
        members, n = policy.members, training.num_envs
        if env.num_envs != members * n or len(self.seeds) != members:
            raise ValueError(f"{env.num_envs} environments and {len(self.seeds)} seeds for {members} members of {n}")
        self.agent = DSRL(config, policy, make_generators(seeds, STREAM))
        self.generators = [make_generators(seeds, STREAM + i) for i in range(1, 5)]
        rows = min(training.buffer_size, training.budget_env_steps + members * n * policy.chunk)
        self.replay = Replay(members, rows, policy.observation_dim, self.agent.action_dim)
        self.initial_vector_steps = -(-training.initial_steps // (n * policy.chunk))
        self.vector_steps = 0
        self.counts = {name: np.zeros(members, np.int64) for name in ("env_steps", "episodes", "successes")}
        self.episode_success: NDArray[np.bool_] = np.zeros(members * n, bool)
        # environment m·n + j: a stream of episodes that depends on the seed of member m and on j alone
        observation, _ = env.reset(seed=[1000 * seed + j for seed in self.seeds for j in range(n)])  # type: ignore[arg-type]
        self.observation = np.array(observation, np.float32)

    def _tensor(self, values: np.ndarray) -> Tensor:
        """(N, ...) -> (M, n, ...) float32."""
        return torch.as_tensor(values, dtype=torch.float32).view(self.policy.members, self.training.num_envs, *values.shape[1:])

    def step(self) -> dict[str, Tensor]:
        """One vector step: play a chunk everywhere, remember it, and learn from the replay. Metrics (M,) of the last update."""
        members, n, training = self.policy.members, self.training.num_envs, self.training
        base, acting, sampling, noise = self.generators
        observation = self.normalization.normalize_observation(self._tensor(self.observation))
        learning = self.vector_steps >= self.initial_vector_steps
        chunk, action = self.agent.act(observation, acting) if learning else self.agent.act_pretrained(observation, base)
        raw = self.normalization.unnormalize_chunk(chunk).flatten(0, 1).numpy()

        self.observation, reward, terminated, truncated, info = self.env.step(raw)
        following = self.normalization.normalize_observation(self._tensor(true_next(self.observation, info)))
        reward, discount, steps = chunk_returns(reward, info, self.policy.chunk, self.config.discount, training)
        ended = terminated | truncated
        over = ended if training.time_limit == "terminal" else terminated
        self.replay.add(observation, action, following, self._tensor(reward), self._tensor(np.where(over, 0.0, discount)))

        self.vector_steps += 1
        self.episode_success |= np.asarray(info.get("success", terminated), bool)
        self.counts["env_steps"] += steps.reshape(members, n).sum(1)
        self.counts["episodes"] += ended.reshape(members, n).sum(1)
        self.counts["successes"] += (ended & self.episode_success).reshape(members, n).sum(1)
        self.episode_success &= ~ended
        return self.agent.train(self.replay, sampling, noise) if learning else {}

    def rollout_metrics(self) -> dict[str, float]:
        """Episodes and their success since the last call."""
        episodes, successes = self.counts["episodes"], self.counts["successes"]
        metrics = {"rollout/env_steps": float(self.counts["env_steps"].mean())}
        if episodes.sum():
            metrics |= {"rollout/success": float(successes.sum() / episodes.sum()), "rollout/episodes": float(episodes.sum())}
        episodes[:], successes[:] = 0, 0
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimisers, replay, environment, generators and counters."""
        return {
            "agent": self.agent.state_dict(), "replay": self.replay.state_dict(), "env": self.env.get_state(),  # type: ignore[attr-defined]
            "generators": [generator_states(g) for g in self.generators], "vector_steps": self.vector_steps,
            "counts": self.counts, "episode_success": self.episode_success, "observation": self.observation,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.agent.load_state_dict(state["agent"])
        self.replay.load_state_dict(state["replay"])
        self.env.set_state(state["env"])  # type: ignore[attr-defined]
        for generators, states in zip(self.generators, state["generators"], strict=True):
            set_generator_states(generators, states)
        self.vector_steps = int(state["vector_steps"])
        self.counts = {name: np.array(values) for name, values in state["counts"].items()}
        self.episode_success, self.observation = np.array(state["episode_success"]), np.array(state["observation"])


class Milestones:
    """The actor of each seed as it was when that seed's environment steps first reached eval_every, 2·eval_every, ..., the budget."""

    def __init__(self, trainer: DSRLTrainer) -> None:
        training = trainer.training
        self.trainer = trainer
        self.steps = [*range(training.eval_every, training.budget_env_steps, training.eval_every), training.budget_env_steps]
        self.reached = np.zeros(len(trainer.seeds), np.int64)  # milestones behind each seed
        self.pending: dict[int, dict[str, Any]] = {}  # milestone -> {"actor": stacked parameters, "env_steps": (M,)}

    def update(self) -> range:
        """Keep what has just passed a milestone; the milestones that every seed has passed now and had not before."""
        taken, actor = self.trainer.counts["env_steps"], self.trainer.agent.networks.actor.state_dict()
        before = int(self.reached.min())
        for m, count in enumerate(taken):
            while self.reached[m] < len(self.steps) and count >= self.steps[self.reached[m]]:
                fresh = {"actor": {k: v.clone() for k, v in actor.items()}, "env_steps": np.zeros(len(taken), np.int64)}
                kept = self.pending.setdefault(int(self.reached[m]), fresh)
                for name, value in actor.items():
                    kept["actor"][name][m] = value[m]
                kept["env_steps"][m] = count
                self.reached[m] += 1
        return range(before, int(self.reached.min()))

    @property
    def finished(self) -> bool:
        return int(self.reached.min()) == len(self.steps)

    def actor(self, milestone: int) -> DSRLActor:
        """The agent of a milestone that every seed has passed."""
        trainer = self.trainer
        actor = make_actor(trainer.config, trainer.policy)
        actor.load_state_dict(self.pending[milestone]["actor"])
        return DSRLActor(trainer.policy, actor, trainer.config.action_magnitude, trainer.training.deterministic_eval)

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached, "pending": self.pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reached, self.pending = np.array(state["reached"]), dict(state["pending"])


@dataclass(frozen=True)
class _Recorded:
    """What config.yaml holds and a resumed run must agree on."""

    task: str | None
    seeds: tuple[int, ...]
    policy: str
    dsrl: DSRLConfig
    training: DSRLTraining
    about: dict[str, Any] = field(default_factory=dict)


def finetune_dsrl(
    policy: Policy,
    output: str | Path,
    config: DSRLConfig | None = None,
    training: DSRLTraining | None = None,
    *,
    task: str | None = None,
    seeds: Sequence[int] | None = None,
    resume: bool = False,
    make_env: MakeEnv | None = None,
    make_evaluation_env: MakeEnv | None = None,
    source: str | Path | None = None,
    before: Evaluation | None = None,
) -> DSRLActor:
    """Finetune every member of `policy` by DSRL and write the run directory: results.json, agent.safetensors, metrics.csv.

    Args:
        policy: M members with `normalization`; `sample(observation, noise)` must be deterministic. It is not changed.
        output: the run directory.
        task: Lift, Can or Square; default the policy's own.
        seeds: members to finetune, by seed; default all.
        resume: go on with the run that `output` holds.
        make_env, make_evaluation_env: N -> a vector environment, for training (resetting in the same step) and for evaluation
            (see :func:`postbc.evaluation.evaluate`); default robosuite's `task`.
        source: the policy's file, for messages.
        before: an evaluation of the policy on the same episodes; without it, it is measured first.

    Raises:
        InputError: another task, other sizes, a stochastic sampler, a seed that is not there, a directory with another run.
    """
    config, training, output = config or DSRLConfig(), training or DSRLTraining(), Path(output)
    policy = select_seeds(policy, seeds)
    check_deterministic(policy, source)
    if make_env is None or make_evaluation_env is None:
        from postbc.evaluation_command import check_task, environment_factory

        task = check_task(task, getattr(policy, "about", {}), Path(source or "policy"))
        name, chunk = task, policy.chunk

        def make_training_env(num_envs: int) -> VectorEnv:
            from postbc.environments import make

            return make(
                name, num_envs=num_envs, chunk=chunk, horizon=training.horizon, reward=training.reward,
                terminate_on=training.terminate_on, autoreset="same_step",
            )  # fmt: skip

        make_env = make_env or make_training_env
        make_evaluation_env = make_evaluation_env or environment_factory(task, chunk, training.horizon)
    members = tuple(int(s) for s in getattr(policy, "seeds", range(policy.members)))
    env = make_env(policy.members * training.num_envs)
    try:
        check_sizes(policy, env, source)
        run = Run(output, _Recorded(task, members, fingerprint(policy), config, training), resume=resume)
        if (output / RESULTS_FILE).exists():
            return DSRLActor.load(output, policy)
        trainer = DSRLTrainer(policy, env, config, training, members)
        actor = _loop(trainer, run, make_evaluation_env, task, before)
    finally:
        env.close()
    run.drop_checkpoints()
    run.close()
    return actor


def check_deterministic(policy: Policy, source: str | Path | None) -> None:
    """InputError if the policy's sampler draws noise of its own: then the latent noise does not decide the action."""
    sampler = getattr(getattr(policy, "config", None), "sampler", "ddim")
    if sampler != "ddim":
        raise InputError(
            "DSRL needs a policy that is deterministic given its latent noise.", file=source, key="sampler", found=sampler,
            expected="ddim", remedy="load it with sampler='ddim' (DiffusionPolicy.load(path, sampler='ddim', inference_steps=8))",
        )  # fmt: skip


def _loop(
    trainer: DSRLTrainer, run: Run, make_evaluation_env: MakeEnv, task: str | None, before: Evaluation | None
) -> DSRLActor:
    training, milestones = trainer.training, Milestones(trainer)
    per_step = training.num_envs * trainer.policy.chunk
    records: list[dict[str, Any]] = []  # evaluations so far, the first of the pretrained policy
    found = run.load()
    if found is not None:
        trainer.load_state_dict(found[1]["trainer"])
        milestones.load_state_dict(found[1]["milestones"])
        records = list(found[1]["records"])
    checkpoints = Checkpoints(run, training.checkpoint_seconds, found[1]["elapsed"] if found else 0.0)

    def save() -> None:
        state = {"trainer": trainer.state_dict(), "milestones": milestones.state_dict(), "records": records}
        checkpoints.save(trainer.vector_steps * per_step, {**state, "elapsed": checkpoints.elapsed})

    def measure(actor: Actor, env_steps: np.ndarray, episodes: int, known: Evaluation | None = None) -> None:
        rates = outcome(
            known
            or evaluate(
                actor, make_evaluation_env, episodes=episodes, envs_per_member=training.envs_per_member,
                policy_seeds=trainer.seeds, progress=False,
            )
        )  # fmt: skip
        records.append({"env_steps": env_steps.tolist(), **rates})
        metrics = {f"evaluation/{name}": float(np.mean(values)) for name, values in rates.items()}
        metrics |= {f"evaluation/success/seed_{s}": v for s, v in zip(trainer.seeds, rates["success"], strict=True)}
        run.log(trainer.vector_steps * per_step, metrics)

    actor: DSRLActor | None = None
    if not records:
        zero = np.zeros(trainer.policy.members, np.int64)
        measure(PolicyActor(trainer.policy), zero, training.eval_episodes, before)
        save()
    with progress("dsrl", training.budget_env_steps, int(trainer.counts["env_steps"].min())) as bar:
        while not milestones.finished or milestones.pending:
            start = int(trainer.counts["env_steps"].min())
            info = trainer.step()
            if trainer.vector_steps % training.log_every == 0:
                metrics = {name: float(value.mean()) for name, value in info.items()}
                run.log(trainer.vector_steps * per_step, metrics | trainer.rollout_metrics())
            for milestone in milestones.update():
                actor = milestones.actor(milestone)
                last = milestone == len(milestones.steps) - 1
                episodes = training.eval_episodes if last else training.curve_episodes or training.eval_episodes
                measure(actor, milestones.pending[milestone]["env_steps"], episodes)
                del milestones.pending[milestone]
            bar.advance(int(trainer.counts["env_steps"].min()) - start, success=float(np.mean(records[-1]["success"])))
            if checkpoints.due and not milestones.finished:
                save()
    assert actor is not None
    actor.save(run.directory, trainer.config)
    curves = [[(r["env_steps"][m], r["success"][m]) for r in records] for m in range(len(trainer.seeds))]
    write_results(
        run.directory, trainer.policy, f"dsrl-{trainer.config.variant}", task, trainer.seeds, records[0], records[-1], curves,
        budget_env_steps=training.budget_env_steps, episodes=training.eval_episodes, wall_clock_s=round(checkpoints.elapsed, 1),
    )  # fmt: skip
    return actor
