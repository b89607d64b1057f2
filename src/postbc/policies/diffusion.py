"""The diffusion policy: a stack of DPPO's diffusion MLPs, its loss, its samplers, and its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postbc.demonstrations.normalization import Normalization
from postbc.errors import InputError
from postbc.nn import Generators, randint, randn
from postbc.policies.base import NormalizationTensors
from postbc.policies.mlp import DiffusionMLP
from postbc.policies.schedules import Schedule, add_noise, ddim, ddpm
from postbc.runs import load_tree, save_tree, write_json

FORMAT = 1


@dataclass(frozen=True)
class DiffusionConfig:
    """Architecture and sampling of a diffusion policy (paper, Table of pretraining; DPPO)."""

    chunk: int = 4
    """T, actions predicted and executed at once."""
    hidden: int = 512
    """Width of the MLP (512 Lift, 1024 Can and Square)."""
    layers: int = 3
    """Hidden layers; 3 is one residual block."""
    time_dim: int = 16
    """Width of the time embedding (16 for 512, 32 for 1024)."""
    condition_hidden: tuple[int, ...] = ()
    """Widths of an MLP on the observation (DPPO uses 512 64 on Square); none by default."""
    denoising_steps: int = 100
    """Diffusion steps in training."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """DDIM is deterministic given the latent noise (DSRL needs that); DDPM is ancestral sampling (DPPO)."""
    inference_steps: int = 8
    """DDIM steps at inference (DDPM always takes all)."""
    denoised_clip: float | None = 1.0
    """Clamp of the denoised chunk at each step, normalised units."""


class DiffusionPolicy(nn.Module):
    """M diffusion policies side by side, in normalised units (:class:`~postbc.policies.base.Policy`).

    Args:
        config: architecture and sampling.
        observation_dim: S.
        action_dim: A.
        seeds: one a member; member m is initialised from `generators[m]`.
        normalizations: one a member, or one for all.
        about: what a reader of the file should know (task, method, demonstrations, versions); saved with it.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        observation_dim: int,
        action_dim: int,
        seeds: Sequence[int],
        generators: Generators,
        normalizations: Sequence[Normalization],
        about: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.seeds, self.about = config, tuple(seeds), dict(about or {})
        self.members, self.observation_dim, self.action_dim, self.chunk = (
            len(self.seeds),
            observation_dim,
            action_dim,
            config.chunk,
        )
        self.normalizations = list(normalizations)
        self.normalization = NormalizationTensors(self.normalizations, self.members)
        self.schedule = Schedule.cosine(config.denoising_steps)
        self.network = DiffusionMLP(
            self.members, observation_dim, config.chunk * action_dim, generators, config.hidden, config.layers, config.time_dim,
            config.condition_hidden, config.denoising_steps,
        )  # fmt: skip

    def loss(self, observation: Tensor, chunk: Tensor, generators: Generators) -> Tensor:
        """(M, B, S), (M, B, T, A) -> (M,): E‖ε − ε_θ(x_t, t, s)‖² (mean over batch and chunk), t uniform, one ε a row."""
        sample = chunk.flatten(2)
        batch, dim = sample.shape[1:]
        noise = randn(generators, batch, dim)
        timestep = randint(generators, self.config.denoising_steps, batch)
        predicted = self.network(add_noise(self.schedule, sample, noise, timestep), timestep, observation)
        return (predicted - noise).square().mean((1, 2))

    def sample(self, observation: Tensor, noise: Tensor | None = None, generators: Generators | None = None) -> Tensor:
        """(M, B, S) -> chunks (M, B, T, A); deterministic given `noise` (M, B, T, A) under DDIM.

        Raises:
            ValueError: neither noise nor generators, or DDPM without generators.
        """
        members, batch = observation.shape[:2]
        dim = self.chunk * self.action_dim
        if noise is None:
            if generators is None:
                raise ValueError("sample needs latent noise or generators to draw it from")
            x = randn(generators, batch, dim)
        else:
            x = noise.reshape(members, batch, dim)
        if self.config.sampler == "ddim":
            timesteps = self.schedule.ddim_timesteps(self.config.inference_steps)
            x = ddim(self.network.denoiser(observation, timesteps), self.schedule, x, len(timesteps), self.config.denoised_clip)
        else:
            if generators is None:
                raise ValueError("DDPM sampling needs generators for the noise of its steps")
            timesteps = list(reversed(range(self.schedule.steps)))
            denoiser, draw = self.network.denoiser(observation, timesteps), lambda: randn(generators, batch, dim)
            x = ddpm(denoiser, self.schedule, x, draw, self.config.denoised_clip)
        return x.view(members, batch, self.chunk, self.action_dim)

    # -- file ------------------------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write `path` (safetensors; everything inference needs) and, beside it, a readable .json of all but the weights."""
        path = Path(path)
        head = {
            "format": FORMAT, "kind": "diffusion", "config": asdict(self.config), "observation_dim": self.observation_dim,
            "action_dim": self.action_dim, "seeds": list(self.seeds), "normalizations": [n.to_dict() for n in self.normalizations],
            "about": self.about,
        }  # fmt: skip
        save_tree(path, {**head, "parameters": dict(self.network.named_parameters())})
        write_json(path.with_suffix(".json"), head)

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> DiffusionPolicy:
        """Read a policy; `overrides` replace fields of its configuration (inference_steps=16, say).

        Raises:
            InputError: not a policy file of this format.
        """
        path = Path(path)
        path = path / "policy.safetensors" if path.is_dir() else path
        tree = load_tree(path)
        if not isinstance(tree, dict) or tree.get("kind") != "diffusion" or tree.get("format") != FORMAT:
            found = {k: tree.get(k) for k in ("kind", "format")} if isinstance(tree, dict) else type(tree).__name__
            raise InputError(
                "This is not a policy file.", file=path, key="kind, format", found=found,
                expected=f"kind 'diffusion', format {FORMAT}", remedy="give the policy.safetensors that `postbc pretrain` wrote",
            )  # fmt: skip
        known = {f.name for f in fields(DiffusionConfig)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in {**tree["config"], **overrides}.items() if k in known
        }
        seeds = tree["seeds"]
        policy = cls(
            DiffusionConfig(**values), tree["observation_dim"], tree["action_dim"], seeds, [torch.Generator() for _ in seeds],
            [Normalization.from_dict(n) for n in tree["normalizations"]], tree["about"],
        )  # fmt: skip
        policy.network.load_state_dict(tree["parameters"])
        return policy.eval().requires_grad_(False)

    def select(self, members: Sequence[int]) -> DiffusionPolicy:
        """The policy of these members alone (indices into `seeds`)."""
        chosen = list(members)
        normalizations = self.normalizations if len(self.normalizations) == 1 else [self.normalizations[m] for m in chosen]
        picked = DiffusionPolicy(
            self.config, self.observation_dim, self.action_dim, [self.seeds[m] for m in chosen],
            [torch.Generator() for _ in chosen], normalizations, self.about,
        )  # fmt: skip
        picked.network.load_state_dict({k: v[chosen] for k, v in self.network.named_parameters()})
        return picked.eval().requires_grad_(False)
