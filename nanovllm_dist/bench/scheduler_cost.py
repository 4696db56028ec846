"""What a step of the pure scheduler costs, by running requests and by the length of the queue.

The one file of the benchmark that looks inside: it builds a Scheduler, makes up the workers' tokens, and times
`schedule` and `commit`. No process, no tensor, no socket takes part.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from nanovllm_dist.bench.distribution import median, percentile
from nanovllm_dist.bench.environment import Environment, describe_environment
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.scheduler.plan import StepPlan
from nanovllm_dist.scheduler.request import Request
from nanovllm_dist.scheduler.scheduler import Scheduler

RUNNING = tuple(2**power for power in range(11))
QUEUED = (1, 10, 100, 1_000, 10_000, 100_000)
RUNNING_BESIDE_A_QUEUE = 64
_BLOCK_SIZE, _BUDGET, _VOCAB = 16, 8192, 151_936
_PROMPT, _ANSWER = 32, 64
_STEPS_IN_FLIGHT = 2


class StepCost(msgspec.Struct, frozen=True):
    """Microseconds of a step with `running` requests and `queued` waiting: medians, and the 99th percentile.

    `submit`: median of adding one request to the queue, where there is one.
    """

    running: int
    queued: int
    schedule: float
    commit: float
    step: float
    step_p99: float
    submit: float | None


class SchedulerReport(msgspec.Struct, frozen=True, tag_field="benchmark", tag="scheduler"):
    """Costs by running requests, all decoding and none waiting; and by the length of the queue, where in each step one
    of 64 running requests ends, one is admitted and one is submitted."""

    environment: Environment
    steps: int
    by_running: list[StepCost]
    by_queue: list[StepCost]

    @property
    def queue_growth(self) -> float:
        """The cost of a step with the longest queue over that with the shortest."""
        return self.by_queue[-1].step / self.by_queue[0].step


def measure_scheduler(
    notify: Callable[[str], None],
    steps: int = 500,
    running: Sequence[int] = RUNNING,
    queued: Sequence[int] = QUEUED,
) -> SchedulerReport:
    """Time `steps` steps of every point. `notify` hears of both series. Raises ConfigError: no steps."""
    if steps < 1:
        raise ConfigError(f"--steps {steps} is not at least 1")
    environment = describe_environment()
    notify(f"{len(running)} numbers of running requests, {steps} steps each")
    by_running = [_Simulation(count, 0, steps).measure(steps) for count in running]
    notify(f"{len(queued)} lengths of the queue, {steps} steps each")
    by_queue = [_Simulation(RUNNING_BESIDE_A_QUEUE, count, steps).measure(steps) for count in queued]
    return SchedulerReport(environment, steps, by_running, by_queue)


class _Simulation:
    """A scheduler in a steady state, with steps in flight as on a device."""

    def __init__(self, running: int, queued: int, steps: int) -> None:
        self._running, self._queued = running, queued
        warm_up = _STEPS_IN_FLIGHT + _ANSWER + running * (_PROMPT + _BLOCK_SIZE) // _BUDGET
        longest = _PROMPT + _BLOCK_SIZE + (_ANSWER if queued else steps + warm_up + 1)
        self._scheduler = Scheduler(
            EngineConfig(
                model="none",
                block_size=_BLOCK_SIZE,
                max_num_seqs=running,
                max_num_batched_tokens=_BUDGET,
                prefill_chunk_size=_BUDGET,
                max_model_len=longest,
                max_num_queued_reqs=running + queued + 1,
                max_steps_in_flight=_STEPS_IN_FLIGHT,
            ),
            # a full table for each, and as much again: a step in flight keeps nothing waiting for blocks
            num_blocks=2 * running * -(-longest // _BLOCK_SIZE) + 2,
            vocab_size=_VOCAB,
            eos_token_ids=(),
        )
        self._in_flight: deque[StepPlan] = deque()
        self._next = 0
        for index in range(running):  # with a queue, one of them ends in every step
            self._submit(1 + index % _ANSWER if queued else longest)
        for _ in range(queued):
            self._submit(_ANSWER)
        for _ in range(warm_up):
            self._step()

    def measure(self, steps: int) -> StepCost:
        """Time `steps` steps."""
        timed = [self._step() for _ in range(steps)]
        schedule, commit, submit = ([step[part] / 1e3 for step in timed] for part in range(3))
        whole = sorted(map(sum, zip(schedule, commit, strict=True)))
        return StepCost(
            running=self._running,
            queued=self._queued,
            schedule=median(schedule),
            commit=median(commit),
            step=percentile(whole, 0.5),
            step_p99=percentile(whole, 0.99),
            submit=median(submit) if self._queued else None,
        )

    def _step(self) -> tuple[int, int, int]:
        """Plan a step, commit the one before it; nanoseconds of planning, committing and submitting."""
        clock, scheduler = time.perf_counter_ns, self._scheduler
        began = clock()
        plan = scheduler.schedule(0.0)
        planned = clock() - began
        if plan is not None:
            self._in_flight.append(plan)
        committed = submitted = 0
        if len(self._in_flight) == _STEPS_IN_FLIGHT:
            oldest = self._in_flight.popleft()
            tokens = [1] * sum(row.samples for row in oldest.rows)
            began = clock()
            scheduler.commit(tokens, 0.0)
            committed = clock() - began
        while scheduler.num_waiting < self._queued:
            began = clock()
            self._submit(_ANSWER)
            submitted += clock() - began
        return planned, committed, submitted

    def _submit(self, answer: int) -> None:
        """A request whose prompt no other has, so that the prefix cache finds nothing; not all grow in one step."""
        self._next += 1
        self._scheduler.add(
            Request(
                key=(b"client", self._next),
                tokens=array("i", (self._next % _VOCAB,)) * (_PROMPT + self._next % _BLOCK_SIZE),
                params=SamplingParams(max_tokens=answer, ignore_eos=True, detokenize=False),
                seed=0,
                arrival=0.0,
            )
        )
