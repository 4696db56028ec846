"""What can be read of an AddRequest that does not decode: its id, so that it is refused alone. It judges nothing."""

from __future__ import annotations

from typing import Annotated

import msgspec

from nanovllm_dist.wire.messages import AddRequest

_Id = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_parts_decoder: msgspec.msgpack.Decoder[list[msgspec.Raw]] = msgspec.msgpack.Decoder(list[msgspec.Raw])


def request_id_of(frame: bytes) -> int | None:
    """The id in a frame that was to be an AddRequest; None if there is none, or none that could be answered."""
    try:
        tag, request_id, *_rest = _parts_decoder.decode(frame)
        if msgspec.msgpack.decode(tag) == AddRequest.__name__:
            return msgspec.msgpack.decode(request_id, type=_Id)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    return None
