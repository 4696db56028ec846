"""StepDeadline: whether a step in flight has taken longer than any step may. Pure; time comes in."""

from __future__ import annotations

# The coordinator looks five times a second. A longer gap is one in which it was itself kept from running
_LONGEST_GAP = 1.0


class StepDeadline:
    """Watches the oldest step in flight, look by look; `limit` in seconds, 0 for none."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._step: int | None = None
        self._looked = 0.0
        self._waited = 0.0

    def passed(self, now: float, step: int | None) -> bool:
        """Whether `step`, the oldest in flight now (None: there is none), has been that for `limit` seconds."""
        if step is None or step != self._step:
            self._step, self._waited = step, 0.0
        else:
            self._waited += min(now - self._looked, _LONGEST_GAP)
        self._looked = now
        return 0.0 < self.limit <= self._waited
