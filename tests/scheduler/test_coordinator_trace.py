"""A client has steps traced over real sockets: times in order, bounded, for one client at a time, and only if asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import zmq
from coordinator_rig import Engine, output_of, submit

from nanovllm_dist.errors import EngineDeadError, InvalidRequestError
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import Channel

SECONDS = 5.0


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path, world_size=2, step_seconds=0.002, max_steps_in_flight=2)
    yield engine
    engine.stop()


def test_the_times_of_a_step_are_in_order_across_processes(engine: Engine) -> None:
    connection = engine.connect()
    window = connection.trace_steps(10, skip=4)
    sinks = [submit(connection, [one], max_tokens=30)[1] for one in range(3)]
    trace = window.result(SECONDS)

    assert [one.step for one in trace.steps] == list(range(4, 14))
    assert {one.rows for one in trace.steps} == {3}
    assert [[one.step for one in rank] for rank in trace.ranks] == [list(range(4, 14))] * 2
    for step, rank in zip(trace.steps, trace.ranks[0], strict=True):
        times = [step.planned, step.sent, step.answered, step.committed, step.delivering, step.delivered]
        assert times == sorted(times)
        assert step.planned <= rank.received <= rank.launched <= rank.done <= step.answered
        assert rank.done - rank.received >= 0.002
    assert all(later.planned > earlier.planned for earlier, later in pairwise(trace.steps))
    for one, sink in enumerate(sinks):
        sink.wait()
        assert sink.tokens == output_of([one], 30)


def test_nothing_is_kept_unless_someone_asks(engine: Engine) -> None:
    connection = engine.connect()
    submit(connection, [1], max_tokens=20)[1].wait()
    assert engine.coordinator._trace is None
    assert [rank.traced for rank in engine.ranks] == [[], []]

    window = connection.trace_steps(3)
    submit(connection, [1], max_tokens=20)[1].wait()
    assert len(window.result(SECONDS).steps) == 3
    assert engine.coordinator._trace is None
    assert [rank.traced for rank in engine.ranks] == [[], []]


def test_a_trace_ends_when_the_requests_do(engine: Engine) -> None:
    connection = engine.connect()
    window = connection.trace_steps(1000)
    submit(connection, [1], max_tokens=6)[1].wait()
    trace = window.result(SECONDS)
    assert 6 <= len(trace.steps) <= 7  # the end of a request is seen a step late
    assert [len(times) for times in trace.ranks] == [len(trace.steps)] * 2


def test_who_asks_again_ends_the_trace_that_runs(engine: Engine) -> None:
    first, second = engine.connect(), engine.connect()
    _, sink = submit(first, [1], max_tokens=None)
    window = first.trace_steps(wire.TRACE_LIMIT)
    while len(sink.tokens) < 8:
        time.sleep(0.005)
    nothing = second.trace_steps(0)
    assert len(window.result(SECONDS).steps) >= 6
    assert nothing.result(SECONDS) == wire.StepTrace([], [[], []])
    again = [first.trace_steps(5), first.trace_steps(4)]
    assert len(again[1].result(SECONDS).steps) == 4
    assert len(again[0].result(SECONDS).steps) < 5


@pytest.mark.parametrize("wrong", [(-1, 0), (wire.TRACE_LIMIT + 1, 0), (5, -1), (5, 2**31)])
def test_a_trace_out_of_bounds_is_refused_by_the_client(engine: Engine, wrong: tuple[int, int]) -> None:
    connection = engine.connect()
    with pytest.raises(InvalidRequestError, match="can be traced"):
        connection.trace_steps(*wrong)
    assert connection.stats().running == 0


@pytest.mark.parametrize("frame", [wire.TraceSteps(wire.TRACE_LIMIT + 1), wire.TraceSteps(5)], ids=["large", "unknown"])
def test_a_trace_that_must_not_be_is_refused_by_the_engine(engine: Engine, frame: wire.TraceSteps) -> None:
    """Too many steps; or a client that never said hello, and so could wait for ever."""
    engine.connect()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = Channel(context, engine.address, wire.CLIENT_FRAME_LIMIT, None)
    stranger.send(wire.encode(frame))
    answer = stranger.receive(5)
    assert answer is not None
    assert isinstance(wire.decode_server(answer), wire.ProtocolError)
    assert engine.coordinator._trace is None
    stranger.close()
    context.term()


def test_a_client_that_left_its_trace_behind_harms_nobody(engine: Engine) -> None:
    leaving, staying = engine.connect(), engine.connect()
    leaving.trace_steps(5)
    leaving.close()
    _, sink = submit(staying, [1], max_tokens=20)
    sink.wait()
    assert sink.tokens == output_of([1], 20)
    window = staying.trace_steps(2)
    submit(staying, [1], max_tokens=5)
    assert len(window.result(SECONDS).steps) == 2


def test_when_the_engine_dies_a_trace_ends_with_its_error(engine: Engine) -> None:
    connection = engine.connect()
    window = connection.trace_steps(1000)
    _, sink = submit(connection, [1], max_tokens=None)
    while not sink.tokens:
        time.sleep(0.005)
    engine.ranks[1].vanish.set()
    with pytest.raises(EngineDeadError):
        window.result(SECONDS)
    with pytest.raises(EngineDeadError):
        connection.trace_steps(5)
