"""A rank that stands still ends every request within `step_timeout`, says so, and is not left behind.

A tiny model with random weights, real processes, real signals.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engine_sandbox import SMALL, Sandbox, model, sandbox, wait_for

from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import EngineDeadError
from nanovllm_dist.launcher.engine import Engine
from nanovllm_dist.sampling_params import SamplingParams

__all__ = ["model", "sandbox"]  # fixtures
pytestmark = pytest.mark.slow

ENDLESS = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True, detokenize=False)
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)


class Requests(threading.Thread):
    """Endless requests in a thread; `error` is what ended them."""

    def __init__(self, client: DistLLM, count: int) -> None:
        super().__init__(daemon=True)
        self.client, self.count = client, count
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.client.generate([[1 + index, 2, 3] for index in range(self.count)], ENDLESS, use_tqdm=False)
        except Exception as error:
            self.error = error


@pytest.fixture
def engine(model: str, sandbox: Sandbox, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A local engine of `request.param` ranks with a step timeout of three seconds."""
    options: dict[str, Any] = {"launcher": "local", "tensor_parallel_size": request.param, "step_timeout": 3.0}
    engine = Engine.start(EngineConfig(model=model, **options, **SMALL))
    yield engine
    engine.stop()


@pytest.mark.parametrize(
    ("engine", "victim", "ranks"),
    [(1, "worker-0", "rank 0 has"), (2, "worker-1", "ranks 0 to 1 have")],
    indirect=["engine"],
)
def test_a_rank_that_stands_still_ends_every_request_and_leaves_nothing(
    engine: Engine, sandbox: Sandbox, victim: str, ranks: str
) -> None:
    client = DistLLM.connect(engine.address)
    requests = Requests(client, count=5)
    wait_for(lambda: client.stats().generated_tokens > 10)

    os.kill(engine.pids[victim], signal.SIGSTOP)
    stopped = time.monotonic()

    requests.join(20)
    assert isinstance(requests.error, EngineDeadError)
    assert 2.5 < time.monotonic() - stopped < 10
    assert f"{ranks} not answered step" in str(requests.error)
    assert "within 3 s" in str(requests.error)
    assert "--step-timeout" in str(requests.error)
    with pytest.raises(EngineDeadError):
        engine.wait(timeout=10)
    client.close()
    engine.stop()
    sandbox.assert_empty()


@pytest.mark.parametrize("engine", [2], indirect=True)
def test_an_engine_that_is_idle_for_longer_than_a_step_may_take_goes_on(engine: Engine, sandbox: Sandbox) -> None:
    client = DistLLM.connect(engine.address)
    client.generate([[1, 2, 3]], SHORT, use_tqdm=False)

    assert not engine.wait(timeout=5)

    assert len(client.generate([[1, 2, 3]], SHORT, use_tqdm=False)[0].token_ids) == 4
    client.close()
    engine.stop()
    sandbox.assert_empty()
