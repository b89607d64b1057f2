"""What the posterior sees of a camera: a frozen encoder, of torchvision or of a LeRobot checkpoint (plain BC)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postbc.errors import InputError, require
from postbc.lerobot.fit import Encode

RANDOM = "random"


def make_encoder(name: str) -> Encode:
    """The encoder of that name: a checkpoint's folder, one of torchvision's ResNet-18 weights, or "random".

    Raises:
        InputError: a checkpoint without an encoder of one camera, weights that cannot be had.
    """
    return checkpoint_encoder(name) if Path(name).is_dir() else resnet18(name)


def resnet18(weights: str) -> Encode:
    """Pooled features (512) of torchvision's ResNet-18."""
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError:
        raise InputError("A posterior of cameras needs torchvision, or a checkpoint.", key="postbc.encoder", found=weights,
                         remedy="pip install 'postbc[lerobot]'") from None  # fmt: skip
    try:
        net = models.resnet18(weights=None if weights == RANDOM else models.get_weight(weights))
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError("The encoder's weights cannot be had.", key="postbc.encoder", found=f"{weights}: {error}"[:300],
                         expected=f"the folder of a checkpoint (plain BC), weights of torchvision's ResNet-18, or {RANDOM!r}",
                         remedy=f"train BC first and give its pretrained_model folder, or --postbc.encoder={RANDOM}",
                         ) from None  # fmt: skip
    net = net.eval().requires_grad_(False)
    net.fc = torch.nn.Identity()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return lambda camera, images: net((images - mean) / std)


def checkpoint_encoder(path: str) -> Encode:
    """The image encoder of a LeRobot diffusion or ACT checkpoint, with the normalisation that it was trained with."""
    factory = importlib.import_module("lerobot.policies.factory")
    try:
        config = importlib.import_module("lerobot.configs.policies").PreTrainedConfig.from_pretrained(path)
        config.device = "cpu"
        policy = factory.get_policy_class(config.type).from_pretrained(path, config=config).eval().requires_grad_(False)
        pre, _ = factory.make_pre_post_processors(config, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("The encoder's checkpoint cannot be read.", file=path, found=f"{type(error).__name__}: {error}"[:300],
                         expected="a pretrained_model folder of lerobot-train") from None  # fmt: skip
    cameras = list(config.image_features)
    parts: dict[str, Callable[[Tensor], Tensor]] = {}
    if config.type == "diffusion" and cameras:
        encoders = policy.diffusion.rgb_encoder
        many = isinstance(encoders, torch.nn.ModuleList)
        parts = {camera: encoders[i] if many else encoders for i, camera in enumerate(cameras)}
    elif config.type == "act" and cameras:
        parts = dict.fromkeys(cameras, lambda images: policy.model.backbone(images)["feature_map"].mean((-2, -1)))
    require(parts, "The checkpoint has no encoder that is known here.", file=path, found=config.type,
            expected="diffusion or act, with cameras", remedy=f"--postbc.encoder={RANDOM}, or weights of torchvision")  # fmt: skip
    stats: Any = next((step._tensor_stats for step in pre.steps if hasattr(step, "_tensor_stats")), {})

    def encode(camera: str, images: Tensor) -> Tensor:
        require(
            camera in parts, "The encoder's policy does not see this camera.", file=path, key=camera, expected=", ".join(parts)
        )
        known = stats.get(camera, {})
        if "mean" in known:
            images = (images - known["mean"]) / known["std"]
        return parts[camera](images)

    return encode
