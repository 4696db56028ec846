"""RunningStep: a step that the device may still be busy with, and when it got it. It knows nothing of models."""

from __future__ import annotations

from nanovllm_dist.wire.messages import Step, StepResult, TokenLogprobs, pack_ints
from nanovllm_dist.workers.transfers import HostCopy


class RunningStep:
    """`launched`: when the device had its work, in seconds of the monotonic clock; `traced`: whether anyone asks."""

    def __init__(
        self,
        step: Step,
        launched: float,
        copy: HostCopy,
        logprobs: list[tuple[int, TokenLogprobs]],
        prompt: list[tuple[int, int, list[TokenLogprobs]]],
    ) -> None:
        self.number = step.step
        self.traced = step.traced
        self.launched = launched
        self._epoch = step.epoch
        self._copy = copy
        self._logprobs = logprobs
        self._prompt = prompt

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self._copy.done()

    def result(self) -> StepResult:
        """Waits for the device."""
        return StepResult(
            epoch=self._epoch,
            step=self.number,
            tokens=pack_ints(self._copy.tokens()),
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt,
        )
