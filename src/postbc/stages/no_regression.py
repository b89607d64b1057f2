"""`postbc no-regression`: episodes of two policies, pair by pair, until it is known whether the one is worse than the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from pydantic import Field

from postbc.agents.base import load_agent
from postbc.devices import Compute
from postbc.errors import require
from postbc.evaluation import check_plays, evaluate
from postbc.files import write_json, write_text
from postbc.progress import note, progress
from postbc.runs import Run
from postbc.schemas import Count, CountOrZero, NonNegative, OpenShare, Seed, Share, plain, read_json, schema
from postbc.seeding import EVALUATION_SEED, TRIAL_SEED, evaluation_seeds
from postbc.sequential import PairedTest, in_words
from postbc.stages.evaluate import digests, environment_of
from postbc.stages.seeds import agent_of, of_one_seed, require_seed

VERDICT, PAIRS = "no_regression.json", "pairs.csv"


@schema
class NoRegression:
    """Is a policy no worse than another, before finetuning? Plays both on the same episodes and stops as soon as the answer is known.

    Writes seed_<seed>/no_regression.json and pairs.csv into the output directory.
    """

    policy: Path
    """The candidate, as `postbc evaluate` takes it: what `postbc pretrain` wrote by PostBC, say."""
    reference: Path
    """What it must not be worse than: BC of the same seeds."""
    output: Path
    """Directory of the stage; each seed's run is seed_<seed> in it."""
    environment: str | None = None
    """postbc/Lift, …; default: the task that the policy was trained on."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of both, each a pair of policies."""
    margin: OpenShare = 0.05
    """A loss of success that would not matter: "not worse" says that the loss is smaller, "worse" that it is larger."""
    level: OpenShare = 0.05
    """Probability at most of either being said wrongly, however long it takes."""
    max_episodes: Count = 4000
    """Pairs of episodes after which it gives up; with --resume and more of them it goes on."""
    batch: Count = 20
    """Episodes played between two looks."""
    num_envs: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Environments side by side."""
    horizon: Count | None = None
    """Environment steps after which an episode has failed; default: the environment's."""
    episode_seed: Annotated[int, Field(ge=EVALUATION_SEED, lt=2**32)] = TRIAL_SEED
    """First episode seed; by default not those of `postbc evaluate`, so that a policy may be chosen by it."""
    allow_version_mismatch: bool = False
    """Go on although the policies' data were made with another version of the simulator."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    jobs: Count = 1
    """Seeds at a time, each a process of its own."""
    resume: bool = False
    """Go on with the runs in the output directory; a decided one is only shown."""

    def __post_init__(self) -> None:
        evaluation_seeds(self.max_episodes, self.episode_seed)


@schema
class Verdict:
    """no_regression.json."""

    decision: Literal["not worse", "worse", "open"]
    """open: not known after max_episodes."""
    pairs: CountOrZero
    """Pairs of episodes until it was known."""
    success: Share
    """Of the candidate in them."""
    reference_success: Share
    margin: OpenShare
    level: OpenShare
    capital: tuple[NonNegative, NonNegative]
    """Evidence (e-values) that it is not worse, and that it is: 1/level decides."""


def play_pairs(config: NoRegression, seed: int) -> Verdict:
    """Play one seed's pair of policies until it is decided, resumable after every batch.

    Raises:
        InputError: a policy cannot be used or is of another environment or seed; nothing is written then.
    """
    config = dataclasses.replace(config, compute=config.compute.resolved())
    device = config.compute.start()
    paths = {"candidate": agent_of(config.policy, seed), "reference": agent_of(config.reference, seed)}
    agents = {name: load_agent(path, device) for name, path in paths.items()}
    environment = environment_of(config.environment, agents["candidate"][1], paths["candidate"])
    horizon = environment.horizon if config.horizon is None else config.horizon
    for name, (agent, about) in agents.items():
        require_seed(about, seed, paths[name])
        note(check_plays(agent, about, environment, horizon, paths[name], config.allow_version_mismatch))
    recorded = of_one_seed(dataclasses.replace(config, environment=environment.name), seed)
    inputs = {f"{name}-{kind}": digest for name, path in paths.items() for kind, digest in digests(path).items()}
    moved = ("compute", "policy", "reference", "max_episodes")
    with Run(config.output / f"seed_{seed}", recorded, resume=config.resume, inputs=inputs, revisable=moved) as run:
        if (run.directory / VERDICT).exists():
            said = read_json(run.directory / VERDICT, Verdict)
            if said.decision != "open":
                run.finish()
            if said.decision != "open" or said.pairs >= config.max_episodes:
                return said
        found = run.load()
        outcomes = np.zeros((0, 2), bool) if found is None else np.asarray(found[1]["outcomes"], bool)
        test = PairedTest(config.margin, config.level)
        for pair in outcomes.tolist():
            test.add(*pair)
        with progress(f"pairs of episodes, seed {seed}", config.max_episodes, len(outcomes)) as bar:
            while test.decision is None and len(outcomes) < config.max_episodes:
                count = min(config.batch, config.max_episodes - len(outcomes))
                played = [
                    evaluate(
                        agent, environment, episodes=count, seed=config.episode_seed + len(outcomes), num_envs=config.num_envs,
                        agent_seed=seed, horizon=horizon, progress=False,
                    )
                    for agent, _ in agents.values()
                ]  # fmt: skip
                require(played[0].chooses_episodes, "Here seeds do not decide the episodes, so that there are no pairs.",
                        key="environment", found=environment.name)  # fmt: skip
                outcomes = np.concatenate((outcomes, np.stack([evaluation.outcomes() for evaluation in played], 1)))
                for pair in outcomes[-count:].tolist():
                    test.add(*pair)
                run.save(len(outcomes), {"outcomes": outcomes})
                bar.advance(count, evidence=max(test.capital))
        used = outcomes[: test.pairs].mean(0)
        verdict = Verdict(
            test.decision or "open", test.pairs, float(used[0]), float(used[1]), config.margin, config.level, test.capital
        )
        rows = (f"{config.episode_seed + i},{int(a)},{int(b)}\n" for i, (a, b) in enumerate(outcomes.tolist()))
        write_text(run.directory / PAIRS, "".join(("episode_seed,candidate,reference\n", *rows)))
        write_json(run.directory / VERDICT, plain(verdict))
        if test.decision is not None:  # else its checkpoint stays: more episodes may be asked for
            run.finish()
    return verdict


def summary(output: Path, seed: int) -> str:
    """What came out of one seed, in a line."""
    v = read_json(output / f"seed_{seed}" / VERDICT, Verdict)
    said = in_words(v.decision, f"{v.margin:g}", "not known yet")
    return f"seed {seed}: {said}, after {v.pairs} pairs of episodes: {v.success:.3f} and {v.reference_success:.3f}"
