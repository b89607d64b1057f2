"""LeRobot's policies as ours: the actions that LeRobot's own processors and policy give for the same noise, kind by kind; finetuned,
and taken back. Tiny, of random weights, offline (make test-lerobot)."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from postbc import cli
from postbc.policies import load_policy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lerobot") is None or importlib.util.find_spec("transformers") is None,
    reason="needs LeRobot with SmolVLA: make test-lerobot",
)
TASK = "lift"
STATE, FRAME, ACTIONS = 4, (3, 64, 64), 2
KINDS = {
    "diffusion": {"n_obs_steps": 2, "horizon": 8, "n_action_steps": 4, "down_dims": (16, 32), "crop_shape": None,
                  "pretrained_backbone_weights": None},
    "multi_task_dit": {"n_obs_steps": 2, "horizon": 8, "n_action_steps": 4, "hidden_dim": 16, "num_layers": 1, "num_heads": 2,
                       "timestep_embed_dim": 8, "image_crop_shape": (28, 28), "tokenizer_max_length": 8},
    "smolvla": {"chunk_size": 6, "n_action_steps": 3, "resize_imgs_with_padding": (64, 64), "num_vlm_layers": 2,
                "tokenizer_max_length": 8},
    "pi0": {"chunk_size": 6, "n_action_steps": 3, "image_resolution": (28, 28), "tokenizer_max_length": 8},
    "pi05": {"chunk_size": 6, "n_action_steps": 3, "image_resolution": (28, 28), "tokenizer_max_length": 16},
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub: π0's sizes, which stand in its code, and the models that policies are made from are replaced by tiny ones."""
    from test_lerobot_vla import tiny_clip, tiny_pi0, tiny_smolvla

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_clip(tmp_path / "tiny-clip")
    tiny_smolvla(tmp_path / "tiny-vlm", monkeypatch)
    for name in ("pi0", "pi05"):
        tiny_pi0(tmp_path, monkeypatch, name)


def tiny(kind: str, folder: Path, **changes: Any) -> Any:
    """A LeRobot policy of random weights as lerobot-train leaves it, in `folder`; returns the policy."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    models = folder.parent
    if changes.get("load_vlm_weights"):
        import transformers as hf

        vlm = hf.AutoConfig.from_pretrained(models / "tiny-vlm")
        hf.SmolVLMForConditionalGeneration(vlm).to(torch.bfloat16).save_pretrained(models / "tiny-vlm")
    own = {
        "multi_task_dit": {"vision_encoder_name": str(models / "tiny-clip"), "text_encoder_name": str(models / "tiny-clip")},
        "smolvla": {"vlm_model_name": str(models / "tiny-vlm")},
    }.get(kind, {})
    config = make_policy_config(
        kind, device="cpu", push_to_hub=False, **{
            "input_features": {"observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
                               "observation.images.top": PolicyFeature(FeatureType.VISUAL, FRAME)},
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTIONS,))},
            **KINDS[kind], **own, **changes,
        })  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = get_policy_class(kind)(config).eval()
        for parameter in policy.parameters():  # what begins at zero would hide much
            parameter.data += 0.05 * torch.randn_like(parameter)
    rng, stats = np.random.default_rng(0), {}
    for name, shape in (("observation.state", (STATE,)), ("observation.images.top", (3, 1, 1)), ("action", (ACTIONS,))):
        at = np.sort(rng.uniform(0.1, 0.9, (5, *shape)), 0)
        stats[name] = {
            key: torch.tensor(at[i], dtype=torch.float32) for i, key in enumerate(("min", "q01", "q10", "q90", "max"))
        }
        stats[name] |= {
            "q99": stats[name]["max"] - 0.01,
            "mean": stats[name]["q10"],
            "std": stats[name]["q90"] - stats[name]["min"],
        }
    for key in ("min", "q01", "q10", "mean", "q90", "q99", "max"):  # a number of the state that never changes
        stats["observation.state"][key][1] = 0.5
    stats["observation.state"]["std"][1] = 0
    before, after = make_pre_post_processors(config, dataset_stats=stats)
    for made in (policy, before, after):
        made.save_pretrained(folder)
    return policy


def observations(steps: int, batch: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    time = (steps,) if steps > 1 else ()
    state = torch.rand(batch, *time, STATE, generator=draw)
    state[..., 1] = 0.5
    return {"state": state, "image.top": torch.randint(256, (batch, *time, *FRAME), generator=draw, dtype=torch.uint8)}


def imported(checkpoint: Path, output: Path, *more: str) -> Any:
    command = [
        "lerobot",
        "import",
        "--checkpoint",
        str(checkpoint),
        "--output",
        str(output),
        "--task",
        TASK,
        "--inference-steps",
        "3",
    ]
    assert cli.main([*command, *more]) == 0
    return load_policy(output)


def lerobots(kind: str, checkpoint: Path) -> tuple[Any, Any, Any]:
    """LeRobot's own policy and processors of a checkpoint, sampling in as many steps as ours, by DDIM."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(checkpoint)
    for name in ("num_inference_steps", "num_steps", "num_integration_steps"):
        if hasattr(config, name):
            setattr(config, name, 3)
    if hasattr(config, "noise_scheduler_type"):
        config.noise_scheduler_type = "DDIM"
    policy = get_policy_class(kind).from_pretrained(checkpoint, config=config).eval()
    return policy, *make_pre_post_processors(config, str(checkpoint))


