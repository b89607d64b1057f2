"""The ResNet-18 against a written-out copy and its count by hand; pretrained weights; crops, and that only training draws them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from made import write_demonstrations
from postbc.agents.base import load_agent
from postbc.cli import main
from postbc.data.normalization import Normalization, fit_normalization
from postbc.data.windows import Windows
from postbc.errors import InputError
from postbc.policies import DiffusionConfig, DiffusionPolicy, load_policy, save_policy
from postbc.policies.networks.encoders import ENCODERS, Encoder, EncoderConfig, SmallEncoder, SpatialSoftmax, crop
from postbc.policies.networks.resnet import ResNet18
from postbc.posterior import window_features
from postbc.pretraining import Pretraining, PretrainingConfig
from postbc.runs import Run
from postbc.schemas import parse
from postbc.seeding import make_generator
from test_pretraining import pixel_demonstrations


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator(seed))


def policy(shapes: Any, observation_steps: int = 1, **encoder: Any) -> DiffusionPolicy:
    config = DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2, encoder=EncoderConfig(**encoder))
    states = shapes.get("state", (0,))[0]
    normalization = Normalization(-np.ones(states), np.ones(states), -np.ones(2), np.ones(2))
    return DiffusionPolicy(config, shapes, 2, 2, normalization, generator(), observation_steps)


# -- keypoints -----------------------------------------------------------------------------------------------------------------
def test_keypoints_are_float32_where_products_are_not() -> None:
    """Coordinates of a map of 84 pixels are 0.024 apart: in bfloat16 neighbours near the edge would be one."""
    maps = torch.full((84, 1, 84, 84), -30.0)
    maps[torch.arange(84), 0, 40, torch.arange(84)] = 30.0  # each points at a column
    with torch.autocast("cpu", torch.bfloat16):
        found = SpatialSoftmax(84, 84)(maps)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 0], torch.linspace(-1, 1, 84), atol=1e-5, rtol=0)


# -- ResNet-18 -----------------------------------------------------------------------------------------------------------------
def test_resnet18_has_as_many_parameters_as_by_hand() -> None:
    def block(inputs: int, outputs: int) -> int:  # two convolutions without bias, two gains and biases, and the projection
        return (
            9 * inputs * outputs + 9 * outputs**2 + 4 * outputs + (inputs * outputs + 2 * outputs if inputs != outputs else 0)
        )

    stem = 49 * 3 * 64 + 2 * 64
    stages = sum(block(i, o) + block(o, o) for i, o in ((64, 64), (64, 128), (128, 256), (256, 512)))
    trunk = ResNet18(3, generator())
    assert (
        sum(p.numel() for p in trunk.parameters()) == stem + stages == 11_176_512
    )  # torchvision's 11,689,512 less 1000 classes
    norms = [layer for layer in trunk.modules() if isinstance(layer, nn.GroupNorm)]
    assert len(norms) == 20
    assert {layer.num_channels // layer.num_groups for layer in norms} == {16}


def written_out(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """ResNet-18's maps from (N, 3, H, W), layer by layer."""

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.group_norm(x, x.shape[1] // 16, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = functional.relu(norm(functional.conv2d(x, weights["conv1.weight"], stride=2, padding=3), "bn1"))
    x = functional.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        for number in range(2):
            name, stride = f"layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1
            y = functional.relu(
                norm(functional.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1")
            )
            y = norm(functional.conv2d(y, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                x = norm(functional.conv2d(x, weights[f"{name}.downsample.0.weight"], stride=2), f"{name}.downsample.1")
            x = functional.relu(x + y)
    return x


def test_resnet18_is_what_it_is_written_out_and_begins_as_published() -> None:
    trunk, x = ResNet18(3, generator()), torch.randn(2, 3, 50, 70, generator=generator(1))
    maps = trunk(x)
    assert maps.shape == (2, 512, 2, 3)
    torch.testing.assert_close(maps, written_out(x, dict(trunk.state_dict())), atol=1e-4, rtol=1e-4)
    for name, weight in trunk.named_parameters():  # He et al. 2015: deviation √(2/fan-out)
        if weight.dim() == 4:
            expected = (2 / (weight.shape[0] * weight.shape[2] * weight.shape[3])) ** 0.5
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name


def test_resnet18_is_torchvisions() -> None:
    models = pytest.importorskip("torchvision.models")
    theirs = models.resnet18(norm_layer=lambda channels: nn.GroupNorm(channels // 16, channels))
    trunk = ResNet18(3, generator())
    assert not theirs.load_state_dict(trunk.state_dict(), strict=False).unexpected_keys
    maps = nn.Sequential(*list(theirs.children())[:-2])(x := torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(trunk(x), maps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("pooling", "width"), [("average", 512), ("spatial-softmax", 12)])
def test_a_resnets_features(pooling: str, width: int) -> None:
    encoder: Any = ENCODERS["resnet18"](EncoderConfig(6, kind="resnet18", pooling=pooling), (3, 64, 40), generator())
    seen = images(2, 3, 64, 40)
    features = encoder(seen)
    assert features.shape == (2, encoder.feature_dim) == (2, width)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    maps = encoder.trunk((seen / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    if pooling == "average":
        torch.testing.assert_close(features, maps.mean((2, 3)), atol=1e-4, rtol=1e-4)
    else:
        share = encoder.pool[0](maps).flatten(2).softmax(-1).view(2, 6, 2, 2)
        x, y = share[..., 1].sum(-1) - share[..., 0].sum(-1), share[..., 1, :].sum(-1) - share[..., 0, :].sum(-1)
        torch.testing.assert_close(features, torch.stack((x, y), -1).flatten(1), atol=1e-4, rtol=1e-4)
    grey: Any = ENCODERS["resnet18"](EncoderConfig(kind="resnet18"), (1, 40, 40), generator())
    assert (grey.mean, grey.std) == (127.5, 127.5)


def test_a_policy_with_resnets_comes_back_from_its_file(tmp_path: Path) -> None:
    shapes = {"image.top": (3, 20, 20), "image.wrist": (3, 24, 20), "state": (3,)}
    made = policy(shapes, 2, kind="resnet18", crop=18).eval().requires_grad_(False)
    assert made.encoder.widths == [512, 512, 512, 512, 3, 3]
    assert made.feature_dim == 4 * 512 + 2 * 3
    save_policy(tmp_path / "policy.safetensors", made)
    loaded = load_policy(tmp_path)
    seen = {name: images(3, 2, *shape) if len(shape) == 3 else torch.zeros(3, 2, *shape) for name, shape in shapes.items()}
    assert torch.equal(loaded.encode(seen), made.encode(seen))
    assert loaded.config == made.config


# -- pretrained weights --------------------------------------------------------------------------------------------------------
def torchvision(monkeypatch: pytest.MonkeyPatch, weights: Any) -> list[int]:
    """A torchvision whose ImageNet weights are these (an exception: they cannot be fetched); the calls that asked for them."""
    calls: list[int] = []

    class Entry:
        def get_state_dict(self, **_: Any) -> Any:
            calls.append(1)
            if isinstance(weights, Exception):
                raise weights
            return weights

    models = types.ModuleType("torchvision.models")
    models.ResNet18_Weights = types.SimpleNamespace(IMAGENET1K_V1=Entry())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return calls


def test_pretrained_convolutions_are_taken_once_and_files_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {k: torch.full_like(v, 0.01) for k, v in ResNet18(3, generator()).state_dict().items()}
    calls = torchvision(monkeypatch, theirs)
    shapes = {"image.top": (3, 20, 20)}
    with torch.device("meta"):
        policy(shapes, kind="resnet18", pretrained=True)
    assert not calls
    made = policy(shapes, kind="resnet18", pretrained=True).eval().requires_grad_(False)
    assert calls == [1]
    for name, weight in made.encoder.images["image/top"].trunk.named_parameters():
        begins = 0.01 if weight.dim() == 4 else float(name.endswith("weight"))  # norms begin as they do, at 1 and 0
        assert torch.equal(weight, torch.full_like(weight, begins)), name
    save_policy(tmp_path / "policy.safetensors", made)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)  # as where it is not installed
    seen = {"image.top": images(2, 3, 20, 20)}
    assert torch.equal(load_policy(tmp_path).encode(seen), made.encode(seen))


def test_what_pretrained_weights_need_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"image.top": (3, 20, 20)}
    torchvision(monkeypatch, OSError("no route to host"))
    with pytest.raises(InputError, match=r"cannot be fetched[\s\S]*no route to host[\s\S]*torch.hub"):
        policy(shapes, kind="resnet18", pretrained=True)
    with pytest.raises(InputError, match="three channels"):
        policy({"image.top": (1, 20, 20)}, kind="resnet18", pretrained=True)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(InputError, match="need torchvision"):
        policy(shapes, kind="resnet18", pretrained=True)
    broken = types.ModuleType("torchvision.models")  # made for another torch
    broken.__getattr__ = lambda name: exec('raise RuntimeError("operator nms does not exist")')  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "torchvision.models", broken)
    with pytest.raises(InputError, match=r"need torchvision[\s\S]*nms does not exist"):
        policy(shapes, kind="resnet18", pretrained=True)
    with pytest.raises(InputError, match=r"encoder.pretrained[\s\S]*resnet18"):
        EncoderConfig(pretrained=True)


# -- crops ---------------------------------------------------------------------------------------------------------------------
def test_a_crop_is_a_part_of_its_own_image_and_every_place_is_met() -> None:
    count, side, height, width = 600, 5, 7, 6
    numbered = torch.arange(count * 2 * height * width).view(count, 2, height, width)
    found = crop(numbered, side, generator())
    inside = numbered.unfold(2, side, 1).unfold(3, side, 1)  # (N, C, 3, 2, side, side): all there are
    same = (inside == found[:, :, None, None]).all(-1).all(-1).all(1)  # both channels at one place
    assert torch.equal(same.sum((1, 2)), torch.ones(count, dtype=torch.long))
    often = same.sum(0)
    assert often.min() > count / 6 * 0.7  # uniform over the 3×2 places, the last ones too
    assert torch.equal(crop(numbered, side, generator()), found)
    assert not torch.equal(crop(numbered, side, generator(1)), found)
    centre = crop(numbered, side)
    assert torch.equal(centre, numbered[:, :, 1:6, 0:5])  # torchvision's: round(1/2) = 0
    assert torch.equal(crop(images(2, 3, 84, 84), 76), images(2, 3, 84, 84)[:, :, 4:80, 4:80])
    assert torch.equal(crop(numbered, 6), numbered[:, :, 0:6])


@pytest.mark.parametrize("steps", [1, 2])
def test_only_training_draws_crops(steps: int) -> None:
    shapes = {"image.top": (3, 24, 20), "state": (3,)}
    made = policy(shapes, steps, crop=16, keypoints=4, channels=(4,))
    assert made.augments
    time = (steps,) if steps > 1 else ()
    seen = {"image.top": images(6, *time, 3, 24, 20), "state": torch.randn(6, *time, 3, generator=generator())}
    features = made.encode(seen)
    assert torch.equal(features, made.encode(seen))
    whole: Any = made.encoder.images["image/top"]
    assert isinstance(whole, SmallEncoder)
    centre = whole(seen["image.top"].reshape(-1, 3, 24, 20)[..., 4:20, 2:18]).view(6, -1)
    torch.testing.assert_close(features[:, : 8 * steps], centre)
    drawn = made.encode(seen, generator())
    assert torch.equal(drawn, made.encode(seen, generator()))
    assert not torch.equal(drawn[:, :8], features[:, :8])
    assert torch.equal(drawn[:, 8 * steps :], features[:, 8 * steps :])


def test_a_policy_without_images_or_crop_augments_nothing() -> None:
    assert not policy({"state": (3,)}, crop=4).augments
    assert not policy({"image.top": (3, 8, 8)}).augments


def test_encoders_that_do_not_fit_are_refused() -> None:
    for encoder, words in (
        ({"crop": 21}, r"smaller than the crop[\s\S]*encoder.crop"), ({"crop": 0}, "crop"), ({"kind": "resnet34"}, "kind"),
        ({"kind": "resnet18", "pooling": "spatial-softmax"}, "too small for keypoints"),
        ({"kind": "resnet18", "pooling": "max"}, "pooling"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            policy({"image.top": (3, 24, 20)}, **encoder)
    with torch.device("meta"):  # costs nothing
        assert Encoder(EncoderConfig(kind="resnet18"), {"image.a": (3, 9, 9)}, 1000, generator()).feature_dim == 512_000


def training(**encoder: Any) -> Pretraining:
    data = pixel_demonstrations(4, 0.1)
    normalization = fit_normalization(data, data)
    config = DiffusionConfig(hidden=16, denoising_steps=10, inference_steps=2, encoder=EncoderConfig(4, (4, 4), **encoder))
    made = DiffusionPolicy(config, data.shapes, 2, 2, normalization, make_generator(0, "policy/initialisation"))
    settings = PretrainingConfig(method="bc", steps=8, batch_size=8, learning_rate=3e-3, ema_every=2)
    return Pretraining(made, Windows(data, 2, tail="pad"), settings, 0)


def weights(trained: Pretraining) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trained.policy.parameters()])


def test_a_resumed_training_with_crops_ends_bit_for_bit(tmp_path: Path) -> None:
    whole, cut, resumed, centred = (training(crop=28) for _ in range(4))
    for _ in range(8):
        whole.step()
    for _ in range(5):
        cut.step()
    with Run(tmp_path / "run", {}) as run:
        run.save(5, cut.state())
        found = run.load()
    assert found is not None
    resumed.load_state(found[1])
    for _ in range(3):
        resumed.step()
    assert torch.equal(weights(whole), weights(resumed))
    centred.augments = False
    for _ in range(8):
        centred.step()
    assert not torch.equal(weights(whole), weights(centred))  # they are drawn
    features = window_features(whole.windows, whole.policy.encode)
    assert torch.equal(features, window_features(whole.windows, whole.policy.encode))  # the posterior sees the centre


def test_a_checkpoint_of_before_resumes() -> None:
    """Without the streams that crops and dropout draw from, which that policy does not."""
    whole, cut, resumed = (training() for _ in range(3))
    for _ in range(8):
        whole.step()
    for _ in range(5):
        cut.step()
    state = cut.state()
    state["streams"] = {name: state["streams"][name] for name in ("data", "loss", "target")}
    resumed.load_state(state)
    for _ in range(3):
        resumed.step()
    assert torch.equal(weights(whole), weights(resumed))


# -- stages --------------------------------------------------------------------------------------------------------------------
def test_the_stages_with_a_transformer_a_resnet_and_crops(tmp_path: Path) -> None:
    """By options of the command line and by a recipe's YAML; pretrained by BC and by PostBC on the BC policy's features."""
    file = write_demonstrations(tmp_path / "d.hdf5", images={"top_image": (16, 16, 3)})
    line = (
        f"--data.demonstrations {file} --data.image-keys top_image --data.num-trajectories 2 --policy.network transformer "
        "--policy.transformer.hidden 8 --policy.transformer.heads 2 --policy.transformer.layers 1 --policy.encoder.crop 14 "
        "--policy.encoder.kind resnet18 --policy.denoising-steps 4 --policy.inference-steps 2 --pretraining.steps 2 "
        "--pretraining.batch-size 4 --pretraining.method"
    ).split()
    main(["pretrain", *line, "bc", "--output", str(tmp_path / "bc")])
    bc = load_policy(tmp_path / "bc/seed_0")
    assert (bc.config.network, bc.config.encoder.kind, bc.config.encoder.crop) == ("transformer", "resnet18", 14)
    written = yaml.safe_load((tmp_path / "bc/seed_0/config.yaml").read_text())["policy"]
    assert parse(DiffusionConfig, written) == bc.config
    fit = ["--data.demonstrations", str(file), "--data.image-keys", "top_image", "--data.num-trajectories", "2", "--encoder"]
    small = ["--ensemble.ensemble-size", "2", "--ensemble.hidden", "4", "--ensemble.steps", "3"]
    main(["posterior", "fit", *fit, str(tmp_path / "bc"), *small, "--output", str(tmp_path / "posterior")])
    main(["pretrain", *line, "postbc", "--output", str(tmp_path / "postbc"), "--posterior", str(tmp_path / "posterior")])
    agent, about = load_agent(tmp_path / "postbc/seed_0")
    assert about.method == "postbc"
    seen = {"image.top": images(1, 3, 16, 16), "state": torch.zeros(1, *bc.shapes["state"])}
    assert agent.act(seen, generator()).shape == (1, 4, 7)
