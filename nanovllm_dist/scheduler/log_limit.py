"""LogLimit: how often what others can provoke may write a line. Pure; time comes in, and lines are the caller's."""

from __future__ import annotations


class LogLimit:
    """`burst` lines at once, then one each `seconds`, until it has been quiet for as long as that."""

    def __init__(self, burst: int, seconds: float) -> None:
        self._burst, self._seconds = burst, seconds
        self._written = self._left_out = 0
        self._asked = self._wrote = float("-inf")

    def take(self, now: float) -> int | None:
        """None: write nothing now. Else write a line, which may say how many were left out since the last one."""
        if now - self._asked >= self._seconds:
            self._written = 0
        self._asked = now
        if self._written >= self._burst and now - self._wrote < self._seconds:
            self._left_out += 1
            return None
        self._written, self._wrote = self._written + 1, now
        left_out, self._left_out = self._left_out, 0
        return left_out
