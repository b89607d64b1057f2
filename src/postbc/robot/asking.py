"""Labels asked for in the terminal: no page, no film, whatever shows the episodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from postbc.progress import say
from postbc.robot.catalogue import Catalogue, session_folder
from postbc.robot.labels import Label, Labels

KEYS: dict[str, Label] = {"s": "success", "f": "failure", "d": "discard"}
QUESTION = "[s]uccess, [f]ailure, [d]iscard, [u]ndo, Enter: leave it, [q]uit? "


def ask(folder: str | Path, by: str, answer: Callable[[str], str] = input) -> None:
    """List the unlabelled episodes and ask for each; a decision is on the disk before the next question.

    Args:
        folder: the session's.
        by: who decides.
        answer: question -> what the person types; EOFError ends the asking, as q does.

    Raises:
        InputError: the folder is no session, or its labels cannot be read or written.
    """
    folder = session_folder(folder)
    labels, catalogue = Labels(folder), Catalogue(folder)
    episodes = catalogue.all()
    left = [n for n in episodes if n not in labels.current()]
    say(
        f"{folder}: {len(left)} of {len(episodes)} episodes have no label" + (f": {', '.join(map(str, left))}" if left else ".")
    )
    place = 0
    while place < len(left):
        episode = left[place]
        if episode in labels.current():  # meanwhile, by somebody else
            place += 1
            continue
        found = episodes[episode]
        say(f"Episode {episode}: " + (found.error or f"{found.steps} steps, {found.file}"))
        try:
            typed = answer(QUESTION).strip().lower()
        except EOFError:
            break
        if typed in ("q", "quit"):
            break
        if typed in ("u", "undo"):
            undone = labels.undo(by)
            say("There is nothing of yours to take back." if undone is None else f"Episode {undone} has no label now.")
            if undone in left[:place]:
                place = left.index(undone)
        elif (label := next((word for key, word in KEYS.items() if typed in (key, word)), None)) is not None:
            labels.set(episode, label, by)
            place += 1
        elif typed == "":
            place += 1
        else:
            say(f"{typed!r} is none of these.")
    count = len([n for n in catalogue.all() if n not in labels.current()])
    say("Every episode has a label." if count == 0 else f"{count} episodes have no label yet.")
