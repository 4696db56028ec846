"""MemoryWatch: the peak of resident memory of groups of processes, sampled.

A group is every process that inherited a mark in its environment, detached ones included. Pages that processes share
count once for each. It knows nothing of what they do.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil
from typing_extensions import Self

MARK = "NANOVLLM_BENCH_GROUP"
_SAMPLE_SECONDS = 0.25


class MemoryWatch:
    """A context manager whose thread samples; `peak` may be asked at any time."""

    def __init__(self) -> None:
        self._groups: dict[int, str] = {}  # of every process seen so far, "" for those without a mark
        self._left_out: set[int] = set()
        self._peaks: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def leave_out(self, pid: int) -> None:
        """Do not count this process, which only drives others of its group."""
        self._left_out.add(pid)

    def peak(self, group: str) -> int:
        """The largest sum of resident bytes of that group so far; 0 if none of it was seen."""
        return self._peaks.get(group, 0)

    def sample(self) -> None:
        """Look once."""
        sums: dict[str, int] = {}
        alive = psutil.pids()
        for pid in alive:
            group = self._group(pid)
            if group and pid not in self._left_out:
                sums[group] = sums.get(group, 0) + _resident(pid)
        for group, size in sums.items():
            self._peaks[group] = max(self._peaks.get(group, 0), size)
        self._groups = {pid: self._groups[pid] for pid in alive if pid in self._groups}

    def _group(self, pid: int) -> str:
        if pid not in self._groups:
            try:
                group = psutil.Process(pid).environ().get(MARK, "")
            except (psutil.Error, OSError):
                return ""  # gone, or another user's: it may be readable later
            if not group and _is_new(pid):
                return ""  # between fork and exec it still has its parent's environment, or none
            self._groups[pid] = group
        return self._groups[pid]

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.sample()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _is_new(pid: int) -> bool:
    try:
        return time.time() - psutil.Process(pid).create_time() < 1.0
    except psutil.Error:
        return True
