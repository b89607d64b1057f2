"""One DSRL-SAC gradient update against stable-baselines3's SAC: same networks, same batch, both sides in one run, in turn.

    python -m benchmarks.bench_dsrl

An update is one of those of `SAC.train(20)` and of `DSRL.learn` at utd 20: batch from the replay, temperature, critics, actor, target.
Both on one thread, which is how a seed runs here. Time on the wall: other programs on the machine disturb it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn

from benchmarks.bench_core import alternate
from postbc.agents.base import Batch
from postbc.agents.dsrl import DSRL, DSRLConfig
from postbc.agents.replay import Replay
from postbc.seeding import make_generator

S, T, A, BATCH = 19, 4, 7, 256
D = T * A


class Shape:
    """A policy's sizes, which are all that SAC in noise space needs of it while it updates."""

    feature_dim, chunk, action_dim = S, T, A


def transitions(n: int) -> Batch:
    """Random ones."""
    return Batch(torch.randn(n, S), 2 * torch.rand(n, D) - 1, torch.randn(n, S), -torch.rand(n), 0.99 * torch.ones(n))


def our_updates(config: DSRLConfig) -> Callable[[], None]:
    """The `utd` gradient updates of a vector step."""
    generator = make_generator(0, "online/initialisation")
    agent, replay = DSRL(config, Shape(), generator), Replay(10_000, S, D)  # type: ignore[arg-type]
    replay.add(transitions(10_000))
    return lambda: [agent.learn(replay, generator, generator), None][1]


def their_updates(config: DSRLConfig, updates: int) -> Callable[[], None]:
    """`updates` gradient updates of stable-baselines3's SAC with the same architecture."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import configure

    class Space(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(-1, 1, (S,))
        action_space = gymnasium.spaces.Box(-1, 1, (D,))

    def activation() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(config.hidden), nn.Tanh()) if config.layer_norm else nn.Tanh()

    kwargs = {"net_arch": [config.hidden] * config.layers, "activation_fn": activation}
    model = SAC(
        "MlpPolicy", Space(), policy_kwargs=kwargs, batch_size=BATCH, buffer_size=10_000, device="cpu", target_entropy=0.0
    )
    model.set_logger(configure(None, []))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        s, after = rng.normal(size=(2, 1, S)).astype(np.float32)
        model.replay_buffer.add(s, after, rng.uniform(-1, 1, (1, D)).astype(np.float32), -rng.random(1), np.zeros(1), [{}])
    return lambda: model.train(updates, BATCH)


def dsrl_sac_update(hidden: int = 256, layer_norm: bool = True, repeats: int = 7) -> dict[str, object]:
    """Milliseconds an update."""
    torch.set_num_threads(1)
    updates = 20 if hidden <= 512 else 2
    config = DSRLConfig("sac", hidden=hidden, layer_norm=layer_norm, utd=updates, batch_size=BATCH)
    ours, theirs = alternate(our_updates(config), their_updates(config, updates), repeats)
    return {
        "ours": 1e3 * ours / updates, "theirs": 1e3 * theirs / updates, "unit": "ms an update",
        "ratio": theirs / ours,
        "what": f"DSRL-SAC gradient update, 3x{hidden} {'LayerNorm ' if layer_norm else ''}Tanh, batch {BATCH}, "
        f"against stable-baselines3's SAC.train; one thread each",
    }  # fmt: skip


def run() -> dict[str, dict[str, object]]:
    """Figures of `make bench`; the first with DSRL's own layers on a laptop's width."""
    try:
        import stable_baselines3  # noqa: F401
    except ImportError:
        print("dsrl_sac_update is left out: stable-baselines3 is not installed (pip install 'postbc[dev]')")
        return {}
    return {
        "dsrl_sac_update": dsrl_sac_update(),
        "dsrl_sac_update_128": dsrl_sac_update(hidden=128),
        "dsrl_sac_update_plain": dsrl_sac_update(layer_norm=False),
    }


if __name__ == "__main__":
    for name, figure in run().items():
        print(f"{name}: {figure['ours']:.3f} against {figure['theirs']:.3f} {figure['unit']}, ratio {figure['ratio']:.2f}")