def chunk_of(kind: str, policy: Any, before: Any, after: Any, observation: dict[str, torch.Tensor], noise: torch.Tensor,
             monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:  # fmt: skip
    """What LeRobot's policy would play: its own select_action, observation by observation, on noise of the whole horizon."""
    policy.reset()
    steps = policy.config.n_obs_steps
    with monkeypatch.context() as patch, torch.no_grad():
        if kind == "multi_task_dit":  # it draws its noise itself
            patch.setattr(torch, "randn", lambda *_, **__: noise)
        given = {} if kind == "multi_task_dit" else {"noise": noise}
        for k in range(steps):
            at = {name: value[:, k] if steps > 1 else value for name, value in observation.items()}
            raw = {
                "observation.state": at["state"],
                "observation.images.top": at["image.top"].float() / 255,
                "task": [TASK] * len(noise),
            }
            batch = before(raw)
            if kind in ("pi0", "pi05"):
                return after(policy.predict_action_chunk(batch, **given))[:, : policy.config.n_action_steps]
            if kind != "smolvla" and k < steps - 1:  # only seen: no action is asked for
                policy._queues["action"].append(torch.zeros(len(noise), ACTIONS))
            first = after(policy.select_action(batch, **({} if kind == "multi_task_dit" else given)))
        return torch.stack([first, *(after(a) for a in policy._queues["action"])], 1)


#: Which row of a chunk's noise each row of the horizon takes, and the width of the noise.
ROWS = {
    "diffusion": ([0, 0, 1, 2, 3, 3, 3, 3], ACTIONS), "multi_task_dit": ([0, 0, 1, 2, 3, 3, 3, 3], ACTIONS),
    "smolvla": ([0, 1, 2, 2, 2, 2], 32), "pi0": ([0, 1, 2, 2, 2, 2], 32), "pi05": ([0, 1, 2, 2, 2, 2], 32),
}  # fmt: skip


def horizon_of(kind: str, noise: torch.Tensor) -> torch.Tensor:
    rows, width = ROWS[kind]
    whole = torch.zeros(len(noise), len(rows), width)
    whole[..., :ACTIONS] = noise[:, rows]
    return whole


FLOW = {"objective": "flow_matching"}
MODES = {
    "MEAN_STD": {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    "MIN_MAX": {"VISUAL": "MIN_MAX", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
    "QUANTILES": {"VISUAL": "QUANTILES", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
    "QUANTILE10": {"VISUAL": "QUANTILE10", "STATE": "QUANTILE10", "ACTION": "QUANTILE10"},
    "IDENTITY": {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"},
}  # fmt: skip
CASES: list[Any] = [
    *((kind, {}) for kind in KINDS), *(("diffusion", {"normalization_mapping": mode}) for mode in MODES.values()),
    ("diffusion", {"n_obs_steps": 1}), ("multi_task_dit", FLOW), ("multi_task_dit", {**FLOW, "integration_method": "rk4"}),
    ("multi_task_dit", {"n_obs_steps": 1, "use_separate_rgb_encoder_per_camera": True}), ("smolvla", {"load_vlm_weights": True}),
    ("smolvla", {"prefix_length": 40, "add_image_special_tokens": True, "empty_cameras": 1}), ("pi0", {"empty_cameras": 1}),
    ("pi0", {"dtype": "bfloat16"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=str)
def test_the_actions_are_lerobots(tmp_path: Path, kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same noise, full and tied, what LeRobot's processors and policy give; every kind of normalisation, a number of the state
    that never changes, one observation and two, both objectives and solvers, empty cameras, weights in half precision."""
    from lerobot.configs import NormalizationMode

    modes = changes.get("normalization_mapping", {})
    changes = {**changes, **({"normalization_mapping": {k: NormalizationMode(v) for k, v in modes.items()}} if modes else {})}
    tiny(kind, tmp_path / "checkpoint", **changes)
    policy = imported(tmp_path / "checkpoint", tmp_path / "imported")
    reference = lerobots(kind, tmp_path / "checkpoint")
    seen, draw = observations(policy.observation_steps), torch.Generator().manual_seed(0)
    full = torch.randn(3, policy.chunk, ACTIONS, generator=draw)
    first = 1 if policy.observation_steps == 2 else 0
    played = []
    for noise in (full, full[:, :1].expand_as(full)):
        ours = policy.normalization.unnormalize_action(policy.sample(policy.encode(seen), noise))
        whole = noise[:, [0, 1, 2, 3, 3, 3, 3, 3]] if len(ROWS[kind][0]) == 8 and not first else horizon_of(kind, noise)
        expected = chunk_of(kind, *reference, seen, whole, monkeypatch)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        played.append(ours)
    assert not torch.allclose(played[0], played[1], atol=1e-3)  # the noise decides
    whole = torch.randn(3, len(ROWS[kind][0]), ROWS[kind][1], generator=torch.Generator().manual_seed(2))
    drawn = policy.sample(policy.encode(seen), generator=torch.Generator().manual_seed(2))
    expected = chunk_of(kind, *reference, seen, whole, monkeypatch)
    torch.testing.assert_close(policy.normalization.unnormalize_action(drawn), expected, atol=1e-5, rtol=1e-5)
