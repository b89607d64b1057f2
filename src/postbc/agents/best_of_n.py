"""Best-of-N: play the pretrained policy, learn what its chunks are worth (IQL), then play the best of N samples at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from postbc.errors import InputError
from postbc.evaluation import Actor, Evaluation, PolicyActor, evaluate
from postbc.finetuning.dsrl import AGENT_FILE, BASE_POLICY_FILE
from postbc.finetuning.iql import IQL, IQLConfig, make_critics
from postbc.finetuning.networks import Critics
from postbc.finetuning.replay import Replay
from postbc.finetuning.results import RESULTS_FILE, Checkpoints, fingerprint, outcome, select_seeds, write_results
from postbc.finetuning.rollouts import TransitionConfig, collect_rollouts, member_batch, read_rollouts
from postbc.nn import Generators, generator_states, make_generators, set_generator_states
from postbc.policies.base import NormalizationTensors, Policy
from postbc.policies.diffusion import DiffusionPolicy
from postbc.progress import progress
from postbc.runs import Run, load_tree, save_tree

MakeEnv = Callable[[int], VectorEnv]
STREAM = 410  # of the generators: 410 initialisation, 411 batches
Aggregate = Literal["min", "mean"]


@dataclass(frozen=True)
class BestOfNConfig:
    """Rollouts, the choice among samples, and evaluation (paper.md sections 5 and 6)."""

    episodes: int = 1000
    """Rollouts a seed with the pretrained policy (paper: 1000 or 2000 on Robomimic, 100 on the robot)."""
    samples: int = 32
    """N, chunks sampled a state (paper: 32 LIBERO, 4 and 16 WidowX)."""
    aggregate: Aggregate = "min"
    """How the critics' values of a chunk are combined before the best is taken."""
    envs_per_member: int = 10
    """Environments a seed, for rollouts and evaluation."""
    horizon: int | None = None
    """Environment steps of an episode; default the task's."""
    eval_episodes: int = 200
    """Evaluation episodes before and after; 0: no evaluation (rollouts of a real robot)."""
    observation_keys: tuple[str, ...] | None = None
    """Datasets under obs/ that make an observation, in rollout files of your own; default robomimic's four."""
    log_every: int = 1000
    """Gradient steps between rows of metrics.csv."""
    checkpoint_seconds: float = 60.0
    """Least time between checkpoints; they never take more than about 5 % of the run."""

    def __post_init__(self) -> None:
        for name in ("episodes", "samples", "envs_per_member", "log_every"):
            if getattr(self, name) < 1:
                raise InputError("A number must be at least 1.", key=name, found=getattr(self, name))


# -- act -----------------------------------------------------------------------------------------------------------------------
class BestOfNActor:
    """Samples N chunks a state in one batch and plays the one of highest Q, raw units in and out (:class:`postbc.evaluation.Actor`).

    Args:
        policy: pretrained, M members; carries `normalization`.
        critics: Q of normalised observations and flattened chunks.
        samples: N; 1 is the pretrained policy itself, to the bit.
        aggregate: "min" or "mean" over the critics.
    """

    def __init__(self, policy: Policy, critics: Critics, samples: int = 32, aggregate: Aggregate = "min") -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, found {samples}")
        self.policy, self.critics, self.samples, self.aggregate = policy, critics, samples, aggregate
        self.members, self.observation_dim = policy.members, policy.observation_dim
        self.chunk, self.action_dim = policy.chunk, policy.action_dim
        self.seeds, self.about = getattr(policy, "seeds", range(policy.members)), getattr(policy, "about", {})
        self.normalization: NormalizationTensors = policy.normalization  # type: ignore[attr-defined]

    @torch.no_grad()
    def act(self, observation: Tensor, generators: Generators) -> Tensor:
        """Raw (M, n, S) -> raw chunks (M, n, T, A)."""
        members, n, _ = observation.shape
        repeated = self.normalization.normalize_observation(observation).repeat(1, self.samples, 1)
        chunks = self.policy.sample(repeated, generators=generators)
        q = self.critics(repeated, chunks.flatten(2))
        q = q.amin(1) if self.aggregate == "min" else q.mean(1)
        best = q.view(members, self.samples, n).argmax(1)
        member, env = torch.arange(members).unsqueeze(1), torch.arange(n)
        return self.normalization.unnormalize_chunk(chunks.view(members, self.samples, n, self.chunk, -1)[member, best, env])

    def save(self, directory: str | Path, config: IQLConfig) -> None:
        """Write agent.safetensors and, for a policy with `save`, base_policy.safetensors: all that inference needs."""
        directory = Path(directory)
        if hasattr(self.policy, "save"):
            self.policy.save(directory / BASE_POLICY_FILE)
        tree = {"kind": "best-of-n", "iql": asdict(config), "samples": self.samples, "aggregate": self.aggregate}
        save_tree(directory / AGENT_FILE, {**tree, "seeds": list(self.seeds), "critics": self.critics.state_dict()})

    @classmethod
    def load(cls, directory: str | Path, policy: Policy | None = None, samples: int | None = None) -> BestOfNActor:
        """Read :meth:`save`'s files; `policy` replaces the saved one (for classes of your own), `samples` the saved N.

        Raises:
            InputError: there is no agent, or it is not Best-of-N's.
        """
        path = Path(directory) / AGENT_FILE
        tree = load_tree(path)
        if not isinstance(tree, dict) or tree.get("kind") != "best-of-n":
            raise InputError(
                "This is not an agent of Best-of-N.", file=path, key="kind", expected="a run of `finetune best-of-n`"
            )
        policy = policy or DiffusionPolicy.load(Path(directory) / BASE_POLICY_FILE)
        config = IQLConfig(**{**tree["iql"], "hidden": tuple(tree["iql"]["hidden"])})
        generators = [torch.Generator() for _ in range(policy.members)]
        critics = make_critics(config, policy.observation_dim, policy.chunk * policy.action_dim, generators)
        critics.load_state_dict(tree["critics"])
        return cls(policy, critics.requires_grad_(False), samples or tree["samples"], tree["aggregate"])


