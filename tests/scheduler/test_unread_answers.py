"""What a client leaves unread is bounded: one that does not keep up is dropped and told, and nobody else is harmed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from coordinator_rig import Engine, Sink, output_of, submit

from nanovllm_dist.connection import Connection
from nanovllm_dist.errors import EngineDeadError
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import Channel

LIMIT = 4_000
LONG = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "UNREAD_LIMIT", LIMIT)
    monkeypatch.setattr(wire, "READ_REPORT", LIMIT // 8)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path, step_seconds=0.002)
    yield engine
    engine.stop()


class Silent:
    """A client that asks and asks, and does not say that it has read anything."""

    def __init__(self, engine: Engine, hello: bool = True) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.channel = Channel(self._context, engine.address, wire.RESULT_FRAME_LIMIT, None)
        if not hello:
            return
        self.say(wire.Hello())
        frame = self.channel.receive(5)  # a status, before it asks for what needs an engine that is ready
        while frame is not None and wire.decode_server(frame).info is None:  # type: ignore[union-attr]
            frame = self.channel.receive(5)

    def say(self, message: wire.ClientMessage) -> None:
        self.channel.send(wire.encode(message))

    def ask(self, first: int, count: int) -> None:
        for request_id in range(first, first + count):
            self.say(wire.AddRequest(request_id, wire.pack_ints([1]), LONG))

    def all_there_is(self) -> list[bytes]:
        frames = []
        while (frame := self.channel.receive(0.3)) is not None:
            frames.append(frame)
        return frames

    def close(self) -> None:
        self.channel.close()
        self._context.term()


def wait_until_requests_are_aborted(watching: Connection) -> wire.EngineStats:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stats = watching.stats()
        if stats.finished.get("abort") and not stats.running + stats.waiting:
            return stats
        time.sleep(0.02)
    raise AssertionError("nothing was aborted")


def test_a_client_that_reads_nothing_is_dropped_told_why_and_others_go_on(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    watching = engine.connect()
    silent = Silent(engine)
    silent.ask(0, 200)
    _, other = submit(watching, [5], max_tokens=40)

    stats = wait_until_requests_are_aborted(watching)

    frames = silent.all_there_is()
    assert LIMIT / 2 < sum(map(len, frames[:-1])) <= LIMIT
    end = wire.decode_server(frames[-1])
    assert isinstance(end, wire.ProtocolError)
    with pytest.raises(EngineDeadError, match=r"4000 bytes of answers were left unread.*connect again"):
        raise end.error.to_exception()
    assert stats.free_blocks == stats.num_blocks
    assert stats.finished["abort"] > 100
    lines = [record.getMessage() for record in caplog.records if "left unread" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("client ")
    other.wait()
    assert other.tokens == output_of([5], 40)
    silent.close()


def test_what_a_dropped_client_asks_afterwards_is_refused_until_it_says_hello(engine: Engine) -> None:
    watching, silent = engine.connect(), Silent(engine)
    silent.ask(0, 200)
    wait_until_requests_are_aborted(watching)
    silent.all_there_is()

    silent.ask(1000, 1)
    silent.say(wire.FramesRead(10**9))
    refusals = silent.all_there_is()
    silent.say(wire.Hello())
    silent.ask(2000, 1)
    answers = [wire.decode_server(frame) for frame in silent.all_there_is()]

    assert len(refusals) == 1
    assert isinstance(wire.decode_server(refusals[0]), wire.ProtocolError)
    assert [end.reason for answer in answers if isinstance(answer, wire.Outputs) for end in answer.finished] == [
        "length"
    ]
    silent.close()


def test_a_dropped_client_is_known_again_only_when_it_has_read(engine: Engine) -> None:
    watching, silent = engine.connect(), Silent(engine)
    silent.ask(0, 200)
    wait_until_requests_are_aborted(watching)

    for _ in range(20):
        silent.say(wire.Hello())
        silent.ask(1000, 200)
    frames = silent.all_there_is()

    assert sum(map(len, frames)) < 2 * LIMIT + 2**16
    silent.say(wire.FramesRead(10**9))
    silent.say(wire.Hello())
    assert any(isinstance(wire.decode_server(frame), wire.EngineStatus) for frame in silent.all_there_is())
    silent.close()


def test_one_that_never_says_hello_is_told_so_and_little_more(engine: Engine) -> None:
    engine.connect()
    stranger = Silent(engine, hello=False)
    stranger.ask(0, 2000)
    frames = stranger.all_there_is()
    assert frames
    assert all(isinstance(wire.decode_server(frame), wire.ProtocolError) for frame in frames)
    assert sum(map(len, frames)) <= 2**16
    stranger.close()


def test_a_client_that_reads_what_it_gets_gets_many_times_the_limit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "UNREAD_LIMIT", 25_000)  # each round is 18,000 bytes
    connection = engine.connect()
    for _ in range(4):
        sinks = [submit(connection, [index], max_tokens=50)[1] for index in range(30)]
        for index, sink in enumerate(sinks):
            end = sink.wait()
            assert isinstance(end, wire.Finished)
            assert sink.tokens == output_of([index], 50)
    assert connection.error is None


def test_a_client_that_was_held_up_for_too_long_finds_an_error_and_not_silence(engine: Engine) -> None:
    class Slow(Sink):
        def on_token(self, token: int, logprobs: wire.TokenLogprobs | None) -> None:
            released.wait()

    released = threading.Event()
    watching, connection = engine.connect(), engine.connect()
    slow = [Slow() for _ in range(100)]
    for index, sink in enumerate(slow):
        connection.submit(index, wire.pack_ints([1]), LONG, sink)
    wait_until_requests_are_aborted(watching)

    released.set()

    ends = [sink.wait() for sink in slow]
    errors = [end for end in ends if isinstance(end, EngineDeadError)]
    assert errors
    assert all("left unread" in str(error) for error in errors)
    with pytest.raises(EngineDeadError, match="left unread"):
        submit(connection, [1])


@pytest.mark.parametrize("by_counters", [False, True], ids=["by a request", "by asking for counters"])
def test_a_client_whose_connection_was_renewed_while_it_asked_nothing_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, by_counters: bool
) -> None:
    connection = engine.connect()
    monkeypatch.setattr("nanovllm_dist.connection._PROBE_AFTER_SECONDS", 0.1)
    engine.forget_clients()
    time.sleep(0.2)
    if by_counters:
        assert connection.stats().running == 0
    _, sink = submit(connection, [3], max_tokens=5)
    sink.wait()
    assert sink.tokens == output_of([3], 5)
