"""LeRobot's policies as ours: the actions that LeRobot's own processors and policy give for the same noise, kind by kind; finetuned,
and taken back. Tiny, of random weights, offline (make test-lerobot)."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from postbc import cli
from postbc.environments import ENVIRONMENTS
from postbc.environments.chunk import Observations
from postbc.environments.registry import Environment
from postbc.policies import load_policy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lerobot") is None or importlib.util.find_spec("transformers") is None,
    reason="needs LeRobot with SmolVLA: make test-lerobot",
)
TASK = "lift"
STATE, FRAME, ACTIONS = 4, (3, 32, 32), 2
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
        stats[name] = {key: torch.tensor(at[i], dtype=torch.float32) for i, key in enumerate(("min", "q01", "q10", "q90", "max"))}
        stats[name] |= {"q99": stats[name]["max"] - 0.01, "mean": stats[name]["q10"], "std": stats[name]["q90"] - stats[name]["min"]}
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
    command = ["lerobot", "import", "--checkpoint", str(checkpoint), "--output", str(output), "--task", TASK, "--inference-steps", "3"]
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
            raw = {"observation.state": at["state"], "observation.images.top": at["image.top"].float() / 255, "task": [TASK] * len(noise)}
            batch = before(raw)
            if kind in ("pi0", "pi05"):
                return after(policy.predict_action_chunk(batch, **given))[:, : policy.config.n_action_steps]
            if kind != "smolvla" and k < steps - 1:  # only seen: no action is asked for
                policy._queues["action"].append(torch.zeros(len(noise), ACTIONS))
            first = after(policy.select_action(batch, **({} if kind == "multi_task_dit" else given)))
        return torch.stack([first, *(after(a) for a in policy._queues["action"])], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_actions_are_lerobots(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(kind, tmp_path / "checkpoint")
    policy = imported(tmp_path / "checkpoint", tmp_path / "imported")
    theirs, before, after = lerobots(kind, tmp_path / "checkpoint")
    seen = observations(policy.observation_steps)
    noise = torch.randn(3, policy.chunk, ACTIONS, generator=torch.Generator().manual_seed(0))
    ours = policy.normalization.unnormalize_action(policy.sample(policy.encode(seen), noise))
    print(kind, policy.seen_dim, policy.feature_dim)