# -- the whole stage -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Recorded:
    """What config.yaml holds and a resumed run must agree on."""

    task: str | None
    seeds: tuple[int, ...]
    policy: str
    rollouts: tuple[str, ...]
    best_of_n: BestOfNConfig
    transitions: TransitionConfig
    iql: IQLConfig
    about: dict[str, Any] = field(default_factory=dict)


def finetune_best_of_n(
    policy: Policy,
    output: str | Path,
    config: BestOfNConfig | None = None,
    iql: IQLConfig | None = None,
    transitions: TransitionConfig | None = None,
    *,
    task: str | None = None,
    seeds: Sequence[int] | None = None,
    rollouts: Sequence[str | Path] | None = None,
    resume: bool = False,
    make_env: MakeEnv | None = None,
    make_evaluation_env: MakeEnv | None = None,
    source: str | Path | None = None,
    before: Evaluation | None = None,
) -> BestOfNActor:
    """Best-of-N for every member of `policy`; writes rollouts, critic and results.json into the run directory `output`.

    Args:
        policy: M members with `normalization`. It is not changed.
        task: Lift, Can or Square; default the policy's own. Not needed where rollouts are given and nothing is evaluated.
        seeds: members, by seed; default all.
        rollouts: robomimic HDF5 files to learn from instead of collecting: one for all members, or one a member.
        resume: go on with the run that `output` holds.
        make_env: N -> environments for rollouts (see :func:`~postbc.finetuning.rollouts.collect_rollouts`).
        make_evaluation_env: N -> environments for evaluation (see :func:`postbc.evaluation.evaluate`).
        source: the policy's file, for messages.
        before: an evaluation of the policy on the same episodes; without it, it is measured first.

    Raises:
        InputError: another task, other sizes, unusable rollouts, a seed that is not there, a directory with another run.
    """
    config, iql, transitions = config or BestOfNConfig(), iql or IQLConfig(), transitions or TransitionConfig()
    output, policy = Path(output), select_seeds(policy, seeds)
    members = tuple(int(s) for s in getattr(policy, "seeds", range(policy.members)))
    given = tuple(str(path) for path in rollouts or ())
    if given and len(given) not in (1, policy.members):
        raise InputError(
            "The number of rollout files is not that of the policy's members.", key="rollouts", found=len(given),
            expected=f"1 or {policy.members}, in the order of the seeds {members}",
        )  # fmt: skip
    simulated = not given or config.eval_episodes > 0
    if simulated and (make_evaluation_env is None or (make_env is None and not given)):
        task, make_env, make_evaluation_env = _robosuite(policy, task, config.horizon, source, make_env, make_evaluation_env)
    data = [read_rollouts(path, config.observation_keys) for path in given]
    for file in data:  # before anything is written
        member_batch(file, policy, 0, iql.discount, transitions)
    run = Run(output, _Recorded(task, members, fingerprint(policy), given, config, transitions, iql), resume=resume)
    if (output / RESULTS_FILE).exists():
        return BestOfNActor.load(output, policy)
    clock = Checkpoints(run, config.checkpoint_seconds, (run.load() or (0, {"elapsed": 0.0}))[1]["elapsed"])

    def measured(name: str, actor: Actor) -> dict[str, list[float]] | None:
        if not config.eval_episodes:
            return None
        path = output / f"episodes_{name}.jsonl"
        if not path.exists():
            assert make_evaluation_env is not None
            n = config.envs_per_member
            evaluate(actor, make_evaluation_env, episodes=config.eval_episodes, envs_per_member=n, policy_seeds=members).save(
                path
            )
        return outcome(Evaluation.load(path))

    score = outcome(before) if before else measured("before", PolicyActor(policy))
    if not given:
        assert make_env is not None
        paths = collect_rollouts(
            policy, make_env, config.episodes, output, envs_per_member=config.envs_per_member, seeds=members,
            checkpoint_seconds=config.checkpoint_seconds,
        )  # fmt: skip
        data = [read_rollouts(path, config.observation_keys) for path in paths]
    batches = [member_batch(data[m % len(data)], policy, m, iql.discount, transitions) for m in range(policy.members)]
    about = [info for _, info in batches]
    critics = train_critics(policy, iql, Replay.fixed([b for b, _ in batches]), members, run, clock, config.log_every)
    actor = BestOfNActor(policy, critics, config.samples, config.aggregate)
    after = measured("after", actor)
    actor.save(output, iql)
    steps = [int(info["env_steps"]) for info in about]
    curves = [
        [(0, score["success"][m]), (steps[m], after["success"][m])] if score and after else [] for m in range(len(members))
    ]
    write_results(
        output, policy, "best-of-n", task, members, score, after, curves, budget_env_steps=steps, episodes=config.eval_episodes,
        rollout_episodes=[int(info["episodes"]) for info in about], rollout_success=[info["success"] for info in about],
        wall_clock_s=round(clock.elapsed, 1),
    )  # fmt: skip
    run.drop_checkpoints()
    run.close()
    return actor


