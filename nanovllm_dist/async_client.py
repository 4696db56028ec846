"""AsyncDistLLM: the asyncio twin of DistLLM: `generate` is awaited, `stream` is an async iterator."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from nanovllm_dist.client import DistLLM
from nanovllm_dist.inputs import Prompt
from nanovllm_dist.outputs import RequestOutput
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.text.tokenizer import Tokenizer
from nanovllm_dist.wire.messages import EngineInfo, EngineStats


class AsyncDistLLM:
    """A client for an event loop. Make one with `start` (an engine of its own) or `connect` (a running one)."""

    def __init__(self, client: DistLLM) -> None:
        self._client = client

    @classmethod
    async def start(cls, model: str, **options: Any) -> Self:
        """Start an engine; options and errors as for DistLLM."""
        return cls(await asyncio.to_thread(DistLLM, model, **options))

    @classmethod
    async def connect(
        cls, address: str, key_file: str | Path | None = None, *, timeout: float = 10.0, tokenizer: str | Path = ""
    ) -> Self:
        """Use a running engine; options and errors as for `DistLLM.connect`."""
        return cls(await asyncio.to_thread(DistLLM.connect, address, key_file, timeout=timeout, tokenizer=tokenizer))

    @property
    def info(self) -> EngineInfo:
        """What engine this is."""
        return self._client.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._client.tokenizer

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """Run one prompt to its end; gather several for a batch. Cancelling the task ends the request.

        Raises InvalidRequestError, QueueFullError, EngineDeadError.
        """
        stream = AsyncStream(self._client, prompt, sampling_params, streaming=False, **options)
        try:
            while True:
                output = await anext(stream)
                if output.finished:
                    return output
        finally:
            stream.abort()

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any) -> AsyncStream:
        """Iterate over what is new as it comes (or the whole so far, with output_kind `cumulative`).

        Letting go of the stream ends the request. Raises as `generate` does.
        """
        return AsyncStream(self._client, prompt, sampling_params, streaming=True, **options)

    async def stats(self) -> EngineStats:
        """The engine's counters now."""
        return await asyncio.to_thread(self._client.stats)

    async def close(self) -> None:
        """Disconnect, and stop the engine if it is this client's own. Twice is fine."""
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncStream:
    """An async iterator over the RequestOutputs of one prompt, whose request is sent on construction."""

    def __init__(
        self,
        client: DistLLM,
        prompt: Prompt,
        params: SamplingParams | None,
        streaming: bool,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[RequestOutput] = asyncio.Queue()

        def deliver(output: RequestOutput) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(news.put_nowait, output)

        self._news = news
        self._generation = client.make_generation(prompt, params, deliver, streaming)
        self._generation.submit(priority, cache_salt)
        self._finished = False

    def abort(self) -> None:
        """End the request if it runs; the iteration still yields its last output."""
        if not self._finished:
            self._generation.abort()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._finished:
            raise StopAsyncIteration
        output = await self._news.get()
        self._finished = output.finished
        if output.error is not None:
            raise output.error
        return output

    def __del__(self) -> None:
        if not getattr(self, "_finished", True):
            self._generation.abort()
