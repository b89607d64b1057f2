"""ResNet-18 (He et al. 2016) with group normalisation instead of batch normalisation, 16 channels a group: Diffusion Policy's.

An average of weights is no average of batch statistics, which is why the field normalises so. Names are torchvision's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from postbc.errors import InputError, require
from postbc.nn import fetches_weights

GROUP = 16
"""Channels a group."""


@torch.no_grad()
def _convolution(inputs: int, outputs: int, kernel: int, stride: int, generator: torch.Generator) -> nn.Conv2d:
    """Without bias, Kaiming's normal weights over the fan-out, as torchvision's."""
    layer = nn.utils.skip_init(
        nn.Conv2d, inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False, device=torch.get_default_device()
    )
    if not layer.weight.is_meta:
        drawn = torch.randn(layer.weight.shape, generator=generator, device=generator.device)
        layer.weight.copy_(drawn * (2 / (kernel**2 * outputs)) ** 0.5)
    return layer


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a residual, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, generator: torch.Generator) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, 3, stride, generator)
        self.bn1 = nn.GroupNorm(outputs // GROUP, outputs)
        self.conv2 = _convolution(outputs, outputs, 3, 1, generator)
        self.bn2 = nn.GroupNorm(outputs // GROUP, outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            projection = _convolution(inputs, outputs, 1, stride, generator)
            self.downsample = nn.Sequential(projection, nn.GroupNorm(outputs // GROUP, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class ResNet18(nn.Module):
    """(N, C, H, W) normalised images -> maps (N, 512, ⌈H/32⌉, ⌈W/32⌉): all of it but pooling and classifier."""

    WIDTH = 512

    def __init__(self, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, 64, 7, 2, generator)
        self.bn1 = nn.GroupNorm(64 // GROUP, 64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, (inputs, outputs) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
            first = BasicBlock(inputs, outputs, 1 if i == 1 else 2, generator)
            self.add_module(f"layer{i}", nn.Sequential(first, BasicBlock(outputs, outputs, 1, generator)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return x


@torch.no_grad()
def imagenet_weights(trunk: ResNet18) -> None:
    """Put the convolutions of torchvision's ResNet-18, trained on ImageNet (IMAGENET1K_V1), into `trunk`.

    Nothing on "meta" and for a policy that is read from its file.

    Raises:
        InputError: images of other than three channels, torchvision is not installed, or its weights cannot be fetched.
    """
    require(trunk.conv1.in_channels == 3, "The pretrained weights are of images of three channels.", key="encoder.pretrained",
            found=trunk.conv1.in_channels, expected=3)  # fmt: skip
    if not fetches_weights(trunk):
        return
    try:
        from torchvision.models import ResNet18_Weights  # type: ignore[import-not-found, unused-ignore]
    except (ImportError, OSError, RuntimeError) as error:  # not there, or made for another torch
        raise InputError(
            "Pretrained weights need torchvision.", key="encoder.pretrained", found=str(error),
            remedy="install the torchvision that belongs to this torch, or leave pretrained out",
        ) from None  # fmt: skip
    try:
        found: dict[str, Any] = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no space, another hash
        raise InputError(
            "The pretrained weights cannot be fetched.", key="encoder.pretrained", found=str(error)[:200],
            remedy="with a network, or put resnet18-f37072fd.pth into the checkpoints folder of torch.hub.get_dir()",
        ) from None  # fmt: skip
    for name, weight in trunk.named_parameters():
        if weight.dim() == 4:
            weight.copy_(found[name])
