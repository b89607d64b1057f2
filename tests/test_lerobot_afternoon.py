"""docs/lerobot-afternoon.md, command by command, on a small scale (make test-lerobot)."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from postbc import cli
from test_data_zarr import store, zipped

PAGE = Path(__file__).parent.parent / "docs/lerobot-afternoon.md"
#: The same commands, in seconds: values of options that the page gives …
SMALL = {
    "--policy.down_dims": "[16,32]", "--policy.num_inference_steps": "2", "--batch_size": "4", "--steps": "2", "--eval.n_episodes": "2",
    "--eval.batch_size": "2", "--episodes": "3", "--best-of-n.episodes": "4", "--iql.steps": "5", "--dsrl.hidden": "16",
    "--training.budget-env-steps": "200", "--training.initial-steps": "50", "--training.eval-every": "100",
}  # fmt: skip
#: … and options more.
MORE = {
    "lerobot train": "--num_workers=0 --postbc.ensemble.ensemble-size=4 --postbc.ensemble.hidden=16 --postbc.ensemble.steps=20",
    "lerobot-eval": "--env.episode_length=12",
    "lerobot import": "--inference-steps 2",
    "evaluate": "--episodes 2 --horizon 12 --videos 0",
    "finetune best-of-n": "--best-of-n.eval-episodes 2 --best-of-n.horizon 12 --best-of-n.num-envs 2 --iql.hidden 16",
    "finetune dsrl": "--training.num-envs 2 --training.eval-episodes 2 --training.horizon 12",
}  # fmt: skip


def commands() -> list[list[str]]:
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        found += [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    return found


def small(words: list[str]) -> list[str]:
    made: list[str] = []
    for word in words:
        option, equals, _ = word.partition("=")
        if made and made[-1] in SMALL:
            made.append(SMALL[made[-1]])
        else:
            made.append(f"{option}={SMALL[option]}" if equals and option in SMALL else word)
    line = " ".join(words)
    return made + next((shlex.split(more) for name, more in MORE.items() if re.match(rf"(postbc )?{name} ", line)), [])


def test_the_page_has_what_is_made_small() -> None:
    words = [word.partition("=")[0] for line in commands() for word in line]
    assert set(SMALL) <= set(words)
    for name in MORE:
        assert any(re.match(rf"(postbc )?{name} ", " ".join(line)) for line in commands()), name


@pytest.mark.skipif(importlib.util.find_spec("lerobot_policy_postbc") is None, reason="needs LeRobot: make test-lerobot")
def test_the_afternoon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gym_pusht")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    zipped(store(tmp_path / "pusht_cchi_v7_replay", (40, 40, 40)))
    for words in map(small, commands()):
        if words[0] == "postbc":
            assert cli.main(words[1:]) == 0, " ".join(words)
        else:
            monkeypatch.setattr(sys, "argv", words)
            importlib.import_module(f"lerobot.scripts.{words[0].replace('-', '_')}").main()
    for name in ("cloned", "dsrl"):
        metrics = json.loads((tmp_path / f"runs/eval-{name}/eval_info.json").read_text())["per_task"][0]["metrics"]
        assert len(metrics["successes"]) == 2
