"""What one request may carry, and what of it workers are told: limits that keep its cost from everybody else. Pure.

What depends on the model or on the cache (vocabulary, lengths) is the scheduler's to check.
"""

from __future__ import annotations

import msgspec

from nanovllm_dist.errors import InvalidRequestError
from nanovllm_dist.sampling_params import MAX_BAD_WORD_TOKENS, MAX_LIST, SamplingParams
from nanovllm_dist.scheduler.outbox import bytes_of_prompt_logprobs
from nanovllm_dist.wire.messages import CACHE_SALT_LIMIT, RESULT_FRAME_LIMIT, AddRequest

# Workers pad sequences to the longest and look for all of them in each step: half a millisecond for so many places
_MAX_BAD_WORD_PLACES = 2**17


def check_limits(message: AddRequest, frame_limit: int = RESULT_FRAME_LIMIT) -> None:
    """Raise InvalidRequestError, naming the field and its limit, for a request that asks too much.

    `frame_limit`: bytes of one frame to a client, in which the log-probabilities of a whole prompt must fit.
    """
    salt = len(message.cache_salt.encode())
    if salt > CACHE_SALT_LIMIT:
        raise InvalidRequestError(f"cache_salt: {salt} bytes are more than {CACHE_SALT_LIMIT}: use a name or a hash")
    _check_bad_words(message.bad_words)
    _check_prompt_logprobs(len(message.prompt) // 4, message.params.prompt_logprobs, frame_limit)


def without_texts(params: SamplingParams) -> SamplingParams:
    """`params` as workers need them. Texts are the client's matter, and those of many requests would outgrow a step's
    frame; the rest is below 2 MiB beside the prompt, with a vocabulary of 152k."""
    if not (params.stop_strings or params.bad_words):
        return params
    return msgspec.structs.replace(params, stop=None, include_stop_str_in_output=False, bad_words=())


def _check_bad_words(bad_words: list[bytes]) -> None:
    if len(bad_words) > 2 * MAX_LIST:  # each word may begin with a space or not
        raise InvalidRequestError(f"bad_words: {len(bad_words)} sequences are more than {2 * MAX_LIST}")
    for index, word in enumerate(bad_words):
        if not 0 < len(word) <= 4 * MAX_BAD_WORD_TOKENS or len(word) % 4:
            raise InvalidRequestError(
                f"bad_words: sequence {index} has {len(word) / 4:g} token ids, and not 1 to {MAX_BAD_WORD_TOKENS}"
            )
    longest = max(map(len, bad_words), default=0) // 4
    if len(bad_words) * longest > _MAX_BAD_WORD_PLACES:
        raise InvalidRequestError(
            f"bad_words: {len(bad_words)} sequences of up to {longest} tokens take {len(bad_words) * longest} places, "
            f"more than {_MAX_BAD_WORD_PLACES}: use fewer, or shorter ones (each word counts with and without a space)"
        )


def _check_prompt_logprobs(prompt_len: int, count: int | None, frame_limit: int) -> None:
    if count is None:
        return
    size = bytes_of_prompt_logprobs(prompt_len - 1, count)
    if size > frame_limit:
        raise InvalidRequestError(
            f"prompt_logprobs={count} of {prompt_len} tokens take up to {size} bytes, over the limit of {frame_limit} "
            "for one answer: ask for fewer, or shorten the prompt"
        )
