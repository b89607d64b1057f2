"""A LeRobot diffusion policy as one of ours: what it sees becomes its features, its latent noise steers it (DSRL, Best-of-N)."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postbc.data.belonging import Facts
from postbc.data.lerobot import ACTION, ENVIRONMENT_STATE, STATE, camera_name, state_parts
from postbc.data.normalization import EPSILON, Normalization
from postbc.data.readers import read_dataset
from postbc.errors import InputError, require
from postbc.policies.base import About, Observation, Shapes, save_policy
from postbc.schemas import Count, CountOrZero, plain, schema

KIND = "lerobot-diffusion"
_TOKENS = "its actions depend on all tokens of its language model, too many numbers for a finetuner to keep of every decision"
#: Why other policies cannot be finetuned here.
WHY_NOT = {
    "act": "ACT sets its latent to zero when it acts, so it is deterministic, and Best-of-N and DSRL have nothing to choose among",
    "smolvla": _TOKENS, "pi0": _TOKENS, "pi05": _TOKENS,
}  # fmt: skip


@schema
class LeRobotDiffusionConfig:
    """A LeRobot diffusion policy: its own configuration, and how our observations become its."""

    kind: Literal["lerobot-diffusion"] = "lerobot-diffusion"
    """LeRobot's DiffusionPolicy."""
    lerobot: dict[str, Any] = field(default_factory=dict)
    """Its config.json."""
    own: CountOrZero = 0
    """How many numbers of the state, from the first on, are `observation.state`; the rest is `observation.environment_state`."""
    cameras: dict[str, str] = field(default_factory=dict)
    """Our name of a camera -> LeRobot's."""
    mean: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Of a camera's channels (0 to 1)."""
    std: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Likewise."""
    inference_steps: Count = 10
    """DDIM steps: DDPM, LeRobot's default, is not deterministic given its noise, which DSRL needs; the network is the same."""


def _configuration(config: LeRobotDiffusionConfig) -> Any:
    """LeRobot's own configuration object: DDIM, and no weights from anywhere but our file."""
    importlib.import_module("lerobot.policies")
    settings = {**config.lerobot, "noise_scheduler_type": "DDIM", "num_inference_steps": config.inference_steps, "device": "cpu",
                "pretrained_backbone_weights": None, "pretrained_path": None, "compile_model": False}  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(settings), encoding="utf-8")
            made = importlib.import_module("lerobot.configs.policies").PreTrainedConfig.from_pretrained(folder)
    except InputError:
        raise
    except Exception as error:  # draccus has errors of its own
        raise InputError(
            "LeRobot does not understand the policy's configuration.", key="lerobot", found=str(error)[:300]
        ) from None
    require(
        made.type == "diffusion",
        "Only LeRobot's diffusion policies play here.",
        key="type",
        found=made.type,
        expected="diffusion",
    )
    return made


