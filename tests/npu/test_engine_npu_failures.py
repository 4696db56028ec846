"""What an engine on SIMULATED devices says when a rank is lost or stands still: which one, and within seconds."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator

import psutil
import pytest
from npu_engine import Launched
from prompts import PROMPTS

from nanovllm_dist.client import DistLLM
from nanovllm_dist.errors import NanoVLLMError
from nanovllm_dist.sampling_params import SamplingParams

pytestmark = [pytest.mark.npu, pytest.mark.slow]

TIMEOUT = 4  # seconds that HCCL waits for a rank
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[Launched]:
    engine = Launched(
        {"HCCL_EXEC_TIMEOUT": str(TIMEOUT)},
        model="smollm2-135m",
        device="npu",
        tp=2,
        launcher="local",
        graph_mode="eager",
    )
    yield engine
    engine.stop()


def worker(engine: Launched, rank: int) -> psutil.Process:
    """The process of a rank, told by what it was started with."""
    names = [process for process in psutil.Process(engine.process.pid).children(recursive=True) if is_worker(process)]
    return sorted(names, key=lambda process: process.pid)[rank]


def is_worker(process: psutil.Process) -> bool:
    return "nanovllm_dist.workers.worker" in process.cmdline()


def error_while_running(engine: Launched, signal_number: int) -> tuple[str, float]:
    """(what a client is told, seconds until then) when rank 1 gets a signal in the middle of its requests."""
    llm = DistLLM.connect(*engine.address())
    try:
        stream = llm.stream(PROMPTS[0], LONG)
        next(stream)
        worker(engine, rank=1).send_signal(signal_number)
        struck = time.monotonic()
        try:
            outputs = list(stream)
        except NanoVLLMError as error:
            return str(error), time.monotonic() - struck
        return str(outputs[-1].error or outputs[-1]), time.monotonic() - struck
    finally:
        llm.close()


def test_a_rank_that_is_killed_ends_requests_with_its_name(engine: Launched) -> None:
    message, seconds = error_while_running(engine, signal.SIGKILL)
    assert re.search(r"rank 1|worker-1", message), message
    assert seconds < 15


def test_a_rank_that_stands_still_ends_requests_after_hccls_timeout(engine: Launched) -> None:
    message, seconds = error_while_running(engine, signal.SIGSTOP)
    assert "rank 0 is gone" in message  # the one that waited: HCCL ends its process
    assert seconds < TIMEOUT + 20

    engine.process.wait(30)
    assert "worker-0 was ended by signal 6" in engine.errors()
    assert f"rank 0 of 2 waited {TIMEOUT} s for the others" in engine.errors()
