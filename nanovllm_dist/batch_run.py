"""BatchRun: the prompts of one `generate`, sent within the engine's queue bound and collected in order.

It knows generations and their ends; how a prompt became tokens, and who shares the engine, it does not.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence

from nanovllm_dist.errors import NanoVLLMError, QueueFullError
from nanovllm_dist.generation import Generation
from nanovllm_dist.outputs import RequestOutput
from nanovllm_dist.progress import TokenProgress

OnOutput = Callable[[int, RequestOutput], None]
_RETRY_SECONDS = 0.1


class BatchRun:
    """One batch. `max_queued`: answers that the engine's queue holds; `return_errors`: an error is an output too;
    `on_output`: is told each prompt's index and output when it has ended."""

    def __init__(
        self, max_queued: int, return_errors: bool, progress: TokenProgress, on_output: OnOutput | None = None
    ) -> None:
        self._max_queued, self._return_errors, self._progress = max_queued, return_errors, progress
        self._on_output = on_output
        self._done: queue.SimpleQueue[tuple[int, RequestOutput]] = queue.SimpleQueue()
        self._waiting: deque[tuple[int, Generation]] = deque()
        self._outputs: dict[int, RequestOutput] = {}
        self._outstanding = 0
        self._not_before = 0.0

    def listener(self, index: int) -> Callable[[RequestOutput], None]:
        """What the generation of prompt `index` is to tell its outputs; only the finished one counts."""

        def deliver(output: RequestOutput) -> None:
            if output.finished:
                self._done.put((index, output))

        return deliver

    def run(
        self, generations: Sequence[Generation | RequestOutput], priority: int, cache_salt: str
    ) -> list[RequestOutput]:
        """Submit and collect until all have ended; what is an output already stays as it is.

        Raises the error of a prompt, unless it is to be returned.
        """
        for index, one in enumerate(generations):
            if isinstance(one, RequestOutput):
                self._ended(index, one)
            else:
                self._waiting.append((index, one))
        while self._waiting or self._outstanding:
            self._submit(priority, cache_salt)
            if self._waiting or self._outstanding:
                self._collect(generations)
        return [self._outputs[index] for index in range(len(generations))]

    def _submit(self, priority: int, cache_salt: str) -> None:
        window = max(1, self._max_queued // 2)
        while self._waiting and time.monotonic() >= self._not_before:
            index, one = self._waiting[0]
            if self._outstanding and self._outstanding + one.params.n > window:
                return
            self._waiting.popleft()
            try:
                one.submit(priority, cache_salt)
            except NanoVLLMError as error:  # it is too large, say, or the engine died while this one waited
                self._ended(index, RequestOutput.refused(one.prompt, one.prompt_ids, error))
            else:
                self._outstanding += one.params.n

    def _collect(self, generations: Sequence[Generation | RequestOutput]) -> None:
        try:
            index, output = self._done.get(timeout=_RETRY_SECONDS if self._waiting else None)
        except queue.Empty:
            return
        one = generations[index]
        self._outstanding -= len(output.outputs)
        fits = len(output.outputs) <= self._max_queued
        if isinstance(output.error, QueueFullError) and isinstance(one, Generation) and fits:
            self._waiting.append((index, one))  # other clients fill the queue: wait for room
            self._not_before = time.monotonic() + _RETRY_SECONDS
        else:
            self._ended(index, output)

    def _ended(self, index: int, output: RequestOutput) -> None:
        if output.error is not None and not self._return_errors:
            raise at_prompt(index, output.error) from None
        self._outputs[index] = output
        self._progress.finished(output)
        if self._on_output is not None:
            self._on_output(index, output)


def at_prompt(index: int, error: NanoVLLMError) -> NanoVLLMError:
    """The same error, which says which prompt of a batch it is about."""
    return type(error)(f"prompt {index}: {error}")
