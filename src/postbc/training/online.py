"""Online finetuning: base-policy rollouts, then collect, update, evaluate, checkpoint. One loop for any learner.

Before its first gradient step the agent *is* the base policy: what is evaluated then is the policy itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import TypedDict

from postbc.agents.base import Agent, Batch, PolicyAgent
from postbc.agents.networks import Info, means
from postbc.devices import Compute
from postbc.environments.chunk import ChunkEnv, ChunkStep, Observations, Termination
from postbc.environments.registry import Environment, find_environment
from postbc.errors import InputError, require
from postbc.evaluation import Evaluation, TaskRate, evaluate
from postbc.nn import check_finite, generator_state, set_generator_state
from postbc.policies.base import Policy, policy_fingerprint
from postbc.progress import progress, say
from postbc.runs import Checkpoints, Run
from postbc.schemas import Count, CountOrZero, NonNegative, Share, later, parse, plain, schema
from postbc.seeding import BEST_SEED, EVALUATION_SEED, episode_seed, make_generator
from postbc.statistics import newcombe_interval, wilson_interval
from postbc.training.results import (
    RESULTS_FILE,
    check_policy,
    make_env,
    rates,
    require_finite_actions,
    to_device,
    write_result,
)

Envs = Annotated[int, Field(ge=1, le=10_000)]


class Memory(Protocol):
    """What a learner keeps of what was played: a replay buffer, or the rollout of an iteration."""

    def remember(self, batch: Batch, played: Tensor, ended: Tensor) -> None:
        """One vector step: N transitions, (N,) where anything was executed, (N,) where the episode ended."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Learner(Protocol):
    """What the loop trains.

    Attributes:
        name: of the finetuner, for results.json.
        policy: the base policy.
        discount: γ.
        gradient_steps: that were made so far.
        on_policy: learns from whole iterations, and its agent plays as the policy does until it has learnt.
        causes: what usually makes it fall below the pretrained policy, and the options that it depends on.
    """

    name: str
    policy: Policy
    discount: float
    gradient_steps: int
    on_policy: bool
    causes: Mapping[str, tuple[str, ...]]

    @property
    def networks(self) -> nn.Module:
        """All that learns."""
        ...

    def memory(self, rows: int, num_envs: int) -> Any:
        """An empty :class:`Memory` for at most `rows` transitions of `num_envs` environments."""
        ...

    def state(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """The policy's features (N, F) -> what this learner acts on and remembers (N, S): itself, or more."""
        ...

    def act(self, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(N, S) -> normalised chunks (N, T, A), and what the memory holds as action (N, D)."""
        ...

    def act_base(self, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same from the base policy."""
        ...

    def learn(self, memory: Any, sampling: torch.Generator, noise: torch.Generator) -> Info:
        """The gradient steps of one vector step, if any: `sampling` draws batches, `noise` whatever else is random."""
        ...

    def agent(self, deterministic: bool = False) -> Any:
        """What has been learnt, as an agent with `save(directory)`."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@schema
class OnlineConfig:
    """Environment, budget and evaluation of an online run (the paper's tables; DSRL's published settings)."""

    budget_env_steps: Count = 500_000
    """Environment steps, the initial rollouts included."""
    num_envs: Annotated[int, Field(ge=1, le=1000)] = 4
    """Environments; a vector step advances each by one chunk."""
    initial_steps: CountOrZero = 24_000
    """Environment steps of rollouts with the base policy before learning starts (paper: 24000 Lift and Can, 32000 Square)."""
    eval_every: Count = 48_000
    """Environment steps between evaluations (DSRL: 3000 vector steps of 4 chunks of 4)."""
    eval_episodes: Count = 200
    """Episodes of the first and the last evaluation."""
    curve_episodes: Count | None = None
    """Episodes of those between; default eval_episodes."""
    stop_at: Share | None = None
    """Stop as soon as an evaluation is surely better than this: its lower 95 % bound (Wilson) is above. Default: spend the budget."""
    eval_envs: Envs = 10
    """Environments while evaluating (at most one an episode)."""
    deterministic_eval: bool = False
    """Evaluate tanh(mean) instead of a sample (DSRL: False)."""
    horizon: Count | None = None
    """Environment steps of an episode; default the environment's (Lift, Can 300, Square 400)."""
    reward: Literal["negative", "sparse", "environment"] = "negative"
    """An environment step earns success − 1 (paper, DSRL), success, or what the environment itself gives."""
    terminate_on: Termination = "success"
    """What ends a training episode besides the horizon. DSRL: "never"."""
    chunk_reward: Literal["sum", "discounted"] = "sum"
    """Reward of a chunk: Σ r_i (DSRL) or Σ γ^i r_i."""
    chunk_discount: Literal["once", "per_step"] = "once"
    """Discount of a chunk: γ (DSRL) or γ^(steps executed)."""
    time_limit: Literal["bootstrap", "terminal"] = "bootstrap"
    """At the horizon: bootstrap from the last observation, or treat it as an end (DSRL as published)."""
    buffer_size: Count = 10_000_000
    """Transitions that the replay holds (bounded by what the budget can produce)."""
    log_every: Count = 50
    """Vector steps between rows of metrics.csv."""
    checkpoint_seconds: NonNegative = 60.0
    """Least time between checkpoints; they never take more than about 5 % of the run."""

    def __post_init__(self) -> None:
        most = wilson_interval(self.eval_episodes, self.eval_episodes)[0]
        require(
            self.stop_at is None or most > self.stop_at, "So few episodes can never show that the target is reached.",
            key="training.stop_at", found=f"{self.stop_at}, evaluated on {self.eval_episodes} episodes",
            expected=f"below {most:.3f}, the lower bound where all of them succeed", remedy="raise --training.eval-episodes",
        )  # fmt: skip

    def initial_vector_steps(self, chunk: int) -> int:
        """Vector steps of the initial rollouts: initial_steps / (N·T), rounded up."""
        return -(-self.initial_steps // (self.num_envs * chunk))

    def require_learning(self, chunk: int) -> None:
        """InputError if the budget ends before learning begins."""
        taken = self.initial_vector_steps(chunk) * self.num_envs * chunk
        require(
            taken < self.budget_env_steps, "The budget ends before learning begins.", key="training.budget_env_steps",
            found=f"{self.budget_env_steps:,}, of which the initial rollouts take {taken:,}",
            expected="more than initial_steps (rounded up to whole vector steps)",
            remedy="raise --training.budget-env-steps or lower --training.initial-steps",
        )  # fmt: skip


# -- collect ---------------------------------------------------------------------------------------------------------------------
def chunk_returns(step: ChunkStep, discount: float, config: OnlineConfig) -> tuple[np.ndarray, np.ndarray]:
    """Reward and discount of a chunk, each (N,); what was not executed earns nothing."""
    chunk = step.successes.shape[1]
    executed = np.arange(chunk) < step.num_steps[:, None]
    rewards = {
        "negative": np.where(executed, step.successes - 1.0, 0.0), "sparse": step.successes.astype(float), "environment": step.rewards
    }[config.reward]  # fmt: skip
    weights = discount ** np.arange(chunk) if config.chunk_reward == "discounted" else np.ones(chunk)
    discounts = discount**step.num_steps if config.chunk_discount == "per_step" else np.full(len(rewards), discount)
    return rewards @ weights, discounts


class Online:
    """Everything that a run consists of, one vector step at a time; `state_dict` is complete, so that a run resumes bit for bit.

    Args:
        learner: of a frozen policy.
        env: `num_envs` environments; an ended one waits for its reset.
        config: numbers.
        seed: of exploration, batches and episodes.
        device: of the replay, the features and the generators.
    """

    def __init__(
        self, learner: Learner, env: ChunkEnv, config: OnlineConfig, seed: int, device: str | torch.device = "cpu"
    ) -> None:
        self.learner, self.env, self.config, self.seed = learner, env, config, seed
        self.policy, self.device, n = learner.policy, torch.device(device), config.num_envs
        assert env.num_envs == n
        self.base, self.acting, self.sampling, self.noise = (
            make_generator(seed, f"online/{use}", device) for use in ("base", "acting", "data", "noise")
        )
        self.memory = learner.memory(min(config.buffer_size, config.budget_env_steps + n * self.policy.chunk), n)
        self.initial_vector_steps = config.initial_vector_steps(self.policy.chunk)
        self.vector_steps = self.env_steps = 0
        self.counts = {"episodes": 0, "successes": 0}  # since the last row of metrics
        self.begun = np.zeros(n, np.int64)  # episodes, an environment
        self.successful = np.zeros(n, bool)  # in the running episode
        self.state = torch.empty(0)
        self._begin(np.ones(n, bool))

    @torch.no_grad()
    def _encode(self, observation: Observations, mask: np.ndarray | None = None) -> Tensor:
        """The learner's state at the frames that are new: each is encoded once."""
        features = self.policy.encode(
            {
                name: torch.as_tensor(observation[name] if mask is None else observation[name][mask]).to(self.device)
                for name in self.policy.shapes
            }
        )
        return self.learner.state(features, self.base)

    def _begin(self, mask: np.ndarray) -> None:
        """The next episodes of the environments in `mask`. Environment j's k-th episode depends on the seed, j and k alone."""
        seeds = [episode_seed(1000 * self.seed + j, int(k)) for j, k in enumerate(self.begun)]
        observation = self.env.reset(seeds, mask)
        self.begun[mask] += 1
        self.successful[mask] = False
        fresh = self._encode(observation, mask)
        if mask.all():
            self.state = fresh
        else:
            self.state[torch.as_tensor(mask, device=self.device)] = fresh

    @property
    def learning(self) -> bool:
        """Whether the initial rollouts are over."""
        return self.vector_steps >= self.initial_vector_steps

    @property
    def has_learnt(self) -> bool:
        """Whether there was a gradient step."""
        return self.learner.gradient_steps > 0

    def step(self) -> Info:
        """One vector step: play a chunk everywhere, remember it, and learn from the replay. Metrics of the last update."""
        learning = self.learning
        act, generator = (self.learner.act, self.acting) if learning else (self.learner.act_base, self.base)
        chunk, action = act(self.state, generator)
        raw = self.policy.normalization.unnormalize_action(chunk).cpu().numpy()
        require_finite_actions(raw, self.env_steps)
        step = self.env.step(raw)
        following = self._encode(step.observation)
        reward, discount = chunk_returns(step, self.learner.discount, self.config)
        over = step.ended if self.config.time_limit == "terminal" else step.terminated
        rows = Batch(self.state, action, following, self._tensor(reward), self._tensor(np.where(over, 0.0, discount)))
        self.memory.remember(rows, *(torch.as_tensor(mask, device=self.device) for mask in (step.num_steps > 0, step.ended)))
        self.state = following

        self.vector_steps += 1
        self.env_steps += int(step.num_steps.sum())
        self.successful |= step.success
        self.counts["episodes"] += int(step.ended.sum())
        self.counts["successes"] += int((step.ended & self.successful).sum())
        if step.ended.any():
            self._begin(step.ended)
        return self.learner.learn(self.memory, self.sampling, self.noise) if learning else {}

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self.device)

    def rollout_metrics(self) -> dict[str, float]:
        """Episodes and their success since the last call."""
        episodes, successes = self.counts["episodes"], self.counts["successes"]
        self.counts = {"episodes": 0, "successes": 0}
        return {"rollout/success": successes / episodes, "rollout/episodes": float(episodes)} if episodes else {}

    def agent(self) -> Agent:
        """What plays now: before the first gradient step the base policy itself."""
        if self.has_learnt or self.learner.on_policy:
            return self.learner.agent(self.config.deterministic_eval)  # type: ignore[no-any-return]
        return PolicyAgent(self.policy)

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimisers, memory, environment, generators and counters."""
        return {
            "learner": self.learner.state_dict(), "memory": self.memory.state_dict(), "env": self.env.get_state(),
            "generators": {name: generator_state(getattr(self, name)) for name in ("base", "acting", "sampling", "noise")},
            "vector_steps": self.vector_steps, "env_steps": self.env_steps, "counts": self.counts, "begun": self.begun,
            "successful": self.successful, "state": self.state,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`, on any device; an environment that cannot say its state begins its next episodes, with a warning."""
        self.learner.load_state_dict(state["learner"])
        self.memory.load_state_dict(state["memory"])
        for name, value in state["generators"].items():
            set_generator_state(getattr(self, name), value)
        self.vector_steps, self.env_steps = int(state["vector_steps"]), int(state["env_steps"])
        self.counts = {name: int(state["counts"][name]) for name in ("episodes", "successes")}
        self.begun[:] = state["begun"]
        require(bool((self.begun >= 0).all()), "A count is negative.", key="begun", found=self.begun.tolist())
        if state["env"] is None:
            warnings.warn("This environment cannot restore its state: the resumed run begins fresh episodes.", stacklevel=2)
            self._begin(np.ones(len(self.begun), bool))
        else:
            self.env.set_state(state["env"])
            self.successful[:] = state["successful"]
            require(state["state"].shape == self.state.shape, "The learner's state has another shape.", key="state")
            self.state = state["state"].to(self.device)


# -- the loop --------------------------------------------------------------------------------------------------------------------
BEST = "best"
"""Folder, in a run's directory, of the milestone that did best."""


@schema
class Milestone:
    """An evaluation during training."""

    env_steps: CountOrZero
    success: Share
    chunk_success: Share
    episodes: Count
    learnt: bool
    """Whether there had been a gradient step: else it is the pretrained policy."""
    tasks: tuple[TaskRate, ...] = later(())
    """By task, where there are several."""


class Loop:
    """A run: until the budget is spent or the target is reached, step, log, evaluate, checkpoint; then the agent and the result."""

    def __init__(self, online: Online, run: Run, environment: Environment, horizon: int) -> None:
        self.online, self.run, self.environment, self.horizon, self.config = online, run, environment, horizon, online.config
        self.causes = [
            cause + (f" ({', '.join(options)})" if options else "") for cause, options in online.learner.causes.items()
        ]
        self.milestones: list[Milestone] = []  # the first of the pretrained policy
        self.checkpoints = Checkpoints(run, self.config.checkpoint_seconds)
        self.warned = self.stopped = False  # said that it has fallen; reached its target
        self.lost = -1  # until when what was kept as the best has been lost

    @property
    def best(self) -> Milestone | None:
        """The first milestone of highest success among those that have learnt and are still kept."""
        return max((m for m in self.milestones if m.learnt and m.env_steps > self.lost), key=lambda m: m.success, default=None)

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one."""
        found, online, config = self.run.load(), self.online, self.config
        if found is None:
            return
        with self.run.restoring():
            online.load_state_dict(found[1]["online"])
            most = online.vector_steps * config.num_envs * online.policy.chunk
            require(online.env_steps == found[0] and online.vector_steps <= online.env_steps <= most, "The counts do not fit.",
                    key="env_steps", found=f"{online.env_steps} in {online.vector_steps} vector steps", expected=found[0])  # fmt: skip
            self.milestones = [parse(Milestone, dict(m)) for m in found[1]["milestones"]]
            require(self.milestones, "There is no evaluation of the pretrained policy.", key="milestones")
            self.stopped, self.warned, self.lost = bool(found[1]["stopped"]), bool(found[1]["warned"]), int(found[1]["lost"])
        if self.best is None:
            return
        if self.best.env_steps == online.env_steps:  # it was being saved, perhaps
            self._keep()
        else:
            try:
                self._kept()
            except InputError as error:
                self.lost = online.env_steps
                say(
                    f"warning: the best milestone so far cannot be read, and is forgotten; the run goes on\n{error}",
                    stderr=True,
                )

    def save(self) -> None:
        milestones = [plain(m) for m in self.milestones]
        state = {
            "online": self.online.state_dict(), "milestones": milestones, "stopped": self.stopped, "warned": self.warned,
            "lost": self.lost,
        }  # fmt: skip
        self.checkpoints.save(self.online.env_steps, state)

    def _keep(self) -> None:
        self.online.agent().save(self.run.directory / BEST)  # type: ignore[attr-defined]

    def _kept(self) -> Any:
        online: Any = self.online
        return type(online.agent()).load(self.run.directory / BEST, online.policy, device=online.device)

    def _reaches(self, success: float, episodes: int) -> float | None:
        """The lower bound of a success that is surely above the target; None where it is not."""
        bound = wilson_interval(success * episodes, episodes)[0]
        return bound if self.config.stop_at is not None and bound > self.config.stop_at else None

    def _evaluate(self, agent: Agent, episodes: int, first: int = EVALUATION_SEED) -> dict[str, Any]:
        return rates(
            evaluate(
                agent, self.environment, episodes=episodes, seed=first, num_envs=self.config.eval_envs, agent_seed=self.online.seed,
                horizon=self.horizon, progress=False,
            )
        )  # fmt: skip

    def measure(self, episodes: int, known: Mapping[str, Any] | None = None) -> None:
        """A milestone; a new best one is kept."""
        online, best = self.online, self.best
        if known is None:
            check_finite(online.learner.networks.state_dict(), f"The networks have diverged by environment step {online.env_steps}.",
                         remedy="lower the learning rate (lr)")  # fmt: skip
            known = self._evaluate(online.agent(), episodes)
            if online.has_learnt and episodes < self.config.eval_episodes and self._reaches(known["success"], episodes):
                episodes = self.config.eval_episodes  # a run does not end by luck: as many episodes as at its end
                known = self._evaluate(online.agent(), episodes)
        milestone = Milestone(
            online.env_steps, known["success"], known["chunk_success"], episodes, online.has_learnt, known.get("tasks", ())
        )
        self.milestones.append(milestone)
        self.run.log(online.env_steps, {f"evaluation/{name}": known[name] for name in ("success", "chunk_success")})
        if milestone.learnt:
            bound = self._reaches(milestone.success, episodes) if episodes >= self.config.eval_episodes else None
            if bound is not None and not self.stopped:
                self.stopped = True
                say(
                    f"{online.learner.name} stops after {online.env_steps:,} environment steps: success {milestone.success:.3f} of "
                    f"{episodes} episodes, its lower bound {bound:.3f} above {self.config.stop_at}"
                )
            self._warn(milestone)
            if best is None or milestone.success > best.success:
                self.save()  # before: what is kept is then always what a resumed run knows of
                self._keep()

    def _warn(self, now: Milestone) -> None:
        first = self.milestones[0]
        _, upper = newcombe_interval(now.success * now.episodes, now.episodes, first.success * first.episodes, first.episodes)
        if upper < 0 and not self.warned:
            self.warned = True
            say(
                f"warning: after {now.env_steps:,} environment steps {self.online.learner.name} succeeds in {now.success:.2f} of its "
                f"episodes, the pretrained policy in {first.success:.2f}: significantly less. Usual causes: "
                f"{'; '.join(self.causes)}; or a reward that does not say what success is (training.reward). The run goes on; "
                f"the best milestone is kept in {BEST}/.",
                stderr=True,
            )

    def go(self, before: Evaluation | None = None) -> None:
        """The whole of it; `before` is an evaluation of the pretrained policy on the same episodes."""
        online, config, run = self.online, self.config, self.run
        self.resume()
        if not self.milestones:
            self.measure(config.eval_episodes, rates(before) if before else None)
            self.save()
        with progress(online.learner.name, config.budget_env_steps, online.env_steps) as bar:
            while online.env_steps < config.budget_env_steps and not self.stopped:
                start = online.env_steps
                info = online.step()
                if info if online.learner.on_policy else online.vector_steps % config.log_every == 0:
                    run.log(online.env_steps, means(info, online.env_steps) | online.rollout_metrics())
                last = online.env_steps >= config.budget_env_steps
                if last or online.env_steps // config.eval_every > start // config.eval_every:
                    # nothing has been learnt yet: the base policy, which was measured at step 0
                    known = None if online.has_learnt else plain(self.milestones[0])
                    self.measure(config.eval_episodes if last else config.curve_episodes or config.eval_episodes, known)
                bar.advance(online.env_steps - start, success=self.milestones[-1].success)
                if self.checkpoints.due and not last:
                    self.save()
        self.finish()

    def finish(self) -> None:
        """Write the agent and the result. The best milestone is reported on episodes of its own: it was chosen by the others."""
        online, config, run, first, best = self.online, self.config, self.run, self.milestones[0], self.best
        last = self.milestones[-1]
        online.learner.agent(config.deterministic_eval).save(run.directory)
        kept: dict[str, Any] = {}
        if best is not None:
            agent = online.agent() if best.env_steps == online.env_steps else self._kept()
            fresh = self._evaluate(agent, config.eval_episodes, BEST_SEED)
            kept = {"best_env_steps": best.env_steps, "success_best": fresh["success"]}
        write_result(
            run, online.policy, plain(first), plain(last), finetuner=online.learner.name, task=self.environment.name, seed=online.seed,
            curve=tuple((m.env_steps, m.success) for m in self.milestones), budget_env_steps=config.budget_env_steps,
            episodes=config.eval_episodes, gradient_steps=online.learner.gradient_steps, stopped=self.stopped, **kept,
        )  # fmt: skip


# -- a run -----------------------------------------------------------------------------------------------------------------------
class RunOptions(TypedDict, total=False):
    """Options that every online finetuner hands to :func:`finetune_online`."""

    seed: int
    compute: Compute | None
    resume: bool
    before: Evaluation | None
    source: str | Path | None
    allow_version_mismatch: bool


def finetune_online(
    policy: Policy,
    environment: Environment | str,
    output: str | Path,
    training: OnlineConfig,
    algorithm: Mapping[str, Any],
    check: Callable[[Policy, torch.device], None],
    make_learner: Callable[[Policy, torch.Generator, Compute], Learner],
    load: Callable[..., Any],
    *,
    inputs: Mapping[str, str] | None = None,
    seed: int = 0,
    compute: Compute | None = None,
    resume: bool = False,
    before: Evaluation | None = None,
    source: str | Path | None = None,
    allow_version_mismatch: bool = False,
) -> Any:
    """One seed of any learner, from a pretrained policy to results.json, agent.safetensors and metrics.csv in `output`.

    Args:
        policy: its weights are not changed.
        environment: where, or its name.
        output: the run directory.
        training: budget, environment, evaluation.
        algorithm: the learner's numbers, for the record: name -> plain values.
        check: what the learner asks of the policy on its device, before anything is written.
        make_learner: policy, generator of the initialisation, where to compute -> the learner.
        load: directory, policy, device=… -> the finished agent.
        inputs: name -> digest of further inputs, which a resumed run must find again.
        seed: of everything random.
        resume: go on with the run that `output` holds.
        before: an evaluation of the policy on the same episodes; without it, it is measured first.
        source: the policy's file, for messages.
        allow_version_mismatch: go on although the policy's data come from another version of the simulator.

    Raises:
        InputError: a policy of another task or of other sizes, a budget that leaves no learning, a directory with another run. Nothing
            was written then.
        NotFiniteError: the learner diverged; the last checkpoint is good.
    """
    compute, output = (compute or Compute()).resolved(), Path(output)
    environment = find_environment(environment) if isinstance(environment, str) else environment
    device = compute.start()
    training.require_learning(policy.chunk)
    policy = to_device(policy, device)
    check(policy, device)
    horizon = environment.horizon if training.horizon is None else training.horizon
    check_policy(policy, environment, horizon, source, allow_version_mismatch)
    recorded = {
        "environment": environment.name,
        "seed": seed,
        **algorithm,
        "training": plain(training),
        "compute": plain(compute),
    }
    with Run(output, recorded, resume=resume, inputs={"policy": policy_fingerprint(policy), **(inputs or {})}) as run:
        if not (output / RESULTS_FILE).exists():
            learner = make_learner(policy, make_generator(seed, "online/initialisation", device), compute)
            env = make_env(environment, policy, training.num_envs, horizon, training.terminate_on)
            try:
                Loop(Online(learner, env, training, seed, device), run, environment, horizon).go(before)
            finally:
                env.close()
        with run.reading():
            agent = load(output, policy, device=device)
        run.finish()
    return agent
