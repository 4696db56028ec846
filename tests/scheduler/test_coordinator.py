"""The coordinator over real sockets: clients and ranks come, misbehave and go, and every request ends once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from coordinator_rig import BLOCKS, Engine, Sink, model_config, output_of, submit
from simulation import VOCAB, make_config

from nanovllm_dist.connection import Connection
from nanovllm_dist.errors import EngineConnectError, EngineDeadError, InvalidRequestError, NanoVLLMError, WireError
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.scheduler.coordinator import Coordinator
from nanovllm_dist.scheduler.outbox import Outbox
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import Channel


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.stop()


def test_the_cache_is_the_smallest_that_any_rank_measured(tmp_path: Path) -> None:
    engine = Engine(tmp_path, world_size=3)
    info = engine.connect().wait_ready(10)
    assert info.num_blocks == BLOCKS
    assert [rank.allocated for rank in engine.ranks] == [BLOCKS] * 3
    engine.stop()
    assert engine.exit_code == 0


def test_two_clients_get_their_own_tokens(engine: Engine) -> None:
    first, second = engine.connect(), engine.connect()
    sinks = [
        (prompt, submit(client, prompt, max_tokens=9)[1]) for client in (first, second) for prompt in ([1], [2, 3])
    ]
    for prompt, sink in sinks:
        end = sink.wait()
        assert isinstance(end, wire.Finished)
        assert (end.reason, sink.tokens) == ("length", output_of(prompt, 9))
        assert len(sink.ends) == 1


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([VOCAB + 1], {}, "outside the vocabulary"),
        ([1] * 80, {}, "at most"),
        ([1], {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
    ],
)
def test_a_bad_request_is_told_why_and_others_go_on(
    engine: Engine, prompt: list[int], params: dict[str, object], message: str
) -> None:
    connection = engine.connect()
    _, good = submit(connection, [5], max_tokens=20)
    _, bad = submit(connection, prompt, **params)

    end = bad.wait()

    assert isinstance(end, wire.Finished)
    assert end.error is not None
    with pytest.raises(InvalidRequestError, match=message):
        raise end.error.to_exception()
    good.wait()
    assert good.tokens == output_of([5], 20)


def test_a_request_that_does_not_decode_is_refused_and_its_clients_others_go_on(engine: Engine) -> None:
    connection = engine.connect()
    _, running = submit(connection, [5], max_tokens=30)
    request_id, bad = connection.next_id(), Sink()
    connection._sinks[request_id] = bad
    frame = wire.encode(wire.AddRequest(request_id, b"", SamplingParams(), [], 2**40))

    connection._queue(frame)

    end = bad.wait()
    assert isinstance(end, wire.Finished)
    assert end.error is not None
    with pytest.raises(InvalidRequestError, match=r"2147483647 - at `\$\[5\]`"):
        raise end.error.to_exception()
    running.wait()
    assert running.tokens == output_of([5], 30)


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1garbage", b"\x91" * 50_000, b"\x92\xa8AddRequest\x01", b"\x91\xa5Hello\x01"]
)
@pytest.mark.parametrize("door", ["clients", "workers"])
def test_a_garbage_frame_harms_nobody(engine: Engine, frame: bytes, door: str) -> None:
    connection = engine.connect()
    _, running = submit(connection, [5], max_tokens=30)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    endpoint = engine.address if door == "clients" else engine.worker_endpoint
    stranger = Channel(context, endpoint, wire.CLIENT_FRAME_LIMIT, None)
    stranger.send(frame)
    if door == "clients":
        answer = stranger.receive(5)
        assert answer is not None
        assert isinstance(wire.decode_server(answer), wire.ProtocolError | wire.EngineStatus)
    stranger.close()
    context.term()
    running.wait()
    assert running.tokens == output_of([5], 30)


def test_garbage_without_end_does_not_fill_the_log(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = Channel(context, engine.address, wire.CLIENT_FRAME_LIMIT, None)
    for _ in range(500):
        stranger.send(b"garbage")
    answers = [stranger.receive(5) for _ in range(500)]
    stranger.close()
    context.term()
    assert all(answers)
    assert 0 < len([record for record in caplog.records if record.name == "coordinator"]) <= 20


@pytest.mark.parametrize("door", ["clients", "workers"])
def test_an_oversized_frame_harms_nobody(engine: Engine, door: str) -> None:
    connection = engine.connect()
    endpoint, limit = (engine.address, wire.CLIENT_FRAME_LIMIT)
    if door == "workers":
        endpoint, limit = engine.worker_endpoint, wire.RESULT_FRAME_LIMIT
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = Channel(context, endpoint, limit, None)
    stranger.send(bytes(limit + 1))
    _, good = submit(connection, [5], max_tokens=5)
    good.wait()
    stranger.close()
    context.destroy(linger=0)
    assert good.tokens == output_of([5], 5)


def test_a_rank_that_speaks_nonsense_is_ignored_until_it_speaks_sense(engine: Engine) -> None:
    engine.coordinator._from_worker(wire.worker_identity(0), b"nonsense")
    engine.coordinator._from_worker(
        wire.worker_identity(0), wire.encode(wire.StepResult(0, 999, wire.pack_ints([1]), [], []))
    )
    _, sink = submit(engine.connect(), [4], max_tokens=4)
    sink.wait()
    assert sink.tokens == output_of([4], 4)


def test_an_abort_ends_a_request_once_and_frees_its_blocks(tmp_path: Path) -> None:
    engine = Engine(tmp_path, step_seconds=0.01)
    connection = engine.connect()
    request_id, sink = submit(connection, [1, 2], max_tokens=None)
    while not sink.tokens:
        time.sleep(0.005)
    connection.abort([request_id, request_id, 12345])
    end = sink.wait()
    assert isinstance(end, wire.Finished)
    assert end.reason == "abort"
    connection.abort([request_id])
    stats = connection.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)
    assert len(sink.ends) == 1
    engine.stop()


def test_requests_of_a_client_that_vanished_are_ended(tmp_path: Path) -> None:
    engine = Engine(tmp_path, step_seconds=0.01)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    vanishing = Channel(context, engine.address, wire.CLIENT_FRAME_LIMIT, None)
    watching = engine.connect()
    add = wire.AddRequest(1, wire.pack_ints([1]), SamplingParams(max_tokens=None, ignore_eos=True))
    vanishing.send(wire.encode(wire.Hello()))
    vanishing.send(wire.encode(add))
    assert vanishing.receive(5) is not None
    vanishing.close()
    context.destroy(linger=0)
    deadline = time.monotonic() + 5
    while watching.stats().running and time.monotonic() < deadline:
        time.sleep(0.02)
    stats = watching.stats()
    assert (stats.running, stats.free_blocks) == (0, stats.num_blocks)
    assert stats.finished == {"abort": 1}
    engine.stop()


def test_when_a_rank_is_lost_every_request_ends_with_an_error_within_seconds(tmp_path: Path) -> None:
    engine = Engine(tmp_path, world_size=2, step_seconds=0.02)
    connection = engine.connect()
    sinks = [submit(connection, [index], max_tokens=None)[1] for index in range(12)]
    while not sinks[0].tokens:
        time.sleep(0.005)
    engine.ranks[1].vanish.set()
    for sink in sinks:
        end = sink.wait()
        error = end.error.to_exception() if isinstance(end, wire.Finished) and end.error else end
        assert isinstance(error, EngineDeadError)
        assert "rank 1" in str(error)
        assert len(sink.ends) == 1
    engine.thread.join(10)
    assert engine.exit_code == 1
    with pytest.raises(EngineDeadError, match="rank 1"):
        submit(connection, [1])
    engine.stop()


def test_when_a_step_does_not_end_every_request_ends_with_an_error_that_says_so(tmp_path: Path) -> None:
    engine = Engine(tmp_path, step_timeout=0.5)
    connection = engine.connect()
    engine.ranks[0].step_seconds = 1.5
    sinks = [submit(connection, [index], max_tokens=None)[1] for index in range(12)]
    for sink in sinks:
        end = sink.wait()
        error = end.error.to_exception() if isinstance(end, wire.Finished) and end.error else end
        assert isinstance(error, EngineDeadError)
        assert "rank 0 has not answered step 0 within 0.5 s" in str(error)
        assert len(sink.ends) == 1
    engine.thread.join(10)
    assert engine.exit_code == 1
    engine.stop()


def test_a_failing_rank_during_start_reports_its_error(tmp_path: Path) -> None:
    spec = wire.CoordinatorSpec(
        config=make_config(), client_endpoint=f"ipc://{tmp_path}/c", worker_endpoint=f"ipc://{tmp_path}/w"
    )
    coordinator = Coordinator(spec, model_config())
    thread = threading.Thread(target=coordinator.run, daemon=True)
    thread.start()
    connection = Connection(coordinator.listening.client_endpoint)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel = Channel(context, f"ipc://{tmp_path}/w", 1000, None, wire.worker_identity(0))
    channel.send(wire.encode(wire.WorkerFailed(wire.ErrorInfo("weights", "model.norm.weight is missing"))))
    with pytest.raises(NanoVLLMError, match=r"model\.norm\.weight is missing"):
        connection.wait_ready(10)
    thread.join(10)
    connection.close()
    channel.close()
    context.term()


def test_stopping_ends_running_requests_with_abort(tmp_path: Path) -> None:
    engine = Engine(tmp_path, step_seconds=0.01)
    connection = engine.connect()
    _, sink = submit(connection, [1], max_tokens=None)
    while not sink.tokens:
        time.sleep(0.005)
    engine.coordinator.stop()
    end = sink.wait()
    assert isinstance(end, wire.Finished)
    assert end.reason == "abort"
    engine.thread.join(10)
    assert engine.exit_code == 0
    engine.stop()


def test_512_requests_through_two_clients_on_a_tenth_of_the_cache_end_exactly_once(tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    engine = Engine(tmp_path, max_steps_in_flight=2)
    clients = [engine.connect(), engine.connect()]
    live: list[tuple[Connection, int, list[int], int, Sink]] = []
    for index in range(512):
        client = clients[index % 2]
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
        max_tokens = rng.randint(1, 30)
        request_id, sink = submit(client, prompt, max_tokens=max_tokens)
        live.append((client, request_id, prompt, max_tokens, sink))
        if rng.random() < 0.1:
            victim = rng.choice(live)
            victim[0].abort([victim[1]])
    for _client, _id, prompt, max_tokens, sink in live:
        end = sink.wait()
        assert isinstance(end, wire.Finished)
        expected = output_of(prompt, max_tokens)
        assert sink.tokens == (expected if end.reason == "length" else expected[: len(sink.tokens)])
    stats = clients[0].stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)
    assert sum(stats.finished.values()) == 512
    assert all(len(sink.ends) == 1 for *_rest, sink in live)
    engine.stop()


def test_outputs_that_are_cut_into_many_frames_lose_nothing(engine: Engine) -> None:
    engine.coordinator._outbox = Outbox(frame_limit=400)
    connection = engine.connect()
    sinks = [([index], submit(connection, [index], max_tokens=9)[1]) for index in range(40)]
    for prompt, sink in sinks:
        sink.wait()
        assert sink.tokens == output_of(prompt, 9)
        assert len(sink.ends) == 1


@pytest.mark.parametrize("request_id", [-1, 2**31, 2**40])
def test_a_request_id_that_cannot_be_answered_is_refused(engine: Engine, request_id: int) -> None:
    connection = engine.connect()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = Channel(context, engine.address, wire.CLIENT_FRAME_LIMIT, None)
    stranger.send(wire.encode(wire.AddRequest(request_id, wire.pack_ints([1]), SamplingParams(ignore_eos=True))))
    answer = stranger.receive(5)
    assert answer is not None
    assert isinstance(wire.decode_server(answer), wire.ProtocolError)
    stranger.close()
    context.term()
    _, good = submit(connection, [5], max_tokens=5)
    good.wait()
    assert good.tokens == output_of([5], 5)


@pytest.mark.parametrize("bad_words", [[b"abc"], [b""], [b"\0" * 4 * 200], [b"\0" * 4] * 10_000], ids=len)
def test_malformed_bad_words_never_reach_a_worker(engine: Engine, bad_words: list[bytes]) -> None:
    connection, sink = engine.connect(), Sink()
    connection.submit(connection.next_id(), wire.pack_ints([1]), SamplingParams(), sink, bad_words=bad_words)
    end = sink.wait()
    assert isinstance(end, wire.Finished)
    assert end.error is not None
    assert "bad_words" in end.error.message


def test_clients_that_left_make_room_for_new_ones(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm_dist.scheduler.clients._MAX_CLIENTS", 4)
    for _ in range(12):
        Connection(engine.address).close()
    staying = [engine.connect() for _ in range(4)]
    with pytest.raises(EngineConnectError, match="4 clients are connected"):
        Connection(engine.address)
    assert all(connection.stats().running == 0 for connection in staying)


def test_a_client_whose_connection_was_lost_and_renewed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm_dist.connection._PROBE_AFTER_SECONDS", 0.2)
    engine = Engine(tmp_path)
    connection = engine.connect()
    engine.forget_clients()
    connection._sinks[7] = sink = Sink()
    end = sink.wait()
    assert isinstance(end, EngineDeadError)
    assert "connect again" in str(end)
    engine.stop()


def test_a_sink_that_breaks_the_connection_ends_every_request_with_what_it_raised(tmp_path: Path) -> None:
    class Broken(Sink):
        def on_token(self, token: int, logprobs: wire.TokenLogprobs | None) -> None:
            raise ValueError("a bug of the caller")

    engine = Engine(tmp_path, step_seconds=0.05)  # so the other one's 63 tokens take three seconds
    connection, broken = engine.connect(), Broken()
    _, other = submit(connection, [1], max_tokens=None)
    connection.submit(connection.next_id(), wire.pack_ints([2]), SamplingParams(), broken)

    end = other.wait()

    assert isinstance(end, EngineDeadError)
    assert str(end) == "the connection broke: ValueError: a bug of the caller"
    assert (other.ends, broken.ends, connection.error) == ([end], [end], end)
    engine.stop()


def test_time_without_requests_is_not_time_without_a_step(engine: Engine) -> None:
    connection = engine.connect()
    submit(connection, [1], max_tokens=2)[1].wait()
    time.sleep(1.0)

    submit(connection, [1], max_tokens=50)
    stats = connection.stats()

    assert stats.seconds_since_step < 0.9


def test_an_address_where_nothing_answers_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(EngineConnectError, match="does not exist"):
        Connection(f"ipc://{tmp_path}/nobody")
    with pytest.raises(EngineConnectError, match="ipc://"):
        Connection("http://localhost")
    with pytest.raises(EngineConnectError, match="key file"):
        Connection("tcp://127.0.0.1:1")


def test_a_prompt_over_the_frame_limit_is_refused_before_it_is_sent(engine: Engine) -> None:
    with pytest.raises(WireError, match="over the limit"):
        submit(engine.connect(), [1] * (wire.CLIENT_FRAME_LIMIT // 4 + 1))


def test_a_step_all_of_whose_tokens_want_the_most_logprobs_is_answered_whatever_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as small:
        small.setattr(wire, "RESULT_FRAME_LIMIT", 1_000)
        engine = Engine(tmp_path)
    connection = engine.connect()
    most = wire.TokenLogprobs(bytes(4 * 65), bytes(4 * 65), 2**31 - 1)
    engine.ranks[0].prompt_logprobs = [(0, 1, [most] * 31)]

    _, sink = submit(connection, [1] * 32, max_tokens=3, prompt_logprobs=64)

    end = sink.wait()
    assert isinstance(end, wire.Finished)
    assert (end.reason, sink.tokens) == ("length", output_of([1] * 32, 3))
    engine.stop()


def test_texts_that_are_the_clients_matter_do_not_make_steps_larger(engine: Engine) -> None:
    texts = {"stop": ["x" * 4000] * 60, "include_stop_str_in_output": True, "bad_words": ["y" * 4000] * 60}
    connection = engine.connect()
    sinks = [submit(connection, [index], max_tokens=4, **texts)[1] for index in range(8)]
    for index, sink in enumerate(sinks):
        sink.wait()
        assert sink.tokens == output_of([index], 4)
    assert engine.ranks[0].largest_frame < 4000
