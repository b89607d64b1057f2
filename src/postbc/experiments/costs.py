"""What a recipe costs on this machine: each kind of work it consists of is timed for a moment, at the recipe's own sizes, and counted.

Work counted per seed is what the stages do at most: episodes of evaluations and rollouts are taken to last until their horizon, which
those that succeed do not. Recording demonstrations, and what is read and written, is not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table

from postbc.agents.base import Batch
from postbc.agents.dppo import DPPO, Rows, trained_steps
from postbc.agents.dsrl import DSRL
from postbc.agents.iql import IQL
from postbc.agents.residual import Residual
from postbc.data.episodes import Dataset, Episode, is_image
from postbc.data.normalization import Normalization
from postbc.data.windows import Windows
from postbc.devices import cores
from postbc.environments.registry import find_environment
from postbc.errors import InputError, require
from postbc.experiments.layout import OPTIONS
from postbc.experiments.recipe import Finetuner, Recipe
from postbc.policies.base import policy_class
from postbc.posterior.closed_form import REGRESSORS
from postbc.posterior.ensemble import Ensemble, EnsembleTraining
from postbc.posterior.seeing import SeeingEnsemble, SeeingTraining
from postbc.pretraining import Method, Pretraining
from postbc.seeding import make_generator
from postbc.stages.seeds import epochs_to_steps
from postbc.value_dice import ValueDICE

#: Images are timed in batches of at most this many, and counted: a large encoder takes minutes for a batch on a CPU.
SEEN_AT_ONCE = 4
#: Demonstrations of a file of which nothing is known: robomimic's multi-human ones.
MULTI_HUMAN = 300


@dataclass(frozen=True)
class Cost:
    """One stage of one seed."""

    stage: str
    """posterior, pretraining, evaluation, or a finetuner."""
    method: Method | None
    """None: of all."""
    gradient_steps: int = 0
    env_steps: int = 0
    """At most, evaluations included."""
    seconds: float = 0.0


@dataclass
class Stopwatch:
    """Times calls, each for about `budget` seconds and at least once after a first one; remembers what it has timed."""

    budget: float = 0.3
    known: dict[str, float] = field(default_factory=dict)

    def seconds(self, what: str, make: Callable[[], Callable[[], Any]]) -> float:
        """Of one call of what `make` makes: the quickest."""
        if what not in self.known:
            call, spent = make(), 0.0
            first = best = _timed(call)
            while first < 10 * self.budget and spent < self.budget:  # what takes so long the first time says enough
                now = _timed(call)
                best, spent = min(best, now), spent + now
            self.known[what] = best
        return self.known[what]


class Estimate:
    """Of one recipe.

    Args:
        recipe: a simulated one.
        watch: shared by recipes, which have much in common.
        steps: control steps of a demonstration; default half the environment's horizon.

    Raises:
        InputError: a robot's recipe (people's time decides), or an environment that cannot run here.
    """

    def __init__(self, recipe: Recipe[Any], watch: Stopwatch, steps: int | None = None) -> None:
        environment = find_environment(recipe.environment)
        require(environment.robot is None, "On a robot the people beside it decide how long it takes.", key="environment",
                found=recipe.environment)  # fmt: skip
        environment.check()
        self.recipe, self.watch, self.chunk = recipe, watch, recipe.data.chunk
        self.horizon = recipe.horizon or environment.horizon
        env = environment.make(1, chunk=self.chunk, horizon=self.horizon, terminate_on="never")
        try:
            self.shapes, self.action_dim = dict(env.shapes), env.action_dim
            self.simulation = watch.seconds(f"{environment.name} {self.chunk}", lambda: _playing(env)) / self.chunk
        finally:
            env.close()
        self.length = steps or max(self.horizon // 2, self.chunk)
        self.sees = any(map(is_image, self.shapes))
        self.normalization = Normalization.identity(self.shapes.get("state", (0,))[0], self.action_dim)
        self.compute = recipe.compute.resolved()

    def __call__(self) -> list[Cost]:
        """Of one seed, stage by stage; a finetuning in several environments is counted in each."""
        recipe = self.recipe
        found = [self.posterior()] if "postbc" in recipe.methods else []
        places = max(1, len(recipe.finetune_in))
        for method in recipe.methods:
            own = recipe.of_method(method)
            found += [self.pretraining(own, method), self.played("evaluation", method, own, own.episodes)]
            for finetuner in recipe.finetuners:
                one = self.best_of_n(own, method) if finetuner == "best-of-n" else self.online(own, method, finetuner)
                found.append(replace(one, gradient_steps=places * one.gradient_steps, env_steps=places * one.env_steps,
                                     seconds=places * one.seconds))  # fmt: skip
        return found

    # -- stages ----------------------------------------------------------------------------------------------------------------
    @property
    def windows(self) -> int:
        """Of the demonstrations that a seed is trained on."""
        count = self.recipe.data.num_trajectories or self.recipe.collect_num or MULTI_HUMAN
        return count * (self.length - (self.chunk - 1 if self.recipe.data.tail == "drop" else 0))

    def posterior(self) -> Cost:
        config, epochs = self.recipe.ensemble, self.recipe.ensemble_epochs
        if self.recipe.posterior_kind == "closed-form":
            config = replace(config, ensemble_size=REGRESSORS)
        steps = config.steps if epochs is None else epochs_to_steps(epochs, self.windows, config.batch_size)
        compute, own = replace(self.compute, precision=self.recipe.ensemble_precision).resolved(), config.encoder == "own"
        timed, share = self._seen(config, own and self.sees)

        def make() -> Callable[[], Any]:
            windows, generator = self._windows(), make_generator(0, "ensemble/initialisation")
            sizes = windows.observation_steps, windows.chunk_size, self.action_dim
            chunks, episode = windows.chunk(torch.arange(len(windows))), torch.as_tensor(windows.episode)
            if own:
                seeing = SeeingEnsemble(timed, self.shapes, *sizes, generator).to(compute.start())
                trainer: Any = SeeingTraining(seeing, windows, chunks, self.normalization, 0, compute)
            else:
                policy = self._policy(self.recipe) if self.sees else None
                width = policy.feature_dim if policy is not None else self.shapes["state"][0] * windows.observation_steps
                ensemble = Ensemble(timed, width, *sizes[1:], generator).to(compute.start())
                trainer = EnsembleTraining(ensemble, torch.randn(len(windows), width), chunks, episode, 0, compute)
            return lambda: trainer.train(1)

        each = self.watch.seconds(f"posterior {timed} {self.shapes} {self.chunk} {compute}", make) * share
        return Cost("posterior", None, gradient_steps=steps, seconds=steps * each)

    def pretraining(self, own: Recipe[Any], method: Method) -> Cost:
        if method == "value-dice":
            steps = own.value_dice.steps
            each = self.watch.seconds(f"value-dice {own.value_dice} {own.policy} {self.shapes} {self.chunk}", lambda: ValueDICE(
                self._policy(own), self._windows(), own.value_dice, 0, self.compute).step)  # fmt: skip
            return Cost("pretraining", method, gradient_steps=steps, seconds=steps * each)
        config, epochs = own.pretraining, own.pretraining_epochs
        steps = config.steps if epochs is None else epochs_to_steps(epochs, self.windows, config.batch_size)
        # the target's noise, in which the methods differ, costs nothing beside the network
        timed, share = self._seen(replace(config, method="bc", posterior_weight=1.0, coherent=0, steps=10**6), self.sees)
        key = f"pretraining {timed} {own.policy} {self.shapes} {self.chunk} {self.compute}"

        def make() -> Callable[[], Any]:
            return Pretraining(self._policy(own), self._windows(), timed, 0, None, self.compute).step

        each = share * self.watch.seconds(key, make)
        return Cost("pretraining", method, gradient_steps=steps, seconds=steps * each)

    def played(self, stage: str, method: Method, own: Recipe[Any], episodes: int) -> Cost:
        """Episodes of the policy (agents differ from it by a small network)."""
        steps = episodes * self.horizon
        act = self._acting(own, own.num_envs) / (own.num_envs * self.chunk)
        return Cost(stage, method, env_steps=steps, seconds=steps * (self.simulation + act))

    def best_of_n(self, own: Recipe[Any], method: Method) -> Cost:
        with torch.device("meta"):  # its sizes alone
            policy = self._policy(own)
        wide = policy.feature_dim, self.chunk * self.action_dim

        def make() -> Callable[[], Any]:
            device = self.compute.start()
            learner = IQL(own.iql, *wide, make_generator(0, "best-of-n/initialisation", device), self.compute)
            batch = Batch(*(part.to(device) for part in _transitions(own.iql.batch_size, *wide)))
            return lambda: learner.update(batch)

        each = self.watch.seconds(f"iql {own.iql} {wide} {self.compute}", make)
        collected = self.played("best-of-n", method, own, own.best_of_n.episodes)
        # every candidate of a chunk is a sample of the policy
        candidates = own.best_of_n.samples * self._acting(own, own.num_envs) / (own.num_envs * self.chunk)
        evaluated = own.episodes * self.horizon
        seconds = collected.seconds + own.iql.steps * each + evaluated * (self.simulation + candidates)
        return Cost("best-of-n", method, own.iql.steps, collected.env_steps + evaluated, seconds)

    def online(self, own: Recipe[Any], method: Method, finetuner: Finetuner) -> Cost:
        numbers, training = (getattr(own, name) for name in OPTIONS[finetuner][:2])
        width = training.num_envs * self.chunk
        steps = math.ceil(training.budget_env_steps / width)
        learning = max(0, steps - training.initial_vector_steps(self.chunk))
        curve = max(0, training.budget_env_steps // training.eval_every - 1) * (training.curve_episodes or own.episodes)
        # at the end, and the best milestone on episodes of its own; DPPO samples its policy otherwise, and measures it first
        ends = (3 if finetuner == "dppo" else 2) * own.episodes
        evaluated = self.played(finetuner, method, own, curve + ends)
        if finetuner == "dppo":
            trained = trained_steps(numbers, self._policy(own).chain(numbers.sampling_steps))
            iterations = steps // numbers.n_steps
            decisions = numbers.n_steps * training.num_envs * trained
            gradient_steps = iterations * numbers.epochs * max(1, decisions // numbers.batch_size)
            seconds = gradient_steps * self._updating(own, finetuner, numbers, training)
        else:
            gradient_steps = learning * numbers.utd + (numbers.critic_warmup if finetuner == "residual" else 0)
            once = numbers.critic_steps_per_actor_step if finetuner == "residual" else 1
            seconds = gradient_steps / once * self._updating(own, finetuner, numbers, training)
        seconds += steps * self._acting(own, training.num_envs) + steps * width * self.simulation + evaluated.seconds
        return Cost(finetuner, method, gradient_steps, steps * width + evaluated.env_steps, seconds)

    # -- one unit of work ------------------------------------------------------------------------------------------------------
    def _updating(self, own: Recipe[Any], finetuner: Finetuner, numbers: Any, training: Any) -> float:
        """Seconds of one update of everything that learns (residual RL: the critics' steps for one of its actor)."""

        def make() -> Callable[[], Any]:
            device = self.compute.start()
            policy, generator = self._policy(own).to(device), make_generator(0, "online/initialisation", device)
            if finetuner == "dppo":
                learner: Any = DPPO(numbers, policy, generator, self.compute)
                n, d = min(numbers.batch_size, 10**5), learner.action_dim
                x, k, one = torch.randn(n, d), torch.randint(learner.trained, (n,)), torch.randn(n)
                rows = Rows(torch.randn(n, policy.feature_dim), x, torch.randn(n, d), k, -torch.ones(n), one, one)
                on_device = Rows(*(part.to(learner.compute.device) for part in rows))
                return lambda: learner.update(on_device)
            if finetuner == "residual":
                once = replace(numbers, critic_warmup=0, utd=numbers.critic_steps_per_actor_step)
                learner = Residual(once, policy, generator, self.compute)
            else:  # na distils about as often as it updates
                once = replace(numbers, utd=1, noise_critic_grad_steps=min(1, numbers.noise_critic_grad_steps))
                learner = DSRL(once, policy, generator, self.compute)
            memory = learner.memory(10_000, training.num_envs)
            memory.add(_transitions(2000, memory.widths[0], memory.widths[1]))
            return lambda: learner.learn(memory, generator, generator)

        return self.watch.seconds(f"{finetuner} {numbers} {training.num_envs} {own.policy} {self.shapes} {self.compute}", make)

    def _acting(self, own: Recipe[Any], num_envs: int) -> float:
        """Seconds in which the policy looks and decides for `num_envs` environments."""

        @torch.no_grad()
        def act(policy: Any, observation: dict[str, torch.Tensor], generator: torch.Generator) -> None:
            policy.sample(policy.encode(observation), generator=generator)

        def make() -> Callable[[], Any]:
            device = self.compute.start()
            policy, generator = self._policy(own).to(device).eval(), make_generator(0, "evaluation/acting", device)
            windows = self._windows()
            observation = {k: v.to(device) for k, v in windows.observation(torch.zeros(num_envs, dtype=torch.int64)).items()}
            return lambda: act(policy, observation, generator)

        return self.watch.seconds(f"acting {own.policy} {self.shapes} {self.chunk} {num_envs} {self.compute.device}", make)

    def _seen(self, config: Any, sees: bool) -> tuple[Any, float]:
        """The configuration to time, and how much longer the real one takes."""
        size = min(config.batch_size, SEEN_AT_ONCE) if sees else config.batch_size
        return replace(config, batch_size=size), config.batch_size / size

    def _policy(self, own: Recipe[Any]) -> Any:
        return policy_class(own.policy.kind)(
            own.policy, self.shapes, self.action_dim, self.chunk, self.normalization, make_generator(0, "policy/initialisation"),
            self.recipe.data.observation_steps,
        )  # fmt: skip

    def _windows(self) -> Windows:
        """Of a few random demonstrations of this recipe's shapes."""
        rng, n = np.random.default_rng(0), max(self.chunk + 1, 60 if self.sees else 200)

        def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if is_image(name):
                return rng.integers(0, 256, (n, *shape), dtype=np.uint8)
            return rng.normal(size=(n, *shape)).astype(np.float32)

        seen = {name: drawn(name, shape) for name, shape in self.shapes.items()}
        actions = rng.uniform(-1, 1, (n, self.action_dim)).astype(np.float32)
        episodes = tuple(Episode(seen, actions, name=f"demo_{i}") for i in range(4))
        tail = self.recipe.data.tail
        return Windows(Dataset(episodes), self.chunk, tail=tail, observation_steps=self.recipe.data.observation_steps)


def cost_of(recipe: Recipe[Any], watch: Stopwatch) -> list[Cost] | InputError:
    """Of one seed; the error says why it is unknown."""
    try:
        return Estimate(recipe, watch)()
    except InputError as error:
        return error


def table_of_costs(name: str, costs: list[Cost], recipe: Recipe[Any]) -> Table:
    """Stage by stage, of one seed and of all."""
    total = sum(cost.seconds for cost in costs)
    seeds = len(recipe.seeds)
    grid = Table(
        title=f"{name}: one seed on this machine, one process, at most",
        caption=f"{seeds} seeds: {duration(seeds * total)} by one process, {duration(seeds * total / cores())} by {cores()} "
        f"(--jobs {cores()}); recording demonstrations is not counted",
    )
    for column in ("stage", "pretraining"):
        grid.add_column(column)
    for column in ("gradient steps", "environment steps", "time"):
        grid.add_column(column, justify="right")
    for cost in costs:
        grid.add_row(cost.stage, cost.method or "", f"{cost.gradient_steps:,}", f"{cost.env_steps:,}", duration(cost.seconds))
    grid.add_section()
    grid.add_row(
        "all", "", f"{sum(c.gradient_steps for c in costs):,}", f"{sum(c.env_steps for c in costs):,}", duration(total)
    )
    return grid


def duration(seconds: float) -> str:
    """In words that nobody mistakes for precise ones."""
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 10 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _playing(env: Any) -> Callable[[], Any]:
    """A chunk of small random actions; an episode that has ended begins anew."""
    rng = np.random.default_rng(0)
    env.reset(np.array([0]))

    def play() -> None:
        step = env.step(rng.uniform(-0.1, 0.1, (1, env.chunk, env.action_dim)).astype(np.float32))
        if step.ended.any():
            env.reset(np.array([0]))

    return play


def _transitions(n: int, features: int, actions: int) -> Batch:
    return Batch(
        torch.randn(n, features), 2 * torch.rand(n, actions) - 1, torch.randn(n, features), -torch.rand(n), 0.9 * torch.ones(n)
    )
