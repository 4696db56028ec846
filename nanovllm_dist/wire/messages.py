"""The only definition of what crosses a process boundary: typed MessagePack messages.

Each message is a tagged array; a frame that does not decode to the expected union is refused. Integers in bulk
travel as packed little-endian int32 bytes, and steps as deltas. Nothing here knows sockets, tensors or policy.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import NanoVLLMError, WireError, error_from_code
from nanovllm_dist.sampling_params import MAX_LOGPROBS, SamplingParams
from nanovllm_dist.wire.packed_ints import pack_ints as pack_ints
from nanovllm_dist.wire.packed_ints import unpack_ints as unpack_ints

PROTOCOL_VERSION = 4
CLIENT_FRAME_LIMIT = 16 * 2**20
RESULT_FRAME_LIMIT = 64 * 2**20  # to a client, or from a worker unless steps are large: see worker_frame_limit
UNREAD_LIMIT = 8 * RESULT_FRAME_LIMIT  # bytes queued for one client; it is dropped before there are more
READ_REPORT = 2**20  # bytes that a client reads before it says so
STEP_FRAME_LIMIT = 1 * 2**30  # to a worker: a step may carry whole prompts
TRACE_LIMIT = 10_000  # steps of one trace
ABORT_LIMIT = 2**16  # ids of one AbortRequests: the coordinator does nothing else while it reads them
CACHE_SALT_LIMIT = 256  # bytes of UTF-8; it is hashed whenever a waiting request is looked at


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages: `[tag, field, field, ...]` on the wire."""


