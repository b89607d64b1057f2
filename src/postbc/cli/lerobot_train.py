"""`postbc lerobot train`."""

from __future__ import annotations

from postbc.lerobot.train import Asked, split, train


def parse(args: list[str]) -> Asked:
    command = split(args)
    command.options()  # help, and a slip of the keyboard
    return command


def run(config: Asked) -> None:
    train(config)
