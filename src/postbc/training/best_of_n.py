"""Best-of-N of one seed, from a pretrained policy to results.json: roll out, fit IQL, evaluate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from postbc.agents.base import Agent, Batch, PolicyAgent, about_of
from postbc.agents.best_of_n import BestOfNAgent, BestOfNConfig
from postbc.agents.iql import IQL, IQLConfig, Networks
from postbc.agents.networks import Critics, means
from postbc.agents.replay import Replay
from postbc.data.transitions import TransitionConfig
from postbc.devices import Compute
from postbc.environments.registry import Environment, find_environment
from postbc.errors import require
from postbc.evaluation import Evaluation, evaluate
from postbc.nn import check_finite, check_memory, generator_state, set_generator_state
from postbc.policies.base import Policy, policy_fingerprint, seen_dim
from postbc.progress import progress, say
from postbc.runs import Checkpoints, Run, digest
from postbc.schemas import plain
from postbc.seeding import evaluation_seeds, make_generator
from postbc.training.results import EPISODES_FILE, RESULTS_FILE, check_policy, rates, to_device, write_result
from postbc.training.rollouts import ROLLOUTS_FILE, collect, read_rollouts, rollouts_digest, transition_batch


def finetune_best_of_n(
    policy: Policy,
    environment: Environment | str | None,
    output: str | Path,
    config: BestOfNConfig | None = None,
    iql: IQLConfig | None = None,
    transitions: TransitionConfig | None = None,
    *,
    seed: int = 0,
    rollouts: str | Path | None = None,
    encoder: Policy | None = None,
    compute: Compute | None = None,
    resume: bool = False,
    before: Evaluation | None = None,
    source: str | Path | None = None,
    allow_version_mismatch: bool = False,
) -> BestOfNAgent:
    """Best-of-N for `policy`; writes rollouts, critic and results.json into one seed's run directory.

    Args:
        policy: it is not changed.
        environment: where, or its name; None where rollouts are given and nothing is evaluated (`eval_episodes` 0).
        output: the run directory.
        seed: of everything random.
        rollouts: what to learn from instead of collecting: a file (robomimic HDF5, also of a real robot; zarr), or the folder of a
            session of `postbc robot rollout`, whose labels say what succeeded.
        encoder: a policy whose frozen encoder the critics see by; default the policy's own (paper, WidowX: one of BridgeData V2).
        resume: go on with the run that `output` holds.
        before: an evaluation of the policy on the same episodes; without it, it is measured first.
        source: the policy's file, for messages.
        allow_version_mismatch: go on although policy or rollouts come from another version of the simulator.

    Raises:
        InputError: a policy of another task or of other sizes, unusable rollouts, rollouts without any success, a directory with
            another run.
        NotFiniteError: the critic diverged; the last checkpoint is good.
    """
    config, iql, transitions = config or BestOfNConfig(), iql or IQLConfig(), transitions or TransitionConfig()
    compute, output = (compute or Compute()).resolved(), Path(output)
    environment = find_environment(environment) if isinstance(environment, str) else environment
    device = compute.start()
    policy = to_device(policy, device)
    encoder = None if encoder is None else _eyes(to_device(encoder, device), policy)
    with torch.device("meta"):
        networks = Networks(iql, seen_dim(encoder or policy), policy.chunk * policy.action_dim, torch.Generator())
        check_memory(networks, 4, device, "iql.hidden")
    simulated = rollouts is None or config.eval_episodes > 0
    horizon = config.horizon
    if simulated:
        require(environment is not None, "An environment is needed to roll out and to evaluate.", key="environment",
                remedy="give one, or rollouts and --best-of-n.eval-episodes 0")  # fmt: skip
        assert environment is not None
        horizon = environment.horizon if horizon is None else horizon
        check_policy(policy, environment, horizon, source, allow_version_mismatch)
    given, inputs = None, {"policy": policy_fingerprint(policy)}
    if encoder is not None:
        inputs["encoder"] = policy_fingerprint(encoder)
    if rollouts is not None:  # looked at before anything is written
        data = read_rollouts(rollouts, policy, config.observation_keys, allow_version_mismatch)
        given = transition_batch(data, policy, iql.discount, transitions, device, encoder=encoder)
        inputs["rollouts"] = rollouts_digest(rollouts)
    recorded = {
        "environment": environment.name if environment else None, "seed": seed, "best_of_n": plain(config), "iql": plain(iql),
        "transitions": plain(transitions), "compute": plain(compute),
    }  # fmt: skip
    with Run(output, recorded, resume=resume, inputs=inputs) as run:
        if not (output / RESULTS_FILE).exists():
            stage = _Stage(environment, horizon, config, seed, run)
            at, state = run.load() or (0, {})
            score = stage.measured("before", PolicyAgent(policy), before)
            if given is None:
                assert environment is not None
                assert horizon is not None
                path = collect(
                    policy, environment, config.episodes, run, state, seed=seed, num_envs=config.num_envs, horizon=horizon,
                    device=device, checkpoint_seconds=config.checkpoint_seconds,
                    frames_every=math.gcd(transitions.stride or policy.chunk, policy.chunk),  # those that transitions begin at
                )  # fmt: skip
                given, inputs["rollouts"] = _own(path, policy, iql, transitions, config, device, encoder), digest(path)
            batch, facts = given
            critics = train_critics(policy, iql, batch, seed, run, at, state, config, compute, device, inputs["rollouts"])
            agent = BestOfNAgent(policy, critics, iql, config.samples, config.aggregate, encoder)
            agent.save(output)
            after, steps = stage.measured("after", agent), int(facts["env_steps"])
            write_result(
                run, policy, score, after, finetuner="best-of-n", seed=seed, budget_env_steps=steps, episodes=config.eval_episodes,
                task=environment.name if environment else about_of(policy).task or "unknown",
                curve=((0, score["success"]), (steps, after["success"])) if score and after else (),
                gradient_steps=iql.steps, rollout_episodes=int(facts["episodes"]), rollout_success=facts["success"],
                horizon=horizon if config.eval_episodes else None,
            )  # fmt: skip
        with run.reading():
            agent = BestOfNAgent.load(output, policy, device=device)
        run.finish()
    return agent


def _own(
    path: Path, policy: Policy, iql: IQLConfig, transitions: TransitionConfig, config: BestOfNConfig, device: torch.device,
    encoder: Policy | None = None,
) -> tuple[Batch, dict[str, float]]:  # fmt: skip
    """Transitions of rollouts that were collected here: their rewards are 1 at a success and else 0."""
    data = read_rollouts(path, policy, config.observation_keys, ours=True)
    rules = replace(transitions, success="zero-one")
    batch, facts = transition_batch(data, policy, iql.discount, rules, device, ours=True, encoder=encoder)
    if not facts["success"]:
        say(f"warning: none of the {facts['episodes']} rollouts succeeded, so the critic has nothing to learn from; the run goes on, "
            "so that a comparison keeps its seed, but do not expect a gain: roll out more (--best-of-n.episodes)")  # fmt: skip
    return batch, facts


def _eyes(encoder: Policy, policy: Policy) -> Policy:
    """`encoder`, if all that it reads is what the policy reads: an agent sees no more than that."""
    found, expected = dict(encoder.shapes), dict(policy.shapes)
    require(found.items() <= expected.items(), "The encoder reads other observations than the policy.", key="encoder: shapes",
            found=found, expected=f"some of {expected}", remedy="train it on observations of these names and sizes")  # fmt: skip
    require(encoder.observation_steps == policy.observation_steps, "The encoder looks at another number of observations.",
            key="encoder: observation_steps", found=encoder.observation_steps, expected=policy.observation_steps)  # fmt: skip
    return encoder


class _Stage:
    """Evaluations of a run, each kept in a file of its own until it ends."""

    def __init__(
        self, environment: Environment | None, horizon: int | None, config: BestOfNConfig, seed: int, run: Run
    ) -> None:
        self.environment, self.horizon, self.config, self.seed, self.run = environment, horizon, config, seed, run

    def measured(self, name: str, agent: Agent, known: Evaluation | None = None) -> dict[str, Any] | None:
        path = self.run.directory / EPISODES_FILE.format(name)
        if known is not None:
            known.save(path)
            return rates(known)
        if not self.config.eval_episodes:
            return None
        if not path.exists():
            assert self.environment is not None
            evaluate(
                agent, self.environment, episodes=self.config.eval_episodes, num_envs=self.config.num_envs, agent_seed=self.seed,
                horizon=self.horizon,
            ).save(path)  # fmt: skip
        return rates(Evaluation.load(path, evaluation_seeds(self.config.eval_episodes).tolist(), self.seed))


def train_critics(
    policy: Policy,
    iql: IQLConfig,
    batch: Batch,
    seed: int,
    run: Run,
    at: int,
    state: Mapping[str, Any],
    config: BestOfNConfig,
    compute: Compute,
    device: str | torch.device = "cpu",
    source: str = "",
) -> Critics:
    """IQL on fixed transitions, going on from the run's `state` loaded `at` a step, bit for bit; the online critics.

    `source` is the digest of their file: a run goes on with the same one.
    """
    action_dim = policy.chunk * policy.action_dim
    feature_dim = batch.features.shape[1]
    data = Replay(len(batch.reward), feature_dim, action_dim, device)
    data.add(batch)
    initialisation, sampling = (make_generator(seed, f"best-of-n/{use}", device) for use in ("initialisation", "data"))
    learner, done = IQL(iql, feature_dim, action_dim, initialisation, compute), 0
    checkpoints = Checkpoints(run, config.checkpoint_seconds)

    def save() -> None:
        checkpoints.save(done, {"learner": learner.state_dict(), "sampling": generator_state(sampling), "done": done,
                                "rollouts": source})  # fmt: skip

    if "learner" in state:
        require(state.get("rollouts") == source, "The rollouts are not those that this run began to learn from.",
                file=run.directory / ROLLOUTS_FILE, remedy="put the former file back, or choose another --output")  # fmt: skip
        with run.restoring():
            done = int(state["done"])
            require(done == at <= iql.steps, "The checkpoint is of another run.", key="done", found=done, expected=at)
            learner.load_state_dict(state["learner"])
            set_generator_state(sampling, state["sampling"])
    else:
        save()  # from here on the steps are IQL's
    with progress("iql", iql.steps, done) as bar:
        while done < iql.steps:
            block = min(config.log_every - done % config.log_every, iql.steps - done)
            info = learner.learn(lambda n: data.sample(sampling, n), block)
            done += block
            metrics = means(info, done)
            run.log(done, metrics)
            bar.advance(block, **metrics)
            if checkpoints.due or done == iql.steps:
                save()
    check_finite(learner.networks.state_dict(), "The critic has diverged.", remedy="lower --iql.lr")
    return learner.networks.critics.requires_grad_(False)
