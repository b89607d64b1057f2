"""Algorithm 2: posterior behavioral cloning. BC, σ-BC and PostBC are one trainer; they differ in the target alone.

ã = a                               BC
ã = a + σ·g,   g ~ N(0, I)          σ-BC
ã = a + α·w,   w ~ N(0, cov(s))     PostBC
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from postbc.demonstrations.chunks import Windows
from postbc.errors import InputError
from postbc.nn import EMA, Generators, generator_states, make_generators, randint, set_generator_states
from postbc.policies.base import Policy
from postbc.posterior.factor import Factor
from postbc.progress import progress
from postbc.runs import Run

Method = Literal["bc", "sigma-bc", "postbc"]


@dataclass(frozen=True)
class PretrainingConfig:
    """Algorithm 2 and the optimiser (paper, Table of pretraining; DPPO)."""

    method: Method = "postbc"
    """Target of the regression: bc, sigma-bc or postbc."""
    posterior_weight: float = 1.0
    """α, multiplies the posterior's standard deviation (postbc)."""
    sigma: float = 0.1
    """σ, standard deviation of isotropic noise, normalised units (sigma-bc)."""
    steps: int = 6000
    """Gradient steps. The paper counts epochs: steps = epochs · ⌈windows / batch⌉."""
    batch_size: int = 256
    """Windows a step."""
    learning_rate: float = 1e-4
    """AdamW's, after warm-up."""
    final_learning_rate: float = 1e-5
    """AdamW's at the end of the cosine."""
    warmup: float = 100 / 3000
    """Share of the steps over which the rate rises linearly (DPPO: 100 of 3000 epochs)."""
    weight_decay: float = 1e-6
    """AdamW's."""
    ema_decay: float = 0.995
    """Decay of the averaged weights, which are what is saved."""
    ema_every: int = 10
    """Steps between two updates of the average."""
    ema_start: float = 20 / 3000
    """Share of the steps before which the average is a plain copy (DPPO: 20 of 3000 epochs)."""
    resample: bool = True
    """Draw w afresh at each step (Algorithm 2), or once for each window."""
    clip_targets: bool = False
    """Clip perturbed targets to the action range. It biases the mean where actions sit at the bound (the gripper)."""
    diagonal: bool = False
    """Use the variances alone, without correlation over chunk and action (LIBERO Best-of-N)."""


class Data:
    """The windows of M members in one table; member m draws from its own rows.

    Args:
        windows: one a member, or one for all; normalised.
        members: M.
    """

    def __init__(self, windows: Sequence[Windows], members: int) -> None:
        if len(windows) not in (1, members):
            raise ValueError(f"{len(windows)} sets of windows for {members} members")
        self.observations = torch.cat([torch.as_tensor(w.observations) for w in windows])
        self.chunks = torch.cat([torch.as_tensor(w.chunks) for w in windows])
        sizes = [len(w) for w in windows]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        expand = members if len(windows) == 1 else 1
        self.sizes, self.starts = sizes * expand, torch.tensor(starts * expand)[:, None]

    def draw(self, batch: int, generators: Generators) -> Tensor:
        """(M, B) rows, uniform with replacement."""
        return self.starts + randint(generators, self.sizes, batch)


