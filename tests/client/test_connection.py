"""The connection under stress: it never blocks whoever uses it, whatever the engine does or leaves undone."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import TIMES, RecordingSink, ScriptedEngine

from nanovllm_dist import connection as connection_module
from nanovllm_dist.connection import Connection
from nanovllm_dist.errors import EngineConnectError, EngineDeadError, InvalidRequestError
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire import messages as wire

MORE_THAN_ANY_QUEUE_HOLDS = 5000  # ZeroMQ's own are of 1,000 a side


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


@pytest.mark.parametrize("closed", [False, True], ids=["abort", "close"])
def test_more_requests_than_one_message_may_name_are_aborted_in_several(
    engine: ScriptedEngine, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    monkeypatch.setattr(wire, "ABORT_LIMIT", 2)
    _client, connection = connect(engine, aside)
    ids = [submit(connection, RecordingSink()) for _ in range(5)]
    for _ in ids:
        engine.receive()

    if closed:
        connection.close()
    else:
        connection.abort(ids, "stop")

    reason = "abort" if closed else "stop"
    assert [engine.receive()[1] for _ in range(3)] == [
        wire.AbortRequests(some, reason) for some in (ids[:2], ids[2:4], ids[4:])
    ]
    connection.close()


@pytest.mark.timeout(30)
def test_a_client_that_a_too_large_frame_cut_off_ends_its_requests_and_can_be_closed(
    engine: ScriptedEngine, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "RESULT_FRAME_LIMIT", 1000)
    monkeypatch.setattr(connection_module, "_PROBE_AFTER_SECONDS", 0.1)
    client, connection = connect(engine, aside)
    sink = RecordingSink()
    request_id = submit(connection, sink)
    engine.receive()

    engine.send(client, finished(*[request_id] * 200))

    assert sink.done.wait(10)
    assert isinstance(sink.ends[0], EngineDeadError)
    aside.submit(connection.close).result(10)


@pytest.mark.timeout(30)
def test_a_cut_off_client_can_be_closed_at_once(
    engine: ScriptedEngine, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "RESULT_FRAME_LIMIT", 1000)
    client, connection = connect(engine, aside)
    sink = RecordingSink()
    submit(connection, sink)
    engine.receive()
    engine.send(client, wire.EngineStatus("x" * 2000))
    time.sleep(0.2)

    aside.submit(connection.close).result(10)

    assert isinstance(sink.ends[0], EngineDeadError)


@pytest.mark.timeout(30)
def test_close_does_not_wait_for_ever_for_a_listener_that_never_returns(
    engine: ScriptedEngine, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_CLOSE_SECONDS", 0.3, raising=False)
    client, connection = connect(engine, aside)
    stuck, other = RecordingSink(hold=threading.Event()), RecordingSink()
    stuck_id, _ = submit(connection, stuck), submit(connection, other)
    engine.send(client, finished(stuck_id))
    assert stuck.told.wait(10)

    aside.submit(connection.close).result(10)

    assert isinstance(other.ends[0], EngineDeadError)
    stuck.hold.set()  # type: ignore[union-attr]


@pytest.mark.timeout(30)
def test_an_end_that_another_thread_knows_of_is_told_by_the_thread_that_tells_all_else(
    engine: ScriptedEngine, aside: ThreadPoolExecutor
) -> None:
    client, connection = connect(engine, aside)
    held, other = RecordingSink(hold=threading.Event()), RecordingSink()
    held_id, _ = submit(connection, held), submit(connection, other)
    engine.send(client, finished(held_id))
    assert held.told.wait(10)

    connection.fail(EngineDeadError("worker-0 is gone"))

    assert not other.told.wait(0.2)  # two answers of one request would be told their ends at once
    held.hold.set()  # type: ignore[union-attr]
    assert other.done.wait(10)
    assert str(other.ends[0]) == "worker-0 is gone"
    assert len(held.ends) == len(other.ends) == 1


@pytest.mark.timeout(30)
def test_an_engine_whose_socket_is_gone_is_not_waited_for(engine: ScriptedEngine, aside: ThreadPoolExecutor) -> None:
    _client, connection = connect(engine, aside)
    waiting = RecordingSink()
    submit(connection, waiting)

    Path(engine.address.removeprefix("ipc://")).unlink()

    assert waiting.done.wait(5)
    assert "its socket does not exist any more" in str(waiting.ends[0])


@pytest.mark.timeout(30)
def test_a_client_says_in_a_fork_that_it_belongs_to_another_process(
    engine: ScriptedEngine, aside: ThreadPoolExecutor
) -> None:
    _client, connection = connect(engine, aside)
    reading, writing = os.pipe()
    if not os.fork():
        try:
            connection.stats()
        except EngineDeadError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)

    assert b"DistLLM.connect" in os.read(reading, 1000)
    os.wait()
    os.close(reading)
    os.close(writing)


KEYS = {"server_public": "k" * 40, "client_public": "k" * 40, "client_secret": "k" * 40}


@pytest.mark.parametrize(
    ("address", "keys", "message"),
    [
        ("tcp://localhost", KEYS, "tcp://HOST:PORT"),
        ("tcp://no such host:12", KEYS, "tcp://HOST:PORT"),
        ("tcp://127.0.0.1:1", {**KEYS, "client_public": "short"}, "its key file"),
        ("tcp://127.0.0.1:1", {**KEYS, "client_public": 7}, r"key file .*client_public"),
        ("tcp://127.0.0.1:1", {"server_public": "k" * 40}, r"key file .*client_public"),
        ("tcp://127.0.0.1:1", [1], "key file"),
    ],
    ids=str,
)
def test_a_bad_address_or_key_file_is_a_connect_error(tmp_path: Path, address: str, keys: object, message: str) -> None:
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    with pytest.raises(EngineConnectError, match=message):
        Connection(address, tmp_path / "keys.json", timeout=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 2**40}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"cache_salt": 7}, "cache_salt"),
        ({"cache_salt": "\ud800"}, "UTF-8"),
    ],
    ids=str,
)
def test_options_that_the_wire_does_not_take_are_refused_before_they_are_sent(
    engine: ScriptedEngine, aside: ThreadPoolExecutor, options: dict[str, Any], message: str
) -> None:
    _client, connection = connect(engine, aside)
    running = RecordingSink()
    submit(connection, running)
    engine.receive()

    with pytest.raises(InvalidRequestError, match=message):
        connection.submit(connection.next_id(), b"", SamplingParams(), RecordingSink(), **options)
    with pytest.raises(InvalidRequestError, match="64"):
        connection.submit(connection.next_id(), b"", SamplingParams(logit_bias={2**70: 1.0}), RecordingSink())

    next_id = submit(connection, RecordingSink())
    _client, message_after = engine.receive()
    assert isinstance(message_after, wire.AddRequest)
    assert message_after.id == next_id
    assert running.ends == []
    connection.close()
