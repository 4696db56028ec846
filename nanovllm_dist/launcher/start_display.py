"""Shows how an engine starts: a live line on a terminal, plain lines elsewhere, always on standard error."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as LiveProgress

from nanovllm_dist.launcher.engine import Progress

_WORDS = {
    "resolve": "looking for the model",
    "cluster": "starting the cluster",
    "start": "starting processes",
    "connect": "connecting ranks",
    "load": "loading weights",
    "profile": "measuring memory",
    "warmup": "warming up",
    "ready": "ready",
}


class StartDisplay:
    """A context manager that is the `progress` callback of `Engine.start`."""

    def __init__(self) -> None:
        self._live: LiveProgress | None = None
        self._task: TaskID | None = None
        self._phase = ""

    def __enter__(self) -> StartDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Show where start-up is."""
        words = _WORDS.get(progress.phase, progress.phase)
        if not sys.stderr.isatty():
            if progress.phase not in (self._phase, "ready"):
                print(f"nanovllm: {words}", file=sys.stderr, flush=True)  # noqa: T201
        elif progress.phase != "resolve":  # fetching a model shows bars of its own
            self._show(words, progress)
        self._phase = progress.phase

    def _show(self, words: str, progress: Progress) -> None:
        if self._live is None or self._task is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
            self._live = LiveProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._live.add_task(words, total=None)
            self._live.start()
        self._live.update(self._task, description=words, completed=progress.done, total=progress.total or None)
