"""The id of a request that does not decode can be read where it could be answered, and nowhere else."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.partial_request import request_id_of


def test_the_id_is_read_though_the_rest_is_wrong() -> None:
    assert request_id_of(wire.encode(wire.AddRequest(7, b"", SamplingParams(), priority=2**40))) == 7
    assert request_id_of(msgpack.packb(["AddRequest", 7, {"what": [None]}])) == 7


@pytest.mark.parametrize(
    "content",
    [
        ["AddRequest"],
        ["AddRequest", -1],
        ["AddRequest", 2**31],
        ["AddRequest", "7"],
        ["Hello", 7],
        [["AddRequest"], 7],
        {"AddRequest": 7},
        7,
    ],
    ids=str,
)
def test_what_could_not_be_answered_has_no_id(content: object) -> None:
    assert request_id_of(msgpack.packb(content)) is None


@pytest.mark.parametrize("frame", [b"", b"\x91" * 50_000, b"\x92\xa2\xff\xff\x01"], ids=["empty", "deep", "no-utf-8"])
def test_garbage_has_no_id(frame: bytes) -> None:
    assert request_id_of(frame) is None


@given(st.binary(max_size=100))
def test_any_bytes_are_answered_without_an_exception(frame: bytes) -> None:
    request_id = request_id_of(frame)
    assert request_id is None or 0 <= request_id < 2**31
