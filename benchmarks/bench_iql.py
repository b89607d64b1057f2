"""One IQL update (V, twin Q, target) against d3rlpy's: same networks, same batch, both sides in one run, in turn.

    python -m benchmarks.bench_iql

d3rlpy's IQL also trains an actor, which Best-of-N does not use: it is left out on their side too, by calling d3rlpy's own
`update_critic` and `update_critic_target` on a batch that is already in tensors. d3rlpy 2.8.1 pins gymnasium 1.0.0, so it is installed
beside postbc without its pins (the `make bench` environment):

    pip install --no-deps d3rlpy==2.8.1 gym==0.26.2 gym-notices structlog colorama click dataclasses-json marshmallow typing-inspect \\
        mypy-extensions tqdm cloudpickle scikit-learn joblib threadpoolctl narwhals

"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.bench_core import alternate
from benchmarks.bench_dsrl import BATCH, D, S, transitions
from postbc.agents.iql import IQL, IQLConfig
from postbc.seeding import make_generator

UPDATES = 32


def our_updates(config: IQLConfig) -> Callable[[], None]:
    """`UPDATES` updates, each on a batch of its own."""
    learner, data = IQL(config, S, D, make_generator(0, "best-of-n/initialisation")), transitions(UPDATES * BATCH)

    return lambda: [learner.learn(lambda n: data, UPDATES), None][1]


def their_updates(config: IQLConfig) -> Callable[[], None]:
    """`UPDATES` updates of d3rlpy's critics and value function."""
    import d3rlpy
    from d3rlpy.torch_utility import TorchMiniBatch

    encoder = d3rlpy.models.VectorEncoderFactory(
        list(config.hidden), activation=config.activation, use_layer_norm=config.layer_norm
    )
    algorithm = d3rlpy.algos.IQLConfig(
        critic_encoder_factory=encoder, value_encoder_factory=encoder, actor_encoder_factory=encoder, batch_size=BATCH,
        gamma=config.discount, tau=config.tau, expectile=config.expectile,
    ).create(device=False)  # fmt: skip
    algorithm.create_impl((S,), D)
    rng = np.random.default_rng(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.as_tensor(rng.uniform(-1, 1, shape), dtype=torch.float32)

    one = tensor(BATCH, 1)
    values: dict[str, Any] = {
        "observations": tensor(BATCH, S), "actions": tensor(BATCH, D), "rewards": one, "next_observations": tensor(BATCH, S),
        "next_actions": tensor(BATCH, D), "returns_to_go": one, "terminals": torch.zeros(BATCH, 1), "intervals": torch.ones(BATCH, 1),
        "device": "cpu",
    }  # fmt: skip
    batch, implementation = TorchMiniBatch(**values), algorithm.impl
    assert implementation is not None

    def run() -> None:
        for _ in range(UPDATES):
            implementation.update_critic(batch)
            implementation.update_critic_target()

    return run


def iql_update(layer_norm: bool = False, repeats: int = 9) -> dict[str, object]:
    """Milliseconds an update."""
    torch.set_num_threads(1)
    config = IQLConfig(layer_norm=layer_norm, expectile=0.7, discount=0.99)
    ours, theirs = alternate(our_updates(config), their_updates(config), repeats)
    return {
        "ours": 1e3 * ours / UPDATES, "theirs": 1e3 * theirs / UPDATES, "unit": "ms an update",
        "ratio": theirs / ours,
        "what": f"IQL update of V, twin Q and target (no actor), 2x256 ReLU{' LayerNorm' if layer_norm else ''}, batch {BATCH}, "
        "against d3rlpy's update_critic and update_critic_target; one thread each",
    }  # fmt: skip


def run() -> dict[str, dict[str, object]]:
    """Figures of `make bench`."""
    try:
        import d3rlpy  # noqa: F401
    except ImportError as error:
        print(f"iql_update is left out: d3rlpy cannot be imported ({error}); benchmarks/bench_iql.py says how to install it")
        return {}
    return {"iql_update": iql_update(), "iql_update_layer_norm": iql_update(layer_norm=True)}


if __name__ == "__main__":
    for name, figure in run().items():
        print(f"{name}: {figure['ours']:.3f} against {figure['theirs']:.3f} {figure['unit']}, ratio {figure['ratio']:.2f}")
