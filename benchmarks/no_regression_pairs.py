"""How many pairs of episodes `postbc no-regression` needs, by simulation: `python -m benchmarks.no_regression_pairs`.

Two policies that solve each episode independently of each other (the worst case: real pairs share their initial states); a row a pair
of rates and a margin, level 0.05. Prints a Markdown table: median and 90th percentile of the pairs until it is known, and the share of
runs in which it is not after 1000, 2000, 3000 and 4000.
"""

from __future__ import annotations

import numpy as np

from postbc.sequential import PairedTest

LOOKS = (1000, 2000, 3000, 4000)


def pairs_needed(candidate: np.ndarray, reference: np.ndarray, margin: float, level: float = 0.05) -> float:
    """Pairs until :class:`PairedTest` decides on these outcomes (n,), or infinity."""
    d = candidate.astype(int) - reference.astype(int)
    logs = np.zeros((len(d), 2, PairedTest(margin, level).bets.shape[1]))
    for value in (-1, 0, 1):
        logs += np.cumsum(d == value)[:, None, None] * np.log1p(PairedTest(margin, level).bets * (value + margin))
    known = np.flatnonzero((np.exp(logs).mean(2) >= 1 / level).any(1))
    return float(known[0] + 1) if len(known) else np.inf


def main(runs: int = 500) -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    print("| candidate, reference | margin | median pairs | 90 % within | open after 1000 | 2000 | 3000 | 4000 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for margin in (0.05, 0.1):
        for ours, theirs in ((0.5, 0.5), (0.7, 0.7), (0.9, 0.9), (0.6, 0.5), (0.3, 0.5)):
            needed = [pairs_needed(rng.random(LOOKS[-1]) < ours, rng.random(LOOKS[-1]) < theirs, margin) for _ in range(runs)]
            median, most = np.quantile(needed, (0.5, 0.9), method="higher")
            late = " | ".join(f"{np.mean(np.array(needed) > look):.0%}" for look in LOOKS)
            print(f"| {ours:g}, {theirs:g} | {margin:g} | {median:.0f} | {most:.0f} | {late} |", flush=True)


if __name__ == "__main__":
    main()
