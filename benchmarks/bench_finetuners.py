"""Updates of the other finetuners: DPPO against the same update written plainly, residual RL against stable-baselines3's SAC.

    python -m benchmarks.bench_finetuners

One thread a side, in turn, in one run.
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
from postbc.agents.dppo import DPPO, DPPOConfig, Rows, clip_range
from postbc.agents.residual import Residual, ResidualConfig
from postbc.data.normalization import Normalization
from postbc.devices import Compute
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.seeding import make_generator

S, T, A, BATCH = 19, 4, 7, 256
D = T * A


def dppo_update(batch: int = 7500, precision: Any = "float32", repeats: int = 5) -> dict[str, object]:
    """Milliseconds a gradient step on one minibatch, at the published sizes (hidden 512, K = 10)."""
    torch.set_num_threads(1)
    generator = make_generator(0, "online/initialisation")
    policy = DiffusionPolicy(DiffusionConfig(), {"state": (S,)}, A, T, Normalization.identity(S, A), generator)
    config = DPPOConfig(batch_size=batch)
    learner = DPPO(config, policy, generator, Compute(device="cpu", precision=precision))
    rows = Rows(torch.randn(batch, S), torch.randn(batch, D), torch.randn(batch, D), torch.randint(10, (batch,)), -torch.ones(batch),
                torch.randn(batch), torch.randn(batch))  # fmt: skip
    ours, theirs = alternate(lambda: [learner.update(rows), None][1], plain_update(policy, rows, config), repeats)
    return {
        "ours": 1e3 * ours, "theirs": 1e3 * theirs, "unit": "ms an update", "ratio": theirs / ours,
        "what": f"DPPO gradient step on {batch} decisions, actor 512 x 3, critic 256 x 3, {precision}, against the same written "
        "plainly (torch.distributions, one joint loss, two AdamW); one thread each",
    }  # fmt: skip


def plain_update(policy: DiffusionPolicy, rows: Rows, config: DPPOConfig) -> Callable[[], None]:
    """The update as one writes it down: the published code's structure."""
    import copy

    actor = copy.deepcopy(policy.network).requires_grad_(True)
    critic = nn.Sequential(
        nn.Linear(S, 256), nn.Mish(), nn.Linear(256, 256), nn.Mish(), nn.Linear(256, 256), nn.Mish(), nn.Linear(256, 1)
    )
    optimizers = torch.optim.AdamW(actor.parameters(), 1e-4), torch.optim.AdamW(critic.parameters(), 1e-3)
    schedule, trained = policy.schedule, 10
    bars, betas = schedule.alpha_bars.float(), schedule.betas.float()

    def update() -> None:
        t = trained - 1 - rows.step
        now, before = bars[t, None], torch.where(t > 0, bars[(t - 1).clamp(min=0)], torch.ones(()))[:, None]
        beta = betas[t, None]
        eps = actor(rows.x, t, rows.features)
        x0 = ((rows.x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        mean = before.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * rows.x
        std = ((1 - before) / (1 - now) * beta).clamp(min=1e-20).sqrt().clamp(min=0.1)
        new = torch.distributions.Normal(mean, std).log_prob(rows.following).clamp(-5, 2).mean(-1)
        log_ratio = new - rows.log_probability
        ratio = log_ratio.exp()
        advantage = (rows.advantage - rows.advantage.mean()) / (rows.advantage.std() + 1e-8)
        advantage = advantage * config.denoising_discount ** (trained - 1 - rows.step)
        clip = clip_range(rows.step, trained, config)
        loss = torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
        loss = loss + 0.5 * 0.5 * ((critic(rows.features).squeeze(-1) - rows.target) ** 2).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return update


class Shape:
    """A policy's sizes, which are all that the residual needs of it while it updates."""

    feature_dim, chunk, action_dim = S, T, A


def their_residual(critics: int, hidden: int, layers: int) -> Any:
    """SAC with as many critics of the same size as residual RL's: of state and chunk. Its actor is not told a proposal."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import configure

    class Space(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(-1, 1, (S,))
        action_space = gymnasium.spaces.Box(-1, 1, (D,))

    def activation() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(hidden), nn.ReLU())

    kwargs = {"net_arch": [hidden] * layers, "activation_fn": activation, "n_critics": critics}
    model = SAC("MlpPolicy", Space(), policy_kwargs=kwargs, batch_size=BATCH, buffer_size=10_000, device="cpu")
    model.set_logger(configure(None, []))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        s, after = rng.normal(size=(2, 1, S)).astype(np.float32)
        model.replay_buffer.add(s, after, rng.uniform(-1, 1, (1, D)).astype(np.float32), -rng.random(1), np.zeros(1), [{}])
    return model


def residual_update(
    critics: int = 10, hidden: int = 256, proposals: int = 1, precision: Any = "float32", repeats: int = 7
) -> dict[str, object]:
    """Milliseconds a step of critics and actor, against SAC with as many critics."""
    torch.set_num_threads(1)
    steps = 10
    config = ResidualConfig(
        proposals=proposals, hidden=hidden, critics=critics, utd=steps, critic_steps_per_actor_step=1, critic_warmup=0,
        demonstration_share=0.0,
    )  # fmt: skip
    generator = make_generator(0, "online/initialisation")
    learner = Residual(config, Shape(), generator, Compute(device="cpu", precision=precision))  # type: ignore[arg-type]
    memory, wide = learner.memory(10_000, 1), S + proposals * D
    memory.add(
        Batch(
            torch.randn(2000, wide),
            2 * torch.rand(2000, D) - 1,
            torch.randn(2000, wide),
            torch.rand(2000),
            0.9 * torch.ones(2000),
        )
    )
    model = their_residual(critics, hidden, config.layers)
    work = lambda: [learner.learn(memory, generator, generator), None][1]  # noqa: E731
    ours, theirs = alternate(work, lambda: model.train(steps, BATCH), repeats)
    return {
        "ours": 1e3 * ours / steps, "theirs": 1e3 * theirs / steps, "unit": "ms an update", "ratio": theirs / ours,
        "what": f"residual RL, a step of {critics} critics and of the actor, 2x{hidden} LayerNorm, batch {BATCH}, {proposals} "
        f"proposal, {precision}, against stable-baselines3's SAC with {critics} critics of the same size; one thread each",
    }  # fmt: skip


def run() -> dict[str, dict[str, object]]:
    """Figures of `make bench`."""
    found = {"dppo_update": dppo_update(), "dppo_update_bfloat16": dppo_update(precision="auto")}
    try:
        import stable_baselines3  # noqa: F401
    except ImportError:
        print("residual_update is left out: stable-baselines3 is not installed (pip install 'postbc[dev]')")
        return found
    return {**found, "residual_update": residual_update(), "residual_update_bfloat16": residual_update(precision="auto")}


if __name__ == "__main__":
    for name, figure in run().items():
        print(f"{name}: {figure['ours']:.3f} against {figure['theirs']:.3f} {figure['unit']}, ratio {figure['ratio']:.2f}")
