"""A comparison as a page and as Markdown, with videos of what the cameras saw."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path

import jinja2

from postbc.data.readers import list_cameras
from postbc.errors import InputError
from postbc.files import write_text
from postbc.progress import progress
from postbc.robot.catalogue import frames
from postbc.robot.comparison import Comparison, Tournament, letter
from postbc.robot.labels import Label
from postbc.robot.recorded import episode_file
from postbc.videos import write_video

PAGE, MARKDOWN, VIDEOS = "report.html", "report.md", "videos"


def verdict(found: Comparison) -> str:
    """The answer in a sentence."""
    rounds = f"{found.rounds} round{'' if found.rounds == 1 else 's'}"
    if found.best is not None:
        others = ", ".join(row.name for row in found.agents if row.name != found.best)
        return f"{found.best} is better than {others} (known after {rounds}; a wrong claim has probability {found.level:g} at most)."
    known = [f"{p.better} is better than {p.second if p.better == p.first else p.first}" for p in found.pairs if p.better]
    said = "; ".join([*known, "the others are not told apart" if known else "it is not known which is better"])
    return f"After {rounds} {said}."


def chosen(tournament: Tournament, labels: Mapping[int, Label], number: int) -> list[tuple[int, int, Label]]:
    """(agent, episode, label) of the first `number` successes and failures of each agent."""
    found = []
    for agent in range(tournament.agents):
        for label in ("success", "failure"):
            of = [e for e, turn in sorted(tournament.turns.items()) if turn.agent == agent and labels.get(e) == label]
            found += [(agent, episode, labels[episode]) for episode in of[:number]]
    return found


def film(folder: Path, tournament: Tournament, labels: Mapping[int, Label], number: int, fps: float) -> tuple[list[str], str]:
    """Write videos, those that are there left alone; their names, and why there are none."""
    shown = chosen(tournament, labels, number)
    cameras = list_cameras(episode_file(folder, shown[0][1])) if shown else ()
    if not cameras:
        return [], "" if not number else "no videos: the robot has no camera"
    names: list[str] = []
    with progress("Videos", len(shown)) as bar:
        for agent, episode, label in shown:
            name = f"{VIDEOS}/{letter(agent)}_{label}_{episode:05}.mp4"
            try:
                if not (folder / name).exists():
                    write_video(folder / name, frames(episode_file(folder, episode), cameras[:1], 256), max(1, round(fps)))
            except InputError as error:
                return names, f"no videos: {error.what}"
            names.append(name)
            bar.advance()
    return names, ""


def write_report(folder: Path, found: Comparison, videos: list[str], note: str) -> None:
    """report.html and report.md beside the episodes."""
    loader = jinja2.FunctionLoader(
        lambda name: importlib.resources.files("postbc.robot").joinpath(name).read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(
        loader=loader, autoescape=lambda name: str(name).startswith("comparison.html"), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["percent"] = lambda share: f"{share:.2f}"
    for template, name in (("comparison.html.j2", PAGE), ("comparison.md.j2", MARKDOWN)):
        text = environment.get_template(template).render(found=found, verdict=verdict(found), videos=videos, note=note)
        write_text(folder / name, text.rstrip("\n") + "\n")
