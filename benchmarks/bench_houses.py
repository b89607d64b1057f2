"""The house rebuilt against the first one (commit 39176ea), per core with as many processes as cores, in turn in one run.

    git worktree add ../first 39176ea
    python -m benchmarks.bench_houses ../first/src

Each side works as it is meant to: the first house one process with as many seeds and threads as there are cores, this one as many
processes of one seed and one thread. A figure is milliseconds of one core for an update and seed (members for the ensemble, chunks
for sampling): wall time · cores / (updates · seeds). The ratio is the first house's over this one's: above 1 this one is faster.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

COMMON = """
import sys, time, torch
figure, seeds, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
S, T, A, B = 19, 4, 7, 256
D = T * A
"""

FIRST = (
    COMMON
    + """
from postbc.nn import make_generators, rand, randn
g = make_generators(range(seeds))
if figure.startswith("dsrl"):
    from postbc.finetuning.dsrl import DSRL, DSRLConfig
    from postbc.finetuning.replay import Replay
    class Shape: observation_dim, chunk, action_dim, members = S, T, A, seeds
    n, config = 20, DSRLConfig("sac", hidden=256 if "256" in figure else 128, layers=3 if "256" in figure else 2, utd=20)
    agent, replay = DSRL(config, Shape(), g), Replay(seeds, 10_000, S, D)
    m = 10_000
    replay.add(randn(g, m, S), 2 * rand(g, m, D) - 1, randn(g, m, S), -rand(g, m), 0.99 * torch.ones(seeds, m))
    work = lambda: agent.train(replay, g, g)
elif figure == "iql":
    from postbc.finetuning.iql import IQL, IQLConfig
    from postbc.finetuning.replay import Replay
    n, m = 32, 10_000
    learner, replay = IQL(IQLConfig(discount=0.99), S, D, g), Replay(seeds, m, S, D)
    replay.add(randn(g, m, S), 2 * rand(g, m, D) - 1, randn(g, m, S), rand(g, m), 0.99 * torch.ones(seeds, m))
    work = lambda: learner.train(replay, n, g)
elif figure == "ddim":
    import numpy as np
    from postbc.demonstrations import Normalization
    from postbc.policies import DiffusionConfig, DiffusionPolicy
    normal = Normalization(-np.ones(S), np.ones(S), -np.ones(A), np.ones(A))
    policy = DiffusionPolicy(DiffusionConfig(inference_steps=8), S, A, list(range(seeds)), g, [normal]).eval().requires_grad_(False)
    s, w, n = torch.randn(seeds, 32, S), torch.randn(seeds, 32, T, A), 10
    def work():
        with torch.inference_mode():
            for _ in range(n): policy.sample(s, w)
