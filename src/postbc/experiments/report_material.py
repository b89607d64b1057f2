"""What else lies in run directories besides results: configurations, versions, pictures of the posterior, videos, policies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from postbc.demonstrations.training_set import TrainingSetConfig, load_training_sets
from postbc.errors import InputError
from postbc.experiments.action_distribution import ActionDistribution, action_distribution

Found = list[tuple[str, Path]]  # (name relative to the given directories, path)


@dataclass(frozen=True)
class Stage:
    """One run directory."""

    name: str
    kind: str
    """posterior, pretraining, finetuning, evaluation or run."""
    path: Path
    config: dict[str, Any]
    """Flattened config.yaml: "data.chunk" -> 4."""
    versions: dict[str, Any]


def find(directories: Iterable[Path], pattern: str) -> Found:
    """Files of a name pattern under the directories, each once, hidden directories left out."""
    found: dict[Path, str] = {}
    for directory in directories:
        for path in sorted(directory.rglob(pattern)):
            inside = path.relative_to(directory)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                found.setdefault(path.resolve(), str(Path(directory.resolve().name) / inside))
    return [(name, path) for path, name in found.items()]


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> {"a.b": value}."""
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {k: v for key, value in values.items() for k, v in flatten(value, f"{prefix}{key}.").items()}


def stages(directories: Sequence[Path]) -> list[Stage]:
    """Every run directory with a config.yaml, told apart by what lies in it; unreadable files are left out."""
    result = []
    for name, path in find(directories, "config.yaml"):
        folder = path.parent
        try:
            config = flatten(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        except (yaml.YAMLError, OSError, UnicodeDecodeError):
            continue
        names = {p.name for p in folder.iterdir()}
        marks: list[tuple[str, Callable[[str], bool]]] = [
            ("finetuning", lambda n: n == "results.json"),
            ("pretraining", lambda n: n == "policy.safetensors"),
            ("posterior", lambda n: n.startswith("posterior_seed_")),
            ("evaluation", lambda n: n in ("evaluation.json", "episodes.jsonl")),
        ]
        kind = next((kind for kind, mark in marks if any(mark(n) for n in names)), "run")
        result.append(Stage(str(Path(name).parent), kind, folder, config, read_json(folder / "versions.json", {})))
    return result


def read_json(path: Path, default: Any) -> Any:
    """A JSON file's content, or `default` if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def shared_and_differing(configs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Fields equal in all configurations with their values, and the names of those that differ."""
    keys = list(dict.fromkeys(k for config in configs for k in config))
    missing = object()
    same = [k for k in keys if all(config.get(k, missing) == configs[0].get(k, missing) for config in configs)]
    return {k: configs[0][k] for k in same}, [k for k in keys if k not in same]


def within(found: Found, megabytes: float, number: int) -> tuple[Found, int]:
    """The first `number` files as long as they fit into the size together, and how many were left out."""
    chosen: Found = []
    room = megabytes * 1e6
    for name, path in found:
        size = path.stat().st_size
        if len(chosen) < number and size <= room:
            chosen.append((name, path))
            room -= size
    return chosen, len(found) - len(chosen)


def posterior_pictures(directories: Sequence[Path]) -> Found:
    """PNG files of the posterior stage: "posterior" in the file's name or in that of a directory above it (no former report's)."""

    def of_a_report(path: Path) -> bool:
        return any((folder / "report.html").exists() for folder in list(path.parents)[:2])

    found = find(directories, "*.png")
    return [(name, path) for name, path in found if "posterior" in name.lower() and not of_a_report(path)]


def videos(directories: Sequence[Path]) -> Found:
    """MP4 files, successes and failures of every directory in turn, so that a limit leaves some of each."""
    lanes: dict[tuple[str, str], Found] = {}
    for name, path in find(directories, "*.mp4"):
        lanes.setdefault((str(Path(name).parent), path.name.split("_")[0]), []).append((name, path))
    longest = max(map(len, lanes.values()), default=0)
    return [lane[k] for k in range(longest) for lane in lanes.values() if k < len(lane)]


@dataclass(frozen=True)
class Pictured:
    """An action distribution and what it is of."""

    distribution: ActionDistribution
    methods: dict[str, str]
    """Label -> pretraining."""
    seed: int
    data: str


def policies(found: Sequence[Stage], label: Callable[[str, float | None], str]) -> tuple[list[Pictured], list[str]]:
    """The action distributions of the pretrained policies that share their demonstrations, one a training set; and notes.

    Args:
        found: stages; those of kind pretraining are pictured, with the posterior whose windows are theirs if there is one.
        label: (pretraining, α or σ) -> name.
    """
    lots: dict[str, list[tuple[Stage, dict[str, Any]]]] = {}
    for stage in found:
        head = read_json(stage.path / "policy.json", None)
        if stage.kind == "pretraining" and isinstance(head, dict):
            data = {k: v for k, v in stage.config.items() if k.startswith("data.")}
            lots.setdefault(json.dumps(data, sort_keys=True, default=str), []).append((stage, head))
    pictured, notes = [], []
    for lot in lots.values():
        try:
            pictured.append(_picture(lot, [s.path for s in found if s.kind == "posterior"], label))
        except (InputError, OSError, LookupError, TypeError, ValueError) as error:
            notes.append(f"The actions of {', '.join(s.name for s, _ in lot)} are not pictured: {str(error).splitlines()[0]}")
    return pictured, notes


def _picture(
    lot: Sequence[tuple[Stage, dict[str, Any]]], posteriors: Sequence[Path], label: Callable[[str, float | None], str]
) -> Pictured:
    from postbc.policies.diffusion import DiffusionPolicy

    seeds = set.intersection(*(set(head["seeds"]) for _, head in lot))
    if not seeds:
        raise ValueError("they have no seed in common")
    seed = min(seeds)
    values = {k.removeprefix("data."): v for k, v in lot[0][0].config.items() if k.startswith("data.")}
    config = TrainingSetConfig(**{**values, "demonstrations": Path(values["demonstrations"])})
    sets = load_training_sets(config, [seed])
    named, methods = {}, {}
    for stage, head in lot:
        about = head["about"]
        name = label(about["method"], about.get("posterior_weight") or about.get("sigma"))
        if name not in named:
            named[name] = DiffusionPolicy.load(stage.path).select([head["seeds"].index(seed)])
            methods[name] = about["method"]
    order = sorted(named, key=lambda n: (["bc", "sigma-bc", "postbc"].index(methods[n]), n))[:4]
    factor = None
    for path in posteriors:
        factor = factor or _factor(path, sets, seed)
    found = action_distribution({n: named[n] for n in order}, sets[0].windows, factor)
    return Pictured(found, {n: methods[n] for n in order}, seed, Path(config.demonstrations).name)


def _factor(path: Path, sets: Any, seed: int) -> Any:
    from postbc.posterior import Posterior
    from postbc.pretraining_command import posterior_factor

    try:
        return posterior_factor(Posterior.load(path), sets, [seed])
    except (InputError, LookupError, ValueError):  # of other windows, or of other seeds
        return None
