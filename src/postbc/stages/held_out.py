"""`postbc held-out`: is a policy no worse than another on demonstrations that neither was trained on? Nothing is played."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from pydantic import Field
from torch import Tensor

from postbc.agents.base import about_of
from postbc.data.batches import read_ahead
from postbc.data.readers import list_dataset
from postbc.data.windows import Windows
from postbc.devices import Compute
from postbc.errors import require
from postbc.files import digest, write_json
from postbc.policies import load_policy, policy_fingerprint
from postbc.policies.base import POLICY_FILE, Policy
from postbc.posterior.calibration import evenly, sign_flips
from postbc.progress import progress, say
from postbc.runs import Run
from postbc.schemas import Count, NonNegative, OpenShare, Seed, Share, plain, read_json, schema
from postbc.seeding import make_generator
from postbc.sequential import in_words
from postbc.stages.seeds import file_of_seed, of_one_seed, require_seed
from postbc.statistics import mean_interval
from postbc.training.rollouts import read_rollouts

HELD_OUT_FILE = "held_out.json"
REMEDY = "train on fewer (--data.num-trajectories), give demonstrations of another file, or more --windows"


@schema
class HeldOut:
    """Does a policy play what demonstrators do, where neither it nor the one it is held against was trained, no worse than that one?

    The trajectories of a file that neither policy was trained on, and the energy score of the chunks that each would play at their
    states: the test of "no worse than BC" before any rollout, of the policies themselves. Writes seed_<seed>/held_out.json.
    """

    policy: Path
    """The candidate: a directory of `postbc pretrain`, by PostBC, say."""
    reference: Path
    """What it must not be worse than: BC of the same seeds."""
    demonstrations: Path
    """Demonstrations of the task, those among them that the policies were not trained on; the file that they are of, or another."""
    output: Path
    """Directory of the stage; each seed's run is seed_<seed> in it."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of both, each a pair of policies."""
    margin: OpenShare = 0.01
    """A loss that would not matter, as a share of the reference's score."""
    level: OpenShare = 0.05
    """Of each of two one-sided tests: that the loss is smaller than the margin ("not worse"), that it is larger ("worse"); where the
    trajectories' differences are as likely as far above their mean as below it."""
    samples: Annotated[int, Field(ge=2, le=1024)] = 16
    """Chunks that each policy draws at a state."""
    windows: Count = 3000
    """At most so many states, evenly spaced: neighbours tell the same."""
    allow_version_mismatch: bool = False
    """Go on although the demonstrations were made with another version of the simulator."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    jobs: Count = 1
    """Seeds at a time, each a process of its own."""
    resume: bool = False
    """Go on with the runs in the output directory; a finished one is only shown."""


@schema
class Scored:
    """held_out.json."""

    decision: Literal["not worse", "worse", "open"]
    trajectories: Count
    """That neither policy was trained on."""
    windows: Count
    score: NonNegative
    """Energy score of the candidate, mean over trajectories; smaller is better."""
    reference_score: NonNegative
    loss: float
    """Of the candidate, as a share of the reference's score."""
    loss_interval: tuple[float, float]
    """Its 95 % interval over trajectories."""
    p_not_worse: Share
    """Of "the loss is the margin or more", sign flips over trajectories."""
    p_worse: Share
    """Of "the loss is the margin or less"."""
    margin: OpenShare
    level: OpenShare


def energy_score(samples: Tensor, target: Tensor) -> Tensor:
    """(M, B, D) draws, (B, D) what was seen -> (B,): mean |x − y| less half of the mean |x − x'| (Gneiting and Raftery 2007).

    Its expectation is least for the distribution that what was seen comes from: neither a mean alone nor a wider spread does better.
    """
    draws = samples.transpose(0, 1)  # (B, M, D)
    count = draws.shape[1]
    apart = torch.cdist(draws, draws, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)) / (count * (count - 1))
    return (draws - target[:, None]).norm(dim=-1).mean(1) - apart / 2


@torch.no_grad()
def scores(policy: Policy, windows: Windows, rows: Tensor, scale: Tensor, samples: int, seed: int, bar: Any) -> Tensor:
    """(len(rows),) energy scores of the policy's raw chunks over `scale` (A,) at these windows."""
    device = policy.normalization.action_low.device
    generator = make_generator(seed, "held-out/sampling", device)
    parts = rows.split(256)
    found = []
    for part, observation in zip(parts, read_ahead(windows, parts, device), strict=True):
        features = policy.encode(observation)
        drawn = torch.stack([policy.sample(features, generator=generator) for _ in range(samples)])
        chunks = policy.normalization.unnormalize_action(drawn) / scale
        found.append(energy_score(chunks.flatten(2), (windows.chunk(part).to(device) / scale).flatten(1)))
        bar.advance(len(part))
    return torch.cat(found).cpu()


