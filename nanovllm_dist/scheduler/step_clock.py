"""StepClock: what each step costs the coordinator, and how large steps are. Time comes in."""

from __future__ import annotations


class StepClock:
    """Books two times of each step under the number of running requests.

    Processor time of the whole process between steps: waiting is free, and so is being kept waiting by a worker
    that has the core. And the wall time of an answer, from a step's result to the departure of the next step, which
    is what a device without a second step in flight waits for.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._bucket = 1
        self._host: dict[int, tuple[int, float]] = {}
        self._answers: dict[int, tuple[int, float]] = {}
        self.batch_histogram: dict[int, int] = {}

    def step_left(self, now: float, running: int, rows: int) -> None:
        """A step of `rows` rows was sent while `running` requests ran; `now` is processor time in seconds."""
        self._bucket = 1 << max(0, running - 1).bit_length()
        _book(self._host, self._bucket, now - self._since)
        self.batch_histogram[rows] = self.batch_histogram.get(rows, 0) + 1
        self._since = now

    def answered(self, seconds: float) -> None:
        """From the arrival of a result until the steps that it allowed had left."""
        _book(self._answers, self._bucket, seconds)

    def idle(self, now: float) -> None:
        """There are no requests: what was done since the last step served none."""
        self._since = now

    def host_us_per_step(self) -> dict[int, tuple[int, float]]:
        """Running requests, rounded up to a power of two -> (steps, mean microseconds of processor time)."""
        return _microseconds(self._host)

    def answer_us_per_step(self) -> dict[int, tuple[int, float]]:
        """Running requests, rounded up to a power of two -> (answers, mean microseconds of wall time)."""
        return _microseconds(self._answers)


def _book(means: dict[int, tuple[int, float]], bucket: int, seconds: float) -> None:
    count, mean = means.get(bucket, (0, 0.0))
    means[bucket] = (count + 1, mean + (seconds - mean) / (count + 1))


def _microseconds(means: dict[int, tuple[int, float]]) -> dict[int, tuple[int, float]]:
    return {bucket: (count, mean * 1e6) for bucket, (count, mean) in sorted(means.items())}
