"""SamplingParams: what a user may ask of the sampling of one request, validated on construction.

It crosses the wire as it is. It does not know the model: ranges that depend on the vocabulary or on the
model length are checked by the coordinator when the request arrives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from nanovllm_dist.errors import InvalidSamplingParamsError

OutputKind = Literal["cumulative", "delta", "final"]
MAX_LOGPROBS = 64
MAX_STOP_STRINGS = 64
MAX_LIST = 4096
MAX_COUNT = 2**31 - 1
MAX_STRING = 4096
MAX_BAD_WORD_TOKENS = 128
_SEED_LIMIT = 2**63


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Parameters of one request. Temperature 0 is greedy.

    Raises:
        InvalidSamplingParamsError: a field is out of range, or two fields contradict each other.
        TypeError: an unknown field name.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the model's length
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    output_kind: OutputKind | None = None  # None: deltas from stream(), everything at the end from generate()

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        self._check_lists()
        self._check_contradictions()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever form it was given in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _check_types(self) -> None:
        try:  # a Struct checks types when decoded, not when constructed
            msgspec.convert(msgspec.structs.asdict(self), _TypesOnly)
        except msgspec.ValidationError as error:
            raise InvalidSamplingParamsError(f"sampling params: {error}") from None

    def _check_ranges(self) -> None:
        _require(1 <= self.n <= 128, "n", self.n, "between 1 and 128")
        _require(_finite(self.temperature, 0.0, 100.0), "temperature", self.temperature, "between 0 and 100")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _require(-1 <= self.top_k <= MAX_COUNT, "top_k", self.top_k, "-1 or 0 (off), or positive")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 and 1")
        _require(
            _finite(self.presence_penalty, -2.0, 2.0), "presence_penalty", self.presence_penalty, "between -2 and 2"
        )
        _require(
            _finite(self.frequency_penalty, -2.0, 2.0), "frequency_penalty", self.frequency_penalty, "between -2 and 2"
        )
        repetition = self.repetition_penalty
        _require(_finite(repetition, 1e-3, 100.0), "repetition_penalty", repetition, "above 0 and at most 100")
        if self.seed is not None:
            _require(-_SEED_LIMIT <= self.seed < _SEED_LIMIT, "seed", self.seed, "a signed 64-bit integer")
        if self.max_tokens is not None:
            _require(1 <= self.max_tokens <= MAX_COUNT, "max_tokens", self.max_tokens, f"between 1 and {MAX_COUNT}")
        _require(0 <= self.min_tokens <= MAX_COUNT, "min_tokens", self.min_tokens, f"between 0 and {MAX_COUNT}")
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _require(0 <= value <= MAX_LOGPROBS, name, value, f"between 0 and {MAX_LOGPROBS}")

    def _check_lists(self) -> None:
        stop = self.stop_strings
        _at_most("stop", len(stop), MAX_STOP_STRINGS, "strings")
        _at_most("stop_token_ids", len(self.stop_token_ids), MAX_LIST, "token ids")
        _at_most("bad_words", len(self.bad_words), MAX_LIST, "words")
        _at_most("logit_bias", len(self.logit_bias or {}), MAX_LIST, "entries")
        for name, strings in (("stop", stop), ("bad_words", self.bad_words)):
            _require(all(strings), name, list(strings)[:8], "a list of non-empty strings")
            longest = max(strings, key=len, default="")
            _at_most(f"{name}: {longest[:20]!r}", len(longest), MAX_STRING, "characters")
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("allowed_token_ids", self.allowed_token_ids or ())):
            _require(all(t >= 0 for t in ids), name, list(ids)[:8], "a list of token ids")
        if self.allowed_token_ids is not None:
            _require(len(self.allowed_token_ids) > 0, "allowed_token_ids", [], "a non-empty list, or None for all")
        if self.logit_bias is not None:
            for token, bias in self.logit_bias.items():
                _require(
                    token >= 0 and _finite(bias, -100.0, 100.0), "logit_bias", {token: bias}, "biases in [-100, 100]"
                )

    def _check_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidSamplingParamsError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: lower one or raise the other"
            )
        if self.stop_strings and not self.detokenize:
            raise InvalidSamplingParamsError("stop needs detokenize=True: stop strings are found in the text")
        if self.include_stop_str_in_output and not self.stop_strings:
            raise InvalidSamplingParamsError("include_stop_str_in_output=True needs at least one stop string")
        if self.greedy and self.n > 1:
            raise InvalidSamplingParamsError(f"n={self.n} with temperature=0 gives {self.n} equal answers: use n=1")


_TypesOnly = msgspec.defstruct(
    "_TypesOnly", [(field.name, field.type) for field in msgspec.structs.fields(SamplingParams)]
)


def _finite(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high


def _require(condition: bool, field: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InvalidSamplingParamsError(f"{field}={value!r} is not {wanted}")


def _at_most(field: str, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise InvalidSamplingParamsError(f"{field} has {count} {what}: at most {limit} are taken")
