"""Random numbers: one generator a use, none shared; and episode seeds, those of evaluation apart from all others by construction."""

from __future__ import annotations

import numpy as np
import torch

from postbc.errors import require

#: What each stream of a seed's random numbers is for. Numbers are never reused, so that no use disturbs another.
STREAMS = {
    "ensemble/initialisation": 0, "ensemble/bootstrap": 1, "ensemble/data": 2, "policy/initialisation": 3,
    "ensemble/crop": 4,
    "value-dice/initialisation": 5, "value-dice/data": 6, "value-dice/noise": 7,
    "pretraining/data": 10, "pretraining/loss": 11, "pretraining/target": 12, "pretraining/crop": 13, "pretraining/dropout": 14,
    "online/initialisation": 400, "online/base": 401, "online/acting": 402, "online/data": 403, "online/noise": 404,
    "residual/demonstrations": 405,
    "best-of-n/initialisation": 410, "best-of-n/data": 411, "rollouts/acting": 420, "report/actions": 500,
    "evaluation/saliency": 501, "held-out/sampling": 502,
    "evaluation/acting": 7000,
    "robot/acting": 10**10,  # beyond evaluation's, whose offsets are episode seeds
}  # fmt: skip

EVALUATION_SEED = 1_000_000_000
"""Episode seeds from here on (below 2³²) are evaluation's alone; whatever trains or collects draws below."""

TRIAL_SEED = EVALUATION_SEED + 250_000_000
"""Evaluation episodes by which a pretrained policy may be chosen (`postbc no-regression`)."""

BEST_SEED = EVALUATION_SEED + 500_000_000
"""Evaluation episodes that report an agent which was chosen by its success on others."""


def make_generator(seed: int, stream: str, device: str | torch.device = "cpu", offset: int = 0) -> torch.Generator:
    """The generator of one use of one seed, on `device`.

    Args:
        seed: non-negative.
        stream: a key of `STREAMS`.
        offset: tells uses of one stream apart (evaluation: by its first episode seed).
    """
    require(seed >= 0, "A seed is a non-negative integer.", key="seed", found=seed)
    number = STREAMS[stream] + offset
    generator = torch.Generator(device=device)
    # splitmix64 of (seed, stream): neighbouring seeds and streams start far apart
    state = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    generator.manual_seed((state ^ (state >> 31)) % 2**63)
    return generator


def episode_seed(*identity: int) -> int:
    """Seed of an episode that trains or collects, a function of `identity` (non-negative integers): below `EVALUATION_SEED`."""
    return int(np.random.SeedSequence(identity).generate_state(1)[0]) % EVALUATION_SEED


def evaluation_seeds(episodes: int, first: int = EVALUATION_SEED) -> np.ndarray:
    """(E,) int64 episode seeds `first`, `first` + 1, ….

    Raises:
        InputError: no episode, or seeds outside evaluation's own range.
    """
    require(episodes >= 1, "An evaluation needs at least one episode.", key="episodes", found=episodes, expected=">= 1")
    require(
        EVALUATION_SEED <= first <= 2**32 - episodes, "Evaluation seeds are kept apart from training seeds.", key="seed",
        found=first, expected=f"{EVALUATION_SEED} to {2**32 - episodes}",
    )  # fmt: skip
    return first + np.arange(episodes, dtype=np.int64)