class LeRobotDiffusion(nn.Module):
    """See :class:`postbc.policies.base.Policy`; `chunk` is the part of the horizon that LeRobot plays (`n_action_steps`).

    Its features are the network's condition: the normalised states and the camera encoder's output, of all observations that it sees.
    Latent noise (B, T, A) is of the part that is played; the horizon's other actions, which are thrown away, take that of the nearest.
    """

    Config = LeRobotDiffusionConfig
    normalization: Normalization
    chunk: int
    feature_dim: int

    def __init__(self, config: LeRobotDiffusionConfig, shapes: Shapes, action_dim: int, chunk: int, normalization: Normalization,
                 generator: torch.Generator, observation_steps: int = 1, about: About | None = None) -> None:  # fmt: skip
        super().__init__()
        theirs = _configuration(config)
        model = importlib.import_module("lerobot.policies.diffusion.modeling_diffusion").DiffusionModel
        with torch.random.fork_rng(devices=[]):
            self.model: Any = model(theirs)
        require((theirs.n_obs_steps, theirs.n_action_steps) == (observation_steps, chunk), "The file contradicts itself.",
                key="n_obs_steps, n_action_steps", found=(observation_steps, chunk))  # fmt: skip
        self.config, self.shapes, self.action_dim, self.chunk = config, dict(shapes), action_dim, chunk
        self.normalization, self.observation_steps, self.about = normalization, observation_steps, about or About()
        encoders = self.model.rgb_encoder if config.cameras else None
        one: Any = encoders[0] if isinstance(encoders, nn.ModuleList) else encoders
        seen = normalization.state_dim + len(config.cameras) * (0 if one is None else int(one.feature_dim))
        self.feature_dim, self.horizon = seen * observation_steps, int(theirs.horizon)

    def encode(self, observation: Observation) -> Tensor:
        """Raw named observations -> (B, F)."""
        steps = self.observation_steps

        def timed(name: str) -> Tensor:
            return observation[name] if steps > 1 else observation[name].unsqueeze(1)

        state = self.normalization.normalize_state(timed("state").float())
        batch: dict[str, Tensor] = {STATE: state[..., : self.config.own]}
        if state.shape[-1] > self.config.own:
            batch[ENVIRONMENT_STATE] = state[..., self.config.own :]
        if self.config.cameras:
            images = []
            for name in self.config.cameras:
                mean, std = (state.new_tensor(values[name]).view(-1, 1, 1) for values in (self.config.mean, self.config.std))
                images.append((timed(name).to(state.dtype) / 255 - mean) / std)
            batch["observation.images"] = torch.stack(images, dim=-4)
        features: Tensor = self.model._prepare_global_conditioning(batch)
        return features

    def loss(self, features: Tensor, chunk: Tensor, generator: torch.Generator, weight: Tensor | None = None) -> Tensor:
        """It is trained by LeRobot: InputError."""
        raise InputError("A LeRobot policy is trained by LeRobot.", remedy="postbc lerobot train")

    def sample(self, features: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """(B, F) -> chunks (B, T, A); deterministic given `noise` (B, T, A)."""
        first = self.observation_steps - 1
        if noise is None:
            if generator is None:
                raise ValueError("sampling needs latent noise, or a generator to draw it from")
            shape = (len(features), self.horizon, self.action_dim)
            noise = torch.randn(shape, generator=generator, device=features.device)
        else:
            nearest = (torch.arange(self.horizon, device=features.device) - first).clamp(0, self.chunk - 1)
            noise = noise.reshape(len(features), self.chunk, self.action_dim)[:, nearest]
        actions: Tensor = self.model.conditional_sample(len(features), global_cond=features, noise=noise)
        return actions[:, first : first + self.chunk]


def _ends(stats: Mapping[str, Tensor], mode: str, width: int) -> tuple[list[float], list[float]]:
    """LeRobot's normalisation as ends of ours: every one of its kinds is affine."""
    pairs = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
    if mode == "IDENTITY":
        low, high = torch.full((width,), -1.0, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    elif mode == "MEAN_STD":
        low, high = (stats["mean"].double() + sign * stats["std"].double() for sign in (-1, 1))
    else:
        require(mode in pairs, "LeRobot normalises in a way that is not known here.", key="normalization_mapping", found=mode)
        low, high = (stats[name].double() for name in pairs[mode])
    return low.tolist(), torch.maximum(high - EPSILON, low).tolist()  # ours adds that to every range


@schema
class Import:
    """Make a policy of ours of a LeRobot diffusion checkpoint, for evaluate, finetune dsrl and finetune best-of-n; it plays by DDIM."""

    checkpoint: Path
    """The pretrained_model folder of lerobot-train."""
    output: Path
    """Directory to write policy.safetensors into."""
    dataset: Path | None = None
    """The dataset that it was trained on (a local folder): names of the state's parts, task, control frequency."""
    inference_steps: Count = 10
    """DDIM steps."""

    def run(self) -> Path:
        """Convert, check that it is deterministic given its noise, and write; returns the file."""
        file = self.output / "policy.safetensors"
        require(not file.exists(), "There is a policy already.", file=file, remedy="choose another --output")
        policy = import_policy(self.checkpoint, self.dataset, self.inference_steps)
        features, noise = torch.randn(2, policy.feature_dim), torch.randn(2, policy.chunk, policy.action_dim)
        with torch.no_grad():
            same = torch.equal(policy.sample(features, noise), policy.sample(features, noise))
        require(same, "The policy is not deterministic given its noise: DSRL could not steer it.", file=self.checkpoint)
        save_policy(file, policy)
        return file


def import_policy(checkpoint: Path, dataset: Path | None = None, inference_steps: int = 10) -> LeRobotDiffusion:
    """A LeRobot diffusion checkpoint as one of our policies, frozen.

    Raises:
        InputError: no checkpoint, another kind of policy, or a dataset with other features.
    """
    try:
        from safetensors.torch import load_file

        config = json.loads((checkpoint / "config.json").read_bytes())
        weights = load_file(checkpoint / "model.safetensors")
        steps = json.loads((checkpoint / "policy_preprocessor.json").read_bytes())["steps"]
        step = next(s for s in steps if s.get("registry_name") == "normalizer_processor")
        stats = load_file(checkpoint / step["state_file"])
        kinds, modes = step["config"]["features"], step["config"]["norm_map"]
        reason = WHY_NOT.get(config["type"], "it is not known here")
        require(config["type"] == "diffusion", f"Only LeRobot's diffusion policies can be imported: {reason}.", file=checkpoint,
                key="type", found=config["type"], expected="diffusion")  # fmt: skip
        features, steps_seen, chunk = config["input_features"], int(config["n_obs_steps"]), int(config["n_action_steps"])
        action_dim = int(config["output_features"][ACTION]["shape"][0])
    except InputError:
        raise
    except Exception as error:  # safetensors and JSON have errors of their own
        raise InputError("This is no checkpoint of lerobot-train.", file=checkpoint, found=f"{type(error).__name__}: {error}"[:300],
                         expected="a pretrained_model folder: config.json, model.safetensors, policy_preprocessor.json",
                         ) from None  # fmt: skip

    def ends(name: str, width: int) -> tuple[list[float], list[float]]:
        own = {key.removeprefix(f"{name}."): value for key, value in stats.items() if key.startswith(f"{name}.")}
        return _ends(own, modes.get(kinds[name]["type"], "IDENTITY"), width)

    widths = {name: int(features[name]["shape"][0]) for name in (STATE, ENVIRONMENT_STATE) if name in features}
    both = [ends(name, width) for name, width in widths.items()]
    low, high = ([x for pair in both for x in pair[i]] for i in range(2))
    normalization = Normalization(low, high, *ends(ACTION, action_dim))
    cameras = {camera_name(name): name for name, feature in features.items() if feature["type"] == "VISUAL"}
    shapes: dict[str, tuple[int, ...]] = {"state": (sum(widths.values()),)}
    shapes |= {name: tuple(features[theirs]["shape"]) for name, theirs in cameras.items()}
    visual = {name: ("mean", "std") if modes.get("VISUAL") == "MEAN_STD" else None for name in cameras}
    known = {name: [stats[f"{cameras[name]}.{k}"].flatten().tolist() for k in keys] if keys else [[0.0] * 3, [1.0] * 3]
             for name, keys in visual.items()}  # fmt: skip
    made = LeRobotDiffusionConfig(
        lerobot=config, own=widths.get(STATE, 0), cameras=cameras, mean={n: tuple(v[0]) for n, v in known.items()},
        std={n: tuple(v[1]) for n, v in known.items()}, inference_steps=inference_steps,
    )  # fmt: skip
    about = About(method=None)
    if dataset is not None:
        data = read_dataset(dataset, image_keys=list(cameras))
        require((data.shapes.get("state"), data.action_dim) == (shapes["state"], action_dim),
                "The dataset is not the one that the policy was trained on.", file=dataset, key="observation.state, action",
                found=(data.shapes.get("state"), data.action_dim), expected=(shapes["state"], action_dim))  # fmt: skip
        later = [part.feature != STATE for part in state_parts(data.state_keys, data.state_dims)]
        require(later == sorted(later), "The dataset's state begins with the environment's part, the policy's with the robot's own.",
                file=dataset, key="state", found=list(data.state_keys), remedy="record the robot's own parts first",
                )  # fmt: skip
        facts = Facts.of_dataset(data)
        about = About(task=facts.environment, data=dataset.name, demonstrations=len(data), facts=plain(facts))
    policy = LeRobotDiffusion(made, shapes, action_dim, chunk, normalization, torch.Generator(), steps_seen, about)
    policy.model.load_state_dict({name.removeprefix("diffusion."): value for name, value in weights.items()})
    return policy.eval().requires_grad_(False)
