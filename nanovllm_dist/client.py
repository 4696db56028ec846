"""DistLLM: the synchronous client. It embeds an engine of its own, or uses a running one.

    with DistLLM("smollm2-135m", tensor_parallel_size=2) as llm:
        print(llm.generate(["Hello"], SamplingParams(max_tokens=32))[0].text)

It knows prompts, texts and outputs; how an engine is started is the launcher's matter.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from nanovllm_dist.batch_run import BatchRun, OnOutput, at_prompt
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.connection import Connection
from nanovllm_dist.errors import ConfigError, EngineConnectError, InvalidRequestError, ModelNotFoundError
from nanovllm_dist.generation import Generation
from nanovllm_dist.inputs import Message, Prompt, as_batch, as_conversations, one_params, params_for, token_ids
from nanovllm_dist.outputs import RequestOutput
from nanovllm_dist.progress import TokenProgress
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.text.tokenizer import Tokenizer
from nanovllm_dist.wire.messages import EngineInfo, EngineStats, StepTrace

if TYPE_CHECKING:
    from nanovllm_dist.launcher.engine import Engine


class DistLLM:
    """An engine and the client of it. Options are the fields of `EngineConfig`, by keyword.

    Raises:
        ConfigError: an unknown or contradictory option.
        ModelNotFoundError, EngineStartError: the engine could not be started.
    """

    def __init__(self, model: str, *, progress: bool = True, **options: Any) -> None:
        from nanovllm_dist.launcher.engine import Engine

        config = _make_config(model, options)
        engine = Engine.start(config, progress=progress)
        self._attach(engine, Connection(engine.address, engine.key_file))

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """A client that owns an engine already started; closing it stops the engine."""
        self = cls.__new__(cls)
        self._attach(engine, Connection(engine.address, engine.key_file))
        return self

    @classmethod
    def connect(
        cls, address: str, key_file: str | Path | None = None, *, timeout: float = 10.0, tokenizer: str | Path = ""
    ) -> Self:
        """A client of a running engine, which goes on when this client closes.

        `tokenizer`: a directory on this host, where the one that the engine was given is not there.
        Raises EngineConnectError when none answers within `timeout` seconds.
        """
        _check_connect(address, timeout)
        self = cls.__new__(cls)
        self._attach(None, Connection(address, key_file, timeout), timeout, tokenizer)
        return self

    def _attach(
        self, engine: Engine | None, connection: Connection, timeout: float = 10.0, tokenizer: str | Path = ""
    ) -> None:
        self.engine = engine
        self._connection = connection
        self._own_tokenizer = tokenizer
        self._lock = threading.Lock()
        self._generations: weakref.WeakSet[Generation] = weakref.WeakSet()
        # runs at close, when the client is garbage, and at interpreter exit, whichever is first, and once
        self._finalizer = weakref.finalize(self, _close, engine, connection)
        if engine is not None:
            engine.on_death(connection.fail)
        self.info: EngineInfo = connection.wait_ready(timeout)

    # --- generation ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int = 0,
        cache_salt: str = "",
        return_errors: bool = False,
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Run all prompts and return their outputs in order.

        A prompt is text or a list of token ids. `sampling_params` is one for all, or one for each.
        A prompt that is refused raises its typed error and ends the others, unless `return_errors`: then its
        output has finish_reason `error` and `error` set, and so have those that an engine which died left without an
        answer. `on_output` is called on this thread with the index and the output of each prompt as it ends. Ctrl-C, or
        what `on_output` raises, ends all of them before it is raised.

        Raises InvalidRequestError (also when the lengths differ), EngineDeadError, WireError for one too large to send.
        """
        batch = as_batch(prompts)
        params = params_for(len(batch), sampling_params)
        with TokenProgress(len(batch), enabled=use_tqdm) as progress:
            run = BatchRun(self.info.max_queued, return_errors, progress, on_output)
            generations: list[Generation | RequestOutput] = []
            for index, (prompt, one) in enumerate(zip(batch, params, strict=True)):
                try:
                    generations.append(self.make_generation(prompt, one, run.listener(index), streaming=False))
                except InvalidRequestError as error:
                    if not return_errors:
                        raise at_prompt(index, error) from None
                    text = prompt if isinstance(prompt, str) else None
                    generations.append(RequestOutput.refused(text, [], error))
            try:
                return run.run(generations, priority, cache_salt)
            except BaseException:
                for generation in generations:
                    if isinstance(generation, Generation):
                        generation.abort()
                raise

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of {"role", "content"}, through the model's template.

        Other keywords as for `generate`. Raises InvalidRequestError when the model has no chat template.
        """
        reserved = {"messages", "tools", "add_generation_prompt"} & set(chat_template_kwargs or {})
        if reserved:
            raise InvalidRequestError(f"chat_template_kwargs must not set {', '.join(sorted(reserved))}")
        prompts = [
            self.tokenizer.apply_chat_template(
                list(conversation),
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            for conversation in as_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm, **options)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Iterator[RequestOutput]:
        """Run one prompt and yield what is new as it comes (or the whole so far, with output_kind `cumulative`).

        Leaving the loop early ends the request. Raises as `generate` does.
        """
        news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        generation = self.make_generation(prompt, sampling_params, news.put, streaming=True)
        generation.submit(priority, cache_salt)
        try:
            while True:
                output = news.get()
                if output.error is not None:
                    raise output.error
                yield output
                if output.finished:
                    return
        finally:
            if not generation.finished:
                generation.abort()

    def make_generation(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        on_output: Callable[[RequestOutput], None],
        streaming: bool,
    ) -> Generation:
        """A prompt made ready to submit; `on_output` is called on the connection's thread.

        Raises InvalidRequestError for what is not text or token ids, or not sampling parameters.
        """
        params = one_params(params)
        text, ids = self._encode(prompt)
        tokenizer = self.tokenizer if params.detokenize or params.bad_words else None
        generation = Generation(self._connection, tokenizer, text, ids, params, on_output, streaming)
        with self._lock:
            self._generations.add(generation)
        return generation

    def abort(self, request_id: int) -> None:
        """End the request whose outputs carry this id, from any thread; an unknown or ended one is ignored."""
        with self._lock:
            generations = list(self._generations)
        for generation in generations:
            if generation.request_id == request_id:
                generation.abort()

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text or None, token ids)."""
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError("the prompt is empty: it needs at least one token")
            return prompt, self.tokenizer.encode(prompt)
        return None, token_ids(prompt)

    # --- the rest ------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The engine's tokenizer, loaded on first use. Raises ModelNotFoundError, UnsupportedModelError."""
        try:
            return Tokenizer.from_directory(self._own_tokenizer or self.info.tokenizer)
        except ModelNotFoundError as error:
            if self.engine is not None:
                raise
            raise ModelNotFoundError(f"{error}: name a directory of this host, connect(..., tokenizer=...)") from None

    @property
    def address(self) -> str:
        """Where other clients can connect."""
        return self._connection.address

    def stats(self) -> EngineStats:
        """The engine's counters now. Raises EngineDeadError when it does not answer."""
        return self._connection.stats()

    def trace_steps(self, count: int, skip: int = 0) -> Future[StepTrace]:
        """Have the engine time its next `count` steps, after `skip` others: when each phase of each step began.

        The result comes when those steps are over. It comes with fewer when the engine runs out of requests since the
        first, or when any client asks again; a count of 0 only ends the trace that runs. Nothing is timed unless asked.

        Raises InvalidRequestError when count or skip is out of range, EngineDeadError.
        """
        return self._connection.trace_steps(count, skip)

    def close(self) -> None:
        """Disconnect, and stop the engine if it is this client's own. Twice is fine."""
        self._finalizer()

    exit = close  # the name that nano-vllm's users know

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


LLM = DistLLM


def _check_connect(address: Any, timeout: Any) -> None:
    if not isinstance(address, str):
        raise EngineConnectError(f"{address!r} is not an engine address: it is a text, ipc://... or tcp://HOST:PORT")
    if not isinstance(timeout, int | float) or not 0 < timeout <= threading.TIMEOUT_MAX:  # not a number is neither
        raise EngineConnectError(f"timeout={timeout!r} is not positive seconds")


def _make_config(model: str, options: dict[str, Any]) -> EngineConfig:
    known = EngineConfig.__struct_fields__
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise ConfigError(f"unknown option {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))
    return EngineConfig(model=model, **options)


def _close(engine: Engine | None, connection: Connection) -> None:
    try:
        connection.close()
    finally:
        if engine is not None:
            engine.stop()