class Target:
    """ã: the one thing in which the methods differ.

    Args:
        config: method, α, σ.
        data: the table of windows.
        factor: posterior covariance of every row of the table (postbc).
        generators: one a member; no other stream is touched, so α = 0 is BC to the bit.
    """

    def __init__(self, config: PretrainingConfig, data: Data, factor: Factor | None, generators: Generators) -> None:
        if config.method == "postbc":
            if factor is None:
                raise InputError(
                    "PostBC needs a posterior.",
                    key="posterior",
                    remedy="run `postbc posterior fit` first and give --posterior DIR",
                )
            factor = (factor.diagonal() if config.diagonal else factor).compact()
            if len(factor.rows) != len(data.chunks):
                raise ValueError(f"the factor covers {len(factor.rows)} windows, the data has {len(data.chunks)}")
        self.config, self.factor, self.generators, self.shape = config, factor, generators, data.chunks.shape[1:]
        self.fixed: Tensor | None = None
        if not config.resample and config.method != "bc":
            every = torch.arange(len(data.chunks))
            self.fixed = torch.stack([self._draw(every, g) for g in generators])

    def _draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Perturbation of the windows `rows` (B,): (B, T, A)."""
        if self.config.method == "sigma-bc":
            return self.config.sigma * torch.randn(len(rows), *self.shape, generator=generator)
        assert self.factor is not None
        return self.config.posterior_weight * self.factor.sample(generator, rows).view(-1, *self.shape)

    def __call__(self, chunk: Tensor, rows: Tensor) -> Tensor:
        """(M, B, T, A), (M, B) -> ã (M, B, T, A)."""
        if self.config.method == "bc":
            return chunk
        if self.fixed is not None:
            noise = torch.stack([table[r] for table, r in zip(self.fixed, rows)])
        else:
            noise = torch.stack([self._draw(r, g) for r, g in zip(rows, self.generators)])
        target = chunk + noise
        return target.clamp(-1, 1) if self.config.clip_targets else target


class Pretraining:
    """Trains M policies side by side, step by step; `state`/`load_state` make it resumable bit for bit.

    Args:
        policy: any :class:`~postbc.policies.base.Policy` that is also a `torch.nn.Module`; trained in place.
        windows: normalised windows, one set a member or one for all.
        config: method and optimiser.
        seeds: one a member.
        factor: posterior covariance of every window, in the order of `windows` (postbc).
    """

    def __init__(
        self,
        policy: Any,
        windows: Sequence[Windows],
        config: PretrainingConfig,
        seeds: Sequence[int],
        factor: Factor | None = None,
    ) -> None:
        assert isinstance(policy, Policy)
        self.policy, self.config, self.done = policy, config, 0
        self.data = Data(windows, len(seeds))
        self.streams = {name: make_generators(seeds, stream=10 + i) for i, name in enumerate(("data", "loss", "target"))}
        self.target = Target(config, self.data, factor, self.streams["target"])
        module: torch.nn.Module = policy  # type: ignore[assignment]
        self.module, self.ema = module, EMA(module, config.ema_decay)
        self.optimiser = torch.optim.AdamW(
            module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to `final_learning_rate`."""
        c = self.config
        warm = max(1, round(c.warmup * c.steps))
        if step < warm:
            return c.learning_rate * (step + 1) / warm
        along = (step - warm) / max(1, c.steps - warm)
        return c.final_learning_rate + (c.learning_rate - c.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * along))

    def step(self) -> Tensor:
        """One gradient step of every member; returns their losses (M,)."""
        config = self.config
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(self.done)
        rows = self.data.draw(config.batch_size, self.streams["data"])
        target = self.target(self.data.chunks[rows], rows)
        losses = self.policy.loss(self.data.observations[rows], target, self.streams["loss"])
        self.optimiser.zero_grad(set_to_none=True)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.done += 1
        if self.done % config.ema_every == 0:
            if self.done < config.ema_start * config.steps:
                self.ema.copy()
            else:
                self.ema.update()
        return losses.detach()

    def finish(self) -> None:
        """Put the averaged weights into the policy, which is what is evaluated, finetuned and saved."""
        self.module.load_state_dict(self.ema.state_dict(), strict=False)
        self.module.eval().requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """Everything that decides the remaining steps."""
        return {
            "parameters": dict(self.module.named_parameters()),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "streams": {name: generator_states(g) for name, g in self.streams.items()},
            "done": self.done,
            "ema_updates": self.ema.updates,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.module.load_state_dict(state["parameters"], strict=False)
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name, generators in self.streams.items():
            set_generator_states(generators, state["streams"][name])
        self.done = state["done"]
        self.ema.updates = state["ema_updates"]


def pretrain(
    policy: Any,
    windows: Sequence[Windows],
    config: PretrainingConfig,
    seeds: Sequence[int],
    factor: Factor | None = None,
    run: Run | None = None,
    checkpoint_every: int = 1000,
) -> Any:
    """Algorithm 2. Trains `policy` (in place) and returns it with its averaged weights, frozen; resumable when a `run` is given."""
    training = Pretraining(policy, windows, config, seeds, factor)
    found = run.load() if run else None
    if found:
        training.load_state(found[1])
    with progress(f"pretraining {config.method}, {len(seeds)} seed(s)", config.steps, training.done) as bar:
        while training.done < config.steps:
            losses = training.step()
            if run and (training.done % checkpoint_every == 0 or training.done == config.steps):
                each = {f"pretraining/loss_seed_{seed}": loss.item() for seed, loss in zip(seeds, losses)}
                run.log(training.done, {"pretraining/loss": losses.mean().item(), **each})
                run.save(training.done, training.state())
            bar.advance(loss=losses)
    training.finish()
    return policy
