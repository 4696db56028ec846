"""TokenProgress: the bar that `generate` shows, prompts done and tokens per second."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm
from typing_extensions import Self

from nanovllm_dist.outputs import RequestOutput


class TokenProgress:
    """Counts finished prompts on a bar; silent when not `enabled`."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._bar = tqdm(total=total, disable=not enabled, unit="prompt", desc="Generating", dynamic_ncols=True)
        self._tokens = 0
        self._started = time.monotonic()

    def finished(self, output: RequestOutput) -> None:
        """One prompt has ended."""
        self._tokens += sum(len(answer.token_ids) for answer in output.outputs)
        rate = self._tokens / max(1e-9, time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
        self._bar.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
