"""The diffusion transformer and the U-Net against torch's own layers, written-out copies and counts by hand; and as policies."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from mutations import mutated_policy
from postbc.agents.base import Batch, load_agent
from postbc.agents.dppo import DPPO, DPPOAgent, DPPOConfig
from postbc.data.normalization import Normalization, fit_normalization
from postbc.data.windows import Windows
from postbc.devices import Compute
from postbc.errors import InputError
from postbc.files import load_tree
from postbc.policies import DiffusionConfig, DiffusionPolicy, FlowConfig, load_policy, policy_fingerprint, save_policy
from postbc.policies.base import About, policy_class
from postbc.policies.networks.encoders import EncoderConfig
from postbc.policies.networks.transformer import Attention, DecoderLayer, DiffusionTransformer, EncoderLayer, TransformerConfig
from postbc.policies.networks.unet import DiffusionUNet, FilmBlock, UNetConfig
from postbc.pretraining import Pretraining, PretrainingConfig
from postbc.schemas import parse, plain
from postbc.seeding import make_generator
from test_pretraining import pixel_demonstrations

T, A = 4, 3
WIDTHS = (5, 5, 2)
SMALL = TransformerConfig(hidden=16, heads=4, layers=2, feed_forward=24, time_dim=8)
THIN = UNetConfig(channels=(8, 16, 32), kernel=3, groups=4, time_dim=8)
OPTIONS: dict[str, dict[str, Any]] = {
    "transformer": {"network": "transformer", "transformer": SMALL},
    "unet": {"network": "unet", "unet": THIN},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def awake(module: nn.Module, seed: int = 1) -> Any:
    """With every weight drawn at random, those that begin at zero too."""
    g = generator(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return module


def transformer(config: TransformerConfig = SMALL) -> DiffusionTransformer:
    return DiffusionTransformer(config, WIDTHS, T, A, generator())


def unet(config: UNetConfig = THIN, chunk: int = T) -> DiffusionUNet:
    return DiffusionUNet(config, sum(WIDTHS), chunk, A, generator())


def policy(name: str, kind: str = "diffusion", shapes: Any = None, chunk: int = T, **more: Any) -> Any:
    made, few = policy_class(kind), {"diffusion": {"denoising_steps": 10}, "flow": {}}[kind]
    return made(
        made.Config(inference_steps=4, **few, **OPTIONS[name], **more), shapes or {"state": (5,)}, A, chunk,
        Normalization(-np.ones(5), 2 * np.ones(5), -np.ones(A), np.ones(A)), make_generator(0, "policy/initialisation"),
        about=About(seed=0),
    )  # fmt: skip


# -- the transformer -----------------------------------------------------------------------------------------------------------
def test_transformer_has_as_many_parameters_as_by_hand() -> None:
    # one layer of attention: four H×H matrices and biases; a feed-forward: H·W + W + W·H + H; a LayerNorm: 2·H
    h, w = 256, 512
    attention, feed_forward = 4 * (h * h + h), h * w + w + w * h + h
    encoder = 4 * (attention + feed_forward + 2 * 2 * h)
    decoder = 4 * (attention + feed_forward + 6 * (h * h + h))
    tokens = (512 * h + h) + (9 * h + h) + (7 * 7 + 7 + 7 * h + h) + 4 * h  # of features, of actions, and their order
    time, last = 2 * (h * h + h), 2 * (h * h + h) + h * 7 + 7
    made = DiffusionTransformer(TransformerConfig(), (512, 9), 4, 7, generator())
    assert count(made) == encoder + decoder + tokens + time + last == 6_193_727


def test_attention_is_torchs() -> None:
    ours, theirs = awake(Attention(SMALL, generator())), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((ours.query_key.weight, ours.value.weight)))
        theirs.in_proj_bias.copy_(torch.cat((ours.query_key.bias, ours.value.bias)))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    where, what = normal(3, 6, 16), normal(3, 6, 16, seed=1)
    torch.testing.assert_close(ours(where, what), theirs(where, where, what)[0], atol=1e-5, rtol=1e-5)


def test_a_layer_of_the_encoder_is_torchs_where_no_place_is_added() -> None:
    ours = awake(EncoderLayer(SMALL, generator()))
    theirs = nn.TransformerEncoderLayer(16, 4, 24, 0.0, lambda x: functional.gelu(x, approximate="tanh"), batch_first=True)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat((ours.attention.query_key.weight, ours.attention.value.weight)))
        theirs.self_attn.in_proj_bias.copy_(torch.cat((ours.attention.query_key.bias, ours.attention.value.bias)))
        for a, b in (
            (theirs.self_attn.out_proj, ours.attention.output), (theirs.linear1, ours.feed_forward[0]),
            (theirs.linear2, ours.feed_forward[3]), (theirs.norm1, ours.norm1), (theirs.norm2, ours.norm2),
        ):  # fmt: skip
            a.load_state_dict(b.state_dict())
    tokens = normal(3, 6, 16)
    torch.testing.assert_close(ours(tokens, torch.zeros(6, 16)), theirs(tokens), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(tokens, normal(6, 16, seed=2)), theirs(tokens))  # a place is


def test_adaln_zero_begins_as_the_identity_and_is_dits_formula() -> None:
    layer, tokens, condition = DecoderLayer(SMALL, generator()), normal(3, T, 16), normal(3, 16, seed=1)
    assert torch.equal(layer(tokens, condition), tokens)
    assert torch.equal(transformer()(normal(3, T * A), torch.arange(3), normal(3, 12)), torch.zeros(3, T * A))
    awake(layer)
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        (condition * torch.sigmoid(condition)) @ layer.modulation.weight.T + layer.modulation.bias
    ).view(3, 6, 1, 16).unbind(1)  # fmt: skip

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    x = norm(tokens) * (1 + scale1) + shift1
    expected = tokens + gate1 * layer.attention(x, x)
    expected = expected + gate2 * layer.feed_forward(norm(expected) * (1 + scale2) + shift2)
    torch.testing.assert_close(layer(tokens, condition), expected, atol=1e-5, rtol=1e-5)


def test_a_block_is_conditioned_by_the_time_and_the_mean_of_its_layers_tokens() -> None:
    net, x, time, features = awake(transformer()), normal(2, T * A), torch.tensor([3, 7]), normal(2, 12, seed=1)
    angle = time[:, None] * torch.exp(-torch.arange(4) * np.log(10000) / 3)
    embedded = net.time(torch.cat((angle.sin(), angle.cos()), 1))
    place = torch.arange(3)[:, None] * torch.exp(-torch.arange(8) * np.log(10000) / 7)
    place = torch.cat((place.sin(), place.cos()), 1)
    observed = torch.stack([net.parts[0](features[:, :5]), net.parts[1](features[:, 5:10]), net.parts[2](features[:, 10:])], 1)
    tokens = net.actions(x.view(2, T, A)) + net.order
    for encoder, decoder in zip(net.encoder, net.decoder):
        observed = encoder(observed, place)
        condition = observed.mean(1) + embedded
        tokens = decoder(tokens, condition)
    shift, scale = net.modulation(functional.silu(condition))[:, None].chunk(2, -1)
    expected = net.output(functional.layer_norm(tokens, (16,), eps=1e-6) * (1 + scale) + shift)
    torch.testing.assert_close(net(x, time, features), expected.flatten(1), atol=1e-5, rtol=1e-5)


def test_a_policys_transformer_has_a_token_for_each_name_and_time_step() -> None:
    shapes = {"image.top": (3, 9, 9), "state": (5,), "language": (7,)}
    made = DiffusionPolicy(
        DiffusionConfig(**OPTIONS["transformer"], encoder=EncoderConfig(4, (4,))), shapes, A, T, Normalization.identity(5, A),
        generator(), 2,
    )  # fmt: skip
    assert [layer.in_features for layer in made.network.parts] == [8, 8, 5, 5, 7, 7]
    seen = {"image.top": torch.zeros(3, 2, 3, 9, 9), "state": normal(3, 2, 5), "language": normal(3, 2, 7)}
    features = made.encode(seen).split(made.encoder.widths, 1)
    torch.testing.assert_close(features[3], seen["state"][:, 1])
    torch.testing.assert_close(features[4], seen["language"][:, 0])


def test_every_weight_of_a_network_learns() -> None:
    """What begins at zero opens within three steps; nothing is stuck."""
    for network in (transformer(), unet()):
        before = copy.deepcopy(network.state_dict())
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(4):
            loss = (
                (network(normal(8, T * A), torch.arange(8), normal(8, 12, seed=1)) - normal(8, T * A, seed=2)).square().mean()
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        unmoved = [name for name, value in network.state_dict().items() if torch.equal(value, before[name])]
        assert not unmoved


def test_every_part_of_the_features_and_every_action_matters() -> None:
    for network in (awake(transformer()), awake(unet())):
        x, time, features = normal(1, T * A), torch.tensor([3]), normal(1, 12, seed=1)
        base = network(x, time, features)
        for i in (0, 5, 10):  # one of each part
            assert not torch.allclose(base, network(x, time, features + functional.one_hot(torch.tensor([i]), 12)), atol=1e-6)
        for i in range(0, T * A, A):
            moved = network(x + functional.one_hot(torch.tensor([i]), T * A), time, features)
            assert not torch.allclose(base, moved, atol=1e-6)
        assert not torch.allclose(base, network(x, time + 1, features), atol=1e-6)


def test_parts_that_are_swapped_are_told_apart() -> None:
    network, features = awake(transformer()), normal(1, 12)
    swapped = torch.cat((features[:, 5:10], features[:, :5], features[:, 10:]), 1)
    x, time = normal(1, T * A), torch.tensor([3])
    assert not torch.allclose(network(x, time, features), network(x, time, swapped), atol=1e-6)


# -- the U-Net -----------------------------------------------------------------------------------------------------------------
def test_unet_has_as_many_parameters_as_by_hand() -> None:
    features, actions, time, kernel = 64, 7, 128, 5

    def block(inputs: int, outputs: int) -> int:
        convolutions = (inputs * kernel + 1) * outputs + (outputs * kernel + 1) * outputs
        norms, film = 2 * 2 * outputs, (time + features + 1) * 2 * outputs
        return convolutions + norms + film + ((inputs + 1) * outputs if inputs != outputs else 0)

    def level(inputs: int, outputs: int) -> int:
        return block(inputs, outputs) + block(outputs, outputs)

    down = level(actions, 256) + (3 * 256 + 1) * 256 + level(256, 512) + (3 * 512 + 1) * 512 + level(512, 1024)
    up = level(2048, 512) + (4 * 512 + 1) * 512 + level(1024, 256) + (4 * 256 + 1) * 256
    embedding = (time + 1) * 4 * time + (4 * time + 1) * time
    last = (256 * kernel + 1) * 256 + 2 * 256 + (256 + 1) * actions
    made = DiffusionUNet(UNetConfig(), features, 4, actions, generator())
    assert count(made) == down + level(1024, 1024) + up + embedding + last


def film_block(x: Tensor, condition: Tensor, block: FilmBlock, groups: int) -> Tensor:
    """A FiLM block, written out: convolution as a sum over shifts, group normalisation from its definition."""

    def convolve(x: Tensor, layer: Any) -> Tensor:
        outside, length = layer.kernel_size[0] // 2, x.shape[-1]
        padded = functional.pad(x, (outside, outside))
        shifted = [
            torch.einsum("oi,bit->bot", layer.weight[..., k], padded[..., k : k + length]) for k in range(2 * outside + 1)
        ]
        return torch.stack(shifted).sum(0) + layer.bias[:, None]

    def normalise(x: Tensor, layer: Any) -> Tensor:
        grouped = x.reshape(len(x), groups, -1)
        grouped = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return grouped.view_as(x) * layer.weight[:, None] + layer.bias[:, None]

    def mish(x: Tensor) -> Tensor:
        return x * torch.tanh(torch.log(1 + x.exp()))

    y = mish(normalise(convolve(x, block.first.convolution), block.first.norm))
    scale, shift = (mish(condition) @ block.film.weight.T + block.film.bias)[..., None].chunk(2, 1)
    y = mish(normalise(convolve(scale * y + shift, block.second.convolution), block.second.norm))
    return y + (x if isinstance(block.residual, nn.Identity) else convolve(x, block.residual))


@pytest.mark.parametrize("outputs", [8, 16])
def test_a_film_block_is_what_it_says(outputs: int) -> None:
    block, x, condition = awake(FilmBlock(THIN, 8, outputs, 6, generator())), normal(2, 8, 5), normal(2, 6, seed=1)
    ours = block(x, block.film(functional.mish(condition)))
    torch.testing.assert_close(ours, film_block(x, condition, block, THIN.groups), atol=1e-5, rtol=1e-4)


def test_the_unet_is_diffusion_policys_on_lengths_that_divide() -> None:
    net, x, features, time = awake(unet(chunk=8)), normal(2, 8 * A), normal(2, 12, seed=1), torch.tensor([3, 7])
    frequencies = torch.exp(-torch.arange(4) * np.log(10000) / 3)
    angle = time[:, None] * frequencies
    embedded = functional.mish(net.time[0](torch.cat((angle.sin(), angle.cos()), 1)))
    condition = torch.cat((net.time[2](embedded), features), 1)

    def level(y: Tensor, blocks: Any) -> Tensor:
        for block in blocks:
            y = film_block(y, condition, block, THIN.groups)
        return y

    first = level(x.view(2, 8, A).transpose(1, 2), net.down[0])
    second = level(functional.conv1d(first, net.downsample[0].weight, net.downsample[0].bias, stride=2, padding=1), net.down[1])
    third = level(functional.conv1d(second, net.downsample[1].weight, net.downsample[1].bias, stride=2, padding=1), net.down[2])
    assert third.shape == (2, 32, 2)
    y = level(torch.cat((level(third, net.middle), third), 1), net.up[0])
    y = functional.conv_transpose1d(y, net.upsample[0].weight, net.upsample[0].bias, stride=2, padding=1)
    y = level(torch.cat((y, second), 1), net.up[1])
    y = functional.conv_transpose1d(y, net.upsample[1].weight, net.upsample[1].bias, stride=2, padding=1)
    y = functional.mish(functional.group_norm(net.last.convolution(y), 4, net.last.norm.weight, net.last.norm.bias))
    torch.testing.assert_close(net(x, time, features), net.output(y).transpose(1, 2).flatten(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("levels", [1, 3])
def test_a_chunk_of_any_length_goes_through_the_unet(chunk: int, levels: int) -> None:
    net = unet(UNetConfig(channels=(8, 16, 32)[:levels], groups=4), chunk)
    assert net(normal(2, chunk * A), torch.tensor([0, 1]), normal(2, 12)).shape == (2, chunk * A)


def test_sizes_that_do_not_divide_are_refused() -> None:
    for wrong, key in (
        (lambda: TransformerConfig(hidden=20, heads=8), "transformer.heads"), (lambda: TransformerConfig(hidden=17), "hidden"),
        (lambda: TransformerConfig(dropout=1.0), "dropout"), (lambda: UNetConfig(channels=(12, 16)), "unet.groups"),
        (lambda: UNetConfig(kernel=4), "unet.kernel"), (lambda: UNetConfig(channels=()), "channels"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=key):
            wrong()


# -- both, in the places of the MLP --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPTIONS)
def test_a_predictor_is_the_forward(name: str) -> None:
    network = awake(policy(name).network)
    times, x, features = torch.tensor([9, 6, 3, 0]), normal(6, T * A), normal(6, 5, seed=1)
    for predict in (network.predictor(features, times), torch.no_grad()(network.predictor)(features, times)):
        for i, t in enumerate(times):
            torch.testing.assert_close(predict(x, i), network(x, t.expand(6), features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_policy_of_each_samples_deterministically_and_comes_back_from_its_file(tmp_path: Any, name: str, kind: str) -> None:
    made = policy(name, kind, {"state": (5,), "image.top": (3, 17, 20)}).eval().requires_grad_(False)
    awake(made.network)
    save_policy(tmp_path / "policy.safetensors", made)
    loaded = load_policy(tmp_path)
    seen = {"state": normal(6, 5), "image.top": torch.randint(256, (6, 3, 17, 20), dtype=torch.uint8, generator=generator())}
    features, noise = made.encode(seen), normal(6, T, A, seed=2)
    sample = made.sample(features, noise)
    assert sample.abs().max() <= 1
    assert sample.std() > 0.01
    assert torch.equal(sample, made.sample(features, noise))
    assert torch.equal(sample, loaded.sample(loaded.encode(seen), noise))
    assert (loaded.config, policy_fingerprint(loaded)) == (made.config, policy_fingerprint(made))
    with pytest.raises(InputError, match=r"another shape|not those that"):
        load_policy(tmp_path, network="mlp")
    again = policy(name, kind, {"state": (5,), "image.top": (3, 17, 20)})
    first = policy(name, kind, {"state": (5,), "image.top": (3, 17, 20)})
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), first.parameters(), strict=True))  # all from the generator


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_decides(name: str) -> None:
    other = {
        "transformer": {"transformer": TransformerConfig(16, 2, 2, 24, 8)},
        "unet": {"unet": UNetConfig((8, 16, 32), 3, 2, 8)},
    }
    made, changed = policy(name), policy(name)
    changed.config = parse(DiffusionConfig, {**plain(made.config), **plain(other[name])})
    assert policy_fingerprint(made) != policy_fingerprint(changed)  # heads and groups show in no weight


@pytest.mark.parametrize("name", OPTIONS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_mutated_file_is_refused_or_is_a_policy(name: str, data: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / f"{name}.safetensors"
    save_policy(path, policy(name, shapes={"state": (5,), "image.a": (1, 9, 9)}, encoder=EncoderConfig(2, (2,), crop=8)))
    made = mutated_policy(path, data)
    if made is not None:
        with torch.no_grad():  # a U-Net's weights are those of any chunk, and a mutated one may be very long
            assert made.chunk > 64 or made.sample(normal(2, made.feature_dim), generator=generator()).isfinite().all()


def test_files_of_before_are_files_of_now(tmp_path: Any) -> None:
    """What the new fields are at their defaults is not written: header and fingerprint are those of 0.2's first files."""
    made = DiffusionPolicy(DiffusionConfig(hidden=8), {"state": (5,)}, A, T, Normalization.identity(5, A), generator())
    save_policy(tmp_path / "policy.safetensors", made)
    assert list(load_tree(tmp_path / "policy.safetensors")["config"]) == [
        "kind", "hidden", "layers", "time_dim", "condition_hidden", "denoising_steps", "sampler", "inference_steps",
        "denoised_clip", "encoder",
    ]  # fmt: skip
    assert list(plain(FlowConfig())["encoder"]) == ["keypoints", "channels"]
    loaded = load_policy(tmp_path)
    assert loaded.config.network == "mlp"
    assert loaded.config.encoder.kind == "small"
    full = DiffusionConfig(network="unet", unet=THIN, encoder=EncoderConfig(crop=7))
    assert parse(DiffusionConfig, plain(full)) == full


