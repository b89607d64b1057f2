"""LeRobot's policies as ours: the actions that LeRobot's own processors and policy give for the same noise, kind by kind; finetuned,
and taken back. Tiny, of random weights, offline (make test-lerobot)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from postbc import cli
from postbc.agents.base import Batch, load_agent
from postbc.agents.dsrl import DSRL, DSRLConfig
from postbc.environments import ENVIRONMENTS
from postbc.environments.chunk import Observations
from postbc.environments.registry import Environment
from postbc.lerobot.steering import KINDS as STEERED
from postbc.policies import load_policy
from postbc.seeding import make_generator
from postbc.stages.seeds import one_agent

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


# -- what cannot be steered ------------------------------------------------------------------------------------------------------
def refusal(checkpoint: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    output = checkpoint.parent / "refused"
    assert cli.main(["lerobot", "import", "--checkpoint", str(checkpoint), "--output", str(output), *more]) == 2
    assert not output.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(("changes", "says"), [
    ({"type": "act"}, "nothing to choose among"),
    ({"type": "vqbet"}, "no latent noise decides"),
    ({"type": "groot"}, "not known here"),
    ({"use_relative_actions": True}, "relative to the state"),
    ({"adapt_to_pi_aloha": True}, "Aloha"),
    ({"n_obs_steps": 2}, "several observations"),
    ({"input_features": {}}, "no state"),
    ({}, "which task"),
])  # fmt: skip
def test_what_no_noise_steers_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("smolvla", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    found = refusal(tmp_path / "checkpoint", capsys)
    assert says in found
    assert str(tmp_path / "checkpoint") in found


def test_a_stochastic_sampler_is_found_by_sampling_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("diffusion", tmp_path / "checkpoint")
    monkeypatch.setattr(
        STEERED["diffusion"], "settings", lambda steps: {"noise_scheduler_type": "DDPM", "num_inference_steps": steps}
    )
    assert "two samples from one noise that differ" in refusal(tmp_path / "checkpoint", capsys)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tiny("smolvla", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/model.safetensors"
    weights = load_file(file)
    del weights["model.action_out_proj.bias"]
    save_file(weights, file)
    assert "action_out_proj.bias" in refusal(tmp_path / "checkpoint", capsys, "--task", TASK)


def test_a_number_that_never_changed_is_not_far_from_itself(tmp_path: Path) -> None:
    """LeRobot's (x - mean) / (0 + 1e-8), which is 0 at the mean; its least and greatest give -1."""
    from lerobot.configs import NormalizationMode

    for mode, expected in (("MEAN_STD", 0.0), ("MIN_MAX", -1.0)):
        names = ("VISUAL", "STATE", "ACTION")
        tiny("diffusion", tmp_path / mode, normalization_mapping=dict.fromkeys(names, NormalizationMode(mode)))
        policy = imported(tmp_path / mode, tmp_path / f"{mode} imported")
        seen = observations(2)
        own = policy.normalization.normalize_state(seen["state"])[..., 1]
        assert policy.encode(seen).unflatten(1, (2, -1))[:, :, 1].unique().tolist() == [expected]
        assert own.unique().tolist() == pytest.approx([expected], abs=0.05)  # ours divides by 1e-6, in float32


# -- finetuned, and taken back -------------------------------------------------------------------------------------------------
class Both(toy.PointReach):
    """The toy by its state and by 64x64 pixels."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.shapes = {"state": (STATE,), "image.top": FRAME}

    def observation(self) -> Observations:
        return {"state": self.at.astype(np.float32), "image.top": toy.draw(self.at).repeat(2, 2).repeat(2, 3)}


ONLINE = ["--training.num-envs", "2", "--training.eval-episodes", "2", "--training.horizon", "12",
          "--training.budget-env-steps", "96", "--training.initial-steps", "24", "--training.eval-every", "96"]  # fmt: skip


SMALL = ["--dsrl.hidden", "8", "--dsrl.utd", "2", *ONLINE]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made = Environment(
        "toy/Both", lambda n, **options: Both(n, **options), horizon=12, chunk=3, facts=lambda: {"env_name": "Both"}
    )
    monkeypatch.setitem(ENVIRONMENTS, "toy/Both", lambda: made)
    return ["--environment", "toy/Both"]


def plays_in_lerobot(folder: Path, exported: Path) -> None:
    """The exported agent by LeRobot's own select_action, one observation at a time, gives what the agent gives."""
    pytest.importorskip("lerobot_policy_postbc")
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    assert cli.main(["lerobot", "export", "--agent", str(folder), "--output", str(exported)]) == 0
    register_third_party_plugins()
    config = PreTrainedConfig.from_pretrained(exported, cli_overrides=["--device=cpu"])
    assert config.type == "postbc"
    assert set(config.input_features) == {"observation.state", "observation.images.top"}
    played = get_policy_class(config.type).from_pretrained(exported, config=config)
    before, after = make_pre_post_processors(config, str(exported))
    agent, about = load_agent(folder)
    generator, seen, steps = make_generator(about.seed or 0, "evaluation/acting"), observations(2, 7), agent.observation_steps
    rows = list(range(7))
    played.reset()
    for step in rows:
        raw = {"observation.state": seen["state"][step : step + 1, 0], "task": ["another"],
               "observation.images.top": seen["image.top"][step : step + 1, 0].float() / 255}  # fmt: skip
        action = after(played.select_action(before(raw)))
        if step % agent.chunk == 0:
            newest = [max(0, step - k) for k in reversed(range(steps))]
            now = {name: value[newest, 0] if steps > 1 else value[step, 0] for name, value in seen.items()}
            chunk = agent.act({name: value[None] for name, value in now.items()}, generator)
        torch.testing.assert_close(action, chunk[:, step % agent.chunk])


