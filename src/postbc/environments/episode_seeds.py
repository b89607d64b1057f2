"""Which seed each environment's next episode gets, where whoever plays does not say: never one of evaluation's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from postbc.environments.chunk import SEED_LIMIT
from postbc.errors import InputError
from postbc.seeding import episode_seed

Seed = int | Sequence[int | None] | None


class EpisodeSeeds:
    """N streams of seeds: environment i's episode k = 0, 1, … gets one derived from (the stream i, k).

    `current` (N,) int64 is the seed of the episode that each environment is in; −1 for none of ours.
    """

    def __init__(self, num_envs: int) -> None:
        entropy = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        self._streams: list[tuple[int, ...]] = [(entropy, i) for i in range(num_envs)]
        self._episodes = np.full(num_envs, -1, np.int64)
        self.current = np.full(num_envs, -1, np.int64)

    def restart(self, seed: Seed, mask: NDArray[np.bool_]) -> None:
        """Begin the streams of the environments in `mask` (N,): s: stream (s, i); a list: (seed[i]); None: they go on.

        Raises:
            InputError: a seed is negative, or a list of another length than N.
        """
        if seed is None:
            return
        if isinstance(seed, int | np.integer):
            streams: list[tuple[int, ...] | None] = [(int(seed), i) for i in range(len(mask))]
        elif len(seed) == len(mask):
            streams = [None if s is None else (int(s),) for s in seed]
        else:
            raise InputError("a list of seeds needs one entry an environment", found=len(seed), expected=len(mask))
        for i in np.flatnonzero(mask):
            stream = streams[i]
            if stream is None:
                continue
            if min(stream) < 0:
                raise InputError("a seed is negative", key="seed", found=seed)
            self._streams[i], self._episodes[i] = stream, -1

    def advance(self, i: int) -> None:
        """Environment i's next episode."""
        self._episodes[i] += 1
        self.current[i] = episode_seed(*self._streams[i], int(self._episodes[i]))

    def choose(self, i: int, seed: int) -> None:
        """Environment i's next episode, with this very seed; its stream does not move.

        Raises:
            InputError: not 0 ≤ seed < 2³².
        """
        if not 0 <= seed < SEED_LIMIT:
            raise InputError("a seed is out of range", key="seeds", found=seed, expected="0 ≤ seed < 2³²")
        self.current[i] = seed
