"""Named workloads: how long each prompt and each answer is, and token ids that are new in every repetition.

All draws come from private generators, so that neither the engine nor the caller can change a workload. It knows
nothing of engines.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from nanovllm_dist.errors import ConfigError

RANDOM = "random"


@dataclass(frozen=True)
class Workload:
    """Request i has `prompt_lens[i]` tokens of prompt and generates exactly `output_lens[i]`.

    `highest_token`: ids are uniform in [0, highest_token], or over the vocabulary where it is None or larger.
    """

    name: str
    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    highest_token: int | None = None

    @property
    def num_requests(self) -> int:
        """How many requests there are."""
        return len(self.prompt_lens)

    @property
    def prompt_tokens(self) -> int:
        """Sum of all prompts."""
        return sum(self.prompt_lens)

    @property
    def output_tokens(self) -> int:
        """Sum of all answers."""
        return sum(self.output_lens)

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer of the largest request."""
        return max(prompt + output for prompt, output in zip(self.prompt_lens, self.output_lens, strict=True))

    def prompts(self, repetition: str, vocab_size: int) -> list[list[int]]:
        """Token ids of every prompt: the same for the same `repetition`, unrelated for any other.

        A prefix cache finds nothing in them.
        """
        highest = vocab_size - 1 if self.highest_token is None else min(self.highest_token, vocab_size - 1)
        rng = Random(f"{self.name}:{repetition}")
        return [rng.choices(range(highest + 1), k=length) for length in self.prompt_lens]

    def shortened(self, longest_output: int, num_requests: int | None = None) -> Workload:
        """The first `num_requests` with answers of at most `longest_output` tokens, for warming up."""
        output_lens = tuple(min(length, longest_output) for length in self.output_lens[:num_requests])
        return replace(self, prompt_lens=self.prompt_lens[:num_requests], output_lens=output_lens)


def make_workload(
    name: str, *, num_requests: int = 64, input_len: int = 128, output_len: int = 128, range_ratio: float = 0.0
) -> Workload:
    """The workload of that name. The numbers are for `random` alone.

    `range_ratio` r draws lengths uniformly from [(1 - r) * length, (1 + r) * length], rounded.

    Raises ConfigError: the name is unknown (the message lists the known ones), or a number is out of range.
    """
    if name == RANDOM:
        return _random(num_requests, input_len, output_len, range_ratio)
    if name not in _NAMED:
        close = difflib.get_close_matches(name, workload_names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"workload {name!r} is unknown: there are {', '.join(workload_names())}{hint}")
    return _NAMED[name](name)


def workload_names() -> list[str]:
    """Every name that `make_workload` takes."""
    return [*_NAMED, RANDOM]


@dataclass(frozen=True)
class _Shape:
    """Requests whose lengths, in and out, are uniform in [shortest, longest], with ids in [0, highest_token]."""

    num_requests: int
    shortest: int
    longest: int
    highest_token: int

    def draw(self, name: str, rng: Random) -> Workload:
        """Each prompt's ids are drawn right after its length, and decide the lengths that follow."""
        prompt_lens = []
        for _ in range(self.num_requests):
            prompt_lens.append(rng.randint(self.shortest, self.longest))
            _skip_tokens(rng, prompt_lens[-1], self.highest_token)
        output_lens = [rng.randint(self.shortest, self.longest) for _ in range(self.num_requests)]
        return Workload(name, tuple(prompt_lens), tuple(output_lens), self.highest_token)


_UPSTREAM = _Shape(num_requests=256, shortest=100, longest=1024, highest_token=10000)
_SHORT = _Shape(num_requests=64, shortest=32, longest=256, highest_token=9999)


def _ascend(name: str) -> Workload:
    """The upstream draw after an engine's warm-up had used the same generator: 4 long prompts and 256 short ones."""
    rng = Random(0)
    _skip_tokens(rng, 4 * 4096, _UPSTREAM.highest_token)
    for _ in range(256):
        _skip_tokens(rng, rng.randint(10, 50), _UPSTREAM.highest_token)
    return _UPSTREAM.draw(name, rng)


def _skip_tokens(rng: Random, count: int, highest_token: int) -> None:
    for _ in range(count):
        rng.randint(0, highest_token)


def _random(num_requests: int, input_len: int, output_len: int, range_ratio: float) -> Workload:
    for option, value in (("num-requests", num_requests), ("input-len", input_len), ("output-len", output_len)):
        if value < 1:
            raise ConfigError(f"--{option} {value} is not at least 1")
    if not 0.0 <= range_ratio < 1.0:
        raise ConfigError(f"--range-ratio {range_ratio} is not in [0, 1)")
    rng = Random(f"{RANDOM}:{num_requests}:{input_len}:{output_len}:{range_ratio}")

    def lengths(middle: int) -> tuple[int, ...]:
        low, high = max(1, round(middle * (1 - range_ratio))), round(middle * (1 + range_ratio))
        return tuple(rng.randint(low, high) for _ in range(num_requests))

    return Workload(RANDOM, lengths(input_len), lengths(output_len))


_NAMED: dict[str, Callable[[str], Workload]] = {
    "upstream_seed0": lambda name: _UPSTREAM.draw(name, Random(0)),
    "upstream_seed1": lambda name: _UPSTREAM.draw(name, Random(1)),
    "upstream_seed2": lambda name: _UPSTREAM.draw(name, Random(2)),
    "ascend_143770": _ascend,
    "c1": lambda name: _SHORT.draw(name, Random(0)),
    "c2": lambda name: Workload(name, (128,), (128,)),
    "single": lambda name: Workload(name, (128,), (512,)),
}
