"""Generation: turns the tokens of one prompt's requests into RequestOutputs: text, stop strings, logprobs, times.

It lives on the client's side; one Generation covers the `n` answers of a prompt. Its methods are called on the
connection's thread, and what it makes is handed to `on_output`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from nanovllm_dist.connection import Connection
from nanovllm_dist.errors import NanoVLLMError
from nanovllm_dist.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, unpack_logprobs
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.text.bad_words import bad_words_ids
from nanovllm_dist.text.detokenizer import IncrementalDetokenizer, detokenize
from nanovllm_dist.text.stop import StopStrings
from nanovllm_dist.text.tokenizer import Tokenizer
from nanovllm_dist.wire import messages as wire

_SEED_MASK = 2**63 - 1


class Generation:
    """One prompt on its way. `on_output` is called once per update, the last time with `finished` set.

    `streaming`: text is made as tokens come; else once at the end, which is cheaper.
    """

    def __init__(
        self,
        connection: Connection,
        tokenizer: Tokenizer | None,
        prompt: str | None,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: Callable[[RequestOutput], None],
        streaming: bool,
    ) -> None:
        self.prompt = prompt
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.error: NanoVLLMError | None = None
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._connection = connection
        self._tokenizer = tokenizer if params.detokenize else None
        self._bad_words = [wire.pack_ints(ids) for ids in bad_words_ids(tokenizer, params.bad_words)]
        self._on_output = on_output
        self._streaming = streaming
        self._kind = (params.output_kind or "delta") if streaming else "final"
        self._ids: list[int] = []
        self._answers: list[_Answer] = []

    def submit(self, priority: int = 0, cache_salt: str = "") -> None:
        """Send the requests. Raises EngineDeadError, InvalidRequestError, or WireError for one too large to send."""
        packed = array("i", self.prompt_ids).tobytes()
        incremental = self._tokenizer is not None and (self._streaming or bool(self.params.stop_strings))
        self._answers = [_Answer(self, index, self._tokenizer, incremental) for index in range(self.params.n)]
        self.abort()  # a full queue may have refused only some of the answers
        bad_words = self._bad_words
        self._ids = []
        self.error = None
        for index, answer in enumerate(self._answers):
            answer.request_id = self._connection.next_id()
            self._ids.append(answer.request_id)
            self._connection.submit(
                answer.request_id,
                packed,
                self._params_of(index),
                answer,
                bad_words=bad_words,
                priority=priority,
                cache_salt=cache_salt,
            )

    def abort(self, reason: str = "abort") -> None:
        """End all its requests; `on_output` still hears of the end."""
        self._connection.abort(self._ids, reason)

    @property
    def request_id(self) -> int:
        """The id that its outputs carry; 0 before it is submitted."""
        return self._ids[0] if self._ids else 0

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return bool(self._answers) and all(answer.ended for answer in self._answers)

    def output(self) -> RequestOutput:
        """What is known now, in the asked-for kind; a delta is taken out by this call."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=[answer.output(self._kind) for answer in self._answers],
            prompt_logprobs=self.prompt_logprobs,
            finished=self.finished,
            error=self.error,
        )

    def describe(self, entry: wire.TokenLogprobs) -> dict[int, Logprob]:
        """Log-probabilities of one position as users read them."""
        ids, values = unpack_logprobs(entry)
        text = self._tokenizer.token_text if self._tokenizer is not None else _no_text
        described = {
            token: Logprob(value, rank, text(token))
            for rank, (token, value) in enumerate(zip(ids[1:], values[1:], strict=True), start=1)
        }
        described[ids[0]] = Logprob(values[0], entry.rank, text(ids[0]))
        return described

    def updated(self, answer: _Answer) -> None:
        """An answer changed; those of an earlier submission no longer count."""
        if answer not in self._answers:
            return
        if self._kind != "final" or self.finished:
            self._on_output(self.output())

    def _params_of(self, index: int) -> SamplingParams:
        """Parameters of one answer: its own seed, and prompt logprobs only once."""
        params = self.params
        if params.n == 1:
            return params
        fields: dict[str, int | None] = {
            "n": 1,
            "seed": (params.seed + index) & _SEED_MASK if params.seed is not None else None,
        }
        if index > 0:
            fields["prompt_logprobs"] = None
        return msgspec.structs.replace(params, **fields)


