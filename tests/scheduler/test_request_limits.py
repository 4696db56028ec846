"""A request that would cost everybody else is refused, and told which field is over which limit."""

from __future__ import annotations

import re

import pytest

from nanovllm_dist.errors import InvalidRequestError
from nanovllm_dist.sampling_params import MAX_LIST, SamplingParams
from nanovllm_dist.scheduler.request_limits import check_limits, without_texts
from nanovllm_dist.wire import messages as wire


def request(**fields: object) -> wire.AddRequest:
    """A request that is harmless but for `fields`."""
    return wire.AddRequest(1, wire.pack_ints([1]), SamplingParams(), **fields)  # type: ignore[arg-type]


def words(*lengths: int) -> list[bytes]:
    """Bad words of so many tokens."""
    return [wire.pack_ints(range(length)) for length in lengths]


@pytest.mark.parametrize("salt", ["", "tenant-7", "s" * 256, "ä" * 128])
def test_a_salt_as_long_as_a_tenants_name_is_taken(salt: str) -> None:
    check_limits(request(cache_salt=salt))


@pytest.mark.parametrize("salt", ["s" * 257, "ä" * 129, "s" * 15_000_000], ids=len)
def test_a_longer_salt_is_refused(salt: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"cache_salt: \d+ bytes are more than 256"):
        check_limits(request(cache_salt=salt))


@pytest.mark.parametrize("lengths", [(1,) * 8192, (16,) * 8192, (128,) * 1024, (3,) * 1023 + (128,)], ids=len)
def test_bad_words_that_workers_keep_in_little_space_are_taken(lengths: tuple[int, ...]) -> None:
    check_limits(request(bad_words=words(*lengths)))


@pytest.mark.parametrize("lengths", [(128,) * 8192, (17,) * 8192, (1,) * 8191 + (128,)], ids=max)
def test_bad_words_that_take_long_to_look_for_in_every_step_are_refused(lengths: tuple[int, ...]) -> None:
    count, longest = len(lengths), max(lengths)
    told = f"bad_words: {count} sequences of up to {longest} tokens take {count * longest} places, more than 131072"
    with pytest.raises(InvalidRequestError, match=re.escape(told)):
        check_limits(request(bad_words=words(*lengths)))


@pytest.mark.parametrize("lengths", [(1, 129), (1, 0)], ids=str)
def test_a_bad_word_that_is_empty_or_too_long_is_named_by_its_place(lengths: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError, match=f"sequence 1 has {lengths[1]} token ids, and not 1 to 128"):
        check_limits(request(bad_words=words(*lengths)))


def test_a_row_with_all_that_parameters_may_hold_is_below_two_mebibytes_beside_its_prompt() -> None:
    vocab = 151_936
    ids = range(vocab - MAX_LIST, vocab)
    params = SamplingParams(
        allowed_token_ids=list(range(vocab)),
        logit_bias=dict.fromkeys(ids, 0.1),
        stop_token_ids=list(ids),
        stop=["s" * 4096] * 64,
        bad_words=["b" * 4096] * MAX_LIST,
        min_tokens=8,
    )
    most = request(bad_words=words(*[16] * 8192))
    check_limits(most)
    row = wire.NewRow(0, b"", 1, 0, 0, b"", 2**63, without_texts(params), most.bad_words)

    assert len(wire.encode(wire.Step(0, 0, b"", b"", b"", b"", [row]))) < 2 * 2**20