class _Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of what is nested in messages."""


# --- shared parts ------------------------------------------------------------------------------------------


class ErrorInfo(_Part, frozen=True):
    """A typed error on the wire; see `errors.error_from_code`."""

    code: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> ErrorInfo:
        """Describe `error`; an error that is not ours keeps its class name in the message."""
        if isinstance(error, NanoVLLMError):
            return cls(error.code, str(error))
        return cls(NanoVLLMError.code, f"{type(error).__name__}: {error}")

    def to_exception(self) -> NanoVLLMError:
        """The exception this describes."""
        return error_from_code(self.code, self.message)


class TokenLogprobs(_Part, frozen=True):
    """Log-probabilities at one position: the chosen token first, then the most likely ones in order.

    `ids` is packed int32, `values` packed float32 of the same count, `rank` the chosen token's rank (1 = best).
    """

    ids: bytes
    values: bytes
    rank: int


# --- client -> coordinator ---------------------------------------------------------------------------------


class Hello(_Message, frozen=True):
    """First message of a client; answered by EngineStatus, which is then pushed on every change."""

    protocol: int = PROTOCOL_VERSION


class AddRequest(_Message, frozen=True):
    """Run one prompt. `id` is chosen by the client and unique among its own; answered by Outputs only, or by
    ProtocolError where the client is not known (any more), or the id is not unique.

    `prompt` is packed token ids; `bad_words` packed token-id sequences; a lower `priority` runs earlier.
    """

    id: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    prompt: bytes
    params: SamplingParams
    bad_words: list[bytes] = []
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] = 0
    cache_salt: str = ""


class AbortRequests(_Message, frozen=True):
    """End these requests with reason `abort`; unknown or finished ids are ignored.

    `reason` is `stop` when the client found a stop string in the text, else `abort`.
    """

    ids: Annotated[list[int], msgspec.Meta(max_length=ABORT_LIMIT)]
    reason: str = "abort"


class StatsRequest(_Message, frozen=True):
    """Ask for one EngineStats. A client that is not known (any more), and so must not wait, gets ProtocolError."""


class TraceSteps(_Message, frozen=True):
    """Time `count` steps, after `skip` more; answered by one StepTrace.

    It comes when their times are there. It comes earlier, with what there is, when the engine has run out of requests
    since the first of them, or when anyone asks again: there is one trace at a time, and a count of 0 only ends it.
    """

    count: Annotated[int, msgspec.Meta(ge=0, le=TRACE_LIMIT)]
    skip: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0


class FramesRead(_Message, frozen=True):
    """The client has read frames of `size` bytes together since it last said so, or began. A client that has more than
    UNREAD_LIMIT bytes to read is dropped: its requests end, and the last that it gets is ProtocolError."""

    size: Annotated[int, msgspec.Meta(ge=0)]


ClientMessage = Hello | AddRequest | AbortRequests | StatsRequest | TraceSteps | FramesRead

# --- coordinator -> client ---------------------------------------------------------------------------------


class EngineInfo(_Part, frozen=True):
    """What a client must know of a ready engine (its paths: the launcher's). `max_total_tokens`: prompt + output."""

    version: str
    model: str
    model_path: str
    tokenizer: str
    architecture: str
    device: str
    dtype: str
    tensor_parallel_size: int
    vocab_size: int
    max_total_tokens: int
    max_num_seqs: int
    max_queued: int
    block_size: int
    num_blocks: int
    eos_token_ids: list[int]


class EngineStatus(_Message, frozen=True):
    """State of the engine: `starting` (with the slowest rank's phase), `ready`, `failed` or `stopping`."""

    state: str
    phase: str = ""
    done: int = 0
    total: int = 0
    info: EngineInfo | None = None
    error: ErrorInfo | None = None


class RequestTimes(_Part, frozen=True):
    """Seconds on the coordinator's clock, from arrival; `first_token` and `queue` are -1 if never reached."""

    queue: float
    first_token: float
    total: float
    num_cached_tokens: int
    num_preemptions: int


class Finished(_Part, frozen=True):
    """The one end of a request: reason `stop`, `length`, `abort` or `error`; `stop_token` if one ended it."""

    id: int
    reason: str
    times: RequestTimes
    stop_token: int | None = None
    error: ErrorInfo | None = None


class PromptLogprobs(_Part, frozen=True):
    """Log-probabilities of prompt tokens 1..n-1 of request `id` (the first token has none)."""

    id: int
    positions: list[TokenLogprobs]


class Outputs(_Message, frozen=True):
    """What one step gave the requests of one client: parallel packed arrays `ids`, `tokens` (one token each),
    then, in that order, `logprobs` of those entries that asked, as (index into `ids`, logprobs).
    What is too large for one frame comes in several, in order: a request's end is never before what belongs to it."""

    ids: bytes
    tokens: bytes
    finished: list[Finished] = []
    logprobs: list[tuple[int, TokenLogprobs]] = []
    prompt_logprobs: list[PromptLogprobs] = []


class EngineStats(_Message, frozen=True):
    """Counters since start, and gauges now. Health is `seconds_since_step` while requests run.

    By running requests, rounded up to a power of two, as (steps, mean µs): `host_us_per_step`, processor time of
    the whole coordinator; `answer_us_per_step`, wall time from a step's result to the next step's departure.
    """

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    num_blocks: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    finished: dict[str, int] = {}
    seconds_since_step: float = 0.0
    host_us_per_step: dict[int, tuple[int, float]] = {}
    answer_us_per_step: dict[int, tuple[int, float]] = {}
    batch_histogram: dict[int, int] = {}  # rows per step -> steps


class StepTimes(_Part, frozen=True):
    """One step in the coordinator, in seconds of its host's monotonic clock, in this order.

    `planned`: the scheduler was asked for it; `sent`: its frames were handed to the sockets; `answered`: rank 0's
    result was in hand; `committed`: the scheduler knew it; then the next steps left; `delivering`, `delivered`: its
    outputs were handed to the clients' sockets in between. `rows` and `tokens` are what it ran.
    """

    step: int
    rows: int
    tokens: int
    planned: float
    sent: float
    answered: float
    committed: float
    delivering: float
    delivered: float


class RankTimes(_Part, frozen=True):
    """One step on one rank, in seconds of its host's monotonic clock, in this order.

    `received`: its frame was in hand; `launched`: its inputs were made and the device had its work; `done`: its tokens
    were on the host, as the host noticed. A device that is busy with the step before begins after `launched`.
    """

    step: int
    received: float
    launched: float
    done: float


class StepTrace(_Message, frozen=True):
    """Times of consecutive steps, and of these on each rank (a rank that said nothing has none)."""

    steps: list[StepTimes]
    ranks: list[list[RankTimes]]


class ProtocolError(_Message, frozen=True):
    """A frame had no effect: it is no ClientMessage, is of another protocol, or repeats the id of a running request; or
    its sender is not known (any more), or one too many. Also the last that a dropped client gets."""

    error: ErrorInfo


ServerMessage = EngineStatus | Outputs | EngineStats | StepTrace | ProtocolError

# --- coordinator -> worker ---------------------------------------------------------------------------------


class Rendezvous(_Message, frozen=True):
    """Join the process group at this `host:port`; sent to every rank but 0, which made it."""

    address: str


class AllocateCache(_Message, frozen=True):
    """The minimum over ranks of what they measured: allocate this many blocks, then answer Ready."""

    num_blocks: int


class NewRow(_Part, frozen=True):
    """A request enters (or re-enters) the batch at `slot`.

    `tokens`: all known ids; `num_computed`: how many of them have been run; `num_cached`: how many have their
    keys and values in the cache (num_computed, or one more when the whole prompt was cached and its last token
    runs only for its logits); `blocks`: its block table so far.
    """

    slot: int
    tokens: bytes
    prompt_len: int
    num_computed: int
    num_cached: int
    blocks: bytes
    seed: int
    params: SamplingParams
    bad_words: list[bytes]


class Step(_Message, frozen=True):
    """One step: rows in order (decodes first), each with its count of tokens; everything else is a delta.

    `grow_slots[i]` gets block `grow_blocks[i]` appended to its table. A row samples when its count reaches the
    end of its known tokens (the sampled one in flight included). Every rank keeps the times of a `traced` step.
    """

    epoch: int
    step: int
    slots: bytes
    counts: bytes
    grow_slots: bytes
    grow_blocks: bytes
    new_rows: list[NewRow]
    traced: bool = False


class Ping(_Message, frozen=True):
    """Sent every second, so that a worker can tell a quiet coordinator from a dead one.

    A rank that has kept times of steps answers with TracedSteps: not step by step, which would disturb what is timed.
    """


class Shutdown(_Message, frozen=True):
    """Leave, in order."""


ToWorker = Rendezvous | AllocateCache | Step | Ping | Shutdown

# --- worker -> coordinator ---------------------------------------------------------------------------------


class WorkerHello(_Message, frozen=True):
    """First message of a rank; rank 0 adds the `host:port` of the rendezvous it serves."""

    rank: int
    pid: int
    rendezvous: str = ""


class WorkerProgress(_Message, frozen=True):
    """Where start-up is: phase `connect`, `load`, `profile`, `warmup`."""

    phase: str
    done: int
    total: int


class CacheMeasured(_Message, frozen=True):
    """How many KV blocks this rank can hold."""

    num_blocks: int


class WorkerReady(_Message, frozen=True):
    """The cache is allocated and the rank waits for steps."""


class StepResult(_Message, frozen=True):
    """Rank 0's answer: one token for each sampling row, in the plan's order.

    `logprobs`: (slot, logprobs) of rows that asked; `prompt_logprobs`: (slot, first position, logprobs...) of
    the prompt positions that this step ran.
    """

    epoch: int
    step: int
    tokens: bytes
    logprobs: list[tuple[int, TokenLogprobs]]
    prompt_logprobs: list[tuple[int, int, list[TokenLogprobs]]]


class TracedSteps(_Message, frozen=True):
    """The times of traced steps that were done since the last ones were sent."""

    times: list[RankTimes]


class WorkerFailed(_Message, frozen=True):
    """The rank's last message: what went wrong."""

    error: ErrorInfo


FromWorker = WorkerHello | WorkerProgress | CacheMeasured | WorkerReady | StepResult | TracedSteps | WorkerFailed

# --- launcher -> its processes (JSON on standard input), and their first line of standard output ------------


class Keys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """CURVE keys (Z85) of one engine: the server's pair, and the one client pair that it lets in."""

    server_public: str
    server_secret: str
    client_public: str
    client_secret: str


class CoordinatorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a coordinator is started with. `keys` is None on ipc endpoints, which a 0700 directory guards.

    An endpoint is `ipc://PATH`, or `tcp://HOST:0` for a port of the system's choosing.
    """

    config: EngineConfig
    client_endpoint: str
    worker_endpoint: str
    keys: Keys | None = None


class CoordinatorListening(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The coordinator's first line of output: the endpoints it really bound."""

    client_endpoint: str
    worker_endpoint: str


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker is started with. `host`: this machine's address for the process group, as others see it.

    `device_index`: which of the devices visible to the process is its own.
    """

    config: EngineConfig
    rank: int
    worker_endpoint: str
    host: str = "127.0.0.1"
    device_index: int = 0
    keys: Keys | None = None


def worker_identity(rank: int) -> bytes:
    """The name under which a rank connects."""
    return f"rank-{rank}".encode()


# --- frames ------------------------------------------------------------------------------------------------

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_client_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_server_decoder: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)
_to_worker_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_RESULT_POSITION = 32  # the most bytes that a token of a step adds to its result, without log-probabilities


def encode(message: _Message) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_client(frame: bytes) -> ClientMessage:
    """Decode what a client sent. Raises WireError."""
    return _decode(_client_decoder, frame, CLIENT_FRAME_LIMIT)


def decode_server(frame: bytes) -> ServerMessage:
    """Decode what the coordinator sent to a client. Raises WireError."""
    return _decode(_server_decoder, frame, RESULT_FRAME_LIMIT)


def decode_to_worker(frame: bytes) -> ToWorker:
    """Decode what the coordinator sent to a worker. Raises WireError."""
    return _decode(_to_worker_decoder, frame, STEP_FRAME_LIMIT)


def decode_from_worker(frame: bytes, limit: int = RESULT_FRAME_LIMIT) -> FromWorker:
    """Decode what a worker sent, at most `limit` bytes. Raises WireError."""
    return _decode(_from_worker_decoder, frame, limit)


def worker_frame_limit(config: EngineConfig) -> int:
    """Bytes of the largest frame from a worker: every token of a step may ask for the most log-probabilities."""
    return max(RESULT_FRAME_LIMIT, config.max_num_batched_tokens * (_RESULT_POSITION + 8 * (MAX_LOGPROBS + 1)))


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes, limit: int) -> T:
    if len(frame) > limit:
        raise WireError(f"a frame of {len(frame)} bytes is over the limit of {limit}")
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, NanoVLLMError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a message of this protocol: {error}") from None
