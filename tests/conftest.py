"""What all tests share: GPU tests are skipped where there is no CUDA, and nothing is sent to anybody's W&B."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.pop("WANDB_PROJECT", None)
torch.set_num_threads(1)  # networks of the tests' sizes lose by a second thread


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