@pytest.mark.parametrize("name", OPTIONS)
def test_dppo_finetunes_each(tmp_path: Any, name: str) -> None:
    made = policy(name).eval().requires_grad_(False)
    config = DPPOConfig(ft_denoising_steps=3, sampling_steps=5, n_steps=4, batch_size=16, epochs=1, critic_hidden=8)
    learner = DPPO(config, made, make_generator(0, "online/initialisation"))
    learner.iterations = 5
    before = [p.clone() for p in learner.networks.actor.parameters()]
    memory, g = learner.memory(0, 4), generator()
    for t in range(config.n_steps):
        _, action = learner.act(normal(4, 5, seed=t), g)
        batch = Batch(normal(4, 5, seed=t), action, normal(4, 5, seed=t + 1), normal(4, seed=t), torch.full((4,), 0.9))
        memory.remember(batch, torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool))
    info = learner.learn(memory, generator(1), generator(2))
    assert float(info["actor/kl"].mean()) == pytest.approx(0, abs=0.1)
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.networks.actor.parameters(), strict=True))
    agent = learner.agent()
    agent.save(tmp_path)
    loaded, _ = load_agent(tmp_path)
    assert isinstance(loaded, DPPOAgent)
    seen = {"state": normal(3, 5)}
    assert torch.equal(loaded.act(seen, generator(4)), agent.act(seen, generator(4)))


