"""What the posterior sees of a camera: a frozen encoder, of torchvision or of a LeRobot checkpoint (plain BC)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from postbc.errors import InputError, require

RANDOM = "random"


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder of single frames. Call it with a camera's name and frames (n, 3, H, W) of 0 to 1: features (n, F)."""

    encode: Callable[[str, Tensor], Tensor]
    device: torch.device
    """Where it computes, and its features are."""
    cameras: tuple[str, ...] | None = None
    """The only ones that it knows; None: it takes any."""

    def __call__(self, camera: str, images: Tensor) -> Tensor:
        return self.encode(camera, images.to(self.device))

    def among(self, cameras: Sequence[str]) -> tuple[str, ...]:
        """Those that it knows. InputError: none of them."""
        known = tuple(c for c in cameras if self.cameras is None or c in self.cameras)
        require(known, "The encoder's policy does not see any of the cameras.", key="postbc.encoder",
                found=", ".join(self.cameras or ()), expected=f"some of {', '.join(cameras)}",
                remedy="give a checkpoint of this dataset's cameras")  # fmt: skip
        return known


def make_encoder(name: str, device: str | torch.device = "cpu") -> Encoder:
    """The encoder of that name on `device`: a checkpoint's folder, one of torchvision's ResNet-18 weights, or "random".

    Raises:
        InputError: a checkpoint without an encoder of one camera, weights that cannot be had.
    """
    made = checkpoint_encoder if Path(name).is_dir() else resnet18
    return made(name, torch.device(device))


def resnet18(weights: str, device: torch.device) -> Encoder:
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
    net.fc = torch.nn.Identity()
    net = net.eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return Encoder(lambda camera, images: net((images - mean) / std), device)


def checkpoint_encoder(path: str, device: torch.device) -> Encoder:
    """The image encoder of a LeRobot diffusion or ACT checkpoint; frames go through the checkpoint's own preprocessor."""
    factory = importlib.import_module("lerobot.policies.factory")
    try:
        config = importlib.import_module("lerobot.configs.policies").PreTrainedConfig.from_pretrained(path)
        config.device = str(device)
        policy = factory.get_policy_class(config.type).from_pretrained(path, config=config).eval().requires_grad_(False)
        pre, _ = factory.make_pre_post_processors(
            config, path, preprocessor_overrides={"device_processor": {"device": device.type}}
        )
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

    def encode(camera: str, images: Tensor) -> Tensor:
        require(
            camera in parts, "The encoder's policy does not see this camera.", file=path, key=camera, expected=", ".join(parts)
        )
        return parts[camera](pre({camera: images})[camera])

    return Encoder(encode, device, tuple(cameras))