def train_critics(
    policy: Policy, config: IQLConfig, data: Replay, seeds: Sequence[int], run: Run, checkpoints: Checkpoints, log_every: int
) -> Critics:
    """IQL on a fixed data set, resumable bit for bit; returns the online critics."""
    learner = IQL(config, policy.observation_dim, policy.chunk * policy.action_dim, make_generators(seeds, STREAM))
    sampling, done = make_generators(seeds, STREAM + 1), 0
    found = run.load()
    if found is not None:
        done = found[0]
        learner.load_state_dict(found[1]["learner"])
        set_generator_states(sampling, found[1]["sampling"])
    with progress("iql", config.steps, done) as bar:
        while done < config.steps:
            block = min(log_every - done % log_every, config.steps - done)
            info = learner.train(data, block, sampling)
            done += block
            run.log(done, {name: float(value.mean()) for name, value in info.items()})
            bar.advance(block, **info)
            if checkpoints.due or done == config.steps:
                state = {
                    "learner": learner.state_dict(),
                    "sampling": generator_states(sampling),
                    "elapsed": checkpoints.elapsed,
                }
                checkpoints.save(done, state)
    return learner.networks.critics.requires_grad_(False)


def _robosuite(
    policy: Policy, task: str | None, horizon: int | None, source: str | Path | None, make_env: MakeEnv | None,
    make_evaluation_env: MakeEnv | None,
) -> tuple[str, MakeEnv, MakeEnv]:  # fmt: skip
    """The task's name, and the makers that were not given."""
    from postbc.evaluation_command import check_sizes, check_task, environment_factory

    name = check_task(task, getattr(policy, "about", {}), Path(source or "policy"))
    check_sizes(policy, name, Path(source or "policy"))

    def make_rollout_env(num_envs: int) -> VectorEnv:
        from postbc.environments import make

        return make(
            name, num_envs=num_envs, chunk=1, horizon=horizon, reward="sparse", terminate_on="never", autoreset="disabled"
        )

    return name, make_env or make_rollout_env, make_evaluation_env or environment_factory(name, policy.chunk, horizon)
