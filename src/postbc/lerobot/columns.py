"""The numbers of a LeRobotDataset in memory: LeRobot's own reading of an item, at a tenth of the time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postbc.data.lerobot_files import matrix

#: What `torch.tensor` makes of Python's numbers, which is how LeRobot reads a cell.
DTYPES = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}


class Columns:
    """Stands where LeRobot's reader has its `datasets.Dataset`, and answers what the reader asks of it with the same tensors.

    That library takes about half a millisecond for each of the questions that an item is (it copies all features for every answer),
    a table in memory microseconds. Other columns than whole ones of numbers (pictures, text) stay where they are.

    Args:
        table: the `datasets.Dataset`, with LeRobot's transform to tensors.
        shapes: of the features that are numbers, as info.json has them: one number is (1,).
    """

    def __init__(self, table: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._table, self._numbers = table, {}
        arrow = table.with_format("arrow")
        for name, shape in shapes.items():
            column = arrow.select_columns([name])[:].column(0)
            if column.null_count == 0:
                values = matrix(column, "the dataset", name, int(np.prod(shape)))
                values = values.astype(DTYPES[values.dtype.kind]).reshape(len(values), *(shape if shape != (1,) else ()))
                self._numbers[name] = torch.from_numpy(values)
        others = [name for name in table.column_names if name not in self._numbers]
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
            stored = self._table if self._others is None else self._others
            return _Column(self._numbers[key]) if key in self._numbers else stored[key]
        others = {} if self._others is None else self._others[key]
        one = isinstance(key, int)
        return {**others, **{name: v[key].clone() if one else v[key].unbind() for name, v in self._numbers.items()}}


class _Column:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return self.values[rows].unbind()
