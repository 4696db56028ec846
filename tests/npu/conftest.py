"""Tests of the Ascend path; those marked `npu` run Huawei's torch_npu over a stand-in for CANN.

`scripts/test --npu` sets the stand-in's environment; elsewhere they are skipped. There torch_npu is imported once,
here: tests find `torch.npu` and `torch.ops.npu` as they are, and need no import that would fail in the normal suite.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
from standin.environment import SIMULATION


def has_standin() -> bool:
    """Whether this process was started with the stand-in, in an environment that has torch_npu."""
    return bool(os.environ.get(SIMULATION)) and importlib.util.find_spec("torch_npu") is not None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "npu: runs torch_npu over a stand-in for CANN (scripts/test --npu)")
    if has_standin():
        importlib.import_module("torch_npu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_standin():
        return
    for item in items:
        if item.get_closest_marker("npu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs scripts/test --npu"))