else:
    import numpy as np
    from postbc.demonstrations import Windows
    from postbc.posterior import Ensemble, EnsembleConfig
    from postbc.posterior.ensemble import EnsembleTraining
    K = 20; rng = np.random.default_rng(0); N = 600; n = 20 * K / seeds  # one ensemble, whatever the threads
    data = Windows(rng.uniform(-1, 1, (N, S)).astype(np.float32), rng.uniform(-1, 1, (N, T, A)).astype(np.float32),
                   np.repeat(np.arange(6), N // 6), np.tile(np.arange(N // 6), 6))
    config = EnsembleConfig(ensemble_size=K, hidden=512, precision="bfloat16" if "bfloat16" in figure else "float32")
    training = EnsembleTraining(Ensemble(config, S, T, A, g[0]), data, seed=0)
    work = lambda: training.train(20)
"""
)

SECOND = (
    COMMON
    + """
from postbc.seeding import make_generator
g = make_generator(0, "online/initialisation")
def transitions(m):
    from postbc.agents.base import Batch
    return Batch(torch.randn(m, S), 2 * torch.rand(m, D) - 1, torch.randn(m, S), torch.rand(m), 0.99 * torch.ones(m))
if figure.startswith("dsrl"):
    from postbc.agents.dsrl import DSRL, DSRLConfig
    from postbc.agents.replay import Replay
    class Shape: feature_dim, chunk, action_dim = S, T, A
    n, config = 20, DSRLConfig("sac", hidden=256 if "256" in figure else 128, layers=3 if "256" in figure else 2, utd=20)
    agent, replay = DSRL(config, Shape(), g), Replay(10_000, S, D)
    replay.add(transitions(10_000))
    work = lambda: agent.learn(replay, g, g)
elif figure == "iql":
    from postbc.agents.iql import IQL, IQLConfig
    from postbc.agents.replay import Replay
    n = 32
    learner, replay = IQL(IQLConfig(discount=0.99), S, D, g), Replay(10_000, S, D)
    replay.add(transitions(10_000))
    work = lambda: learner.learn(lambda m: replay.sample(g, m), n)
elif figure == "ddim":
    from postbc.data.normalization import Normalization
    from postbc.policies.base import policy_class
    made = policy_class("diffusion")
    policy = made(made.Config(inference_steps=8), {"state": (S,)}, A, T, Normalization.identity(S, A), g).eval().requires_grad_(False)
    s, w, n = torch.randn(32, S), torch.randn(32, T, A), 10
    def work():
        with torch.inference_mode():
            for _ in range(n): policy.sample(s, w)
else:
    from postbc.devices import Compute
    from postbc.posterior.ensemble import Ensemble, EnsembleConfig, EnsembleTraining
    K = 20; N = 600; n = 20 * K
    config = EnsembleConfig(ensemble_size=K, hidden=512)
    ensemble = Ensemble(config, S, T, A, g)
    training = EnsembleTraining(ensemble, 2 * torch.rand(N, S) - 1, 2 * torch.rand(N, T, A) - 1, torch.arange(N) // 100, 0,
                                Compute(device="cpu", precision="bfloat16" if "bfloat16" in figure else "float32"))
    work = lambda: training.train(20)
"""
)

LOOP = """
work(); work()
print("ready", flush=True)
for line in sys.stdin:
    begin, times = time.perf_counter(), 0
    while time.perf_counter() - begin < 2.0:
        work(); times += 1
    print((time.perf_counter() - begin) / (times * n * seeds), flush=True)
"""

FIGURES = {
    "dsrl_sac_256x3": "ms an update and seed", "dsrl_sac_128x2": "ms an update and seed", "iql": "ms an update and seed",
    "ddim": "ms a batch of 32", "ensemble": "ms a member-step (512x3, float32)",
    "ensemble_bfloat16": "ms a member-step (512x3, bfloat16 products)",
}  # fmt: skip


class Side:
    """The processes of one house, which measure when they are told to."""

    def __init__(self, source: Path, script: str, figure: str, processes: int, seeds: int, threads: int) -> None:
        env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", script + LOOP, figure, str(seeds), str(threads)]
        self.processes = [
            subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"

    def measure(self) -> float:
        """Core-milliseconds for one unit of work."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        seconds = [float(process.stdout.readline()) for process in self.processes]  # type: ignore[union-attr]
        return 1e3 * statistics.mean(seconds) * CORES / len(self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def compare(first: Path, figure: str, repeats: int = 5) -> dict[str, object]:
    """Both houses in turn, medians."""
    here = Path(__file__).resolve().parent.parent / "src"
    sides = [Side(first, FIRST, figure, 1, CORES, CORES), Side(here, SECOND, figure, CORES, 1, 1)]
    found = [[side.measure() for side in sides] for _ in range(repeats)]
    for side in sides:
        side.close()
    old, new = (statistics.median(row[k] for row in found) for k in (0, 1))
    return {"first": old, "rebuilt": new, "unit": f"core-{FIGURES[figure]}", "ratio": old / new}


def main(first: Path, asked: list[str]) -> None:
    results = {figure: compare(first, figure) for figure in FIGURES if not asked or figure in asked}
    for name, r in results.items():
        print(f"{name:16} first {r['first']:8.3f}   rebuilt {r['rebuilt']:8.3f}   {r['unit']:50} ratio {r['ratio']:.2f}")
    if not asked:
        text = json.dumps({"cores": CORES, **results}, indent=2) + "\n"
        (Path(__file__).parent / "houses.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
