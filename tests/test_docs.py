"""What the README and the docs show is run: Python blocks as they stand, commands through the parser, links to files that exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from made import save_policy, write_demonstrations
from postbc import cli

ROOT = Path(__file__).parent.parent
SIZES = {
    "episodes=200": "episodes=2",
    "budget_env_steps=100_000": "budget_env_steps=300",
    "initial_steps=16_000": "initial_steps=100",
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target in re.findall(r"<img[^>]*src=\"([^\"]+)\"", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} shows {target}"