@pytest.mark.parametrize(("kind", "variant"), [("multi_task_dit", "na"), ("smolvla", "sac")])
def test_finetuned_with_tied_noise_and_taken_back(tmp_path: Path, kind: str, variant: str, both: list[str]) -> None:
    tiny(kind, tmp_path / "checkpoint")
    policy = imported(tmp_path / "checkpoint", tmp_path / "imported")
    base, run = ["--policy", str(tmp_path / "imported"), *both], tmp_path / "dsrl"
    chosen = ["--dsrl.variant", variant, "--dsrl.latent", "tied", *SMALL]
    assert cli.main(["finetune", "dsrl", *base, "--output", str(run), *chosen]) == 0
    folder = one_agent(run)
    agent: Any = load_agent(folder)[0]
    assert agent.config.latent == "tied"
    assert agent.actor.net(torch.zeros(1, policy.seen_dim)).shape == (
        1,
        2 * ACTIONS,
    )  # mean and deviation of one action's noise
    given: list[torch.Tensor] = []
    sample = agent.policy.sample
    agent.policy.sample = lambda features, noise: given.append(noise) or sample(features, noise)
    agent.act(observations(policy.observation_steps), torch.Generator().manual_seed(0))
    assert torch.equal(given[0], given[0][:, :1].expand_as(given[0]))
    plays_in_lerobot(folder, tmp_path / "exported")


@pytest.mark.parametrize("kind", ["multi_task_dit", "smolvla"])
def test_best_of_n_and_taken_back(tmp_path: Path, kind: str, both: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "RADIUS", 1.5)  # so that some of a random policy's episodes succeed
    tiny(kind, tmp_path / "checkpoint")
    imported(tmp_path / "checkpoint", tmp_path / "imported")
    run = tmp_path / "best"
    base = ["--policy", str(tmp_path / "imported"), *both]
    assert cli.main(["finetune", "best-of-n", *base, "--output", str(run), "--best-of-n.episodes", "4",
                     "--best-of-n.eval-episodes", "2", "--best-of-n.horizon", "12", "--best-of-n.num-envs", "2",
                     "--best-of-n.samples", "3", "--iql.steps", "3", "--iql.hidden", "8"]) == 0  # fmt: skip
    plays_in_lerobot(one_agent(run), tmp_path / "exported")


def test_a_vision_language_policy_is_finetuned_by_what_its_learners_see(
    tmp_path: Path, both: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """na and residual RL, which would keep all of a state's tokens, are refused; what sac remembers is what learners see."""
    tiny("smolvla", tmp_path / "checkpoint")
    policy = imported(tmp_path / "checkpoint", tmp_path / "imported")
    assert policy.seen_dim == STATE + 32 < policy.feature_dim
    base = ["--policy", str(tmp_path / "imported"), *both]
    assert cli.main(["finetune", "dsrl", *base, "--output", str(tmp_path / "na"), *SMALL]) == 2
    assert "--dsrl.variant sac" in capsys.readouterr().err
    assert cli.main(["finetune", "residual", *base, "--output", str(tmp_path / "residual"), *ONLINE]) == 2
    assert "--dsrl.variant sac" in capsys.readouterr().err
    learner = DSRL(DSRLConfig(variant="sac", hidden=8, latent="tied"), policy, torch.Generator().manual_seed(0))
    memory, wide, one = learner.memory(10, 2), torch.rand(2, policy.feature_dim), torch.ones(2)
    memory.remember(Batch(wide, torch.zeros(2, ACTIONS), wide, one, one), one.bool(), one.bool())
    batch = memory.batch(torch.arange(2))
    assert torch.equal(batch.features, wide[:, : policy.seen_dim])
    assert torch.equal(batch.next_features, wide[:, : policy.seen_dim])
