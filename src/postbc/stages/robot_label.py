"""`postbc robot label`: look at the episodes of a session again, and label or relabel them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import tyro

from postbc.progress import say
from postbc.robot.labels import user_name
from postbc.schemas import Port, schema


@schema
class RobotLabel:
    """A page with a film of every episode of a session, to label and relabel them; one or several people at once, offline."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Of a session: the --output of `postbc robot rollout`. Its labels.jsonl is appended to, nothing else is written."""
    host: str = "127.0.0.1"
    """Where the page listens: this machine alone, or 0.0.0.0 for every machine of the network, which then needs the link's token."""
    port: Port = 8017
    """0 takes a free one."""
    token: str | None = None
    """What the link must have; by default made anew where one is needed."""
    terminal: bool = False
    """No page: list the unlabelled episodes and ask for each here."""
    by: str | None = None
    """Who decides, in the terminal; by default this machine's user (the page asks)."""

    def run(self) -> None:
        """Serve until interrupted, or ask until every episode has an answer."""
        if self.terminal:
            from postbc.robot.asking import ask

            ask(self.folder, self.by or user_name())
            return
        from postbc.robot.page import serve

        with serve(self.folder, self.host, self.port, self.token) as server:
            say("Ctrl-C closes it.")
            with contextlib.suppress(KeyboardInterrupt):
                server.wait()
