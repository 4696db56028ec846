"""An engine that is not ready in time says what to do, by what it was doing."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import cast

import pytest

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.deployment import Deployment


@pytest.mark.parametrize(
    ("phase", "remedy"),
    [("warmup", "graphs were being recorded, or compiled.*--startup-timeout"), ("load", "what the processes wait for")],
)
def test_the_remedy_is_that_of_the_phase(phase: str, remedy: str) -> None:
    config = EngineConfig(model="m", startup_timeout=9.0)
    deployment = cast(Deployment, SimpleNamespace(config=config, processes=[]))

    report = Deployment.timeout_report(deployment, phase)

    assert report.startswith("the engine was not ready after startup_timeout=9 seconds: ")
    assert re.search(remedy, report)
