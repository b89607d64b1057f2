"""From named observations to features: the normalised vector of a state, a convolutional net for each camera's images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from postbc.data.episodes import is_image
from postbc.data.normalization import Normalization
from postbc.errors import require
from postbc.nn import convolution
from postbc.policies.networks.resnet import ResNet18, imagenet_weights
from postbc.schemas import Width, later, schema


@schema
class EncoderConfig:
    """How images become features (states need nothing: their features are the normalised vector)."""

    keypoints: Annotated[int, Field(ge=1, le=4096)] = 32
    """K points that a camera's image is reduced to; its features are their 2·K coordinates. Of small, and of spatial-softmax."""
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (16, 32, 32)
    """Of the 3×3 convolutions of small."""
    kind: Literal["small", "resnet18"] = later("small")
    """small: a few convolutions; resnet18: a ResNet-18 with group normalisation, for each camera its own."""
    pooling: Literal["average", "spatial-softmax"] = later("average")
    """Of resnet18's maps: their averages (512 features), or keypoints of them (2·K)."""
    pretrained: bool = later(False)
    """Begin resnet18 with torchvision's convolutions, trained on ImageNet."""
    crop: Annotated[int, Field(ge=1, le=2**16)] | None = later(None)
    """Side in pixels of the square that an image is cropped to: at random in training, its centre otherwise (76 of 84 is the
    field's)."""
    language: Width | None = later(None)
    """V, width of the vectors that stand for the tasks, which a policy keeps; None: "language" is taken as it is. Pretraining sets it
    (--data.language)."""

    def __post_init__(self) -> None:
        require(not self.pretrained or self.kind == "resnet18", "Only a ResNet has pretrained weights.", key="encoder.pretrained",
                found=f"kind {self.kind}", expected="encoder.kind resnet18")  # fmt: skip


