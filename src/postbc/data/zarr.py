"""Stub until the reader stands."""
from __future__ import annotations

from pathlib import Path
from typing import Any


def is_zarr(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".zip"


def list_zarr(path: str | Path) -> Any:
    raise NotImplementedError


def read_zarr(path: str | Path, **kwargs: Any) -> Any:
    raise NotImplementedError
