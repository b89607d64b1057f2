"""The house as docs/architecture.md has it: an arrow goes only down the list, there is no circle, and nobody imports `cli`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import postbc

ROOT = Path(postbc.__file__).parent
ORDER = [
    "errors", "disk", "schemas", "seeding", "devices", "files", "metrics", "progress", "runs", "engines", "board", "jobs", "nn", "data",
    "policies",
    "posterior", "pretraining", "value_dice", "statistics", "sequential", "environments", "agents", "evaluation", "saliency", "videos",
    "robot", "training", "stages", "experiments", "theory", "doctor", "lerobot", "cli",
]  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Modules of the house that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("postbc"):
            assert node.module is not None
            yield from [f"postbc.{n.name}" for n in node.names] if node.module == "postbc" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (n.name for n in node.names if n.name.startswith("postbc"))


def test_an_arrow_goes_only_one_way() -> None:
    against = []
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        for module in imports(path):
            other = module.split(".")[1]
            if other != "__version__" and ORDER.index(other) > ORDER.index(own):
                against.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not against


def test_no_circle_of_modules_when_they_are_imported() -> None:
    def at_import(path: Path) -> set[str]:
        found = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("postbc."):
                found.add(str(node.module))
        return found

    graph = {"postbc." + ".".join(p.relative_to(ROOT).with_suffix("").parts): at_import(p) for p in ROOT.rglob("*.py")}
    graph = {name.removesuffix(".__init__"): edges for name, edges in graph.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way, name])
        if name not in done:
            for edge in sorted(graph.get(name, ())):
                visit(edge, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_protocol_is_asked_by_isinstance() -> None:
    """From Python 3.12 on that looks past the submodules of a torch.nn.Module: `postbc.policies.base.lacking` asks instead."""
    assert not [path for path in ROOT.rglob("*.py") if "runtime_checkable" in path.read_text(encoding="utf-8")]