class _Answer:
    """One of the `n` answers: the sink of one request."""

    def __init__(self, generation: Generation, index: int, tokenizer: Tokenizer | None, incremental: bool) -> None:
        params = generation.params
        self.request_id = 0
        self.token_ids: list[int] = []
        self.ended = False
        self._generation = generation
        self._tokenizer = tokenizer
        self._detokenizer: IncrementalDetokenizer | None = None
        if incremental and tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(tokenizer, params, generation.prompt_ids)
        self._stop: StopStrings | None = None
        if params.stop_strings:
            self._stop = StopStrings(params.stop_strings, params.include_stop_str_in_output)
        self._completion = CompletionOutput(index, logprobs=[] if params.logprobs is not None else None)
        self._text_taken = self._tokens_taken = 0

    def on_token(self, token: int, logprobs: wire.TokenLogprobs | None) -> None:
        """A new token; after a stop string was found, late ones are dropped."""
        if self._completion.finish_reason is not None:
            return
        self.token_ids.append(token)
        if logprobs is not None and self._completion.logprobs is not None:
            self._completion.logprobs.append(self._generation.describe(logprobs))
        if self._detokenizer is not None:
            self._add_text(self._detokenizer.feed([token]))
            if self._completion.finish_reason is not None:
                self._generation._connection.abort([self.request_id], "stop")
                return  # the end comes from the engine, with its times
        self._generation.updated(self)

    def on_prompt_logprobs(self, positions: list[wire.TokenLogprobs]) -> None:
        """Log-probabilities of prompt tokens 1..n-1."""
        self._generation.prompt_logprobs = [None, *(self._generation.describe(entry) for entry in positions)]

    def on_finished(self, finished: wire.Finished) -> None:
        """The end. A stop string found here counts before whatever the engine ended with meanwhile."""
        completion = self._completion
        if completion.finish_reason is None:
            self._flush_text()
        if completion.finish_reason is None:
            completion.finish_reason = finished.reason
            completion.stop_reason = finished.stop_token
        times, count = finished.times, len(self.token_ids)
        per_token = (times.total - times.first_token) / (count - 1) if count > 1 and times.first_token >= 0 else -1.0
        completion.metrics = RequestMetrics(
            times.queue, times.first_token, times.total, per_token, times.num_cached_tokens, times.num_preemptions
        )
        self._end(finished.error.to_exception() if finished.error is not None else None)

    def on_error(self, error: NanoVLLMError) -> None:
        """The end, with the engine gone."""
        self._completion.finish_reason = "error"
        self._end(error)

    def _end(self, error: NanoVLLMError | None) -> None:
        self.ended = True
        self._generation.error = self._generation.error or error
        self._generation.updated(self)

    def _flush_text(self) -> None:
        if self._detokenizer is not None:
            self._add_text(self._detokenizer.flush())
            if self._stop is not None and self._completion.finish_reason is None:
                self._completion.text += self._stop.flush()
        elif self._tokenizer is not None:
            generation = self._generation
            self._completion.text = detokenize(
                self._tokenizer, self.token_ids, generation.params, generation.prompt_ids
            )

    def _add_text(self, delta: str) -> None:
        if self._stop is None or len(self.token_ids) <= self._generation.params.min_tokens:
            self._completion.text += delta
            return
        text, matched = self._stop.feed(delta)
        self._completion.text += text
        if matched is not None:
            self._completion.finish_reason, self._completion.stop_reason = "stop", matched

    def output(self, kind: str) -> CompletionOutput:
        """A copy in the asked-for kind."""
        completion = self._completion
        text_from, tokens_from = (self._text_taken, self._tokens_taken) if kind == "delta" else (0, 0)
        self._text_taken, self._tokens_taken = len(completion.text), len(self.token_ids)
        return replace(
            completion,
            finish_reason=completion.finish_reason if self.ended else None,
            text=completion.text[text_from:],
            token_ids=self.token_ids[tokens_from:],
            logprobs=completion.logprobs[tokens_from:] if completion.logprobs is not None else None,
        )


def _no_text(token: int) -> str:
    return ""
