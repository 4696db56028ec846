"""StepClock: how much processor time of the coordinator each step costs, and how large steps are. Time comes in."""

from __future__ import annotations


class StepClock:
    """Books the time between steps under the number of running requests.

    The clock is the processor time of the whole process: waiting is free, and so is being kept waiting by a worker
    that has the core.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._host: dict[int, tuple[int, float]] = {}
        self.batch_histogram: dict[int, int] = {}

    def step_left(self, now: float, running: int, rows: int) -> None:
        """A step of `rows` rows was sent while `running` requests ran; `now` in seconds."""
        bucket = 1 << max(0, running - 1).bit_length()
        steps, mean = self._host.get(bucket, (0, 0.0))
        self._host[bucket] = (steps + 1, mean + (now - self._since - mean) / (steps + 1))
        self.batch_histogram[rows] = self.batch_histogram.get(rows, 0) + 1
        self._since = now

    def idle(self, now: float) -> None:
        """There are no requests: what was done since the last step served none."""
        self._since = now

    def host_us_per_step(self) -> dict[int, tuple[int, float]]:
        """Running requests, rounded up to a power of two -> (steps, mean microseconds)."""
        return {bucket: (steps, mean * 1e6) for bucket, (steps, mean) in sorted(self._host.items())}
