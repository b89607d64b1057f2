"""Which task an episode is of, as an observation: "language", one-hot among the tasks that the data name, and vectors for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from postbc.data.episodes import Dataset
from postbc.errors import InputError, require

LANGUAGE = "language"


def with_language(dataset: Dataset) -> Dataset:
    """The dataset with the observation "language" (N, E) float32: one-hot, the episode's task among `dataset.tasks`.

    Raises:
        InputError: the data do not say which task an episode is of.
    """
    unknown = [episode.name for episode in dataset if episode.task is None]
    require(not unknown, "The data do not say which task an episode is of.", file=dataset.source,
            key=f"data/{unknown[0]} attribute task" if unknown else None, expected="tasks by name",
            remedy="leave out --data.language, or record them again with `postbc demos collect`")  # fmt: skip
    rows = dict(zip(dataset.tasks, np.eye(len(dataset.tasks), dtype=np.float32)))
    told = (
        replace(episode, observations={**episode.observations, LANGUAGE: np.tile(rows[str(episode.task)], (len(episode), 1))})
        for episode in dataset
    )
    return replace(dataset, episodes=tuple(told))


def read_vectors(file: str | Path, tasks: Sequence[str], needed: Sequence[str]) -> np.ndarray:
    """Vectors of a language model for tasks, (E, V) float32, a row a task; of a task that is not `needed` and not there, zeros.

    Args:
        file: safetensors with a vector (V,) for each task, under its name.

    Raises:
        InputError: the file is not one, or a needed task's vector is missing, of another width or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        vectors = load_file(Path(file))
    except (OSError, SafetensorError) as error:
        raise InputError("The file of language vectors cannot be read.", file=file, key="language", found=str(error)[:200],
                         expected="one-hot, or a safetensors file with a vector for each task, under its name") from error  # fmt: skip
    missing = [task for task in needed if task not in vectors]
    require(not missing, "The file of language vectors lacks tasks.", file=file, key=missing[0] if missing else None,
            found=", ".join(sorted(vectors))[:300])  # fmt: skip
    shape = next((vectors[task].shape for task in tasks if task in vectors), ())
    for task in tasks:
        row = vectors.get(task)
        good = row is None or (row.ndim == 1 and row.shape == shape and row.size and np.isfinite(row.astype(np.float32)).all())
        require(good, "A language vector cannot be used.", file=file, key=task, found=f"shape {None if row is None else row.shape}",
                expected=f"finite numbers of shape {shape if len(shape) == 1 else '(V,)'}")  # fmt: skip
    return np.stack([np.asarray(vectors.get(task, np.zeros(shape)), np.float32) for task in tasks])