def compare_held_out(config: HeldOut, seed: int) -> Scored:
    """Score one seed's pair of policies.

    Raises:
        InputError: a policy or the file cannot be used, they do not belong together, or no trajectory is left; nothing is written then.
    """
    config = dataclasses.replace(config, compute=config.compute.resolved())
    device = config.compute.start()
    paths = [file_of_seed(path, seed, POLICY_FILE, "postbc pretrain") for path in (config.policy, config.reference)]
    policies = [load_policy(path, device) for path in paths]
    for policy, path in zip(policies, paths):
        require_seed(about_of(policy), seed, path)
    candidate, reference = policies
    require(candidate.chunk == reference.chunk, "Chunks of different lengths have scores that cannot be compared.", key="chunk",
            file=paths[0], found=candidate.chunk, expected=reference.chunk)  # fmt: skip
    left = unseen(config.demonstrations, policies)
    read = [read_rollouts(config.demonstrations, p, None, config.allow_version_mismatch, names=left) for p in policies]
    whole = [name for name, length in zip(read[0].names, read[0].lengths) if length >= candidate.chunk]
    if len(whole) < len(left):
        say(f"note: {len(left) - len(whole)} trajectories are left out, which are shorter than a chunk")
    enough(len(whole), config)
    made = [
        Windows(dataset.keep(whole), policy.chunk, observation_steps=policy.observation_steps, device=device)
        for dataset, policy in zip(read, policies)
    ]
    rows = evenly(len(made[0]), config.windows)
    names, which = np.unique(np.asarray(made[0].episode)[rows.numpy()], return_inverse=True)
    enough(len(names), config)
    inputs = {"candidate": policy_fingerprint(candidate), "reference": policy_fingerprint(reference),
              "demonstrations": " ".join(windows.fingerprint for windows in made)}  # fmt: skip
    moved = ("compute", "policy", "reference", "demonstrations")
    with Run(
        config.output / f"seed_{seed}", of_one_seed(config, seed), resume=config.resume, inputs=inputs, revisable=moved
    ) as run:
        if (run.directory / HELD_OUT_FILE).exists():
            return read_json(run.directory / HELD_OUT_FILE, Scored)
        actions = made[0].chunk(rows).flatten(0, 1)
        scale = actions.std(0).to(device)
        scale = torch.where(scale > 1e-6, scale, torch.ones_like(scale))
        with progress(f"held-out scores, seed {seed}", 2 * len(rows)) as bar:
            both = torch.stack([scores(p, w, rows, scale, config.samples, seed, bar) for p, w in zip(policies, made)], 1)
        by_trajectory = np.stack([both.numpy()[which == i].mean(0) for i in range(len(names))]).astype(np.float64)
        comparison = compare_scores(by_trajectory, len(rows), config.margin, config.level, seed)
        write_json(run.directory / HELD_OUT_FILE, plain(comparison))
        run.finish()
    return comparison


def unseen(path: Path, policies: list[Any]) -> list[str]:
    """Names of the trajectories of a file that none of the policies was trained on, as far as they know.

    Raises:
        InputError: a policy that is of this file does not say which, or none is left.
    """
    left = list(list_dataset(path).names)
    there, content = len(left), digest(path)
    for policy in policies:
        about = about_of(policy)
        if not about.is_of(path, content):
            if about.data != path.name:
                say(f"note: a policy was trained on {about.data or 'an unknown file'}: it counts as not having seen {path}")
                continue
            say(f"note: {path} is not as it was when a policy was trained on it; trajectories of the same names are left out")
        require(about.trajectories is not None, "The policy does not say which trajectories it was trained on.", file=path,
                remedy="give demonstrations of another file")  # fmt: skip
        known = set(about.trajectories or ())
        left = [name for name in left if name not in known]
    require(left, "The policies were trained on all of these trajectories.", file=path, found=there, remedy=REMEDY)
    return left


def enough(count: int, config: HeldOut) -> None:
    """Raise :class:`InputError` where so few trajectories can show nothing: the smallest p of G sign flips is 2⁻ᴳ."""
    least = max(2, math.ceil(-math.log2(config.level)))
    require(count >= least, "So few trajectories that the policies were not trained on cannot tell anything.",
            file=config.demonstrations, found=count, expected=f"{least} at least", remedy=REMEDY)  # fmt: skip


def compare_scores(by_trajectory: np.ndarray, windows: int, margin: float, level: float, seed: int = 0) -> Scored:
    """(G, 2) scores of candidate and reference, trajectory by trajectory -> what they tell."""
    score, reference = by_trajectory.mean(0)
    loss = float(score / reference - 1)
    below = (1 + margin) * by_trajectory[:, 1] - by_trajectory[:, 0]
    good, bad = (float(sign_flips(sign * below[:, None], seed)[0]) for sign in (1, -1))
    apart = (by_trajectory[:, 0] - (1 + loss) * by_trajectory[:, 1]) / reference  # a ratio's errors, to first order
    _, low, high = mean_interval(apart)
    return Scored(
        "not worse" if good <= level else "worse" if bad <= level else "open", len(below), windows, float(score),
        float(reference), loss, (loss + low, loss + high), good, bad, margin, level,
    )  # fmt: skip


def summary(output: Path, seed: int) -> str:
    """What came out of one seed, in a line."""
    c = read_json(output / f"seed_{seed}" / HELD_OUT_FILE, Scored)
    said, (low, high) = in_words(c.decision, f"{c.margin:.1%}", "not told"), c.loss_interval
    return (
        f"seed {seed}: {said} on {c.trajectories} trajectories held out: energy score {c.score:.4f} and "
        f"{c.reference_score:.4f}, {c.loss:+.1%} [{low:+.1%}, {high:+.1%}]"
    )
