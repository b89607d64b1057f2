"""SmolVLA and π0 on PostBC's targets: LeRobot's own classes, tiny and of random weights."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("av")

from made import write_demonstrations
from postbc import cli
from postbc.data import read_dataset
from postbc.data.lerobot_write import LeRobotWriter
from test_lerobot import COMMON, FIT, data, plainly, same, weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lerobot") is None or importlib.util.find_spec("transformers") is None,
    reason="needs LeRobot with SmolVLA: make test-lerobot",
)


def tokenizer() -> Any:
    """Of a few words."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "lift"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", extra_special_tokens={
            "fake_image_token": words[2], "image_token": words[3], "global_image_token": words[4], "end_of_utterance_token": words[5]
        },
    )  # fmt: skip


def tiny_smolvla(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What LeRobot asks the hub for: the model's configuration, a tokenizer and the processor of frames."""
    import transformers as hf

    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 32}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
              "patch_size": 16}  # fmt: skip
    hf.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=3).save_pretrained(folder)
    hf.SmolVLMProcessor(hf.SmolVLMImageProcessor(), tokenizer(), hf.SmolVLMVideoProcessor()).save_pretrained(folder)
    return [f"--policy.vlm_model_name={folder}", "--policy.resize_imgs_with_padding=[64,64]", "--policy.num_vlm_layers=2",
            "--policy.num_steps=2"]  # fmt: skip


def tiny_pi0(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "pi0") -> list[str]:
    """π0 and π0.5 write their sizes in code and ask the hub for a tokenizer: both are replaced, the rest is their own."""
    import transformers as hf

    pi0 = importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")

    whole = pi0.PaliGemmaForConditionalGenerationWithPiGemma
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16,
              "projection_dim": 32}  # fmt: skip

    def tiny(config: Any) -> Any:
        for key, value in vision.items():
            setattr(config.vision_config, key, value)
        return whole(config=config)

    monkeypatch.setattr(pi0, "get_gemma_config", lambda variant: pi0.GemmaConfig(32, 2, 64, 8, 1, 8))
    monkeypatch.setattr(pi0, "PaliGemmaForConditionalGenerationWithPiGemma", tiny)
    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", lambda name, **_: tokenizer())
    return ["--policy.image_resolution=[32,32]", "--policy.num_inference_steps=2"]


def tiny_clip(folder: Path) -> None:
    """What LeRobot's multi-task transformer asks the hub for: CLIP's two encoders and its tokenizer."""
    import transformers as hf

    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
            "max_position_embeddings": 16, "eos_token_id": 5}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14}  # fmt: skip
    hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("kind", ["smolvla", "pi0"])
def test_trains_on_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """α = 0 is plain training to the bit; α = 1 is not, and what it leaves is LeRobot's own checkpoint, which plays."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = write_demonstrations(tmp_path / "a.hdf5", 3, 12, images={"top_image": (64, 64, 3)})
    root = LeRobotWriter(tmp_path / "set", read_dataset(file, image_keys=["top_image"]), "x").write()
    tiny = {"smolvla": tiny_smolvla, "pi0": tiny_pi0}[kind](tmp_path / "vlm", monkeypatch)
    common = [
        *data(root), *COMMON, f"--policy.type={kind}", *tiny, "--policy.chunk_size=8", "--policy.n_action_steps=4",
        "--policy.tokenizer_max_length=8", "--steps=2", "--num_workers=0", "--seed=7",
    ]  # fmt: skip
    plainly(*common, f"--output_dir={tmp_path / 'plain'}")
    for name, weight in (("zero", 0), ("one", 1)):
        ours = [f"--postbc.weight={weight}", f"--postbc.factors={tmp_path / 'f'}", *FIT]
        assert cli.main(["lerobot", "train", *common, *ours, f"--output_dir={tmp_path / name}"]) == 0
    plain, zero, one = (weights(tmp_path / name) for name in ("plain", "zero", "one"))
    assert same(plain, zero)
    assert not same(plain, one)
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    checkpoint = tmp_path / "one/checkpoints/last/pretrained_model"
    policy = get_policy_class(kind).from_pretrained(checkpoint)
    before, after = make_pre_post_processors(policy.config, str(checkpoint))
    batch = before({"observation.state": torch.zeros(9), "observation.images.top": torch.rand(3, 64, 64), "task": "lift"})
    noise = torch.randn(1, 8, policy.config.max_action_dim, generator=torch.Generator().manual_seed(0))
    first, second = (after(policy.predict_action_chunk(batch, noise=noise)) for _ in range(2))
    assert first.shape == (1, 8, 7)
    assert torch.equal(first, second)  # deterministic given its noise, which DSRL would steer
