"""What crosses a process boundary is plain MessagePack, typed, bounded, and nothing else gets in."""

from __future__ import annotations

import time

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError, NanoVLLMError, WireError
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire import messages as wire

SAMPLES: list[tuple[object, object]] = [
    (
        wire.AddRequest(7, wire.pack_ints([1, 2]), SamplingParams(temperature=0.0, stop=["a"]), [b"\0" * 4], 2, "s"),
        wire.decode_client,
    ),
    (wire.AbortRequests([1, 2], "stop"), wire.decode_client),
    (wire.FramesRead(2**40), wire.decode_client),
    (
        wire.Outputs(
            wire.pack_ints([1]),
            wire.pack_ints([5]),
            [wire.Finished(1, "stop", wire.RequestTimes(0.1, 0.2, 0.3, 4, 0), 5, wire.ErrorInfo("config", "no"))],
            [(0, wire.TokenLogprobs(b"", b"", 1))],
            [wire.PromptLogprobs(1, [])],
        ),
        wire.decode_server,
    ),
    (
        wire.Step(0, 3, wire.pack_ints([1]), wire.pack_ints([1]), b"", b"", [
            wire.NewRow(1, wire.pack_ints([9]), 1, 0, 0, wire.pack_ints([4]), 2**63 - 1, SamplingParams(), [])
        ]),
        wire.decode_to_worker,
    ),
    (wire.StepResult(0, 3, wire.pack_ints([2]), [], []), wire.decode_from_worker),
    (wire.TraceSteps(256, 1000), wire.decode_client),
    (
        wire.StepTrace(
            [wire.StepTimes(7, 2, 33, 0.1, 0.2, 0.5, 0.6, 0.7, 0.8)], [[wire.RankTimes(7, 0.25, 0.3, 0.4)], []]
        ),
        wire.decode_server,
    ),
    (wire.TracedSteps([wire.RankTimes(7, 0.25, 0.3, 0.4)]), wire.decode_from_worker),
    (wire.WorkerFailed(wire.ErrorInfo.of(ConfigError("x"))), wire.decode_from_worker),
]  # fmt: skip


@pytest.mark.parametrize(("message", "decode"), SAMPLES, ids=lambda value: type(value).__name__)
def test_a_message_comes_back_as_it_was_sent(message, decode) -> None:  # type: ignore[no-untyped-def]
    assert decode(wire.encode(message)) == message


def test_a_frame_is_plain_messagepack_that_any_reader_can_open() -> None:
    frame = wire.encode(wire.AbortRequests([1, 2]))
    assert msgpack.unpackb(frame) == ["AbortRequests", [1, 2], "abort"]


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_a_message_but_never_anything_else(frame: bytes) -> None:
    for decode in (wire.decode_client, wire.decode_server, wire.decode_to_worker, wire.decode_from_worker):
        try:
            message = decode(frame)
        except WireError:
            continue
        assert isinstance(message, msgspec.Struct)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(WireError):
        wire.decode_client(b"\x91" * 100_000)


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(WireError):
        wire.decode_client(wire.encode(wire.Shutdown()))


def test_invalid_sampling_params_are_refused_on_arrival_too() -> None:
    frame = msgpack.packb(["AddRequest", 1, b"\1\0\0\0", {"temperature": -1.0}, [], 0, ""])
    with pytest.raises(WireError, match="temperature"):
        wire.decode_client(frame)


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="over the limit"):
        wire.decode_client(b"\xc4" + b"\0" * (wire.CLIENT_FRAME_LIMIT + 1))


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_packed_integers_come_back(values: list[int]) -> None:
    assert wire.unpack_ints(wire.pack_ints(values)) == values


def test_bytes_that_are_no_whole_integers_are_refused() -> None:
    with pytest.raises(WireError):
        wire.unpack_ints(b"\0\0\0")


@pytest.mark.parametrize("kind", NanoVLLMError.__subclasses__())
def test_a_typed_error_keeps_its_type_and_message_over_the_wire(kind: type[NanoVLLMError]) -> None:
    rebuilt = wire.ErrorInfo.of(kind("what happened")).to_exception()
    assert type(rebuilt) is kind
    assert str(rebuilt) == "what happened"


def test_ids_to_abort_are_so_many_that_the_coordinator_is_not_held_up_by_one_client() -> None:
    most = wire.AbortRequests([2**31 - 1] * wire.ABORT_LIMIT)
    assert wire.decode_client(wire.encode(most)) == most

    frame = wire.encode(wire.AbortRequests([1] * 15_000_000))
    began = time.process_time()
    with pytest.raises(WireError, match="length <= 65536"):
        wire.decode_client(frame)
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    "request_", [wire.TraceSteps(wire.TRACE_LIMIT + 1), wire.TraceSteps(-1), wire.TraceSteps(5, -1)]
)
def test_a_trace_has_bounds(request_: wire.TraceSteps) -> None:
    with pytest.raises(WireError, match="not a message"):
        wire.decode_client(wire.encode(request_))


def test_the_largest_trace_fits_a_frame() -> None:
    steps = [wire.StepTimes(2**40 + step, 1024, 2**20, *[step + 0.1] * 6) for step in range(wire.TRACE_LIMIT)]
    times = [wire.RankTimes(one.step, 0.1, 0.1, 0.1) for one in steps]
    assert len(wire.encode(wire.StepTrace(steps, [times] * 16))) < wire.RESULT_FRAME_LIMIT


@pytest.mark.parametrize("positions", [1, 7, 1_000])
def test_the_largest_result_of_a_step_of_any_size_is_below_the_limit_for_workers(
    positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "RESULT_FRAME_LIMIT", 100)
    most = wire.TokenLogprobs(b"\x7f" * 4 * 65, b"\x7f" * 4 * 65, 2**31 - 1)
    rows = [(2**31 - 1, 2**31 - 1, [most] * positions)] * (3_000 // positions)
    tokens = len(rows) * positions
    config = EngineConfig(model="m", max_num_batched_tokens=tokens)

    frame = wire.encode(wire.StepResult(2**31, 2**31, wire.pack_ints([2**31 - 1] * len(rows)), [], rows))

    assert len(frame) <= wire.worker_frame_limit(config)
    assert wire.decode_from_worker(frame, wire.worker_frame_limit(config)) is not None
