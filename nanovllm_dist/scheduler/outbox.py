"""Outbox: gathers what one step gave into one message per client, or several where one would be too large a frame.

Pure; the coordinator sends them. Sizes are upper bounds, so that nothing is encoded only to be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nanovllm_dist.scheduler.request import Request
from nanovllm_dist.wire.messages import (
    RESULT_FRAME_LIMIT,
    ErrorInfo,
    Finished,
    Outputs,
    PromptLogprobs,
    RequestTimes,
    TokenLogprobs,
    encode,
    pack_ints,
)

# The most bytes of: a message without entries; a token with its id; an end without its error's text; the
# log-probabilities of one position without ids and values, and of one prompt without its positions
_MESSAGE, _TOKEN, _END, _POSITION, _PROMPT = 64, 8, 128, 32, 32


@dataclass(slots=True)
class _Parcel:
    size: int = _MESSAGE
    ids: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)


class Outbox:
    """Parcels by client identity. A request's key is (client, id); `frame_limit` in bytes."""

    def __init__(self, frame_limit: int = RESULT_FRAME_LIMIT) -> None:
        self._frame_limit = frame_limit
        self._full: dict[bytes, list[_Parcel]] = {}
        self._open: dict[bytes, _Parcel] = {}

    def token(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> None:
        """One new token of a request."""
        client, request_id = request.key
        size = _TOKEN if logprobs is None else _TOKEN + _bytes_of_position(logprobs)
        parcel = self._open.get(client)  # as _parcel does, without a call for every token of every step
        if parcel is None or parcel.size + size > self._frame_limit:
            parcel = self._next_parcel(client)
        parcel.size += size
        if logprobs is not None:
            parcel.logprobs.append((len(parcel.ids), logprobs))
        parcel.ids.append(request_id)
        parcel.tokens.append(token)

    def finished(self, request: Request, now: float, error: ErrorInfo | None = None) -> None:
        """The one end of a request."""
        client, request_id = request.key
        count = request.params.prompt_logprobs
        if count is not None and request.prompt_logprobs:
            positions = [entry for _position, entry in sorted(request.prompt_logprobs.items())]
            parcel = self._parcel(client, bytes_of_prompt_logprobs(len(positions), count))
            parcel.prompt_logprobs.append(PromptLogprobs(request_id, positions))
        reason = request.finish_reason or "error"
        self._end(client, Finished(request_id, reason, request.times(now), request.stop_token, error))

    def refused(self, client: bytes, request_id: int, error: ErrorInfo) -> None:
        """A request that was never queued."""
        self._end(client, Finished(request_id, "error", RequestTimes(-1.0, -1.0, 0.0, 0, 0), None, error))

    def send(self, send: Callable[[bytes, bytes], bool]) -> None:
        """Hand each client's messages to `send(identity, frame)`, until it says that the client is gone."""
        for client, last in self._open.items():
            for parcel in [*self._full.get(client, ()), last]:
                if not send(client, _frame(parcel)):
                    break
        self._full.clear()
        self._open.clear()

    def _end(self, client: bytes, finished: Finished) -> None:
        text = 0 if finished.error is None else len(finished.error.code) + 4 * len(finished.error.message)
        self._parcel(client, _END + text).finished.append(finished)

    def _parcel(self, client: bytes, size: int) -> _Parcel:
        """Where the next entry of that client goes, which takes `size` bytes."""
        parcel = self._open.get(client)
        if parcel is None or parcel.size + size > self._frame_limit:
            parcel = self._next_parcel(client)
        parcel.size += size
        return parcel

    def _next_parcel(self, client: bytes) -> _Parcel:
        if client in self._open:
            self._full.setdefault(client, []).append(self._open[client])
        parcel = self._open[client] = _Parcel()
        return parcel


def bytes_of_prompt_logprobs(num_positions: int, count: int) -> int:
    """The most that a message takes with `num_positions` prompt tokens and the `count` likeliest beside each."""
    return _MESSAGE + _PROMPT + num_positions * (_POSITION + 8 * (count + 1))


def _bytes_of_position(logprobs: TokenLogprobs) -> int:
    return _POSITION + len(logprobs.ids) + len(logprobs.values)


def _frame(parcel: _Parcel) -> bytes:
    return encode(
        Outputs(
            pack_ints(parcel.ids),
            pack_ints(parcel.tokens),
            parcel.finished,
            parcel.logprobs,
            parcel.prompt_logprobs,
        )
    )
