"""What clients are told is cut into frames that they take, in order, and nothing is lost by it."""

from __future__ import annotations

from array import array
from collections import defaultdict

import pytest

from nanovllm_dist.errors import InvalidRequestError
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.scheduler.outbox import Outbox
from nanovllm_dist.scheduler.request import Request
from nanovllm_dist.scheduler.request_limits import check_limits
from nanovllm_dist.wire import messages as wire

LIMIT = 20_000
LARGEST_RANK = 2**31 - 1


def logprobs_of(count: int) -> wire.TokenLogprobs:
    """The chosen token and `count` others, as large as they get."""
    return wire.TokenLogprobs(b"\x7f" * 4 * (count + 1), b"\x7f" * 4 * (count + 1), LARGEST_RANK)


def ended_request(client: bytes, request_id: int, prompt_len: int, count: int | None) -> Request:
    """A request that was aborted after its prompt had run."""
    params = SamplingParams(prompt_logprobs=count)
    request = Request(key=(client, request_id), tokens=array("i", [1] * prompt_len), params=params, seed=0, arrival=0.0)
    if count is not None:
        request.prompt_logprobs.update({position: logprobs_of(count) for position in range(prompt_len - 1)})
    request.finish_reason = "abort"
    return request


class Clients:
    """Decode what is sent to them; those in `gone` cannot be reached."""

    def __init__(self, *gone: bytes) -> None:
        self.gone = gone
        self.sizes: list[int] = []
        self.messages: defaultdict[bytes, list[wire.Outputs]] = defaultdict(list)

    def send(self, client: bytes, frame: bytes) -> bool:
        self.sizes.append(len(frame))
        message = wire.decode_server(frame)
        assert isinstance(message, wire.Outputs)
        self.messages[client].append(message)
        return client not in self.gone


def test_what_one_step_gives_a_client_is_one_message() -> None:
    outbox, clients = Outbox(LIMIT), Clients()
    request = ended_request(b"a", 1, 8, None)
    for token in range(100):
        outbox.token(request, token, None)
    outbox.finished(request, 1.0)
    outbox.send(clients.send)
    assert len(clients.messages[b"a"]) == 1


def test_many_ends_with_prompt_logprobs_are_cut_into_frames_below_the_limit() -> None:
    outbox, clients = Outbox(LIMIT), Clients()
    for request_id in range(64):
        outbox.finished(ended_request(b"a", request_id, 20, 20), 1.0)
        outbox.finished(ended_request(b"b", request_id, 20, None), 1.0)
    outbox.send(clients.send)

    assert max(clients.sizes) <= LIMIT
    assert min(clients.sizes[:-1]) > LIMIT // 4, "frames are cut where they are full, not for each request"
    told = clients.messages[b"a"]
    assert [finished.id for message in told for finished in message.finished] == list(range(64))
    ready: set[int] = set()
    for message in told:  # an end is never told before what belongs to it
        assert {len(entry.positions) for entry in message.prompt_logprobs} <= {19}
        ready |= {entry.id for entry in message.prompt_logprobs}
        assert {finished.id for finished in message.finished} <= ready


def test_tokens_with_logprobs_keep_their_order_and_their_logprobs_over_a_cut() -> None:
    outbox, clients = Outbox(LIMIT), Clients()
    requests = [ended_request(b"a", request_id, 4, None) for request_id in range(300)]
    for request in requests:
        outbox.token(request, 1000 + request.key[1], logprobs_of(64) if request.key[1] % 2 else None)
    for request in requests:
        outbox.finished(request, 1.0, wire.ErrorInfo("engine_dead", "ä" * 100))
    outbox.send(clients.send)

    assert max(clients.sizes) <= LIMIT
    told = clients.messages[b"a"]
    assert [i for message in told for i in wire.unpack_ints(message.ids)] == list(range(300))
    assert [t for message in told for t in wire.unpack_ints(message.tokens)] == list(range(1000, 1300))
    with_logprobs = [wire.unpack_ints(message.ids)[index] for message in told for index, _ in message.logprobs]
    assert with_logprobs == list(range(1, 300, 2))
    assert [finished.id for message in told for finished in message.finished] == list(range(300))


def test_a_client_that_is_gone_gets_no_more_of_its_frames() -> None:
    outbox, clients = Outbox(LIMIT), Clients(b"a")
    for request_id in range(64):
        outbox.finished(ended_request(b"a", request_id, 20, 20), 1.0)
        outbox.finished(ended_request(b"b", request_id, 20, 20), 1.0)
    outbox.send(clients.send)
    outbox.send(clients.send)
    assert len(clients.messages[b"a"]) == 1
    assert sum(len(message.finished) for message in clients.messages[b"b"]) == 64


@pytest.mark.parametrize("count", [0, 1, 20, 64])
def test_the_longest_prompt_whose_logprobs_are_allowed_fits_a_frame_and_one_more_token_is_refused(count: int) -> None:
    def refusal(length: int) -> str:
        try:
            check_limits(wire.AddRequest(1, b"\0" * 4 * length, SamplingParams(prompt_logprobs=count)), LIMIT)
        except InvalidRequestError as error:
            return str(error)
        return ""

    longest = next(length for length in range(LIMIT) if refusal(length + 1))
    assert f"prompt_logprobs={count} of {longest + 1} tokens" in refusal(longest + 1)
    outbox, clients = Outbox(LIMIT), Clients()
    outbox.finished(ended_request(b"a", 2**31 - 1, longest, count), 1.0, wire.ErrorInfo("engine_dead", "x" * 3000))
    outbox.send(clients.send)

    assert LIMIT * 0.4 < max(clients.sizes) <= LIMIT
    assert len(clients.messages[b"a"][0].prompt_logprobs[0].positions) == longest - 1


def test_a_long_prompt_without_prompt_logprobs_is_not_refused() -> None:
    check_limits(wire.AddRequest(1, b"\0" * 4 * 200_000, SamplingParams()), LIMIT)
