"""What callers may hand to `generate`, `chat` and `stream`, checked before anything is sent. Pure.

Python checks no types, and what is nearly right would run as something else: bytes, say, as token ids.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeGuard

import msgspec

from nanovllm_dist.errors import InvalidRequestError, InvalidSamplingParamsError
from nanovllm_dist.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
_TokenIds = list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, given without a list, is a batch of one. Raises InvalidRequestError for what is no list."""
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "tolist"):  # arrays, series, tensors
        prompts = prompts.tolist()
    if not _is_list(prompts):
        raise InvalidRequestError(
            f"prompts: a text, a list of token ids, or a list of these is expected, not {_described(prompts)}"
        )
    one = len(prompts) > 0 and isinstance(prompts[0], int)
    return [prompts] if one else list(prompts)


def as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """One conversation, given without a list, is a list of one. Raises InvalidRequestError for what is none."""
    wanted = 'a conversation is a list of {"role": ..., "content": ...}'
    if not _is_list(messages):
        raise InvalidRequestError(
            f"messages: {wanted}; one, or a list of several, is expected, not {_described(messages)}"
        )
    several = [messages] if messages and isinstance(messages[0], Mapping) else messages
    for index, one in enumerate(several):
        if not _is_list(one):
            raise InvalidRequestError(f"conversation {index}: {wanted}, not {_described(one)}")
    return list(several)


def params_for(count: int, params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    """Sampling parameters of each of `count` prompts. Raises InvalidRequestError."""
    if not _is_list(params):
        return [one_params(params)] * count  # type: ignore[arg-type]
    checked = [one_params(one) for one in params]
    if len(checked) != count:
        raise InvalidRequestError(f"{count} prompts but {len(checked)} sampling params: give one, or one for each")
    return checked


def one_params(params: SamplingParams | None) -> SamplingParams:
    """The parameters, or the defaults for None. Raises InvalidSamplingParamsError for what is neither."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise InvalidSamplingParamsError(
            f"sampling_params: a SamplingParams is expected, not {_described(params)}: SamplingParams(max_tokens=...)"
        )
    return params


def token_ids(prompt: Sequence[int]) -> list[int]:
    """The ids of a prompt that is no text. Raises InvalidRequestError for what is no list of ids."""
    if not _is_list(prompt):
        raise InvalidRequestError(f"a prompt is text or a list of token ids, not {_described(prompt)}")
    ids: list[Any] = list(prompt)
    if not ids:
        raise InvalidRequestError("the prompt is empty: it needs at least one token")
    try:
        return msgspec.convert(ids, _TokenIds)
    except msgspec.ValidationError:
        wrong = next((token for token in ids if not _is_int(token) or not 0 <= token < 2**31), ids)
    if _is_int(wrong):
        raise InvalidRequestError(f"token id {wrong} is outside the vocabulary")
    raise InvalidRequestError(f"a prompt is text or a list of token ids, but it holds {_described(wrong)}")


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _described(value: Any) -> str:
    return f"{reprlib.repr(value)} of type {type(value).__name__}"
