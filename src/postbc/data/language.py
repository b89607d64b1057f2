"""Which task an episode is of, as an observation: "language", one-hot among the tasks that the data name; and vectors for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from postbc.data.episodes import Dataset
from postbc.data.libero_tasks import KITCHEN, find_tasks
from postbc.errors import InputError, require
from postbc.files import write_bytes

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


def sentences_of(tasks: Sequence[str]) -> dict[str, str]:
    """Task -> its instruction in words, of tasks as data name them: of LIBERO's from the name; else the name is the instruction.

    "libero/kitchen" and what else :func:`postbc.data.libero_tasks.find_tasks` knows after "libero/" stands for all that it means.
    """
    found: dict[str, str] = {}
    for name in tasks:
        known = find_tasks(name.removeprefix("libero/")) if name.startswith("libero/") or name in KITCHEN else ()
        found |= {task.name: task.sentence for task in known} or {name: name}
    return found


def pooled_output(sentences: Sequence[str], model: str) -> np.ndarray:
    """(E, V) float32: what BERT makes of each sentence as a whole, its pooled output (LIBERO's `get_task_embs`, "bert").

    Args:
        model: of transformers: a folder, or a name that is fetched where the hub is reachable.

    Raises:
        InputError: transformers is not installed, or the model cannot be had, or has no trained pooled output.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise InputError("A language model needs transformers.", found=str(error), remedy="pip install transformers") from None
    import torch

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network, about = AutoModel.from_pretrained(model, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise InputError("The language model cannot be had.", key="model", found=f"{model}: {str(error)[:300]}",
                         expected="a folder of one, or a name of the hub's",
                         remedy="where the hub is out of reach, download it elsewhere and give the folder") from error  # fmt: skip
    with torch.no_grad():
        output = network.eval()(**tokenizer(list(sentences), padding=True, return_tensors="pt"))
    pooled = getattr(output, "pooler_output", None)
    if pooled is None or any("pooler" in name for name in about["missing_keys"]):
        raise InputError(
            "This model has no pooled output that was trained.", key="model", found=model, expected="BERT, as bert-base-cased"
        )
    return np.asarray(pooled.float().numpy())


def write_vectors(file: str | Path, sentences: Mapping[str, str], model: str) -> Path:
    """The vectors of `sentences` (task -> words) into a file for :func:`read_vectors`; its header says model and sentences.

    Raises:
        InputError: as :func:`pooled_output`, or the file cannot be written.
    """
    from safetensors.numpy import save

    vectors = pooled_output(list(sentences.values()), model)
    said = {"model": model, "sentences": json.dumps(dict(sentences), ensure_ascii=False)}
    write_bytes(Path(file), save({task: vectors[k] for k, task in enumerate(sentences)}, said))
    return Path(file)