@pytest.mark.parametrize("name", OPTIONS)
def test_each_in_bfloat16_and_as_one_graph(name: str) -> None:
    network = awake(policy(name).network)
    arguments = normal(6, T * A), torch.arange(6), normal(6, 5, seed=1)
    exact = network(*arguments)
    with Compute(device="cpu", precision="bfloat16").autocast():
        rounded = network(*arguments)
    assert 0 < (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()
    torch.compiler.reset()
    graph = torch.compile(network, backend="eager", fullgraph=True)  # no data decides what Python does
    torch.testing.assert_close(graph(*arguments), exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_it_trains_the_same(name: str) -> None:
    losses = []
    for compute in (Compute(device="cpu"), Compute(device="cpu", compile=True)):
        training, _ = pixel_training(name, steps=3, compute=compute)
        losses.append([float(training.step()) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- training ------------------------------------------------------------------------------------------------------------------
def pixel_training(name: str, steps: int, compute: Compute | None = None, **more: Any) -> tuple[Pretraining, Windows]:
    data, device = pixel_demonstrations(6, 0.1), (compute or Compute()).resolved().device
    windows, normalization = Windows(data, 2, tail="pad", device=device), fit_normalization(data, data)
    options = {
        "encoder": EncoderConfig(keypoints=16, channels=(16, 16)),
        "denoising_steps": 20,
        **OPTIONS.get(name, {}),
        **more,
    }
    config = DiffusionConfig(**options)
    made = DiffusionPolicy(config, data.shapes, 2, 2, normalization, make_generator(0, "policy/initialisation"))
    settings = PretrainingConfig(method="bc", steps=steps, batch_size=32, learning_rate=3e-3, warmup=0.05)
    return Pretraining(made, windows, settings, 0, compute=compute), windows


@pytest.mark.parametrize("name", OPTIONS)
def test_each_fits_demonstrations_in_pixels(name: str) -> None:
    wide = {"transformer": TransformerConfig(32, 4, 2, 64, 16), "unet": UNetConfig((32, 64), 3, 8, 16)}
    training, windows = pixel_training(name, 400, **{name: wide[name]})
    every = torch.arange(len(windows))
    chunk = training.policy.normalization.normalize_action(windows.chunk(every))
    for _ in range(400):
        training.step()
    training.finish()
    made = training.policy
    sample = made.sample(made.encode(windows.observation(every)), generator=generator())
    error, spread = (sample - chunk).square().mean(), (chunk - chunk.mean(0)).square().mean()
    assert error < 0.3 * spread, (error, spread)


@pytest.mark.gpu
@pytest.mark.parametrize("compute", [Compute(), Compute(compile=True), Compute(precision="bfloat16")], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_gpu_trains_each_with_crops_and_the_cpu_plays_it(name: str, compute: Compute) -> None:
    training, windows = pixel_training(name, 20, compute, encoder=EncoderConfig(kind="resnet18", crop=28))
    for _ in range(20):
        training.step()
    training.finish()
    rows = torch.arange(6, device=windows.device)
    seen = {key: value.cpu() for key, value in windows.observation(rows).items()}
    made = training.policy.cpu()
    assert made.sample(made.encode(seen), normal(6, 2, 2)).isfinite().all()


def test_dropout_trains_and_resumes_bit_for_bit_and_playing_knows_none() -> None:
    def training() -> Pretraining:
        config = TransformerConfig(hidden=16, heads=4, layers=1, feed_forward=24, time_dim=8, dropout=0.1)
        return pixel_training("transformer", 6, transformer=config)[0]

    whole, cut = training(), training()
    for _ in range(6):
        whole.step()
    for _ in range(3):
        cut.step()
    resumed = training()
    torch.manual_seed(123)  # whatever else has drawn meanwhile
    resumed.load_state(cut.state())
    for _ in range(3):
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True))
    without = pixel_training("transformer", 6, transformer=TransformerConfig(16, 4, 1, 24, 8))[0]
    for _ in range(6):
        without.step()
    assert not all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), without.policy.parameters(), strict=True))
    made = whole.policy.eval()
    features, noise = normal(3, made.feature_dim), normal(3, 2, 2)
    assert torch.equal(made.sample(features, noise), made.sample(features, noise))
