"""The numbers of a LeRobotDataset in memory: LeRobot's own reading of an item, at a tenth of the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postbc.data.lerobot_files import is_number

BLOCK = 4096


def hold_numbers(dataset: Any) -> None:
    """Let a LeRobotDataset read its numbers (states, actions, times) from memory: the same items, to the bit."""
    numbers = [name for name, feature in dataset.meta.features.items() if is_number(feature)]
    dataset.reader.hf_dataset = Columns(dataset.hf_dataset, numbers)


class Columns:
    """Stands where LeRobot's reader has its `datasets.Dataset`, and answers what the reader asks of it with the same tensors.

    That library takes about half a millisecond for each of the questions that an item is (it copies all features for every answer),
    a table in memory microseconds. Other columns than numbers (pictures, text) stay where they are.

    Args:
        table: the `datasets.Dataset`, with LeRobot's transform to tensors.
        numbers: columns to hold.
    """

    def __init__(self, table: Any, numbers: list[str]) -> None:
        self._table = table
        held = table.select_columns(numbers)
        blocks = [
            {name: torch.stack(rows) for name, rows in held[i : i + BLOCK].items()} for i in range(0, len(table), BLOCK)
        ]  # stacked at once: a tensor for each row takes many times the memory of its numbers
        self._numbers = {name: torch.cat([block[name] for block in blocks]) for name in numbers}
        others = [name for name in table.column_names if name not in numbers]
        self._others = table.select_columns(others) if others else None

    def __len__(self) -> int:
        return len(self._table)

    def __getattr__(self, name: str) -> Any:
        if name == "_table":  # while being unpickled
            raise AttributeError(name)
        return getattr(self._table, name)

    def __getitem__(self, key: Any) -> Any:
        """A column, which can be indexed by a list of rows; or a row, or several, as a dictionary."""
        if isinstance(key, str):
            return _Column(self._numbers[key]) if key in self._numbers else self._table[key]
        others = {} if self._others is None else self._others[key]
        one = isinstance(key, int)
        return {**others, **{name: v[key].clone() if one else v[key].unbind() for name, v in self._numbers.items()}}


class _Column:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return self.values[rows].unbind()
