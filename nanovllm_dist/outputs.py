"""What a client gives back to its user for one prompt: RequestOutput, readable as object and as mapping."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from nanovllm_dist.errors import NanoVLLMError, WireError
from nanovllm_dist.wire.messages import TokenLogprobs, unpack_ints


@dataclass(frozen=True)
class Logprob:
    """One candidate token at one position: its natural-log probability, rank (1 = best) and text."""

    logprob: float
    rank: int
    text: str = ""


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds since the engine got the request: in the queue, to the first token, to the end.

    `per_token` is the mean time per output token after the first (TPOT); -1 where a stage was not reached.
    """

    queue: float
    first_token: float
    total: float
    per_token: float
    num_cached_tokens: int
    num_preemptions: int


@dataclass
class CompletionOutput:
    """One of the `n` answers. While streaming with output_kind `delta`, text and ids hold only what is new."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # stop, length, abort, error
    stop_reason: str | int | None = None  # the stop string or the token that ended it
    metrics: RequestMetrics | None = None


@dataclass
class RequestOutput:
    """The answer to one prompt. `output["text"]` and `output.text` give the first of its `n` answers."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    error: NanoVLLMError | None = None  # set when finish_reason is error

    @classmethod
    def refused(cls, prompt: str | None, prompt_token_ids: list[int], error: NanoVLLMError) -> RequestOutput:
        """The output of a prompt that was not even sent."""
        answer = CompletionOutput(0, finish_reason="error")
        return cls(0, prompt, prompt_token_ids, [answer], finished=True, error=error)

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the first answer."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first answer ended: stop, length, abort or error; None while it runs."""
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        """Log-probabilities of the first answer, a mapping per position, if asked for."""
        return self.outputs[0].logprobs

    @property
    def metrics(self) -> RequestMetrics | None:
        """Times of the first answer."""
        return self.outputs[0].metrics

    def __getitem__(self, key: str) -> Any:
        """Mapping access, as users of nano-vllm write it: `output["text"]`."""
        if key not in _KEYS:
            raise KeyError(f"{key!r}; there are {', '.join(_KEYS)}")
        return getattr(self, key)


def unpack_logprobs(entry: TokenLogprobs) -> tuple[list[int], list[float]]:
    """Token ids and natural-log probabilities of one position, the chosen token first. Raises WireError."""
    ids = unpack_ints(entry.ids)
    if len(entry.values) != 4 * len(ids):
        raise WireError(f"{len(entry.values)} bytes of log-probabilities for {len(ids)} tokens")
    return ids, list(struct.unpack(f"<{len(ids)}f", entry.values))


_KEYS = ("text", "token_ids", "finish_reason", "logprobs", "metrics", "prompt", "prompt_token_ids", "outputs")
