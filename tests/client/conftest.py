"""An engine that a test speaks for, and threads for what must not hang it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedEngine]:
    """Of one test."""
    engine = ScriptedEngine(tmp_path)
    yield engine
    engine.close()


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    """Threads for the client, while the test speaks for the engine; one that hangs is not waited for."""
    executor = ThreadPoolExecutor(2)
    yield executor
    executor.shutdown(wait=False)
