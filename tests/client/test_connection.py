"""The connection under stress: it never blocks whoever uses it, whatever the engine does or leaves undone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from scripted_engine import TIMES, RecordingSink, ScriptedEngine

from nanovllm_dist.connection import Connection
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire import messages as wire

MORE_THAN_ANY_QUEUE_HOLDS = 5000  # ZeroMQ's own are of 1,000 a side


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(tmp_path)
    yield engine
    engine.close()


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    """A thread for what must not hang; one that does is not waited for."""
    executor = ThreadPoolExecutor(2)
    yield executor
    executor.shutdown(wait=False)


def connect(engine: ScriptedEngine, aside: ThreadPoolExecutor) -> tuple[bytes, Connection]:
    """A connected client, and its identity on the engine's side."""
    connecting: Future[Connection] = aside.submit(Connection, engine.address)
    return engine.welcome(), connecting.result(10)


def submit(connection: Connection, sink: RecordingSink) -> int:
    request_id = connection.next_id()
    connection.submit(request_id, wire.pack_ints([1, 2]), SamplingParams(), sink)
    return request_id


def finished(*ids: int) -> wire.Outputs:
    return wire.Outputs(b"", b"", [wire.Finished(one, "abort", TIMES) for one in ids])


def test_any_number_of_requests_can_be_sent_and_aborted_while_ends_come_in(
    engine: ScriptedEngine, aside: ThreadPoolExecutor
) -> None:
    client, connection = connect(engine, aside)
    slow, next_one = RecordingSink(hold=threading.Event()), RecordingSink()
    engine.send(client, finished(submit(connection, slow), submit(connection, next_one)))
    assert slow.told.wait(10)  # from here on the connection's thread reads nothing

    def burst() -> int:
        last = 0
        for _ in range(MORE_THAN_ANY_QUEUE_HOLDS):
            last = submit(connection, RecordingSink())
            connection.abort([last])
        return last

    sending = aside.submit(burst)
    threading.Timer(0.5, slow.hold.set).start()  # type: ignore[union-attr]

    last = sending.result(20)
    assert next_one.done.wait(10)
    while (message := engine.receive()[1]) != wire.AbortRequests([last]):
        assert isinstance(message, wire.AddRequest | wire.AbortRequests)
    connection.close()
