"""StepClock: how much of the coordinator's own time each step costs, and how large steps are. Time comes in."""

from __future__ import annotations


class StepClock:
    """Adds up busy time until a step leaves, then books it under the number of running requests. In seconds."""

    def __init__(self) -> None:
        self._busy = 0.0
        self._since = 0.0
        self._host: dict[int, tuple[int, float]] = {}
        self.batch_histogram: dict[int, int] = {}

    def work_begins(self, now: float) -> None:
        """The coordinator stops waiting."""
        self._since = now

    def step_left(self, now: float, running: int, rows: int) -> None:
        """A step of `rows` rows was sent while `running` requests ran: book all work since the last one."""
        bucket = 1 << max(0, running - 1).bit_length()
        steps, mean = self._host.get(bucket, (0, 0.0))
        busy = self._busy + now - self._since
        self._host[bucket] = (steps + 1, mean + (busy - mean) / (steps + 1))
        self.batch_histogram[rows] = self.batch_histogram.get(rows, 0) + 1
        self._busy, self._since = 0.0, now

    def work_ends(self, now: float, requests_left: bool) -> None:
        """The coordinator waits again; work done while there are no requests serves no step."""
        self._busy = self._busy + now - self._since if requests_left else 0.0

    def host_us_per_step(self) -> dict[int, tuple[int, float]]:
        """Running requests, rounded up to a power of two -> (steps, mean microseconds of host time)."""
        return {bucket: (steps, mean * 1e6) for bucket, (steps, mean) in sorted(self._host.items())}