class SpatialSoftmax(nn.Module):
    """(N, K, H, W) maps -> (N, 2·K) in [−1, 1]: where each is large (robomimic's spatial softmax); in float32 under autocast, too."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.places: Tensor
        self.register_buffer("places", torch.stack((x.flatten(), y.flatten()), -1), persistent=False)  # (H·W, 2)

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):  # places of bfloat16 would lie pixels apart
            return (maps.flatten(2).float().softmax(-1) @ self.places).flatten(1)


class SmallEncoder(nn.Module):
    """(N, C, H, W) uint8 -> (N, 2·K) in [−1, 1]: convolutions, then where each of K maps is large.

    A convolution halves what is larger than 16 pixels, so that the maps of small images stay fine enough to point.
    """

    def __init__(self, config: EncoderConfig, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for outputs in config.channels:
            stride = 2 if max(height, width) > 16 else 1
            layers += [
                convolution(nn.Conv2d, channels, outputs, 3, generator, stride=stride, padding=1), nn.GroupNorm(1, outputs), nn.ReLU()
            ]  # fmt: skip
            channels, height, width = outputs, -(-height // stride), -(-width // stride)
        self.convolutions = nn.Sequential(*layers, convolution(nn.Conv2d, channels, config.keypoints, 1, generator))
        self.pool, self.feature_dim = SpatialSoftmax(height, width), 2 * config.keypoints

    def forward(self, image: Tensor) -> Tensor:
        pooled: Tensor = self.pool(self.convolutions(image.to(torch.float32) / 127.5 - 1))
        return pooled


class ResNetEncoder(nn.Module):
    """(N, C, H, W) uint8 -> (N, 512) averages of a ResNet-18's maps, or (N, 2·K) coordinates of keypoints in K maps of them.

    Images of three channels are normalised by ImageNet's mean and deviation, others to [−1, 1].

    Raises:
        InputError: keypoints of an image so small that its map is a single pixel; pretrained weights of other than three channels,
            without torchvision, or that cannot be fetched.
    """

    def __init__(self, config: EncoderConfig, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        channels, height, width = shape
        self.trunk = ResNet18(channels, generator)
        if config.pretrained:
            imagenet_weights(self.trunk)
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None], persistent=False)
        height, width = -(-height // 32), -(-width // 32)
        self.pool: nn.Module
        if config.pooling == "average":
            self.pool, self.feature_dim = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), ResNet18.WIDTH
        else:
            require(height * width > 1, "This image is too small for keypoints in maps 32 times smaller.",
                    key="encoder.pooling", found=f"{shape[1]}×{shape[2]} pixels", expected="> 32", remedy="use average")  # fmt: skip
            maps = convolution(nn.Conv2d, ResNet18.WIDTH, config.keypoints, 1, generator)
            self.pool, self.feature_dim = nn.Sequential(maps, SpatialSoftmax(height, width)), 2 * config.keypoints

    def forward(self, image: Tensor) -> Tensor:
        pooled: Tensor = self.pool(self.trunk((image.to(torch.float32) - self.mean) / self.std))
        return pooled


#: kind -> encoder of one camera's images: a module (N, C, H, W) uint8 -> (N, `feature_dim`), made of (config, shape, generator).
ENCODERS: dict[str, Callable[[EncoderConfig, tuple[int, ...], torch.Generator], nn.Module]] = {
    "small": SmallEncoder,
    "resnet18": ResNetEncoder,
}


def crop(image: Tensor, side: int, generator: torch.Generator | None = None) -> Tensor:
    """(N, C, H, W) -> (N, C, side, side): each image's own random part, or without a generator its centre.

    robomimic's `CropRandomizer`, but for its never drawing the last row and column.
    """
    count, channels, height, width = image.shape
    if generator is None:
        top, left = round((height - side) / 2), round((width - side) / 2)
        return image[..., top : top + side, left : left + side]
    device = image.device
    first = (torch.randint(extent - side + 1, (count, 1), generator=generator, device=device) for extent in (height, width))
    rows, columns = (start + torch.arange(side, device=device) for start in first)  # (N, side)
    picture, channel = torch.arange(count, device=device), torch.arange(channels, device=device)
    return image[picture[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


class Encoder(nn.Module):
    """Named observations -> features (B, F), F = `feature_dim`: those of each name, in the order of `shapes`, side by side.

    `widths` are those of the parts that stand side by side: of each name, its time steps.

    Args:
        config: of the image encoders.
        shapes: name -> shape: "state" (S,), "image.<camera>" (C, H, W); another name's vector (E,) is taken as it is.
        observation_steps: observations stand (B, To, ...) where it is above 1; their features are put side by side, the newest last.
        generator: source of the initialisation; states draw nothing.
        state_features: width of a normalised state, if it is not S (`Normalization.state_features`).

    Raises:
        InputError: a shape that cannot be encoded, or an image smaller than the crop.
    """

    def __init__(
        self,
        config: EncoderConfig,
        shapes: Mapping[str, tuple[int, ...]],
        observation_steps: int,
        generator: torch.Generator,
        state_features: int | None = None,
    ) -> None:
        super().__init__()
        self.shapes, self.observation_steps = {name: tuple(shape) for name, shape in shapes.items()}, observation_steps
        self.crop = config.crop
        for name, shape in self.shapes.items():
            image = is_image(name)
            require(len(shape) == (3 if image else 1), "An observation has a shape that cannot be encoded.", key=name, found=shape,
                    expected="(channels, height, width)" if image else "(width,)")  # fmt: skip
            require(not image or self.crop is None or self.crop <= min(shape[1:]), "An image is smaller than the crop.",
                    key="encoder.crop", found=f"{self.crop} of {name} {shape}", expected="at most its height and width")  # fmt: skip
        # module names cannot hold dots
        self.images = nn.ModuleDict(
            {
                name.replace(".", "/"): ENCODERS[config.kind](config, self._cropped(shape), generator)
                for name, shape in self.shapes.items()
                if len(shape) == 3
            }
        )
        self.vectors: Tensor | None  # (E, V)
        told = config.language is not None and "language" in self.shapes
        self.register_buffer("vectors", torch.zeros(*self.shapes["language"], config.language or 0) if told else None)
        own = {name: self._image(name).feature_dim if len(shape) == 3 else shape[0] for name, shape in self.shapes.items()}
        if "state" in own and state_features is not None:
            own["state"] = state_features
        widths = ((config.language or 0) if told and name == "language" else width for name, width in own.items())
        self.widths: list[int] = [width for width in widths for _ in range(observation_steps)]
        self.feature_dim = sum(self.widths)

    @property
    def crops(self) -> bool:
        """Whether training draws random numbers to encode."""
        return self.crop is not None and len(self.images) > 0

    def _image(self, name: str) -> Any:
        return self.images[name.replace(".", "/")]

    def _cropped(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.crop is None else (shape[0], self.crop, self.crop)

    def forward(
        self, observation: Mapping[str, Tensor], normalization: Normalization, generator: torch.Generator | None = None
    ) -> Tensor:
        """Raw named observations of B states -> (B, F); with a generator, which training gives, of random crops."""
        parts = []
        for name, shape in self.shapes.items():
            require(name in observation, "The observation lacks what the policy reads.", key=name, found=", ".join(observation),
                    expected=", ".join(self.shapes))  # fmt: skip
            value = observation[name]
            leading = (len(value), self.observation_steps) if self.observation_steps > 1 else (len(value),)
            require(tuple(value.shape) == (*leading, *shape), "An observation has another shape than the policy was made for.",
                    key=name, found=tuple(value.shape), expected=(*leading, *shape))  # fmt: skip
            if len(shape) == 3:
                value = value.reshape(-1, *shape)
                value = self._image(name)(value if self.crop is None else crop(value, self.crop, generator))
            elif name == "state":
                value = normalization.normalize_state(value.to(torch.float32))
            elif name == "language" and self.vectors is not None:
                value = self.vectors[value.argmax(-1)]
            parts.append(value.reshape(leading[0], -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
