"""Request: everything that one request needs to go on, with the three counters that carry its progress.

`num_tokens` known, `num_computed` in the cache, `num_scheduled` in flight. Prefix hits, chunked prefill and
preemption all come down to setting `num_computed` and running on.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire.messages import RequestTimes, TokenLogprobs


@dataclass(eq=False, slots=True)
class Request:
    """One prompt on its way to its one end. Times are on the coordinator's clock, -1 until reached."""

    key: tuple[bytes, int]  # (client, its id for the request)
    tokens: array[int]  # prompt, then output
    params: SamplingParams
    seed: int
    arrival: float
    priority: int = 0
    cache_salt: str = ""
    bad_words: list[bytes] = field(default_factory=list)

    prompt_len: int = field(init=False)
    max_total: int = 0  # set on submission: it ends with `length` at this many tokens
    stop_ids: frozenset[int] = frozenset()  # set on submission: tokens that end it
    order: int = 0  # set on submission: first come, first served

    num_computed: int = 0
    num_scheduled: int = 0
    num_pending: int = 0  # tokens being sampled by steps in flight
    num_cached: int = 0  # tokens whose keys and values were found in the cache at the last admission
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0  # blocks of the table already offered to the prefix cache
    slot: int = -1  # row in the workers' batch while running
    incarnation: int = 0  # counts preemptions: results of an earlier life do not advance num_computed

    finish_reason: str | None = None
    stop_token: int | None = None
    first_scheduled: float = -1.0
    first_token: float = -1.0
    first_cached: int = -1  # num_cached of the first admission
    num_preemptions: int = 0
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """Known tokens, prompt and output."""
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        """Generated tokens so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def running(self) -> bool:
        """Whether it holds a slot."""
        return self.slot >= 0

    @property
    def sort_key(self) -> tuple[int, int]:
        """Who goes first, and who is preempted last."""
        return (self.priority, self.order)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether positions of the prompt must still be run for their log-probabilities."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len - 1

    def times(self, now: float) -> RequestTimes:
        """Durations so far, in seconds."""
        return RequestTimes(
            queue=self.first_scheduled - self.arrival if self.first_scheduled >= 0 else -1.0,
            first_token=self.first_token - self.arrival if self.first_token >= 0 else -1.0,
            total=now - self.arrival,
            num_cached_tokens=max(0, self.first_cached),
            num_preemptions=self.num_preemptions,
        )
