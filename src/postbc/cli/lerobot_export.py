"""`postbc lerobot export`."""

from __future__ import annotations

from postbc.cli import options
from postbc.lerobot.export import Export
from postbc.progress import say


def parse(args: list[str]) -> Export:
    chosen: Export = options(Export, "lerobot export", args)
    return chosen


def run(config: Export) -> None:
    say(
        f"Written: {config.run()}. Next: lerobot-eval --policy.path={config.output} --env.type=… (pip install lerobot_policy_postbc)"
    )
