"""StepTrace: the times of a window of steps, gathered for the client that asked. Pure: time comes in."""

from __future__ import annotations

from nanovllm_dist.scheduler.plan import StepPlan
from nanovllm_dist.wire.messages import RankTimes, StepTimes
from nanovllm_dist.wire.messages import StepTrace as StepTraceMessage


class StepTrace:
    """Times of `count` steps for `client`, after `skip` others, on `ranks` ranks."""

    def __init__(self, client: bytes, count: int, skip: int, ranks: int) -> None:
        self.client = client
        self._left = count
        self._skip = skip
        self._in_flight: dict[int, tuple[StepPlan, float, float]] = {}
        self._committed: list[tuple[int, float, float]] = []
        self._steps: dict[int, StepTimes] = {}
        self._ranks: list[dict[int, RankTimes]] = [{} for _ in range(ranks)]
        self._asked = False

    def takes_next(self) -> bool:
        """Whether the step that leaves now belongs to the window. Ask once for each step."""
        if self._skip:
            self._skip -= 1
            return False
        return self._left > 0

    def sent(self, plan: StepPlan, planned: float, sent: float) -> None:
        """A step of the window has left."""
        self._left -= 1
        self._in_flight[plan.step] = (plan, planned, sent)

    def committed(self, step: int, answered: float, committed: float) -> None:
        """A step has come back; others than those of the window are passed over."""
        if step in self._in_flight:
            self._committed.append((step, answered, committed))

    def delivered(self, began: float, ended: float) -> None:
        """The outputs of all steps that have come back are on their way."""
        for step, answered, committed in self._committed:
            plan, planned, sent = self._in_flight.pop(step)
            self._steps[step] = StepTimes(
                step, len(plan.rows), plan.num_tokens, planned, sent, answered, committed, began, ended
            )
        self._committed.clear()

    def on_rank(self, rank: int, times: list[RankTimes]) -> None:
        """What a rank has kept; times of steps that are not of the window are dropped."""
        ours = (one for one in times if one.step in self._steps or one.step in self._in_flight)
        self._ranks[rank].update((one.step, one) for one in ours)

    def idle(self) -> None:
        """There are no requests: a window that has begun is over."""
        if self._steps or self._in_flight:
            self._left = 0

    def must_ask_ranks(self) -> bool:
        """True once: when all steps are back, and only the ranks' times are missing."""
        asks = self._over and not self._asked
        self._asked = self._asked or asks
        return asks

    @property
    def complete(self) -> bool:
        """Whether nothing more is to come."""
        return self._over and all(len(times) == len(self._steps) for times in self._ranks)

    def to_message(self) -> StepTraceMessage:
        """What there is, in the order of the steps."""
        ranks = [[times[step] for step in self._steps if step in times] for times in self._ranks]
        return StepTraceMessage(list(self._steps.values()), ranks)

    @property
    def _over(self) -> bool:
        return self._left == 0 and not self._in_flight
