"""Changes to a file's tree, for the tests that a file from outside is refused or is what it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from postbc.errors import InputError
from postbc.files import load_tree, save_tree
from postbc.policies import load_policy

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)  # fmt: skip


def mutate(tree: dict[str, Any], data: st.DataObject) -> None:
    """One change somewhere in a file's tree: a value of another kind, a missing key, one too many."""
    place, keys = tree, ["?"]
    while isinstance(place, (dict, list)) and place and keys:
        keys = sorted(place, key=str) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inside = place[key]
        if not isinstance(inside, (dict, list)) or not inside or data.draw(st.booleans()):
            break
        place = inside
    what = data.draw(st.sampled_from(["replace", "remove", "add", "size"]))
    if what == "remove":
        del place[key]
    elif what == "add" and isinstance(place, dict):
        place[data.draw(st.text(max_size=5))] = data.draw(JUNK)
    elif what == "size" and isinstance(place[key], torch.Tensor):
        place[key] = data.draw(st.sampled_from([place[key][:1], place[key].double(), place[key] * math.nan]))
    else:
        place[key] = data.draw(JUNK | st.sampled_from([10**9, -1, 0, 2**20, 1e-9]))


def mutated_policy(path: Path, data: st.DataObject) -> Any:
    """The policy that a file says after one change; None where it is refused, by name."""
    tree = load_tree(path)
    mutate(tree, data)
    save_tree(path, tree)
    try:
        return load_policy(path)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017
        return None
