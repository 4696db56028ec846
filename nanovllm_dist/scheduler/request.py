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

    # what every step touches comes first: the fewer cache lines, the shorter a step
    tokens: array[int]  # prompt, then output
    num_computed: int = field(default=0, init=False)
    num_scheduled: int = field(default=0, init=False)
    num_pending: int = field(default=0, init=False)  # tokens being sampled by steps in flight
    blocks: list[int] = field(default_factory=list, init=False)
    slot: int = field(default=-1, init=False)  # row in the workers' batch while running
    incarnation: int = field(default=0, init=False)  # counts preemptions; older results do not advance num_computed
    prompt_len: int = field(init=False)
    max_total: int = field(default=0, init=False)  # set on submission: it ends with `length` at this many tokens
    stop_ids: frozenset[int] = field(default=frozenset(), init=False)  # set on submission: tokens that end it
    finish_reason: str | None = field(default=None, init=False)
    first_token: float = field(default=-1.0, init=False)

    key: tuple[bytes, int]  # (client, its id for the request)
    params: SamplingParams
    seed: int
    arrival: float
    priority: int = 0
    cache_salt: str = ""
    bad_words: list[bytes] = field(default_factory=list)

    order: int = field(default=0, init=False)  # set on submission: first come, first served
    num_cached: int = field(default=0, init=False)  # tokens found in the cache at the last admission
    block_hashes: list[bytes] = field(default_factory=list, init=False)
    num_registered: int = field(default=0, init=False)  # blocks of the table already offered to the prefix cache
    stop_token: int | None = field(default=None, init=False)
    first_scheduled: float = field(default=-1.0, init=False)
    first_cached: int = field(default=-1, init=False)  # num_cached of the first admission
    num_preemptions: int = field(default=0, init=False)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """Known tokens, prompt and output."""
        return len(self.tokens)

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
