"""How LeRobot's policies are steered, kind by kind: what of an observation their features are, how latent noise goes in, actions out.

A kind's features have two parts: what learners see, and what sampling needs besides (for most kinds nothing). Batches are as
LeRobot's own processors leave them; what is called of LeRobot is what its policies call of themselves (0.6.1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from postbc.data.lerobot import STATE

IMAGES = "observation.images"
TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"

#: Why other kinds cannot be finetuned here.
WHY_NOT = {
    "act": "ACT sets its latent to zero when it acts, so it is deterministic, and Best-of-N and DSRL have nothing to choose among",
    "pi0_fast": "it draws its tokens one after the other, and no latent noise decides them",
    "vqbet": "it chooses among codes, and no latent noise decides its actions",
    "tdmpc": "it plans, and no latent noise decides its actions",
}
UNKNOWN = "how latent noise goes into it is not known here (postbc/lerobot/steering.py)"


class Steered(Protocol):
    """A kind of LeRobot policy whose actions a latent noise decides; `policy` is LeRobot's, `batch` has B states.

    Attributes:
        timed: whether its batches have an axis of time, even of one observation.
    """

    timed: bool

    def settings(self, steps: int) -> dict[str, Any]:
        """What of its configuration is replaced: deterministic sampling in `steps` steps, nothing fetched that its weights replace."""
        ...

    def refused(self, config: Mapping[str, Any]) -> str | None:
        """Why one of this configuration (config.json) cannot be steered; None: it can."""
        ...

    def reads_weights(self, config: Any) -> bool:
        """Whether LeRobot's constructor reads weights of a pretrained model, which those of the policy replace."""
        ...

    def noise_shape(self, config: Any) -> tuple[int, int]:
        """(rows, width) of a state's latent noise; the actions that are played are A of the width, rows from :meth:`first` on."""
        ...

    def first(self, config: Any) -> int:
        """The row of the first action that is played."""
        ...

    def encode(self, policy: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What learners see (B, S), and what sampling needs besides (B, C)."""
        ...

    def sample(self, policy: Any, seen: Tensor, context: Tensor, noise: Tensor) -> Tensor:
        """:meth:`encode`'s parts and noise (B, rows, width) -> normalised actions (B, rows, at least A); no randomness."""
        ...


class _Denoiser:
    """A denoiser of a horizon that begins at the oldest observation; its whole condition is seen. DDIM: DDPM, LeRobot's default, draws
    noise at every step. The network is the same."""

    timed = True

    def settings(self, steps: int) -> dict[str, Any]:
        return {"noise_scheduler_type": "DDIM", "num_inference_steps": steps}

    def refused(self, config: Mapping[str, Any]) -> str | None:
        return None

    def reads_weights(self, config: Any) -> bool:
        return False

    def noise_shape(self, config: Any) -> tuple[int, int]:
        return config.horizon, config.action_feature.shape[0]

    def first(self, config: Any) -> int:
        return int(config.n_obs_steps) - 1

    def _condition(self, policy: Any, batch: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def encode(self, policy: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        cameras = [batch[name] for name in policy.config.image_features]
        seen = self._condition(policy, {**batch, **({IMAGES: torch.stack(cameras, dim=-4)} if cameras else {})})
        return seen, seen[:, :0]


class Diffusion(_Denoiser):
    """DiffusionPolicy: a U-Net on normalised states and the camera encoder's output."""

    def settings(self, steps: int) -> dict[str, Any]:
        return {**super().settings(steps), "pretrained_backbone_weights": None}

    def _condition(self, policy: Any, batch: dict[str, Tensor]) -> Tensor:
        condition: Tensor = policy.diffusion._prepare_global_conditioning(batch)
        return condition

    def sample(self, policy: Any, seen: Tensor, context: Tensor, noise: Tensor) -> Tensor:
        actions: Tensor = policy.diffusion.conditional_sample(len(seen), global_cond=seen, noise=noise)
        return actions


class MultiTaskDiT(_Denoiser):
    """A transformer on normalised states, CLIP's view of each camera and of the task's words; diffusion or flow matching.

    LeRobot's samplers draw their noise themselves, so their loop over the scheduler's steps stands here.
    """

    def settings(self, steps: int) -> dict[str, Any]:
        return {**super().settings(steps), "num_integration_steps": steps}

    def reads_weights(self, config: Any) -> bool:
        return True

    def _condition(self, policy: Any, batch: dict[str, Tensor]) -> Tensor:
        condition: Tensor = policy.observation_encoder.encode(batch)
        return condition

    def sample(self, policy: Any, seen: Tensor, context: Tensor, noise: Tensor) -> Tensor:
        objective, network = policy.objective, policy.noise_predictor
        if policy.config.is_flow_matching:
            times = torch.linspace(0, 1, policy.config.num_integration_steps + 1, device=noise.device)
            ways = {"euler": objective._euler_integrate, "rk4": objective._rk4_integrate}
            actions: Tensor = ways[policy.config.integration_method](network, noise, times, seen)
            return actions
        scheduler = objective.noise_scheduler
        scheduler.set_timesteps(objective.num_inference_steps)
        for t in scheduler.timesteps:
            at = torch.full(noise.shape[:1], t, dtype=torch.long, device=noise.device)
            noise = scheduler.step(network(noise, at, conditioning_vec=seen), t, noise).prev_sample
        return noise


class _VisionLanguage:
    """Flow matching by an expert that attends to a vision-language model's tokens; the noise of actions that there are not is 0.

    Learners see the normalised state and, of each camera, the mean of its embedded patches. Sampling needs all that the language
    model reads: embedded patches and words, their masks, the padded state.
    """

    timed = False
    steps = "num_inference_steps"
    """The setting that says how many integration steps there are."""

    def settings(self, steps: int) -> dict[str, Any]:
        return {self.steps: steps, "rtc_config": None}

    def refused(self, config: Mapping[str, Any]) -> str | None:
        if config.get("n_obs_steps", 1) != 1:
            return "it would see several observations, of which LeRobot shows it the newest alone"
        if config.get("use_relative_actions"):
            return "its actions are relative to the state, and policies here give actions that stand alone"
        return (
            "its joints are turned into Aloha's after normalisation (adapt_to_pi_aloha)"
            if config.get("adapt_to_pi_aloha")
            else None
        )

    def reads_weights(self, config: Any) -> bool:
        return False

    def noise_shape(self, config: Any) -> tuple[int, int]:
        return config.chunk_size, config.max_action_dim

    def first(self, config: Any) -> int:
        return 0

    def _width(self, policy: Any) -> int:
        return int(policy.model.paligemma_with_expert.paligemma.config.text_config.hidden_size)

    def _images(self, policy: Any, batch: dict[str, Tensor]) -> Any:
        return policy._preprocess_images(batch)

    def _state(self, policy: Any, batch: dict[str, Tensor]) -> Tensor:
        """What of the state the expert reads by itself, (B, P)."""
        state: Tensor = policy.prepare_state(batch)
        return state

    def _state_of_prefix(self, state: Tensor) -> dict[str, Tensor]:
        """The state, where it is one of the language model's tokens."""
        return {}

    def encode(self, policy: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        batch = dict(batch)
        state, (images, masks) = self._state(policy, batch), self._images(policy, batch)
        words = batch[TOKENS], batch[TOKEN_MASK]
        tokens, there, begins = policy.model.embed_prefix(images, masks, *words, **self._state_of_prefix(state))
        # patches camera by camera (first those that there are), words; then the state, if it is a token: it begins a block of attention
        end = int(begins[0].int().argmax()) or tokens.shape[1]
        patches = tokens[:, : end - words[0].shape[1]].unflatten(1, (len(images), -1))
        patches = patches[:, : sum(name in batch for name in policy.config.image_features)]
        seen = torch.cat((batch[STATE], patches.float().mean(2).flatten(1)), 1)
        return seen, torch.cat((tokens.float().flatten(1), there.float(), begins.float(), state.float()), 1)

    def _arguments(self, context: Tensor, state: Tensor) -> tuple[Any, ...]:
        """Of `sample_actions`, which asks for everything that the prefix is made of."""
        return None, None, None, None, state

    def sample(self, policy: Any, seen: Tensor, context: Tensor, noise: Tensor) -> Tensor:
        width, own = self._width(policy), self._state_width(policy)
        length = (context.shape[1] - own) // (width + 2)
        tokens, there, begins, state = context.split((length * width, length, length, own), 1)
        prefix = tokens.unflatten(1, (length, width)), there > 0.5, begins > 0.5
        with _replaced(policy.model, "embed_prefix", lambda *_, **__: prefix):
            actions: Tensor = policy.model.sample_actions(*self._arguments(context, state), noise=noise)
        return actions

    def _state_width(self, policy: Any) -> int:
        return int(policy.config.max_state_dim)


class Pi0(_VisionLanguage):
    """π0: PaliGemma's patches and words; the expert reads the state."""


class Pi05(_VisionLanguage):
    """π0.5: PaliGemma's patches and words, among which the state is written in digits."""

    def _state(self, policy: Any, batch: dict[str, Tensor]) -> Tensor:
        return batch[STATE][:, :0]

    def _state_width(self, policy: Any) -> int:
        return 0

    def _arguments(self, context: Tensor, state: Tensor) -> tuple[Any, ...]:
        return None, None, context, None


class SmolVLA(_VisionLanguage):
    """SmolVLA: SmolVLM's patches and words, and the state as a token after them."""

    steps = "num_steps"

    def reads_weights(self, config: Any) -> bool:
        return bool(config.load_vlm_weights)

    def _width(self, policy: Any) -> int:
        return int(policy.model.vlm_with_expert.config.text_config.hidden_size)

    def _images(self, policy: Any, batch: dict[str, Tensor]) -> Any:
        return policy.prepare_images(batch)

    def _state_of_prefix(self, state: Tensor) -> dict[str, Tensor]:
        return {"state": state}


KINDS: dict[str, Steered] = {
    "diffusion": Diffusion(), "multi_task_dit": MultiTaskDiT(), "smolvla": SmolVLA(), "pi0": Pi0(), "pi05": Pi05(),
}  # fmt: skip


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the module's method `name` is `value`."""
    vars(module)[name] = value
    try:
        yield
    finally:
        del vars(module)[name]
