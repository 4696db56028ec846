"""Integers in bulk as bytes: little-endian int32, whatever the machine."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

from nanovllm_dist.errors import WireError


def pack_ints(values: Iterable[int]) -> bytes:
    """Pack integers as little-endian int32."""
    packed = array("i", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ints(data: bytes) -> list[int]:
    """The inverse of `pack_ints`. Raises WireError when `data` is not a whole number of int32."""
    if len(data) % 4:
        raise WireError(f"{len(data)} bytes are not a whole number of int32 values")
    packed = array("i", data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()
