"""`postbc lerobot import`."""

from __future__ import annotations

from postbc.cli import options
from postbc.lerobot.policy import Import
from postbc.progress import say


def parse(args: list[str]) -> Import:
    chosen: Import = options(Import, "lerobot import", args)
    return chosen


def run(config: Import) -> None:
    say(f"Written: {config.run()}. Next: postbc evaluate --policy {config.output} --environment …")
