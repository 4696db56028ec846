"""Outbox: gathers what one step gave into one message per client. Pure; the coordinator sends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nanovllm_dist.scheduler.request import Request
from nanovllm_dist.wire.messages import (
    ErrorInfo,
    Finished,
    Outputs,
    PromptLogprobs,
    RequestTimes,
    TokenLogprobs,
    encode,
    pack_ints,
)


@dataclass
class _Parcel:
    ids: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)


class Outbox:
    """Parcels by client identity. A request's key is (client, id)."""

    def __init__(self) -> None:
        self._parcels: dict[bytes, _Parcel] = {}

    def token(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> None:
        """One new token of a request."""
        client, request_id = request.key
        parcel = self._parcel(client)
        if logprobs is not None:
            parcel.logprobs.append((len(parcel.ids), logprobs))
        parcel.ids.append(request_id)
        parcel.tokens.append(token)

    def finished(self, request: Request, now: float, error: ErrorInfo | None = None) -> None:
        """The one end of a request."""
        client, request_id = request.key
        parcel = self._parcel(client)
        if request.params.prompt_logprobs is not None and request.prompt_logprobs:
            positions = [entry for _position, entry in sorted(request.prompt_logprobs.items())]
            parcel.prompt_logprobs.append(PromptLogprobs(request_id, positions))
        reason = request.finish_reason or "error"
        parcel.finished.append(Finished(request_id, reason, request.times(now), request.stop_token, error))

    def refused(self, client: bytes, request_id: int, error: ErrorInfo) -> None:
        """A request that was never queued."""
        self._parcel(client).finished.append(
            Finished(request_id, "error", RequestTimes(-1.0, -1.0, 0.0, 0, 0), None, error)
        )

    def send(self, send: Callable[[bytes, bytes], bool]) -> list[bytes]:
        """Hand each client's message to `send(identity, frame)`; returns the clients that are gone."""
        gone = []
        for client, parcel in self._parcels.items():
            message = Outputs(
                pack_ints(parcel.ids),
                pack_ints(parcel.tokens),
                parcel.finished,
                parcel.logprobs,
                parcel.prompt_logprobs,
            )
            if not send(client, encode(message)):
                gone.append(client)
        self._parcels.clear()
        return gone

    def _parcel(self, client: bytes) -> _Parcel:
        parcel = self._parcels.get(client)
        if parcel is None:
            parcel = self._parcels[client] = _Parcel()
        return parcel
