"""AsyncDistLLM: the asyncio twin of DistLLM: `generate` is awaited, `stream` is an async iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from nanovllm_dist.client import DistLLM, Prompt, encode_prompt
from nanovllm_dist.generation import Generation
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
    async def connect(cls, address: str, key_file: str | Path | None = None, *, timeout: float = 10.0) -> Self:
        """Use a running engine. Raises EngineConnectError."""
        return cls(await asyncio.to_thread(DistLLM.connect, address, key_file, timeout=timeout))

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
        """Run one prompt to its end; gather several for a batch. Cancelling the task ends the request."""
        params = sampling_params or SamplingParams()
        last: RequestOutput | None = None
        async for output in self._outputs(prompt, params, streaming=False, **options):
            last = output
        if last is None:
            raise AssertionError("a generation ended without an output")
        return last

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """Yield what is new as it comes. Leaving the loop early ends the request."""
        return self._outputs(prompt, sampling_params or SamplingParams(), streaming=True, **options)

    async def _outputs(
        self, prompt: Prompt, params: SamplingParams, streaming: bool, priority: int = 0, cache_salt: str = ""
    ) -> AsyncIterator[RequestOutput]:
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[RequestOutput] = asyncio.Queue()
        text, ids = encode_prompt(self._client, prompt)
        tokenizer = self.tokenizer if params.detokenize or params.bad_words else None

        def deliver(output: RequestOutput) -> None:
            loop.call_soon_threadsafe(news.put_nowait, output)

        generation = Generation(self._client._connection, tokenizer, text, ids, params, deliver, streaming)
        generation.submit(priority, cache_salt)
        try:
            while True:
                output = await news.get()
                if output.error is not None:
                    raise output.error
                yield output
                if output.finished:
                    return
        finally:
            if not generation.finished:
                generation.abort()

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
