"""What the README and the docs show is run: Python blocks as they stand, commands through the parser, links to files that exist."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from made import save_policy, write_demonstrations
from postbc import cli
from postbc.policies import load_policy

ROOT = Path(__file__).parent.parent
SIZES = {
    "episodes=200": "episodes=2",
    "budget_env_steps=100_000": "budget_env_steps=300",
    "initial_steps=16_000": "initial_steps=100",
    "initial_steps=5_000": "initial_steps=100, budget_env_steps=300",
    "budget_env_steps=1_000_000, num_envs=40": "budget_env_steps=300, num_envs=4",
    "sampling_steps=5, ft_denoising_steps=5, n_steps=75, batch_size=1500": "sampling_steps=4, n_steps=3, batch_size=20",
}  # the same calls, in seconds
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if line.startswith("postbc ") and not line.startswith("postbc --"):
                    yield pytest.param(line, id=f"{page.stem}: {line[:60]}")


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    args = shlex.split(line, comments=True)[1:]
    words = cli.find(args)
    assert words, f"no such command: {line}"
    if "--help" not in args:
        cli.command(words).parse(args[len(words.split()) :])


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_demonstrations(tmp_path / "lift.hdf5", trajectories=6, length=12)
    for name in ("bc", "postbc"):  # what the pages before would have left in runs/
        save_policy(tmp_path / "runs" / name / "seed_0")
    torch.manual_seed(0)
    for block in blocks(page, "python"):
        for full, few in SIZES.items():
            block = block.replace(full, few)
        exec(compile(block, str(page), "exec"), {"__name__": "docs"})


def test_the_finetuner_of_the_docs_is_where_its_generator_is(tmp_path, monkeypatch):
    """Networks, replay and what it plays; "meta" stands for a GPU, on which nothing can be drawn here."""
    (block,) = blocks(ROOT / "docs/bring-your-own-finetuner.md", "python")
    module = {"__name__": "docs"}
    exec(compile(block.split("# everything above")[0], "docs", "exec"), module)
    policy, device = load_policy(save_policy(tmp_path)), torch.device("meta")
    monkeypatch.setattr("postbc.nn.fill_uniform", lambda *_: None)
    chooser = module["Chooser"](policy, SimpleNamespace(device=device))
    assert {p.device for p in chooser.networks.parameters()} == {device}
    memory = chooser.memory(10, 2)
    assert memory.rows.device == device
    state = torch.empty(3, memory.widths[0], device=device)
    for chunk, stored in (chooser.act(state, None), chooser.act_base(state, None)):
        assert chunk.device == stored.device == device
        assert chunk.shape == (3, policy.chunk, policy.action_dim)
    agent = chooser.agent()
    assert agent.critics is chooser.networks["critics"]


@pytest.mark.gpu
def test_the_finetuner_of_the_docs_runs_on_a_gpu(tmp_path, monkeypatch):
    test_python_blocks_run(ROOT / "docs/bring-your-own-finetuner.md", tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target in re.findall(r"<img[^>]*src=\"([^\"]+)\"", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} shows {target}"
