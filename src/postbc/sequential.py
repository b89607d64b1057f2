"""Is a policy no worse than another? A test on paired episodes that may be looked at after every one of them, and stops when it knows.

Two gamblers bet on the differences d = candidate − reference ∈ {−1, 0, 1} of the episodes' successes. The first starts with 1 and bets
against "E d ≤ −margin": its capital is multiplied by 1 + λ(d + margin). As long as that is true the capital is a supermartingale, which
ever reaches 1/level with probability level at most (Ville 1939): there it stops, and the candidate is *not worse*. The second bets that
it is worse, by 1 − λ(d + margin). Nobody knows the right λ: a gambler's capital is the mean over a grid of them (Robbins 1970;
Waudby-Smith and Ramdas 2024).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from postbc.errors import require

Decision = Literal["not worse", "worse"]
BETS = np.linspace(0.02, 0.98, 33)
"""λ as a share of the largest that cannot lose everything."""


def in_words(decision: Decision | Literal["open"], margin: str, otherwise: str) -> str:
    """What a test with this margin has decided; `otherwise`, if it has not."""
    words = {"not worse": f"not worse (by {margin} or more)", "worse": f"worse by more than {margin}"}
    return words.get(decision, otherwise)


class PairedTest:
    """The test of one pair of policies; errors of either kind have probability `level` at most, whenever it stops.

    Args:
        margin: a loss of success that would not matter, in [0, 1): the hypothesis of the first gambler is a loss as large or larger.
            With 0 they bet on which is better: "not worse" says that the candidate is better.
        level: in (0, 1).

    Attributes:
        decision: None while it is not known.
    """

    def __init__(self, margin: float = 0.05, level: float = 0.05) -> None:
        require(0 <= margin < 1, "This lies between 0 and 1.", key="margin", found=margin)
        require(0 < level < 1, "This lies strictly between 0 and 1.", key="level", found=level)
        self.margin, self.level, self.pairs = margin, level, 0
        # a capital cannot become negative: d + margin lies in [margin − 1, margin + 1]
        self.bets = np.stack((BETS / (1 - margin), -BETS / (1 + margin)))
        self.logs = np.zeros_like(self.bets)
        self.decision: Decision | None = None

    def add(self, candidate: bool, reference: bool) -> Decision | None:
        """One more pair of episodes of the same initial state; the decision, as soon as there is one. After it nothing changes."""
        if self.decision is None:
            self.pairs += 1
            self.logs += np.log1p(self.bets * (float(candidate) - float(reference) + self.margin))
            good, bad = self.capital
            self.decision = "not worse" if good >= 1 / self.level else "worse" if bad >= 1 / self.level else None
        return self.decision

    @property
    def capital(self) -> tuple[float, float]:
        """Of the gamblers for "not worse" and for "worse"."""
        first, second = np.exp(self.logs).mean(1).tolist()
        return first, second
